"""Eight moves between two hosts at the same time, beside the same eight one after the other.

All eight guests run all the time, so a move finds the same machine alone and in the crowd. They go there one after the
other and back at once, then the other way about: neither way is always the first, and none has one direction alone.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

from kvmhv.lab.bench import figures
from kvmhv.lab.bench.product import kvmhv
from kvmhv.lab.guest_images import ensure_guest_images
from kvmhv.lab.lab import Lab
from kvmhv.lab.steps import Progress

VMS = 8
MEMORY_MIB = 96
RATE = "400mbit"
GUEST = "kvmhv.dirty=1M kvmhv.dirty_set=32M kvmhv.dirty_kind=random"
WORKS_S = 30.0
ORDER = (False, True, True, False, False, True)
"""Whether each of the runs is at once; every other one goes back."""

Run = dict[str, Any]
"""`at_once`, `seconds`, and the moves' reports."""


def measure(name: str, progress: Progress) -> tuple[list[dict[str, Any]], list[Run]]:
    """Return the ratios of moves at once to moves one after the other, and the runs. Raises HostError `bench-step`."""
    progress(f"{VMS} moves at once, and one after the other, {len(ORDER)} times")
    lab = Lab.up(name, rate=RATE, progress=progress)
    runs: list[Run] = []
    try:
        crowd = _Crowd(lab, progress)
        for number, at_once in enumerate(ORDER):
            ways = ("host1", "host2") if number % 2 == 0 else ("host2", "host1")
            runs.append(crowd.move(*ways, at_once=at_once))
            how = "at once" if at_once else "one after the other"
            longest = max(report["blackout_ms"] for report in runs[-1]["reports"])
            progress(f"  {how}: {runs[-1]['seconds']:.2f} s, longest blackout {longest:.0f} ms")
    finally:
        lab.down()
    return limits(runs), runs


def limits(runs: list[Run]) -> list[dict[str, Any]]:
    """Return what the runs come to. Pure."""
    one_by_one, at_once = ([run for run in runs if run["at_once"] is wanted] for wanted in (False, True))
    single_s, crowd_s = (median(run["seconds"] for run in some) for some in (one_by_one, at_once))
    single_ms = median(_blackouts_ms(one_by_one))
    crowd_ms = _blackouts_ms(at_once)
    apart = median(max(memory) / min(memory) for memory in map(_memory_s, at_once))
    note = f"one after the other: {single_s:.2f} s, blackout {single_ms:.0f} ms; at once: {crowd_s:.2f} s, blackouts "
    note += f"{min(crowd_ms):.0f} to {max(crowd_ms):.0f} ms, median {median(crowd_ms):.0f} ms"
    what = f"{VMS} moves at once by {VMS} one after the other"
    return [
        figures.limit(f"time of {what}", crowd_s / single_s, "", 1.0, note),
        figures.limit(f"median blackout of {what}", median(crowd_ms) / single_ms, "", 1.5, note),
        figures.limit(f"worst blackout of {what}", _worst(one_by_one, at_once), "", 1.5, "by the same guest's alone"),
        figures.limit(f"slowest by fastest of {VMS} moves at once", apart, "", 1.5, "by their memory phases"),
    ]


def _blackouts_ms(runs: list[Run]) -> list[float]:
    return [ms for run in runs for ms in _guests_ms(run)]


def _worst(one_by_one: list[Run], at_once: list[Run]) -> float:
    """Return the largest ratio of a blackout in the crowd to the median of the same guest's blackouts alone."""
    alone_ms = [median(blackouts) for blackouts in zip(*map(_guests_ms, one_by_one), strict=True)]
    ratios = [ms / alone for run in at_once for ms, alone in zip(_guests_ms(run), alone_ms, strict=True)]
    return float(max(ratios))


def _guests_ms(run: Run) -> list[float]:
    """Return each guest's blackout, in their order."""
    return [float(report["blackout_ms"]) for report in run["reports"]]


def _memory_s(run: Run) -> list[float]:
    phases = [one for report in run["reports"] for one in report["phases"]]
    return [one["seconds"] for one in phases if one["phase"] == "memory"]


class _Crowd:
    """Eight guests that write a little, on one host of a lab."""

    def __init__(self, lab: Lab, progress: Progress) -> None:
        self._lab = lab
        images = ensure_guest_images(progress)
        files = ("--kernel", str(images.vmlinuz), "--initrd", str(images.initrd))
        kvmhv(self._lab, "host1", "image", "import", "crowd", *files, "--append", f"{images.cmdline} {GUEST}")
        for host in ("host1", "host2"):
            kvmhv(self._lab, host, "host", "set", f"migration.moves_out={VMS}", f"migration.moves_in={VMS}")
        for number in range(VMS):
            vm = f"crowd{number}"
            kvmhv(self._lab, "host1", "vm", "create", vm, "--memory", f"{MEMORY_MIB}M", "--image", "crowd", "--start")
        time.sleep(WORKS_S)

    def move(self, source: str, target: str, *, at_once: bool) -> Run:
        """Move all of them."""

        def one(number: int) -> dict[str, Any]:
            report: dict[str, Any] = json.loads(
                kvmhv(self._lab, source, "vm", "move", f"crowd{number}", "--to", target, "--json")
            )
            return report

        started_s = time.monotonic()
        with ThreadPoolExecutor(VMS if at_once else 1) as pool:
            reports = list(pool.map(one, range(VMS)))
        return {"at_once": at_once, "seconds": time.monotonic() - started_s, "reports": reports}
