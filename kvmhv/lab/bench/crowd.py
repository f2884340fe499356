"""Eight moves between two hosts at the same time, beside the same eight one after the other.

All eight guests run all the time, so a move finds the same machine alone and in the crowd.
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


def limits(name: str, progress: Progress) -> list[dict[str, Any]]:
    """Return the ratios of moves at once to moves one after the other. Raises HostError `bench-step`."""
    progress(f"{VMS} moves at once, and one after the other")
    lab = Lab.up(name, rate=RATE, progress=progress)
    try:
        crowd = _Crowd(lab, progress)
        single_s, single = crowd.move("host1", "host2", at_once=False)
        crowd_s, together = crowd.move("host2", "host1", at_once=True)
    finally:
        lab.down()
    walls = [one["ended_at"] - one["started_at"] for one in together]
    what = f"{VMS} moves at once by {VMS} one after the other"
    single_ms = median(map(_blackout_ms, single))
    note = f"one after the other: {single_s:.2f} s, blackout {single_ms:.0f} ms; at once: {crowd_s:.2f} s"
    blackout = median(map(_blackout_ms, together)) / single_ms
    return [
        figures.limit(f"time of {what}", crowd_s / single_s, "", 1.0, note),
        figures.limit(f"median blackout of {what}", blackout, "", 1.5, note),
        figures.limit(f"slowest by fastest of {VMS} moves at once", max(walls) / min(walls), "", 1.5, note),
    ]


def _blackout_ms(report: dict[str, Any]) -> float:
    return float(report["blackout_ms"])


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

    def move(self, source: str, target: str, *, at_once: bool) -> tuple[float, list[dict[str, Any]]]:
        """Move all of them; returns the seconds that it took, and the reports."""

        def one(number: int) -> dict[str, Any]:
            report: dict[str, Any] = json.loads(
                kvmhv(self._lab, source, "vm", "move", f"crowd{number}", "--to", target, "--json")
            )
            return report

        started_s = time.monotonic()
        with ThreadPoolExecutor(VMS if at_once else 1) as pool:
            reports = list(pool.map(one, range(VMS)))
        return time.monotonic() - started_s, reports
