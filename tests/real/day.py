"""A day's worth of moves under the eyes of a real Prometheus: is what it has in the end what the records say?

    python -m tests.real.day [--minutes 6] [--vms 4] [--more 192] [--seed N]

brings up a lab of its own: VMs that move there and back all the time and queue for the slots, some of the moves are
cancelled or cannot be, and more VMs that are only there. In the end the counters of both hosts are compared with the
records of their moves, nothing of a move may be left in a scrape, no alert may have fired, each guest's memory must be
whole; what a scrape cost is printed. Exit status 1: something was not so.
"""

import argparse
import contextlib
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from kvmhv.errors import KvmhvError
from kvmhv.lab.guest_images import ensure_guest_images
from kvmhv.lab.lab import Lab
from tests.real.moving import MIB, Pair, Report, Side, until
from tests.real.observers import Prometheus, prometheus
from tests.real.test_moves_observed import LIVE

WINDOW = "[2h]"


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Traveller(threading.Thread):
    """A VM that moves there and back until its time is over."""

    def __init__(self, name: str, sides: tuple[Side, Side], end_s: float, luck: random.Random) -> None:
        super().__init__(name=name)
        self.sides, self.end_s, self.luck = sides, end_s, luck
        self.broke: BaseException | None = None

    def run(self) -> None:
        """Move until the time is over."""
        try:
            while time.monotonic() < self.end_s:
                self.sides = self._one_move(*self.sides)
        except BaseException as error:
            self.broke = error

    def beats(self) -> bool:
        """Whether the guest works where it is now."""
        return "beat" in self.sides[0].console(self.name)

    def _one_move(self, source: Side, target: Side) -> tuple[Side, Side]:
        body: dict[str, object] = {"vm": self.name, "target": target.name, "queue_s": 600.0, "include_storage": True}
        dice = self.luck.random()
        if dice < 0.1:  # its disks cannot stay where they are: the check finds that
            body |= {"include_storage": False, "queue_s": None}
        elif dice < 0.3:
            body |= {"bandwidth_bytes_per_s": 4 * MIB}
        try:
            begun: Report = source.agent.call("POST", f"vms/{self.name}/move", dict[str, Any], body=body, timeout_s=120)
        except KvmhvError as error:
            assert error.code == "limit-reached", error  # of one that does not queue
            time.sleep(0.5)
            return source, target
        if 0.1 <= dice < 0.2:
            until("it has begun or waited enough", lambda: source.report(begun["id"])["queue"] is None)
            time.sleep(self.luck.random() * 3)
            with contextlib.suppress(KvmhvError):  # it has ended already
                source.agent.call("POST", f"moves/{begun['id']}/cancel", dict[str, Any], timeout_s=120)
        ended = until("the move ends", lambda: _ended(source, begun["id"]), 600)
        assert ended["outcome"] in ("done", "cancelled", "failed"), ended
        assert ended["outcome"] != "failed" or ended["error"]["code"] in ("incompatible", "limit-reached"), ended
        if ended["outcome"] != "done":
            return source, target
        until("it is over on both sides", lambda: _ended(target, begun["id"]))
        return target, source


def _ended(side: Side, move_id: str) -> Report | None:
    report = side.report(move_id)
    return report if report["outcome"] != "running" else None


def differences(side: Side, watcher: Prometheus, reports: list[Report]) -> list[str]:
    """Return where what Prometheus has of a host is not what its records say."""
    instance = f'instance=~"{side.host.plan.addresses["management"]}:.*"'
    found = []
    told: Counter[tuple[str, str, str]] = Counter()
    for report in reports:
        told[report["direction"], report["outcome"], (report["error"] or {}).get("code", "none")] += 1
    seen = {
        (one["metric"]["direction"], one["metric"]["outcome"], one["metric"]["reason"]): int(float(one["value"][1]))
        for one in watcher.query(f"sum by (direction, outcome, reason) (kvmhv_migrations_total{{{instance}}}) > 0")
    }
    if seen != dict(told):
        found.append(f"{side.name}: counted {seen}, recorded {dict(told)}")
    out = [report for report in reports if report["direction"] == "out"]
    done = [report for report in out if report["outcome"] == "done"]
    sums = {
        "kvmhv_migration_blackout_seconds_sum": sum(report["blackout_ms"] for report in done) / 1000,
        "kvmhv_migration_blackout_seconds_count": len(done),
        'kvmhv_migration_bytes_total{kind="memory",': sum(report["memory_bytes"] for report in out),
        'kvmhv_migration_bytes_total{kind="wire",': sum(report["wire_bytes"] or 0 for report in out),
        'kvmhv_migration_phase_seconds_count{phase="state",': len(done),
    }
    for name, recorded in sums.items():
        query = name + (instance + "}" if name.endswith(",") else "{" + instance + "}")
        counted = sum(float(one["value"][1]) for one in watcher.query(query))
        if abs(counted - recorded) > 1e-6 * max(1.0, abs(recorded)):
            found.append(f"{side.name}: {query} is {counted}, the records have {recorded}")
    return found


def aftermath(pair: Pair, watcher: Prometheus) -> list[str]:
    """Return what Prometheus has that it should not have, when all moves are over."""
    found = []
    for side in pair.sides:
        reports = [r for r in side.kvmhv("move", "list") if r["direction"] != "here"]
        found += differences(side, watcher, reports)
        outcomes = Counter(f"{report['direction']} {report['outcome']}" for report in reports)
        waited = [report["queued_seconds"] for report in reports if report["queued_seconds"] is not None]
        say(f"{side.name}: {dict(outcomes)}; waited for a slot: {max(waited, default=0):.1f} s at most")
    found += [f"left over: {one['metric']}" for one in watcher.query(f'{{__name__=~"{LIVE}"}}')]
    found += [f"still queued: {one['metric']}" for one in watcher.query("kvmhv_migrations_queued > 0")]
    fired = watcher.query(f'count_over_time(ALERTS{{alertstate="firing"}}{WINDOW})')
    found += [f"alert: {one['metric']} {one['value'][1]} times" for one in fired]
    most = watcher.value(f"max(max_over_time(kvmhv_migration_slots_in_use{WINDOW}))")
    if most > 2:
        found.append(f"{most:.0f} moves at once where 2 are allowed")
    return found


def costs(watcher: Prometheus) -> None:
    """Print what the scrapes cost."""
    for name, text in (
        (f"max(max_over_time(kvmhv_migration_slots_in_use{WINDOW}))", "moves of one direction at once, most"),
        (f"max(max_over_time(sum by (instance) (kvmhv_migrations_queued){WINDOW[:-1]}:1s]))", "queue, longest"),
        (f"max(max_over_time(scrape_samples_scraped{WINDOW}))", "series of a scrape, most"),
        ("count(count by (__name__) ({__name__=~'kvmhv_.*',job='kvmhv'}))", "names"),
        (f"max(quantile_over_time(0.5, scrape_duration_seconds{WINDOW})) * 1000", "scrape, median ms"),
        (f"max(quantile_over_time(0.95, scrape_duration_seconds{WINDOW})) * 1000", "scrape, 95 % ms"),
        (f"max(max_over_time(scrape_duration_seconds{WINDOW})) * 1000", "scrape, worst ms"),
        (f"sum(count_over_time(scrape_duration_seconds{WINDOW}))", "scrapes"),
        (f"sum(count_over_time((up == 0){WINDOW[:-1]}:1s])) or vector(0)", "scrapes that failed"),
    ):
        say(f"{text}: {watcher.value(name):.1f}")


def main() -> int:
    """Run it; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--vms", type=int, default=4)
    parser.add_argument("--more", type=int, default=192)
    parser.add_argument("--seed", type=int, default=1)
    wanted = parser.parse_args()
    images = ensure_guest_images(say)
    lab = Lab.up(f"day-{os.getpid()}"[:20], progress=say)
    with contextlib.ExitStack() as ends:
        ends.callback(lab.down)
        directory = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        pair = Pair(lab, images)
        for number in range(wanted.more):
            body = {"name": f"idle{number:03}", "memory_bytes": 32 * MIB}
            pair.a.agent.call("POST", "vms", dict[str, Any], body=body, timeout_s=60)
        names = [f"vm{number}" for number in range(wanted.vms)]
        for name in names:
            pair.boot(vm=name, rate_bytes_per_s=2 * MIB, disk="file=/srv/boot.raw,format=raw")
        watcher = ends.enter_context(prometheus(lab, directory))
        end_s = time.monotonic() + wanted.minutes * 60
        travellers = [Traveller(name, pair.sides, end_s, random.Random(f"{wanted.seed}/{name}")) for name in names]
        for one in travellers:
            one.start()
        for one in travellers:
            one.join()
        troubles = [f"{one.name}: {one.broke!r}" for one in travellers if one.broke is not None]
        for one in travellers:
            until(f"{one.name} beats", one.beats)
            if "BAD" in one.sides[0].console(one.name):
                troubles.append(f"{one.name}'s memory is damaged")
        ended_s = time.time()
        until("both agents are scraped after the moves", lambda: watcher.has_scraped_since(ended_s))
        troubles += aftermath(pair, watcher)
        costs(watcher)
    for trouble in troubles:
        say(f"TROUBLE {trouble}")
    return 1 if troubles else 0


if __name__ == "__main__":
    raise SystemExit(main())
