"""Thirty moves with a limit to the blackout, of guests that are at times too busy for it.

Three guests, one after the other, each of which dirties memory at a rate of its own; the link is now fast, now slow.
Where the blackout would be too long the move is taken back in one turn of the links; in the next the guest is slowed
down.
"""

import json
import time
from typing import Any

from kvmhv.lab.bench import figures
from kvmhv.lab.bench.cases import GUEST_NUMBERS, KVMHV, Guest
from kvmhv.lab.bench.machine import Hardware, hardware, shape
from kvmhv.lab.bench.meters import Onlooker
from kvmhv.lab.bench.product import kvmhv
from kvmhv.lab.guest_images import ensure_guest_images
from kvmhv.lab.lab import Lab
from kvmhv.lab.steps import Progress

LIMIT_MS = 300
SLACK = 1.2
RATES = ("1gbit", "400mbit", "100mbit")
"""In turn."""
ON_OVERRUN = ("cancel", "throttle")
"""In turn, each for one turn of the links."""
DIRTY_MIB_PER_S = (2, 10, 40)
"""The guests: the slowest link takes about 11 MiB/s, the next one 45."""
MOVES_EACH = 10
MOVES = MOVES_EACH * len(DIRTY_MIB_PER_S)
MEMORY_MIB, DIRTY_SET_MIB = 96, 32
BEAT_PORT = 7164
MOVE_S = 420.0
WORKS_S = 10.0
SETTLE_S = 0.6
"""The guest's heartbeats are looked at for so much longer than the move lasts."""
NAME = "limited"
OVER_LIMIT = "blackout-over-limit"

Move = dict[str, Any]
"""`dirty_mib_per_s`, `rate`, `on_overrun`, `seen_ms` (the longest gap in the guest's heartbeats), and the `report`."""


def measure(name: str, progress: Progress) -> tuple[list[dict[str, Any]], list[Move]]:
    """Return how many blackouts were too long unannounced, and the moves. Raises HostError `bench-step`."""
    progress(f"{MOVES} moves whose blackout may last {LIMIT_MS} ms")
    lab = Lab.up(name, rate=RATES[0], progress=progress)
    moves: list[Move] = []
    try:
        for dirty in DIRTY_MIB_PER_S:
            guest = _Guest(lab, dirty, progress)
            for number in range(MOVES_EACH):
                rate = RATES[number % len(RATES)]
                moves.append(guest.move(rate, ON_OVERRUN[number // len(RATES) % len(ON_OVERRUN)]))
                progress(f"  {len(moves)} {dirty} MiB/s, {rate}: {told(moves[-1])}")
            guest.end()
    finally:
        lab.down()
    return limits(moves), moves


def told(move: Move) -> str:
    """Return how a move ended, in a line. Pure."""
    report = move["report"]
    ended = "moved" if report["outcome"] == "done" else (report["error"] or {}).get("code") or report["outcome"]
    slowed = f", slowed down by {report['throttle_percent']} %" if report["throttle_percent"] else ""
    blackout = ""
    if report["blackout_ms"] is not None:
        blackout = f", blackout {report['blackout_ms']:.0f} ms"
        expected_ms = (report["switchover"] or {}).get("predicted_ms")
        blackout += "" if expected_ms is None else f" ({expected_ms:.0f} ms expected)"
    return f"{ended}{slowed}{blackout}, silent for {move['seen_ms']:.0f} ms"


def limits(moves: list[Move]) -> list[dict[str, Any]]:
    """Return what the moves come to. Pure.

    A warning that comes after the blackout is none: a blackout that was too long has been announced only if more than
    the limit was expected before the guest was stopped.
    """
    done = [one for one in moves if one["report"]["outcome"] == "done"]
    away = [one for one in moves if (one["report"]["error"] or {}).get("code") == OVER_LIMIT]
    slowed = [one for one in done if one["report"]["throttle_percent"]]
    longest_ms = max((one["report"]["blackout_ms"] for one in done), default=0.0)
    note = f"{len(done)} moved (longest blackout {longest_ms:.0f} ms), {len(slowed)} of them slowed down; "
    note += f"{len(away)} turned away; {len(moves) - len(done) - len(away)} failed otherwise"
    unannounced = [one for one in moves if not _announced(one)]
    over = sum((one["report"]["blackout_ms"] or 0.0) > SLACK * LIMIT_MS for one in unannounced)
    slow = [one for one in unannounced if one["report"]["throttle_percent"]]
    free = [one for one in unannounced if not one["report"]["throttle_percent"]]
    silent = sum(one["seen_ms"] > SLACK * LIMIT_MS for one in free)
    free_ms, slow_ms = (max((one["seen_ms"] for one in some), default=0.0) for some in (free, slow))
    longest = f"longest gap {free_ms:.0f} ms; of guests that were slowed down, and sleep for that, {slow_ms:.0f} ms"
    what = f"over {LIMIT_MS} ms by more than 20 % without having said so"
    return [
        figures.limit(f"blackouts {what}, of {len(moves)} moves with that limit", over, "", 0.0, note),
        figures.limit(
            f"heartbeats missing for {what}, of {len(free)} whose guest was not slowed down", silent, "", 0.0, longest
        ),
    ]


def _announced(move: Move) -> bool:
    switchover = move["report"]["switchover"] or {}
    return bool((switchover.get("predicted_ms") or 0.0) > LIMIT_MS)


class _Guest:
    """A guest that goes there and back."""

    def __init__(self, lab: Lab, dirty_mib_per_s: int, progress: Progress) -> None:
        """Start it on the first host, and wait until it works."""
        self._lab, self._dirty = lab, dirty_mib_per_s
        self._here, self._there = "host1", "host2"
        images = ensure_guest_images(progress)
        client = lab.host("client")
        client_ip = client.plan.addresses["lan"]
        guest = Guest(MEMORY_MIB, dirty_mib_per_s, DIRTY_SET_MIB)
        machine = hardware(guest, KVMHV, images.cmdline, BEAT_PORT, client_ip)
        self._onlooker = Onlooker(client, BEAT_PORT, f"{client_ip.rsplit('.', 1)[0]}.{GUEST_NUMBERS[KVMHV]}")
        self._start(machine, (str(images.vmlinuz), str(images.initrd)))
        self._onlooker.wait_ready()
        time.sleep(WORKS_S)

    def _start(self, machine: Hardware, files: tuple[str, str]) -> None:
        image = f"{NAME}-{self._dirty}"
        kernel = ("--kernel", files[0], "--initrd", files[1], "--append", machine.append)
        kvmhv(self._lab, self._here, "image", "import", image, *kernel)
        wanted = ("--memory", f"{machine.memory_mib}M", "--image", image, "--switch", "lan", "--mac", machine.mac)
        kvmhv(self._lab, self._here, "vm", "create", NAME, *wanted, "--start")

    def move(self, rate: str, on_overrun: str) -> Move:
        """Move it over a link of this rate, or try to."""
        for host in (self._here, self._there):
            shape(self._lab.host(host), "migration", rate)
        self._onlooker.mark("move")
        asked = ("--to", self._there, "--blackout-limit", str(LIMIT_MS), "--on-overrun", on_overrun, "--json")
        report = json.loads(kvmhv(self._lab, self._here, "vm", "move", NAME, *asked, may_fail=True, timeout_s=MOVE_S))
        time.sleep(SETTLE_S)
        seen_ms = self._onlooker.window()["beats"]["longest_gap_ms"]
        if report["outcome"] == "done":
            self._here, self._there = self._there, self._here
        return {
            "dirty_mib_per_s": self._dirty, "rate": rate, "on_overrun": on_overrun, "seen_ms": seen_ms,
            "report": report,
        }  # fmt: skip

    def end(self) -> None:
        """End it and forget it."""
        kvmhv(self._lab, self._here, "vm", "stop", NAME, "--force")
        kvmhv(self._lab, self._here, "vm", "remove", NAME)
        self._onlooker.end()
