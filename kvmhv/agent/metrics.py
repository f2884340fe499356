"""Prometheus metrics of the agent, in a registry of their own.

What only grows is counted when it happens (`observe_move`, once for each move at its end); what is true at this moment
(states of VMs, the moves that run) is read at the scrape from a snapshot, so that nothing can be left standing.
"""

import asyncio
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvmhv.model import HostSettings, MoveReport, Outcome, Phase, Struct, VmState, VmSummary

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BLACKOUT_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
PHASE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 7200.0, 28800.0)
PASS_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
LAG_BUCKETS_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
LAG_PROBE_S = 1.0


class Snapshot(Struct, frozen=True, kw_only=True):
    """What a scrape shows of this moment."""

    vms: tuple[VmSummary, ...]
    moves: tuple[MoveReport, ...]
    settings: HostSettings


class Metrics:
    """The agent's metrics."""

    def __init__(self, version: str, host: str) -> None:
        self._registry = CollectorRegistry()
        self._present = _Present()
        self._registry.register(self._present)
        ProcessCollector(registry=self._registry)
        Info("kvmhv_build", "Version of the agent, and its host.", registry=self._registry).info(
            {"version": version, "host": host}
        )
        self._migrations = Counter(
            "kvmhv_migrations_total",
            "Moves that ended.",
            ("direction", "mode", "outcome", "reason"),
            registry=self._registry,
        )
        self._phase_s = Histogram(
            "kvmhv_migration_phase_seconds",
            "Time of each phase of the moves that ended well.",
            ("phase", "mode"),
            buckets=PHASE_BUCKETS_S,
            registry=self._registry,
        )
        self._blackout_s = Histogram(
            "kvmhv_migration_blackout_seconds",
            "Time in which the VM ran nowhere.",
            buckets=BLACKOUT_BUCKETS_S,
            registry=self._registry,
        )
        self._passes = Histogram(
            "kvmhv_migration_passes",
            "Complete passes of pre-copy before the guest was stopped.",
            buckets=PASS_BUCKETS,
            registry=self._registry,
        )
        self._peer_refused = Counter(
            "kvmhv_peer_refused",
            "Connections that were refused before their first request, by cause.",
            ("cause",),
            registry=self._registry,
        )
        self._lag_s = Histogram(
            "kvmhv_event_loop_lag_seconds",
            "How late the agent's event loop came to a timer.",
            buckets=LAG_BUCKETS_S,
            registry=self._registry,
        )

    def observe_move(self, report: MoveReport) -> None:
        """Count a move at its end: called once for each move on each side."""
        mode = report.mode.value if report.mode is not None else "none"
        reason = report.error.code if report.error is not None else "none"
        self._migrations.labels(report.direction, mode, report.outcome.value, reason).inc()
        if report.outcome is not Outcome.DONE:
            return
        for phase in report.phases:
            self._phase_s.labels(phase.phase.value, mode).observe(phase.seconds)
        if report.blackout_ms is not None:
            self._blackout_s.observe(report.blackout_ms / 1000)
        if report.switchover is not None:
            self._passes.observe(report.switchover.pass_number)

    def peer_refused(self, cause: str) -> None:
        """Count a refused connection; `cause` is one of a few fixed words."""
        self._peer_refused.labels(cause).inc()

    def render(self, snapshot: Snapshot) -> bytes:
        """Return everything in Prometheus' text format (`CONTENT_TYPE`)."""
        self._present.snapshot = snapshot
        return generate_latest(self._registry)

    async def watch_loop_lag(self) -> None:
        """Measure the event loop's lag each second, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LAG_PROBE_S
            await asyncio.sleep(LAG_PROBE_S)
            self._lag_s.observe(max(0.0, loop.time() - due))


class _Present(Collector):
    """Gauges of this moment, made from the newest snapshot."""

    def __init__(self) -> None:
        self.snapshot = Snapshot(vms=(), moves=(), settings=HostSettings())

    def collect(self) -> Iterator[Metric]:
        running = [move for move in self.snapshot.moves if move.outcome is Outcome.RUNNING]
        yield self._vms()
        yield from self._slots(running)
        yield from _live(running)

    def _vms(self) -> Metric:
        family = GaugeMetricFamily("kvmhv_vms", "VMs of this host by state.", labels=("state",))
        for state in VmState:
            family.add_metric((state.value,), sum(vm.state is state for vm in self.snapshot.vms))
        return family

    def _slots(self, running: list[MoveReport]) -> Iterator[Metric]:
        settings = self.snapshot.settings
        used = GaugeMetricFamily("kvmhv_migrations_running", "Moves that run now.", labels=("direction",))
        limit = GaugeMetricFamily("kvmhv_migrations_limit", "Moves that may run at once.", labels=("direction",))
        for direction, most in (("out", settings.moves_out), ("in", settings.moves_in)):
            used.add_metric((direction,), sum(move.direction == direction for move in running))
            limit.add_metric((direction,), most)
        yield used
        yield limit
        yield GaugeMetricFamily(
            "kvmhv_migration_enabled", "1 if this host takes part in moves.", value=int(settings.enabled)
        )


def _live(running: list[MoveReport]) -> Iterator[Metric]:
    labels = ("vm", "direction")
    phase = GaugeMetricFamily(
        "kvmhv_migration_phase", "1 for the phase that the VM's move is in.", labels=(*labels, "phase")
    )
    number = GaugeMetricFamily("kvmhv_migration_pass", "Complete passes of the move so far.", labels=labels)
    remaining = GaugeMetricFamily("kvmhv_migration_remaining_bytes", "Memory still to be sent.", labels=labels)
    progress = GaugeMetricFamily("kvmhv_migration_progress_ratio", "0 to 1, never goes backward.", labels=labels)
    for move in running:
        key = (move.vm, move.direction)
        for name in Phase:
            phase.add_metric((*key, name.value), int(move.phase is name))
        number.add_metric(key, move.passes[-1].number if move.passes else 0)
        remaining.add_metric(key, move.remaining_bytes)
        progress.add_metric(key, move.progress)
    yield from (phase, number, remaining, progress)
