"""Shares mounted by kvmhv's own code with cifs and nfs of Linux, in a guest with Debian's kernel, from real servers."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmhv.lab.guest_images import CACHE, ensure_guest_images
from kvmhv.lab.lab import Lab
from kvmhv.lab.storage_host import USER, StorageHost
from tests.real.conftest import lab_name

pytestmark = [pytest.mark.real, pytest.mark.timeout(420, func_only=True)]

ROOT = Path(__file__).resolve().parents[2]
BLOCK = 4096
AWAY_S = 30.0
SECTOR = 512
MACHINE = ["-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "512", "-nodefaults", "-display", "none"]
APPEND = "console=ttyS0 quiet loglevel=4 no_timer_check mitigations=off panic=-1"


@pytest.fixture(scope="module")
def lab_with_servers(_lab_ground: None) -> Iterator[Lab]:
    made = Lab.up(lab_name("kernel"), storage=True, agents=False, progress=print)
    try:
        yield made
    finally:
        made.down()
    assert made.leftovers() == []


def archive(directory: Path, server: StorageHost) -> Path:
    """kvmhv, the guest's program and what it is told, as the guest's second disk."""
    file = directory / "program.tar"
    told = json.dumps({"server": server.address, "user": USER, "secret": server.secret}).encode()
    with tarfile.open(file, "w") as tar:
        for source in sorted((ROOT / "kvmhv").rglob("*.py")):
            tar.add(source, str(source.relative_to(ROOT)))
        tar.add(ROOT / "tests/real/kernel_client.py", "main.py")
        entry = tarfile.TarInfo("told.json")
        entry.size = len(told)
        tar.addfile(entry, io.BytesIO(told))
    os.truncate(file, -(-file.stat().st_size // SECTOR) * SECTOR)
    return file


def guest(lab: Lab, files: list[Path]) -> Iterator[dict[str, Any]]:
    """Boot it on host1, whose address it shares; yields what it says. It has ended when this does."""
    opened = [os.open(file, os.O_RDONLY) for file in files]
    kernel, initrd, *disks = [f"/proc/self/fd/{number}" for number in opened]
    command = ["qemu-system-x86_64", *MACHINE, "-kernel", kernel, "-initrd", initrd, "-append", APPEND]
    for disk in disks:
        command += ["-drive", f"if=virtio,file={disk},format=raw,readonly=on"]
    command += ["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=", "-serial", "stdio"]
    process = subprocess.Popen(
        lab.host("host1").argv([*command, "-no-reboot"]),
        pass_fds=opened,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
    )
    for number in opened:
        os.close(number)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            sys.stdout.write(line.decode(errors="replace"))  # shown when the test fails
            if line.startswith(b"{"):
                yield json.loads(line)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def written(server: StorageHost, kind: str) -> set[int]:
    content = server.path(f"{kind}/written").read_bytes()
    return {struct.unpack_from("<Q", content, at)[0] for at in range(0, len(content), BLOCK)}


def test_the_kernel_s_clients_are_safe_with_the_options_that_kvmhv_gives(lab_with_servers: Lab, tmp_path: Path) -> None:
    server = StorageHost(lab_with_servers)
    image = ensure_guest_images(print, sources=ROOT / "client-image", cache=CACHE.with_name("client-images")).directory
    files = [image / "vmlinuz", image / "initrd", image / "root.img", archive(tmp_path, server)]
    seen: dict[tuple[str, str], dict[str, Any]] = {}
    writing = set()
    for said in guest(lab_with_servers, files):
        seen[said["what"], said.get("kind") or said.get("name", "")] = said
        if said["what"] == "writes":
            writing.add(said["kind"])
            if writing == {"nfs", "smb"}:
                for kind in writing:
                    server.kill_server(kind)
                time.sleep(AWAY_S)
                for kind in writing:
                    server.start_server(kind)
    assert ("end", "") in seen, seen

    for kind, filesystem, wanted in (
        ("nfs", "nfs4", {"vers=4.2", "hard", "proto=tcp"}),
        ("smb", "cifs", {"vers=3.1.1", "seal", "cache=none", "nobrl", "hard"}),
    ):
        mounted, used = seen["mounted", kind], seen["used", kind]
        assert mounted["able"] is True
        assert (mounted["type"], mounted["unsafe"]) == (filesystem, [])
        assert wanted <= set(mounted["options"])
        assert (used["direct"], used["lock"]) == (True, "")
        assert used["records"] == [True, False, True, True]
        after = seen["written", kind]
        newest = set(range(max(1, after["number"] - 63), after["number"] + 1))
        assert newest <= written(server, kind)
    assert seen["written", "nfs"]["error"] == ""
    assert seen["written", "nfs"]["longest_s"] > AWAY_S / 2, "the server was not away"
    # cifs of Linux 6.12 may fail the write that the server's death cut short; QEMU then stops the guest.
    assert seen["written", "smb"]["error"] in ("", "EBADF")

    plain, soft = seen["by hand", "smb-plain"], seen["by hand", "nfs-soft"]
    assert len(plain["unsafe"]) == 2
    assert len(soft["unsafe"]) == 1
