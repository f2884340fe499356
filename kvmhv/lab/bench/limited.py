"""Thirty moves with a limit to the blackout, of a guest that is at times too busy for it."""

import json
import time
from typing import Any

from kvmhv.lab.bench import figures
from kvmhv.lab.bench.machine import shape
from kvmhv.lab.bench.product import kvmhv
from kvmhv.lab.guest_images import ensure_guest_images
from kvmhv.lab.lab import Lab
from kvmhv.lab.steps import Progress

MOVES = 30
LIMIT_MS = 300
SLACK = 1.2
RATES = ("1gbit", "400mbit", "100mbit")
"""In turn: the guest dirties about as much as the slowest one takes."""
GUEST = "kvmhv.dirty=10M kvmhv.dirty_set=32M kvmhv.dirty_kind=random"
MEMORY_MIB = 96
WORKS_S = 20.0


def measure(name: str, progress: Progress) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return how many blackouts were too long unannounced, and the moves' reports. Raises HostError `bench-step`."""
    progress(f"{MOVES} moves whose blackout may last {LIMIT_MS} ms")
    lab = Lab.up(name, rate=RATES[0], progress=progress)
    reports = []
    try:
        images = ensure_guest_images(progress)
        files = ("--kernel", str(images.vmlinuz), "--initrd", str(images.initrd))
        kvmhv(lab, "host1", "image", "import", "limited", *files, "--append", f"{images.cmdline} {GUEST}")
        kvmhv(lab, "host1", "vm", "create", "limited", "--memory", f"{MEMORY_MIB}M", "--image", "limited", "--start")
        time.sleep(WORKS_S)
        here, there = "host1", "host2"
        for number in range(MOVES):
            for host in (here, there):
                shape(lab.host(host), "migration", RATES[number % len(RATES)])
            asked = ("vm", "move", "limited", "--to", there, "--blackout-limit", str(LIMIT_MS), "--json")
            report: dict[str, Any] = json.loads(kvmhv(lab, here, *asked, may_fail=True))
            reports.append(report)
            progress(f"  {number + 1} {report['outcome']}, blackout {report['blackout_ms']}, {report['switchover']}")
            if report["outcome"] == "done":
                here, there = there, here
    finally:
        lab.down()
    done = [one for one in reports if one["outcome"] == "done"]
    over = [one for one in done if one["blackout_ms"] > SLACK * LIMIT_MS]
    silent = [one for one in over if not one["warnings"]]
    away = sum((one["error"] or {}).get("code") == "blackout-over-limit" for one in reports)
    longest_ms = max((one["blackout_ms"] for one in done), default=0.0)
    note = f"{len(done)} moved (longest blackout {longest_ms:.0f} ms), {away} turned away, {len(over)} over and told so"
    what = f"of {MOVES} moves with a limit of {LIMIT_MS} ms"
    return [
        figures.limit(f"over by more than 20 % without having said so, {what}", len(silent), "", 0.0, note),
        figures.limit(f"over by more than 20 %, {what}", len(over), "", 1.0, note),
    ], reports
