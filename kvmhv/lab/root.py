"""The first stage of a host: makes its mounts, moves into its root and becomes PID 1 (init.py).

Runs as `python -I root.py SPEC.json` inside fresh namespaces, with the machine's Python and nothing else of ours: the
standard library only. SPEC: tree, directory (of the host's disk contents), run_dir, package, hostname, files (written
at each boot), files_of_first_boot (from then on they are the operator's).
Whatever fails ends the process with a sentence on standard error, and the kernel takes the namespaces down with it.
"""

import ctypes
import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Any

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 16384, 1 << 18
MNT_DETACH = 2
PLAIN = MS_NOSUID | MS_NODEV | MS_NOEXEC
INIT = "/opt/kvmhv/src/kvmhv/lab/init.py"
CHARACTER_DEVICES = {
    "null": (1, 3),
    "zero": (1, 5),
    "full": (1, 7),
    "random": (1, 8),
    "urandom": (1, 9),
    "tty": (5, 0),
    "net/tun": (10, 200),
    "fuse": (10, 229),
}
DEVICE_LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2), with the failure as a sentence."""
    result = _libc.mount(
        source.encode(), os.fsencode(target), kind.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    )
    if result:
        error = os.strerror(ctypes.get_errno())
        sys.exit(f"cannot mount {kind or source} on {target}: {error} (options {data or 'none'})")


def bind(source: str, target: Path, *, read_only: bool = False) -> None:
    """Show the directory `source` at `target` too."""
    target.mkdir(parents=True, exist_ok=True)
    mount(source, target, flags=MS_BIND)
    if read_only:
        mount(source, target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def make_devices(dev: Path) -> None:
    """Make the devices that QEMU and a shell need, and private terminals and shared memory."""
    mount("dev", dev, "tmpfs", MS_NOSUID, "mode=755,size=64k,nr_inodes=256")
    devices = dict(CHARACTER_DEVICES)
    try:
        number = Path("/dev/kvm").stat().st_rdev
        devices["kvm"] = (os.major(number), os.minor(number))
    except FileNotFoundError:
        pass  # a machine without virtualisation: QEMU emulates
    for name, (major, minor) in devices.items():
        path = dev / name
        path.parent.mkdir(exist_ok=True)
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))
        path.chmod(0o666)
    for name, target in DEVICE_LINKS.items():
        (dev / name).symlink_to(target)
    for name, kind, data in (("pts", "devpts", "newinstance,ptmxmode=0666,mode=620,gid=5"), ("shm", "tmpfs", "")):
        (dev / name).mkdir()
        mount(kind, dev / name, kind, MS_NOSUID | MS_NODEV, data)


def make_root(spec: dict[str, Any]) -> Path:
    """Mount the host's root from its tree and its own disk contents, and everything in it."""
    directory = Path(spec["directory"])
    for name in ("upper", "work", "data", "root"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    root = directory / "root"
    options = f"lowerdir={spec['tree']},upperdir={directory}/upper,workdir={directory}/work"
    mount("overlay", root, "overlay", 0, options)
    mount("proc", root / "proc", "proc", PLAIN)
    mount("sysfs", root / "sys", "sysfs", PLAIN)
    make_devices(root / "dev")
    mount("run", root / "run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    bind(spec["run_dir"], root / "run/kvmhv")
    bind(spec["package"], root / "opt/kvmhv/src/kvmhv", read_only=True)
    # Disks of VMs stand on the machine's own file system: O_DIRECT and the full speed, no copy-up.
    bind(f"{directory}/data", root / "var/lib/kvmhv")
    return root


def write_files(root: Path, files: dict[str, str]) -> None:
    """Write the host's own files into its root."""
    for name, text in files.items():
        path = root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_text(text)


def enter(root: Path) -> None:
    """Make `root` the root of this mount namespace and let go of the machine's mounts."""
    os.chdir(root)
    if _libc.pivot_root(b".", b".") or _libc.umount2(b".", MNT_DETACH):
        sys.exit(f"cannot move into {root}: {os.strerror(ctypes.get_errno())}")
    os.chdir("/")


def main() -> None:
    """Make the host and become its PID 1."""
    os.umask(0o022)
    spec = json.loads(Path(sys.argv[1]).read_text())
    mount("none", Path("/"), flags=MS_REC | MS_PRIVATE)
    socket.sethostname(spec["hostname"])
    root = make_root(spec)
    write_files(root, spec["files"])
    first = spec["files_of_first_boot"]
    write_files(root, {name: first[name] for name in first if not (root / name.lstrip("/")).exists()})
    enter(root)
    environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": "/root", "LANG": "C.UTF-8"}
    os.execve("/usr/bin/python3", ["kvmhv-lab-init", "-I", "-S", INIT], environment)  # noqa: S606  (no shell is meant)


if __name__ == "__main__":
    main()
