"""Shares as directories of this host: the kernel's mounts, the operator's, and kvmhv's own FUSE mount of SMB.

Options are those that are right for running VMs: what a guest has flushed is on the server, nothing is cached on one
host that another one changes, and I/O waits for a server that is away instead of failing.
"""

import asyncio
import errno
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from kvmhv.config import Waits
from kvmhv.drivers.storage.qemu_img import end_by_force
from kvmhv.errors import HostError
from kvmhv.model import LocationKind, LocationSpec

POLL_S = 0.1
SMB_PORT = 445
SHARED_TYPES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "ceph", "gfs2", "ocfs2", "glusterfs", "fuse.glusterfs", "beegfs", "gpfs", "afs"}
)
"""File systems that several hosts see (libvirt's list, as /proc/self/mountinfo calls them)."""
FUSE_TYPE = "fuse.kvmhv-smb"
KERNEL_TYPES = {LocationKind.NFS: "nfs4", LocationKind.SMB: "cifs"}


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo."""

    mounted_on: Path
    type: str
    source: str
    options: frozenset[str]


def parse(mountinfo: str, directory: Path) -> Mount | None:
    """Return the mount that a directory is on."""
    best: Mount | None = None
    for line in mountinfo.splitlines():
        left, separator, right = line.partition(" - ")
        if not separator:
            continue
        fields, (kind, source, *options) = left.split(), right.split()
        mounted_on = Path(fields[4].encode().decode("unicode_escape"))
        nearer = best is None or len(mounted_on.parts) >= len(best.mounted_on.parts)
        if nearer and directory.is_relative_to(mounted_on):
            words = {word for text in (fields[5], *options) for word in text.split(",")}
            best = Mount(mounted_on, kind, source, frozenset(words))
    return best


def mount_of(directory: Path) -> Mount | None:
    """Return the mount that a directory is on, without touching the directory (its server may be away)."""
    return parse(Path("/proc/self/mountinfo").read_text(), directory)


def unsafe_options(mount: Mount) -> tuple[str, ...]:
    """Say what about a mount's options makes it unsafe to run a VM on it that moves to another host."""
    found = []
    options = mount.options
    if "ro" in options:
        found.append("it is mounted read-only")
    if mount.type in ("cifs", "smb3"):
        if "cache=none" not in options:
            found.append("cifs caches on this host (cache=none is missing): another host may read what is old")
        if "nobrl" not in options:
            found.append("cifs passes byte-range locks on (nobrl is missing): a guest's writes to sector 0 would fail")
        if "soft" in options:
            found.append("cifs gives up when the server is away (soft)")
    if mount.type in ("nfs", "nfs4"):
        if "soft" in options or "softerr" in options:
            found.append("NFS gives up when the server is away (soft): acknowledged writes may be lost")
        if "nolock" in options:
            found.append("NFS locks are local (nolock): QEMU's image locks do not reach the other host")
    return tuple(found)


def kernel_mount(spec: LocationSpec, mountpoint: Path, credentials: Path) -> list[str]:
    """Return the command that mounts a share with the kernel's client; no secret is in it."""
    server, port = split_server(spec.server)
    if spec.kind is LocationKind.NFS:
        options = ["vers=4.2", "hard", "proto=tcp", *([f"port={port}"] if port else [])]
        return ["mount", "-t", "nfs", "-o", ",".join(options), f"{server}:{spec.share}", str(mountpoint)]
    options = ["vers=3.1.1", "seal", "cache=none", "nobrl", "hard", "mfsymlinks", f"credentials={credentials}"]
    options += [f"port={port}"] if port else []
    return ["mount", "-t", "cifs", "-o", ",".join(options), f"//{server}/{spec.share}", str(mountpoint)]


def split_server(text: str) -> tuple[str, int | None]:
    """Split `host`, `host:port` or `[v6]:port`."""
    match = re.fullmatch(r"\[([0-9a-fA-F:.]+)\](?::(\d{1,5}))?|([^:\s/]+)(?::(\d{1,5}))?", text)
    if match is None:
        raise ValueError(f"{text!r} is neither a host nor host:port")
    port = match[2] or match[4]
    return match[1] or match[3], int(port) if port else None


def kernel_can(kind: LocationKind) -> bool:
    """Whether this host's kernel has the client (or a module of it) and the program that mounts it."""
    helper = {LocationKind.NFS: "mount.nfs", LocationKind.SMB: "mount.cifs"}[kind]
    if not any((Path(directory) / helper).exists() for directory in ("/sbin", "/usr/sbin")):
        return False
    known = Path("/proc/filesystems").read_text().split()
    modules = Path("/lib/modules") / os.uname().release / "kernel/fs"
    places = {LocationKind.NFS: ("nfs",), LocationKind.SMB: ("smb/client", "cifs")}[kind]
    return KERNEL_TYPES[kind] in known or any((modules / place).is_dir() for place in places)


async def mount_with_kernel(spec: LocationSpec, mountpoint: Path, credentials: Path, waits: Waits) -> None:
    """Mount a share. Raises HostError `location-unreachable` with mount's own words."""
    _make_directory(mountpoint)
    process = await asyncio.create_subprocess_exec(
        *kernel_mount(spec, mountpoint, credentials),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(waits.mount_s):
            _, said = await process.communicate()
    except TimeoutError:
        await end_by_force(process)
        raise _unreachable(spec, f"mount took longer than {waits.mount_s:g} s") from None
    if process.returncode:
        raise _unreachable(spec, said.decode(errors="replace").strip()[-400:])


async def mount_in_user_space(
    spec: LocationSpec, mountpoint: Path, secret_file: Path, run_path: Path, waits: Waits
) -> None:
    """Serve an SMB share by smb_mount.py, in a process that outlives the agent. Raises HostError as above."""
    _make_directory(mountpoint)
    server, port = split_server(spec.server)
    described = {
        "server": server,
        "port": port or SMB_PORT,
        "share": spec.share,
        "user": spec.user,
        "secret_file": str(secret_file),
        "mountpoint": str(mountpoint),
        "connect_s": waits.share_command_s,
        "silence_s": waits.smb_silence_s,
        "patience_s": waits.smb_patience_s,
    }
    file, log = run_path / f"{spec.name}.json", run_path / f"{spec.name}.log"
    file.write_bytes(msgspec.json.encode(described))
    process = _serve(file, log)
    for _ in range(math.ceil(waits.mount_s / POLL_S)):
        if is_mounted(mountpoint):
            return
        if process.poll() is not None:
            break
        await asyncio.sleep(POLL_S)
    else:
        process.send_signal(signal.SIGKILL)
        process.wait()
    said = log.read_text(errors="replace").strip().rpartition("\n")[2].partition(": ")[2]
    raise _unreachable(spec, said[-400:] or "the mount does not come up")


def _make_directory(mountpoint: Path) -> None:
    mountpoint.mkdir(parents=True, exist_ok=True, mode=0o700)


def _serve(file: Path, log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "kvmhv.drivers.storage.smb_mount", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "FUSE_LIBRARY_PATH": _fuse_library()},
            start_new_session=True,
        )


def is_mounted(mountpoint: Path) -> bool:
    """Whether something is mounted on exactly this directory."""
    found = mount_of(mountpoint)
    return found is not None and found.mounted_on == mountpoint


def is_dead(mountpoint: Path) -> bool:
    """Whether the program that served this mount has ended. Blocks while the mount's server is away."""
    try:
        mountpoint.stat()
    except OSError as error:
        return error.errno == errno.ENOTCONN
    return False


async def unmount(mountpoint: Path, timeout_s: float, *, lazily: bool = False) -> None:
    """Unmount what kvmhv has mounted; no error if nothing is. Raises HostError `location-busy`.

    `lazily`: also if files of it are open, which lead nowhere then.
    """
    if not is_mounted(mountpoint):
        return
    command = ["umount", *(["--lazy"] if lazily else []), str(mountpoint)]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(timeout_s):
            _, said = await process.communicate()
    except TimeoutError:
        await end_by_force(process)
        said = b"umount hangs: is the server away?"
    if is_mounted(mountpoint):
        text = f"{mountpoint} cannot be unmounted: {said.decode(errors='replace').strip()}"
        raise HostError("location-busy", text, "stop what uses it, then try again")


def _fuse_library() -> str:
    for name in ("libfuse3.so.4", "libfuse3.so.3"):
        for directory in Path("/usr/lib").glob("*-linux-gnu*"):
            if (directory / name).exists():
                return str(directory / name)
    raise HostError("fuse-missing", "there is no libfuse3 on this host", "install fuse3, or mount the share yourself")


def _unreachable(spec: LocationSpec, said: str) -> HostError:
    where = f"//{spec.server}/{spec.share}" if spec.kind is LocationKind.SMB else f"{spec.server}:{spec.share}"
    return HostError(
        "location-unreachable",
        f"location {spec.name}: {where} cannot be used: {said}",
        "check server, share, user and password, and that the server allows this host",
    )
