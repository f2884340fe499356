"""Who sees a VM run, whatever the agents say: the guest's own words on its console, which QEMU itself writes down.

The witness reads every console log of every host all the time. A guest counts its heartbeats and goes on counting where
it was moved to, so all that it said, in the order in which it was said on whichever host, is one text in which each
number follows the one before. Two copies that run say a number twice. The guest also says there what it has put on its
disks, so the same text is what the oracle compares the disks with.
"""

import contextlib
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from kvmhv.lab import oracle
from kvmhv.lab.lab import Lab
from kvmhv.lab.state import run_dir

LOOK_EVERY_S = 0.03
CHUNK_BYTES = 1 << 20
BEAT = re.compile(r"beat (\d+) passes \d+ errors (\d+) ms \d+ dirtied \d+")


@dataclass
class _Log:
    """One QEMU's console log, open: it is read to its end wherever it is moved, and when it is removed."""

    vm_id: str
    host: str
    descriptor: int


@dataclass(frozen=True)
class Said:
    """What a guest said on a host, and when it was read."""

    host: str
    text: str
    at_s: float


class Witness:
    """Reads until it is closed."""

    def __init__(self, lab: Lab, hosts: tuple[str, ...]) -> None:
        self._places = [(host, run_dir(lab.name, host)) for host in hosts]
        self._logs: dict[tuple[int, int], _Log] = {}
        self._said: dict[str, list[Said]] = {}
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="witness")
        self._thread.start()

    def close(self) -> None:
        """End it."""
        self._ending.set()
        self._thread.join()
        for log in self._logs.values():
            os.close(log.descriptor)

    def said(self, vm_id: str) -> list[Said]:
        """Return all that a guest has said until now."""
        self.look()
        with self._lock:
            return list(self._said.get(vm_id, ()))

    def text(self, vm_id: str) -> str:
        """Return it in one piece."""
        return "".join(piece.text for piece in self.said(vm_id)).replace("\r", "")

    def beats(self, vm_id: str, *hosts: str) -> int:
        """Return how many heartbeats were heard from a guest on these hosts, or on all."""
        return sum(len(BEAT.findall(piece.text)) for piece in self.said(vm_id) if not hosts or piece.host in hosts)

    def check(self, vm_id: str, boots: int) -> None:
        """Assert that the guest ran once at any time, undamaged, and was booted so often."""
        assert self._thread.is_alive(), "the witness has died: nobody watched"
        parts = self.text(vm_id).split("BOOT ")[1:]
        assert len(parts) == boots, f"{len(parts)} boots instead of {boots}"
        for part in parts:
            assert "BAD" not in part, part[-2000:]
            beats = [int(beat[1]) for beat in BEAT.finditer(part)]
            assert beats == list(range(1, len(beats) + 1)), f"it ran twice, or went back: {beats}"
            assert {beat[2] for beat in BEAT.finditer(part)} <= {"0"}, part[-2000:]

    def acks(self, vm_id: str, disk: str) -> list[oracle.Ack]:
        """Return what the guest has acknowledged of a disk."""
        lines = [line[4:] for line in self.text(vm_id).split("\n")[:-1] if line.startswith("ack ")]
        return [ack for ack in map(_whole, lines) if ack is not None and ack.disk == disk]

    # ---

    def _watch(self) -> None:
        while not self._ending.wait(LOOK_EVERY_S):
            self.look()

    def look(self) -> None:
        """Read what there is now."""
        with self._lock:
            self._find()
            # The newest first: a guest that is heard where it has arrived had said its last word where it left.
            logs = list(self._logs.values())
            heard = [(log, self._read(log)) for log in reversed(logs)]
            now_s = time.monotonic()
            for log, text in reversed(heard):
                if text:
                    self._said.setdefault(log.vm_id, []).append(Said(log.host, text, now_s))

    def _find(self) -> None:
        for host, place in self._places:
            for path in _consoles(place):
                try:
                    descriptor = os.open(path, os.O_RDONLY)
                except FileNotFoundError:
                    continue
                found = os.fstat(descriptor)
                key = found.st_dev, found.st_ino
                if key in self._logs:
                    os.close(descriptor)
                else:
                    self._logs[key] = _Log(path.parent.name, host, descriptor)

    @staticmethod
    def _read(log: _Log) -> str:
        text = b""
        while chunk := os.read(log.descriptor, CHUNK_BYTES):
            text += chunk
        return text.decode(errors="replace")


def _consoles(place: Path) -> list[Path]:
    """Return the console logs of a host that may be losing its power, and its runtime files, at this very moment."""
    found: list[Path] = []
    for kind in ("vm", "ended"):
        with contextlib.suppress(FileNotFoundError):
            found += place.glob(f"{kind}/*/console.log")
    return found


def _whole(line: str) -> oracle.Ack | None:
    """Return what an acknowledgement says; None for the half of one whose QEMU was killed."""
    try:
        return oracle.parse_ack(line)
    except ValueError:
        return None
