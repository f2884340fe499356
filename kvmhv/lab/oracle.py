"""Decides whether a disk holds every write that the Linux guest acknowledged. Pure but for the command at the end.

The guest writes numbered, checksummed records into slots of 4096 bytes and acknowledges each when it is on the
disk. The disk of a stopped VM is right if each slot holds what was acknowledged last for it, or a later record whose
acknowledgement was still on its way. Zeros bear no number, so the guest announces them: `will-zeros`,
`will-discard`. Each boot begins with a `start`, so that the boots of all records are known.

    python -m kvmhv.lab.oracle --acks FILE --image FILE --format raw|qcow2 [--disk vda] [--base FILE]

prints the report as JSON and exits with 0 if nothing is wrong, 1 if something is, 2 if it cannot tell.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

SLOT_BYTES = 4096
LEAST_RECORD_BYTES = 512
MAGIC = b"KVMHVREC"
PROBLEMS_MAX = 50
CONVERT_TIMEOUT_S = 600.0

WRITTEN = frozenset({"data", "zeros", "discard"})
ANNOUNCED = frozenset({"start", "will-zeros", "will-discard"})

# magic, disk, number, slot, boot id, length, CRC-32 of the whole record with this field 0 (vm-images/linux/disk.c)
_HEADER = struct.Struct("<8s8sQQ16sII")
_CRC_AT = _HEADER.size - 4


@dataclass(frozen=True, slots=True)
class Ack:
    """One line of the guest: `disk record slot crc kind boot_id`."""

    disk: str
    record: int
    slot: int
    crc: int
    kind: str
    boot_id: str


@dataclass(frozen=True, slots=True)
class Record:
    """What a whole, undamaged record in a slot says about itself."""

    disk: str
    number: int
    slot: int
    boot_id: str
    crc: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A slot that does not hold what it must."""

    slot: int
    what: str
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of slots (`acked_records`: of lines); each acked slot is in one of those behind it.

    found: what was acknowledged last. later: a later record, acknowledgement still on its way. lost: zeros in the
    place of a record, or the disk ends before. stale: an earlier content. torn: no whole record. misplaced: another
    slot's or disk's record. `problems` has the first PROBLEMS_MAX of the last four.
    """

    acked_records: int = 0
    acked: int = 0
    found: int = 0
    later: int = 0
    lost: int = 0
    stale: int = 0
    torn: int = 0
    misplaced: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every acknowledged write is there."""
        return not (self.lost or self.stale or self.torn or self.misplaced)

    def as_json(self) -> dict[str, object]:
        """Return the report for people and scripts."""
        return {"ok": self.ok, **asdict(self)}


def parse_ack(line: str) -> Ack:
    """Return what a line of the guest says. Raises ValueError: it is not such a line."""
    words = line.split()
    if len(words) != 6:
        raise ValueError(f"an acknowledgement has 6 words: {line[:200]!r}")
    disk, record, slot, crc, kind, boot_id = words
    if kind not in WRITTEN | ANNOUNCED:
        raise ValueError(f"unknown kind of acknowledgement: {line[:200]!r}")
    ack = Ack(disk, int(record), int(slot), int(crc, 16), kind, str(uuid.UUID(boot_id)))
    if ack.record < (ack.kind != "start") or ack.slot < 0:
        raise ValueError(f"record or slot out of range: {line[:200]!r}")
    return ack


def parse_record(content: bytes) -> Record | None:
    """Return the record that fills a slot, or None if the content is not one whole, undamaged record."""
    if len(content) < LEAST_RECORD_BYTES:
        return None
    magic, disk, number, slot, boot_id, length, crc = _HEADER.unpack_from(content)
    if magic != MAGIC or length != len(content):
        return None
    if zlib.crc32(content[:_CRC_AT] + bytes(4) + content[_CRC_AT + 4 :]) != crc:
        return None
    name = disk.rstrip(b"\0").decode("ascii", "replace")
    return Record(name, number, slot, str(uuid.UUID(bytes=boot_id)), crc)


class _Expectation:
    """What the acknowledgements of one disk, in the order of their arrival, allow each slot to hold."""

    def __init__(self, acks: Iterable[Ack]) -> None:
        self.acked_records = 0
        self.final: dict[int, Ack] = {}
        self.may_be_zero: set[int] = set()
        self.slot_of: dict[tuple[str, int], int] = {}
        self.boot_order: dict[str, int] = {}
        self.disks: set[str] = set()
        for ack in acks:
            self.disks.add(ack.disk)
            self.boot_order.setdefault(ack.boot_id, len(self.boot_order))
            if ack.kind == "start":
                continue
            if ack.kind in ANNOUNCED:
                self.may_be_zero.add(ack.slot)
                continue
            self.acked_records += 1
            self.final[ack.slot] = ack
            self.slot_of[ack.boot_id, ack.record] = ack.slot
            self.may_be_zero.discard(ack.slot)

    def judge(self, slot: int, content: bytes | None) -> str:
        """Return which count of the Report the slot belongs to."""
        if content is None:
            return "lost"
        if not any(content):
            return self._judge_zeros(slot)
        record = parse_record(content)
        if record is not None:
            return self._judge_record(slot, record)
        # What was discarded may hold anything, but not a piece of one of our records.
        discarded = self.final[slot].kind == "discard" and not content.startswith(MAGIC)
        return "found" if discarded else "torn"

    def _judge_zeros(self, slot: int) -> str:
        if self.final[slot].kind != "data":
            return "found"
        return "later" if slot in self.may_be_zero else "lost"

    def _judge_record(self, slot: int, record: Record) -> str:
        final = self.final[slot]
        acked_for = self.slot_of.get((record.boot_id, record.number), slot)
        if record.slot != slot or record.disk not in self.disks or acked_for != slot:
            return "misplaced"
        order = self.boot_order.get(record.boot_id, -1), record.number
        final_order = self.boot_order[final.boot_id], final.record
        if order > final_order:
            return "later"
        if order == final_order:
            return "found" if final.kind == "data" and record.crc == final.crc else "torn"
        # What was discarded may hold what it held before.
        return "found" if final.kind == "discard" else "stale"


def verify(acks: Iterable[Ack], read_slot: Callable[[int], bytes], slots: int) -> Report:
    """Compare a disk with the acknowledgements for it, in the order in which they arrived.

    `read_slot(slot)` gives the content of a slot below `slots`: 4096 bytes, less in the last slot of a disk whose size
    is no multiple of that. The acknowledgements must be of one disk. Raises ValueError: they are of several.
    """
    expectation = _Expectation(acks)
    if len(expectation.disks) > 1:
        raise ValueError(f"the acknowledgements are of several disks: {', '.join(sorted(expectation.disks))}")
    counts: Counter[str] = Counter()
    problems: list[Problem] = []
    for slot, final in sorted(expectation.final.items()):
        content = read_slot(slot) if slot < slots else None
        what = expectation.judge(slot, content)
        counts[what] += 1
        if what not in {"found", "later"} and len(problems) < PROBLEMS_MAX:
            expected = f"{final.kind}, record {final.record} of boot {final.boot_id}"
            problems.append(Problem(slot, what, expected, _describe(content)))
    return Report(expectation.acked_records, len(expectation.final), **counts, problems=problems)


def _describe(content: bytes | None) -> str:
    if content is None:
        return "the disk ends before it"
    if not any(content):
        return "zeros"
    record = parse_record(content)
    if record is None:
        return "no whole record, begins with " + content[:16].hex()
    return f"record {record.number} of slot {record.slot}, disk {record.disk}, boot {record.boot_id}"


# ---- the command ----


def read_acks(path: Path, disk: str | None = None) -> list[Ack]:
    """Return the acknowledgements of one disk from a file of the watcher; without `disk` there must be only one.

    A last line without its end was being written when the watcher died and is left out. Raises ValueError: a line is
    not an acknowledgement, or the disk is not clear.
    """
    acks = [parse_ack(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    disks = sorted({ack.disk for ack in acks})
    if disk is None and len(disks) > 1:
        raise ValueError(f"{path} is of several disks, name one with --disk: {', '.join(disks)}")
    if disk is not None and disk not in disks:
        raise ValueError(f"{path} has nothing of {disk}, only of: {', '.join(disks) or 'no disk'}")
    return [ack for ack in acks if disk is None or ack.disk == disk]


def verify_raw(acks: Iterable[Ack], image: Path) -> Report:
    """`verify` for a raw image."""
    with image.open("rb") as file:
        image_bytes = file.seek(0, os.SEEK_END)

        def read_slot(slot: int) -> bytes:
            return os.pread(file.fileno(), SLOT_BYTES, slot * SLOT_BYTES)

        return verify(acks, read_slot, -(-image_bytes // SLOT_BYTES))


def verify_image(acks: Iterable[Ack], image: Path, image_format: str, base: Path | None = None) -> Report:
    """`verify` for an image of any format QEMU knows, by a raw copy of it that is removed afterwards.

    `base` takes the place of the backing file that a qcow2 image names. The image is only read, even while a QEMU has
    it open; if that QEMU's VM runs, the report says nothing. Raises OSError or subprocess.SubprocessError: no copy.
    """
    if image_format == "raw":
        return verify_raw(acks, image)
    layer: dict[str, object] = {"driver": image_format, "file": {"driver": "file", "filename": str(image.absolute())}}
    if base is not None:
        layer["backing"] = {"driver": "qcow2" if _is_qcow2(base) else "raw", "file": _file(base)}
    with tempfile.TemporaryDirectory(prefix="kvmhv-oracle-") as scratch:
        raw = Path(scratch) / "raw"
        command = ["qemu-img", "convert", "-U", "-O", "raw", "json:" + json.dumps(layer), str(raw)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=CONVERT_TIMEOUT_S)
        return verify_raw(acks, raw)


def _file(path: Path) -> dict[str, str]:
    return {"driver": "file", "filename": str(path.absolute())}


def _is_qcow2(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"QFI\xfb"


def main() -> int:
    """Run the command; the module's docstring has its arguments."""
    parser = argparse.ArgumentParser(prog="python -m kvmhv.lab.oracle")
    parser.add_argument("--acks", type=Path, required=True, help="the file of acknowledgements that the watcher wrote")
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--format", required=True, choices=["raw", "qcow2"])
    parser.add_argument("--disk", help="the disk's name in the guest (vda), if the file is of several")
    parser.add_argument("--base", type=Path, help="backing file, in the place of the one that the image names")
    arguments = parser.parse_args()
    try:
        acks = read_acks(arguments.acks, arguments.disk)
        report = verify_image(acks, arguments.image, arguments.format, arguments.base)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"oracle: {error.stderr.strip()}\n")
        return 2
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"oracle: {error}\n")
        return 2
    json.dump(report.as_json(), sys.stdout)
    sys.stdout.write("\n")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
