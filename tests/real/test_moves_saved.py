"""What need not be sent is not sent, the report says so, and the disks are the same at the target."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.real.moving import MIB, Pair, Report, Side, until
from tests.real.test_moves_performance import status

pytestmark = pytest.mark.real

DISKS = "/var/lib/kvmhv/disks/web01"


def digests(side: Side, *names: str) -> list[str]:
    """Return a digest of what a guest reads of each image."""
    whole = "qemu-img convert -U -O raw {0} /srv/look.raw && sha256sum < /srv/look.raw && rm /srv/look.raw"
    return [side.sh(f"mkdir -p /srv && {whole.format(f'{DISKS}/{name}')}").split()[0] for name in names]


def stored(side: Side, name: str) -> int:
    """Return the bytes that an image takes on its host."""
    return side.file(f"{DISKS}/{name}").stat().st_blocks * 512


def test_zeros_and_what_is_not_stored_stay_at_the_source(pair: Pair) -> None:
    """A raw image with written zeros, a sparse one, a qcow2 with zero clusters, written zeros and a discard."""
    pair.a.sh(
        "mkdir -p /srv; cd /srv; head -c 24M /dev/zero > zeros.raw; head -c 4M /dev/urandom >> zeros.raw;"
        "truncate -s 64M sparse.raw; head -c 4M /dev/urandom | dd of=sparse.raw conv=notrunc bs=1M seek=30 status=none;"
        "qemu-img create -q -f qcow2 mixed.qcow2 64M;"
        "head -c 4M /dev/urandom > data; qemu-io -d unmap -c 'write -s data 8M 4M' -c 'write -s data 40M 4M'"
        " -c 'write -z 16M 8M' -c 'write -P 0 24M 8M' -c 'discard 40M 2M' mixed.qcow2 > /dev/null; rm data"
    )
    files = ("zeros.raw,format=raw", "sparse.raw,format=raw", "mixed.qcow2")
    pair.boot(*(word for file in files for word in ("--disk", f"file=/srv/{file}")))
    images = ("disk1.raw", "disk2.raw", "disk3.qcow2")
    before, was = digests(pair.a, *images), {name: stored(pair.a, name) for name in images}

    report = pair.moved(pair.a, pair.b)
    pair.works(pair.b)
    assert digests(pair.b, *images) == before
    found = {saving["disk"]: saving for saving in report["savings"]}
    assert list(found) == ["disk0", "disk1", "disk2", "disk3"]
    data = {"disk1": 4 * MIB, "disk2": 4 * MIB, "disk3": 6 * MIB}
    for disk, data_bytes in data.items():
        assert data_bytes <= found[disk]["sent_bytes"] < data_bytes * 1.05 + MIB / 4, found
    assert found["disk1"]["zero_bytes"] > 23.5 * MIB, found
    assert found["disk1"]["unallocated_bytes"] < MIB, found
    assert found["disk2"]["unallocated_bytes"] > 59 * MIB, found
    assert found["disk2"]["zero_bytes"] == 0, found
    assert found["disk3"]["zero_bytes"] > 7.5 * MIB, found
    assert found["disk3"]["unallocated_bytes"] > 48 * MIB, found
    for name, data_bytes in zip(images, data.values(), strict=True):
        assert stored(pair.b, name) <= min(was[name], data_bytes + MIB), (name, was, stored(pair.b, name))
    assert report["wire_bytes"] < report["memory_bytes"] * 1.1 + sum(one["sent_bytes"] for one in found.values()) + MIB


# --- bases that the target has


FORGE = """
import sqlite3, sys
database = sqlite3.connect("/var/lib/kvmhv/kvmhv.sqlite", timeout=20)
changed = "CAST(json_set(CAST(value AS TEXT), '$.sha256', ?) AS BLOB)"
database.execute(f"UPDATE records SET value = {changed} WHERE key = 'default/_images/other.raw'", sys.argv[1:])
database.commit()
"""
"""Lets a host believe that an image holds something else."""
BASED = ("--disk", "size=64M,backing=debian")


def make_template(side: Side, name: str, image_format: str) -> None:
    """Import the same disk as an image, in any format."""
    side.sh(f"qemu-img convert -O {image_format} /srv/system.raw /srv/{name}.{image_format}")
    side.kvmhv("image", "import", name, "--disk", f"/srv/{name}.{image_format}", "--format", image_format)


def make_system(pair: Pair) -> None:
    """Make a disk of 24 MiB of noise with holes, the same on both hosts, and its image on host1."""
    pair.a.sh("mkdir -p /srv; head -c 24M /dev/urandom > /srv/system.raw; truncate -s 48M /srv/system.raw")
    pair.b.sh("mkdir -p /srv")
    pair.b.file("/srv/system.raw").write_bytes(pair.a.file("/srv/system.raw").read_bytes())
    make_template(pair.a, "debian", "qcow2")


def base_of(source: Side, target: Side, vm: str = "web01") -> Any:
    """Return what a check says of the base of disk1 at the target."""
    found = source.kvmhv("vm", "check", vm, "--to", target.name, "--include-storage")
    return {copy["disk"]: copy["base"] for copy in found["plan"]["disk_copies"]}["disk1"]


def saved(report: Report) -> dict[str, int]:
    """Return the saving of disk1."""
    (found,) = (saving for saving in report["savings"] if saving["disk"] == "disk1")
    return dict(found)


def test_a_base_that_lies_there_as_a_template_is_not_sent(pair: Pair) -> None:
    """Under another name and in another format; the VM's copy is its own, and the way back needs no base either."""
    make_system(pair)
    pair.boot(*BASED)
    (before,) = digests(pair.a, "disk1.qcow2")
    make_template(pair.b, "template", "raw")
    found = until("host2 knows the base", lambda: base_of(pair.a, pair.b))
    assert found["data_bytes"] == 24 * MIB
    said = pair.a.sh("kvmhv vm check web01 --to host2 --include-storage")
    assert "disk1's base is on host2 already: 24 MiB less to send" in said

    there = saved(pair.moved(pair.a, pair.b))
    assert there["base_bytes"] == 24 * MIB
    assert there["sent_bytes"] < MIB, there
    pair.b.kvmhv("image", "remove", "template")
    assert digests(pair.b, "disk1.qcow2") == [before]
    pair.works(pair.b)

    until("host1 knows the base", lambda: base_of(pair.b, pair.a))
    back = saved(pair.moved(pair.b, pair.a))
    assert (back["base_bytes"], back["sent_bytes"] < MIB) == (24 * MIB, True), back
    assert digests(pair.a, "disk1.qcow2") == [before]
    pair.works(pair.a)


def test_a_base_that_came_with_another_vm_is_not_sent_again_and_outlives_it(pair: Pair) -> None:
    make_system(pair)
    pair.create(*BASED, "--disk", "size=8M", vm="first")
    sent = pair.a.move(pair.b, vm="first").json
    assert sent["savings"][0]["base_bytes"] == 0
    assert sent["savings"][0]["sent_bytes"] > 24 * MIB
    pair.boot(*BASED)
    until("host2 knows the base", lambda: base_of(pair.a, pair.b))
    (before,) = digests(pair.a, "disk1.qcow2")
    there = saved(pair.moved(pair.a, pair.b))
    assert (there["base_bytes"], there["sent_bytes"] < MIB) == (24 * MIB, True), there
    pair.b.kvmhv("vm", "stop", "first", "--force")
    pair.b.kvmhv("vm", "remove", "first", "--yes")
    assert digests(pair.b, "disk1.qcow2") == [before]
    pair.works(pair.b)


def test_a_base_that_is_not_what_it_was_read_as_ends_the_move_and_the_next_one_sends_it(pair: Pair) -> None:
    """The record of an image says what the VM's base holds, and the image holds something else."""
    make_system(pair)
    pair.boot(*BASED)
    pair.b.sh("head -c 24M /dev/urandom > /srv/other.raw; truncate -s 48M /srv/other.raw")
    pair.b.kvmhv("image", "import", "other", "--disk", "/srv/other.raw", "--format", "raw")
    wanted = until("host1 knows the base", lambda: digest_of(pair.a, "debian.qcow2"))
    until("host2 knows the image", lambda: digest_of(pair.b, "other.raw"))
    empty = pair.b.left()
    pair.b.host.exec(["python3", "-c", FORGE, wanted])
    failed = pair.a.move(pair.b)
    assert (failed.status, failed.json["error"]["code"]) == (1, "base-differs"), failed
    pair.b.is_again(empty)
    there = saved(pair.moved(pair.a, pair.b))
    assert (there["base_bytes"], there["sent_bytes"] > 24 * MIB) == (0, True), there
    pair.works(pair.b)


def digest_of(side: Side, image: str) -> str:
    """Return the digest of an image as it is now, empty before it is known."""
    file = side.file(f"/var/lib/kvmhv/disks/_images/{image}").stat()
    mark = f"{file.st_ino} {file.st_size} {file.st_mtime_ns} {file.st_ctime_ns}"
    return "".join(str(record["sha256"]) for record in read_bases(side) if record["mark"] == mark)


def read_bases(side: Side) -> list[dict[str, Any]]:
    """Return the records of a host's bases."""
    query = "SELECT value FROM records WHERE kind = 'base'"
    script = (
        "import sqlite3; db = sqlite3.connect('file:/var/lib/kvmhv/kvmhv.sqlite?mode=ro', uri=True);"
        f'print("[" + ",".join(bytes(row[0]).decode() for row in db.execute("{query}")) + "]")'
    )
    return list(json.loads(side.host.exec(["python3", "-c", script]).stdout))


# --- memory that the guest has freed

FILL = "mkdir /t; mount -t tmpfs t /t; dd if=/dev/urandom of=/t/f bs=1M count=80; rm /t/f; echo FRE''ED"
TELL = """
import socket, sys
with socket.socket(socket.AF_UNIX) as console:
    console.settimeout(60)
    console.connect(sys.argv[1])
    console.sendall(sys.argv[2].encode() + b"\\n")
    said = b""
    while b"FREED" not in said:
        some = console.recv(4096)
        assert some, said
        said += some
"""
"""Types a line at a guest's console, and reads all that it says until it has done it."""
FREED_BYTES = 80 * MIB
MUCH_BYTES = FREED_BYTES // 2
"""Blocks that are smaller than the guest reports stay with it, and what it dirties meanwhile differs."""
SET_BYTES = 16 * MIB


def fill_and_free(side: Side, vm: str) -> int:
    """Let a guest write to 80 MiB of its memory and free them; returns the id of its process."""
    shown = side.show(vm)
    log = side.file(str(Path(shown["console"]).with_name("console.log")))
    until(f"{vm} has a shell", lambda: "~ #" in log.read_text(errors="replace"))
    side.host.exec(["python3", "-c", TELL, shown["console"], FILL])
    return int(shown["pid"])


def resident_bytes(side: Side, pid: int) -> int:
    """Return the memory of the host that a QEMU has."""
    status = side.file(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_memory_that_the_guest_has_freed_is_not_sent_and_the_rest_of_it_is_as_it_was(pair: Pair) -> None:
    """Its twin, the same but for the reporting, sends all of it."""
    pair.a.sh("mkdir -p /srv")
    for file in (pair.images.vmlinuz, pair.images.initrd):
        pair.a.file(f"/srv/{file.name}").write_bytes(file.read_bytes())
    pair.a.kvmhv("image", "import", "linux", "--kernel", "/srv/vmlinuz", "--initrd", "/srv/initrd")
    network = pair.lab.host("client").plan.addresses["lan"].rsplit(".", 1)[0]
    for vm, last, reports in (("twin", 53, "--no-free-page-reporting"), ("web01", 54, "--free-page-reporting")):
        work = f"kvmhv.ip={network}.{last}/24 kvmhv.dirty=16M kvmhv.dirty_set=16M"
        append = f"{pair.images.cmdline} {work}"
        pair.create("--image", "linux", "--append", append, "--switch", "lan", reports, vm=vm, memory="192M")
    with ThreadPoolExecutor() as both:
        twin_pid, pid = both.map(lambda vm: fill_and_free(pair.a, vm), ("twin", "web01"))
    most = resident_bytes(pair.a, twin_pid)
    until("the host has it back", lambda: resident_bytes(pair.a, pid) < most - FREED_BYTES * 3 // 4)

    twin = pair.a.move(pair.b, vm="twin").json
    assert twin["outcome"] == "done", twin
    for source, target in ((pair.a, pair.b), (pair.b, pair.a)):
        report = pair.moved(source, target)
        assert report["memory_bytes"] < twin["memory_bytes"] - MUCH_BYTES, (report, twin)
        assert report["memory_zero_bytes"] > twin["memory_zero_bytes"] + MUCH_BYTES, (report, twin)
        assert report["wire_bytes"] < twin["wire_bytes"] - MUCH_BYTES, (report, twin)
    before = status(pair, f"{network}.54")["dirtied_bytes"]

    def verified() -> bool:
        return bool(status(pair, f"{network}.54")["dirtied_bytes"] > before + 2 * SET_BYTES)

    until("the guest has verified its working set", verified)
    assert status(pair, f"{network}.54")["memory_errors"] == 0
