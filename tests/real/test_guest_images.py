"""The lab's guests on real QEMU (of the lab's tree): they build to the same bytes, boot, work, notice damage, move."""

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from kvmhv.lab.guest_images import AS_FAST_AS_IT_CAN, GuestImages, ensure_guest_images, write_boot_guest
from kvmhv.lab.oracle import Ack, read_acks, verify_raw
from kvmhv.lab.tree import cache_lock, ensure_trees

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
BASELINE = "qemu64"
RICHER = "qemu64,+cx16,+lahf-lm,+popcnt,+pni,+sse4.1,+sse4.2,+ssse3,enforce"
# QEMU runs in the tree with the test's directory at /mnt; it ends when the test does, and so do its mounts.
CAGE = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
ENTER = 'mount --bind "$2" "$1/mnt" && mount --bind /dev "$1/dev" && t=$1 && shift 2 && exec chroot "$t" "$@"'
BEAT = re.compile(r"beat (\d+) passes (\d+) errors (\d+) ms (\d+) dirtied (\d+)\r?\n")
DEADLINE_S = 60.0


def wait_for(what: str, look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:.0f} s: {what}"
        time.sleep(0.05)
    return seen


class Qemu:
    """A QEMU in the tree, its QMP, and its serial console in a file. The current directory is the tests'."""

    def __init__(self, tree: Path, directory: Path, name: str, memory: str, cpu: str, *arguments: str) -> None:
        self.serial_file = directory / f"{name}.serial"
        machine = ["-machine", "pc-q35-7.2", "-accel", "tcg", "-cpu", cpu, "-m", memory]
        plain = ["-nodefaults", "-display", "none"]
        plain += [] if "-serial" in arguments else ["-serial", f"file:/mnt/{name}.serial"]
        qmp = ["-qmp", f"unix:/mnt/{name}.qmp,server=on,wait=off"]
        command = ["qemu-system-x86_64", *machine, *plain, *qmp, *arguments]
        self.process = subprocess.Popen([*CAGE, "sh", "-c", ENTER, "sh", str(tree), str(directory), *command])
        self.socket = connect(directory / f"{name}.qmp")
        self.lines = self.socket.makefile("rw")
        self.lines.readline()
        self.qmp("qmp_capabilities")

    def qmp(self, command: str, **arguments: Any) -> Any:
        self.lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.lines.flush()
        while "event" in (answer := json.loads(self.lines.readline())):
            pass
        assert "return" in answer, answer
        return answer["return"]

    def serial(self) -> str:
        return self.serial_file.read_text(errors="replace") if self.serial_file.exists() else ""

    def beats(self) -> list[tuple[int, ...]]:
        return [tuple(map(int, beat.groups())) for beat in BEAT.finditer(self.serial())]

    def end(self) -> None:
        self.lines.close()
        self.socket.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(DEADLINE_S)

    def connected() -> bool:
        try:
            sock.connect(str(path))
        except OSError:
            return False
        return True

    wait_for(f"a socket at {path}", connected)
    return sock


@pytest.fixture(scope="module")
def images() -> GuestImages:
    return ensure_guest_images(print)


@pytest.fixture(scope="module")
def tree() -> Path:
    with cache_lock():
        return ensure_trees(["trixie"], print)["trixie"]


@pytest.fixture
def start(tree: Path, tmp_path: Path) -> Iterator[Callable[..., Qemu]]:
    with ExitStack() as stack:

        def start_qemu(name: str, *arguments: str, memory: str = "64M", cpu: str = BASELINE) -> Qemu:
            qemu = Qemu(tree, tmp_path, name, memory, cpu, *arguments)
            stack.callback(qemu.end)
            return qemu

        yield start_qemu


def boot_disk() -> list[str]:
    return ["-drive", "if=none,id=d,file=/mnt/boot.img,format=raw", "-device", "virtio-blk-pci,drive=d"]


def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    """Both are built now: the kept images may be of another day, and so of other packages."""
    once = ensure_guest_images(print, cache=tmp_path / "once")
    again = ensure_guest_images(print, cache=tmp_path / "again")
    assert again.manifest.read_text() == once.manifest.read_text()
    assert again.initrd.read_bytes() == once.initrd.read_bytes()
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        [f"{again.directory.name}.log", again.directory.name]
    )


def test_a_build_that_fails_names_its_step_and_leaves_nothing(tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    shutil.copytree(ROOT / "vm-images", sources)
    (sources / "boot" / "guest.c").write_text("this is no program")
    with pytest.raises(Exception, match="boot-sector guest") as raised:
        ensure_guest_images(print, sources=sources, cache=tmp_path / "cache")
    assert "guest.c:1" in str(raised.value)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".log"]


@pytest.mark.parametrize(("memory", "cpu"), [("64M", BASELINE), ("1G", RICHER)])
def test_the_boot_guest_starts_and_works(
    start: Callable[..., Qemu], images: GuestImages, tmp_path: Path, memory: str, cpu: str
) -> None:
    write_boot_guest(
        tmp_path / "boot.img", images.boot_template, working_set_bytes=8 << 20, rate_bytes_per_s=16 << 20, guest_id=0xAB
    )
    qemu = start("a", *boot_disk(), memory=memory, cpu=cpu)
    wait_for("three sweeps", lambda: qemu.beats() and qemu.beats()[-1][1] >= 3)
    serial = qemu.serial()
    assert re.search(r"^BOOT 000000ab[0-9a-f]{8} pages 2048 rate 16777216\r?$", serial, re.MULTILINE)
    _, _, errors, ms, dirtied = qemu.beats()[-1]
    assert errors == 0
    assert dirtied / (ms / 1000) == pytest.approx(16 << 20, rel=0.3)
    qemu.qmp("system_powerdown")
    assert qemu.process.wait(DEADLINE_S) == 0


def test_the_boot_guest_takes_no_more_memory_than_there_is(
    start: Callable[..., Qemu], images: GuestImages, tmp_path: Path
) -> None:
    write_boot_guest(tmp_path / "boot.img", images.boot_template, working_set_bytes=1 << 30, rate_bytes_per_s=0)
    qemu = start("a", *boot_disk())
    wait_for("READY", lambda: "READY" in qemu.serial())
    pages = int(re.findall(r"pages (\d+)", qemu.serial())[0])
    assert 40 << 20 < pages * 4096 <= 47 << 20


def test_the_boot_guest_notices_damage(start: Callable[..., Qemu], images: GuestImages, tmp_path: Path) -> None:
    write_boot_guest(
        tmp_path / "boot.img", images.boot_template, working_set_bytes=1 << 20, rate_bytes_per_s=AS_FAST_AS_IT_CAN
    )
    qemu = start("a", *boot_disk(), "-gdb", "unix:/mnt/gdb,server=on,wait=off")
    wait_for("READY", lambda: "READY" in qemu.serial())
    assert qemu.beats()[-1][2] == 0
    with connect(tmp_path / "gdb") as gdb:  # connecting stops the guest; write a word into page 3 of the working set
        packet = f"M{(16 << 20) + 3 * 4096 + 8:x},4:00000000"
        gdb.sendall(b"+$" + packet.encode() + b"#%02x" % (sum(packet.encode()) & 255))
        answer = b""
        while b"OK" not in answer:
            answer += gdb.recv(100)
    qemu.qmp("cont")
    wait_for("the damage", lambda: "BAD page" in qemu.serial())
    assert re.findall(r"BAD page (\d+) word (\d+)", qemu.serial()) == [("3", "2")]
    wait_for("its count", lambda: qemu.beats()[-1][2] == 1)


def move(source: Qemu, target: Qemu) -> None:
    for qemu in (source, target):
        on = [{"capability": name, "state": True} for name in ("events", "return-path")]
        qemu.qmp("migrate-set-capabilities", capabilities=on)
    target.qmp("migrate-incoming", uri="unix:/mnt/move")
    source.qmp("migrate-set-parameters", **{"max-bandwidth": 40 << 20, "downtime-limit": 1})
    source.qmp("migrate", uri="unix:/mnt/move")
    wait_for("some passes", lambda: moved(source) or passes(source) >= 4)
    source.qmp("migrate-set-parameters", **{"max-bandwidth": 10 << 30})
    source.qmp("stop")
    assert wait_for("the end of the move at the source", lambda: moved(source)) == "completed"
    assert wait_for("the end of the move at the target", lambda: moved(target)) == "completed"
    target.qmp("cont")
    source.qmp("quit")


def passes(qemu: Qemu) -> int:
    return int(qemu.qmp("query-migrate").get("ram", {}).get("dirty-sync-count", 0))


def moved(qemu: Qemu) -> str | None:
    status = str(qemu.qmp("query-migrate").get("status"))
    return status if status in {"completed", "failed"} else None


@pytest.mark.parametrize("working_set_bytes", [64 * 4096, 16 << 20])
def test_the_boot_guest_moves(
    start: Callable[..., Qemu], images: GuestImages, tmp_path: Path, working_set_bytes: int
) -> None:
    write_boot_guest(
        tmp_path / "boot.img",
        images.boot_template,
        working_set_bytes=working_set_bytes,
        rate_bytes_per_s=AS_FAST_AS_IT_CAN,
    )
    incoming = ("-incoming", "defer", "-S")
    hosts = [start("a", *boot_disk())]
    wait_for("READY", lambda: "READY" in hosts[0].serial())
    for name in ("b", "c"):
        hosts.append(start(name, *boot_disk(), *incoming))
        move(hosts[-2], hosts[-1])
        wait_for("heartbeats at the target", lambda: len(hosts[-1].beats()) > 10)
    serial = "".join(host.serial() for host in hosts)
    beats = [tuple(map(int, beat.groups())) for beat in BEAT.finditer(serial)]
    assert serial.count("BOOT ") == 1
    assert "BAD" not in serial
    assert [beat[0] for beat in beats] == list(range(1, len(beats) + 1))
    assert beats[-1][2] == 0
    assert all(later[3] > earlier[3] and later[4] >= earlier[4] for earlier, later in pairwise(beats))


def linux(images: GuestImages, directory: Path, append: str) -> list[str]:
    shutil.copy(images.vmlinuz, directory)
    shutil.copy(images.initrd, directory)
    return ["-kernel", "/mnt/vmlinuz", "-initrd", "/mnt/initrd", "-append", f"{images.cmdline} {append}"]


def test_the_linux_guest_has_a_console(start: Callable[..., Qemu], images: GuestImages, tmp_path: Path) -> None:
    arguments = linux(images, tmp_path, "kvmhv.dirty=0 kvmhv.dirty_set=8M kvmhv.nonsense=1")
    qemu = start("a", *arguments, "-serial", "unix:/mnt/console,server=on,wait=off", memory="192M")
    text = b""
    with connect(tmp_path / "console") as sock:

        def read_until(end: bytes) -> None:
            nonlocal text
            while end not in text:
                piece = sock.recv(4096)
                assert piece, text
                text += piece

        read_until(b"kvmhv.nonsense=1 is not understood")
        read_until(b"~ # ")
        sock.sendall(b"echo $((6 * 7)) $(nc 127.0.0.1 8 | grep -c boot_id)\n")
        read_until(b"42 1")
        sock.sendall(b"poweroff\n")
        assert qemu.process.wait(DEADLINE_S) == 0


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


async def test_the_linux_guest_works_and_every_write_is_there(
    start: Callable[..., Qemu], images: GuestImages, tmp_path: Path
) -> None:
    ack, beat, echo, status = free_ports(4)
    watcher = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "kvmhv.lab.watch", "--ack", str(ack), "--beat", str(beat)),
        *("--out", str(tmp_path / "report.json")),
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert watcher.stdin is not None
    assert watcher.stdout is not None
    assert await watcher.stdout.readline() == b"listening\n"
    disks = {name: tmp_path / name for name in ("vda", "vdb")}
    sizes = {"vda": 20_000_000 // 512 * 512, "vdb": 1 << 20}  # no multiple of 4096: the last slot is a short one
    devices: list[str] = []
    for name, path in disks.items():
        path.touch()
        with path.open("r+b") as file:
            file.truncate(sizes[name])
        devices += ["-drive", f"if=none,id={name},file=/mnt/{name},format=raw,discard=unmap"]
        devices += ["-device", f"virtio-blk-pci,drive={name}"]
    network = f"user,id=n,hostfwd=tcp:127.0.0.1:{echo}-10.0.2.15:7,hostfwd=tcp:127.0.0.1:{status}-10.0.2.15:8"
    append = (
        "kvmhv.ip=10.0.2.15/24 kvmhv.dirty=8M kvmhv.dirty_set=16M kvmhv.dirty_kind=compressible"
        f" kvmhv.disk=/dev/vda,/dev/vdb kvmhv.disk_rate=0 kvmhv.ack=10.0.2.2:{ack} kvmhv.beat=10.0.2.2:{beat}@10ms"
    )
    arguments = linux(images, tmp_path, append)
    qemu = start("a", *arguments, *devices, "-netdev", network, "-device", "virtio-net-pci,netdev=n", memory="256M")
    async with asyncio.timeout(DEADLINE_S):
        assert await watcher.stdout.readline() == b"ready\n"
        await asyncio.sleep(5)  # let it work
        reader, writer = await asyncio.open_connection("127.0.0.1", echo)
        writer.write(b"echo")
        assert await reader.readexactly(4) == b"echo"
        writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", status)
        state = json.loads(await reader.read())
        writer.close()
    assert state["memory_errors"] == 0
    assert state["dirtied_bytes"] > 8 << 20
    assert [disk["errors"] + disk["mismatches"] for disk in state["disks"]] == [0, 0]
    qemu.qmp("system_powerdown")
    assert await asyncio.to_thread(qemu.process.wait, DEADLINE_S) == 0
    watcher.stdin.write(b"quit\n")
    assert await watcher.wait() == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["boot_ids"] == [state["boot_id"]]
    assert report["total"]["beats"]["lost"] == report["total"]["beats"]["doubled"] == report["acks_malformed"] == 0
    for name, path in disks.items():
        _every_write_is_there(read_acks(tmp_path / "report.json.acks", name), path, sizes[name])


def _every_write_is_there(acks: list[Ack], path: Path, size_bytes: int) -> None:
    slots = -(-size_bytes // 4096)
    assert {ack.kind for ack in acks} == {"start", "data", "zeros", "discard", "will-zeros", "will-discard"}
    assert {0, slots - 1} <= {ack.slot for ack in acks if ack.kind == "data"}
    verdict = verify_raw(acks, path)
    assert verdict.ok, verdict.problems
    assert verdict.found > 100
    last_data = [ack for ack in {ack.slot: ack for ack in acks}.values() if ack.kind == "data"][-1]
    with path.open("r+b") as file:  # and the oracle does look
        file.seek(last_data.slot * 4096 + 100)
        file.write(b"damage")
    assert verify_raw(acks, path).torn == 1
