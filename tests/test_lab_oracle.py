"""The disk oracle: right disks pass, and each kind of planted mistake is found and named."""

import struct
import subprocess
import sys
import uuid
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvmhv.lab.oracle import Ack, Report, parse_ack, parse_record, read_acks, verify, verify_raw

BOOTS = [str(uuid.UUID(int=number)) for number in (1, 2)]
SLOTS = 8


def make_record(number: int, slot: int, boot_id: str, *, length: int = 4096, disk: str = "vda") -> bytes:
    header = struct.pack("<8s8sQQ16sI", b"KVMHVREC", disk.encode(), number, slot, uuid.UUID(boot_id).bytes, length)
    payload = (struct.pack("<Q", number * 1000003 + slot + 1) * 512)[: length - 56]
    crc = zlib.crc32(header + bytes(4) + payload)
    return header + struct.pack("<I", crc) + payload


class Disk:
    """A guest and its disk as they should be: writes, acknowledges, and can keep the last acknowledgements back."""

    def __init__(self) -> None:
        self.slots = [bytes(4096) for _ in range(SLOTS)]
        self.acks: list[Ack] = []
        self.written: list[tuple[int, bytes]] = []

    def write(self, number: int, slot: int, kind: str, boot_id: str, *, acked: bool = True) -> None:
        content = make_record(number, slot, boot_id) if kind == "data" else bytes(4096)
        crc = parse_record(content).crc if kind == "data" else 0
        if kind != "data":
            self.acks.append(Ack("vda", number, slot, 0, f"will-{kind}", boot_id))
        self.slots[slot] = content
        self.written.append((slot, content))
        if acked:
            self.acks.append(Ack("vda", number, slot, crc, kind, boot_id))

    def report(self) -> Report:
        return verify(self.acks, lambda slot: self.slots[slot], SLOTS)


operations = st.lists(
    st.tuples(st.integers(0, SLOTS - 1), st.sampled_from(["data", "data", "data", "zeros", "discard"])),
    min_size=1,
    max_size=40,
)


def run(writes: list[tuple[int, str]], *, unacked: int = 0, restart_at: int | None = None) -> Disk:
    disk = Disk()
    number, boot_id = 0, BOOTS[0]
    for at, (slot, kind) in enumerate(writes):
        if at == restart_at:
            number, boot_id = 0, BOOTS[1]
            disk.acks.append(Ack("vda", 0, 0, 0, "start", boot_id))
        number += 1
        disk.write(number, slot, kind, boot_id, acked=at < len(writes) - unacked)
    return disk


@given(operations, st.integers(0, 3), st.integers(0, 40))
def test_a_right_disk_passes(writes: list[tuple[int, str]], unacked: int, restart_at: int) -> None:
    report = run(writes, unacked=unacked, restart_at=restart_at).report()
    assert report.ok, report.problems
    assert report.found + report.later == report.acked
    assert report.acked_records == max(0, len(writes) - unacked)


@given(operations, st.data())
def test_a_lost_record_is_found(writes: list[tuple[int, str]], data: st.DataObject) -> None:
    disk = run([*writes, (3, "data")])
    victims = [ack.slot for ack in {ack.slot: ack for ack in disk.acks}.values() if ack.kind == "data"]
    victim = data.draw(st.sampled_from(victims))
    disk.slots[victim] = bytes(4096)
    report = disk.report()
    assert report.lost == 1
    assert [problem.slot for problem in report.problems] == [victim]


@given(operations, st.integers(1, 4095))
def test_a_torn_record_is_found(writes: list[tuple[int, str]], at: int) -> None:
    disk = run([*writes, (3, "data")])
    before = make_record(9999, 3, BOOTS[0])
    torn = disk.slots[3][:at] + before[at:]
    assume(torn not in (before, disk.slots[3]))
    disk.slots[3] = torn
    assert disk.report().torn == 1


@given(operations, st.integers(0, 4096 * 8 - 1))
def test_a_flipped_bit_is_found(writes: list[tuple[int, str]], bit: int) -> None:
    disk = run([*writes, (3, "data")])
    content = bytearray(disk.slots[3])
    content[bit // 8] ^= 1 << bit % 8
    disk.slots[3] = bytes(content)
    assert not disk.report().ok


@given(operations, st.sampled_from(["data", "zeros"]))
def test_a_stale_slot_is_found(writes: list[tuple[int, str]], last: str) -> None:
    disk = run([*writes, (3, "data"), (5, "data"), (3, last)])
    disk.slots[3] = make_record(len(writes) + 1, 3, BOOTS[0])
    report = disk.report()
    assert (report.stale, report.ok) == (1, False)


def test_a_record_of_the_boot_before_is_stale() -> None:
    disk = run([(3, "data"), (3, "data"), (3, "data"), (3, "data")], restart_at=3)
    disk.slots[3] = make_record(3, 3, BOOTS[0])  # a higher number, but of an earlier boot
    assert disk.report().stale == 1


def test_a_record_of_an_unknown_boot_is_stale() -> None:
    disk = run([(3, "data")])
    disk.slots[3] = make_record(7, 3, str(uuid.UUID(int=99)))
    assert disk.report().stale == 1


@given(operations)
def test_swapped_slots_are_found(writes: list[tuple[int, str]]) -> None:
    disk = run([*writes, (3, "data"), (5, "data")])
    disk.slots[3], disk.slots[5] = disk.slots[5], disk.slots[3]
    assert disk.report().misplaced == 2


def test_a_record_of_another_disk_is_misplaced() -> None:
    disk = run([(3, "data")])
    disk.slots[3] = make_record(1, 3, BOOTS[0], disk="vdb")
    assert disk.report().misplaced == 1


def test_zeros_that_were_overwritten_by_nothing_acknowledged_must_stay_zeros() -> None:
    disk = run([(3, "data"), (3, "zeros")])
    assert disk.report().found == 1
    disk.slots[3] = make_record(1, 3, BOOTS[0])
    assert disk.report().stale == 1


def test_announced_zeros_may_be_there_already_or_not_yet() -> None:
    disk = run([(3, "data"), (3, "zeros")], unacked=1)
    assert disk.report().later == 1
    disk.slots[3] = make_record(1, 3, BOOTS[0])
    assert disk.report().found == 1


def test_an_old_announcement_excuses_nothing() -> None:
    disk = run([(3, "zeros"), (3, "data")])
    disk.slots[3] = bytes(4096)
    assert disk.report().lost == 1


def test_a_discarded_slot_may_hold_what_it_held_before() -> None:
    disk = run([(3, "data"), (3, "discard")])
    assert disk.report().found == 1
    disk.slots[3] = make_record(1, 3, BOOTS[0])
    assert disk.report().found == 1
    disk.slots[3] = b"something of the backing file".ljust(4096)
    assert disk.report().found == 1
    disk.slots[3] = make_record(1, 3, BOOTS[0])[:512] + bytes(3584)
    assert disk.report().torn == 1


def test_a_disk_that_ends_too_early_has_lost_its_end() -> None:
    disk = run([(SLOTS - 1, "data"), (0, "data")])
    report = verify(disk.acks, lambda slot: disk.slots[slot], SLOTS - 1)
    assert (report.lost, report.found) == (1, 1)


def test_the_short_last_slot_of_a_raw_image(tmp_path: Path) -> None:
    image = tmp_path / "image"
    record = make_record(1, 1, BOOTS[0], length=1536)
    ack = Ack("vda", 1, 1, parse_record(record).crc, "data", BOOTS[0])
    image.write_bytes(bytes(4096) + record)
    assert verify_raw([ack], image).found == 1
    image.write_bytes(bytes(4096) + record[:1024])
    assert verify_raw([ack], image).torn == 1
    image.write_bytes(bytes(4096))
    assert verify_raw([ack], image).lost == 1


def test_a_wrong_checksum_in_the_acknowledgement_is_damage() -> None:
    disk = run([(3, "data")])
    disk.acks = [replace(ack, crc=ack.crc ^ 1) for ack in disk.acks]
    assert disk.report().torn == 1


def test_acknowledgements_of_two_disks_are_refused() -> None:
    acks = [Ack("vda", 1, 0, 0, "zeros", BOOTS[0]), Ack("vdb", 1, 0, 0, "zeros", BOOTS[0])]
    with pytest.raises(ValueError, match="several disks"):
        verify(acks, lambda _slot: bytes(4096), 1)


@pytest.mark.parametrize(
    "line",
    ["", "vda 1 2 0 data", "vda x 2 0 data " + BOOTS[0], "vda 1 -2 0 data " + BOOTS[0], "vda 1 2 0 dada " + BOOTS[0]],
)
def test_lines_that_are_no_acknowledgements(line: str) -> None:
    with pytest.raises(ValueError):
        parse_ack(line)


def test_reading_a_file_of_acknowledgements(tmp_path: Path) -> None:
    file = tmp_path / "acks"
    file.write_text(f"vda 1 0 00000000 zeros {BOOTS[0]}\nvdb 1 0 0000000a data {BOOTS[0]}\nvda 2 0 00")
    assert [ack.record for ack in read_acks(file, "vda")] == [1]
    assert read_acks(file, "vdb")[0].crc == 10
    with pytest.raises(ValueError, match="vda, vdb"):
        read_acks(file)
    with pytest.raises(ValueError, match="nothing of vdc"):
        read_acks(file, "vdc")


def test_the_command(tmp_path: Path) -> None:
    disk = run([(1, "data"), (0, "zeros")])
    (tmp_path / "image").write_bytes(b"".join(disk.slots))
    lines = [f"{a.disk} {a.record} {a.slot} {a.crc:08x} {a.kind} {a.boot_id}\n" for a in disk.acks]
    (tmp_path / "acks").write_text("".join(lines))
    command = [sys.executable, "-m", "kvmhv.lab.oracle", "--acks", "acks", "--image", "image", "--format", "raw"]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.returncode, '"ok": true' in done.stdout) == (0, True), done.stderr
    (tmp_path / "image").write_bytes(bytes(4096 * SLOTS))
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.returncode, '"lost": 1' in done.stdout) == (1, True), done.stderr
