"""Prometheus metrics of the agent, in a registry of their own.

What only grows is counted when it happens (`observe_move`, once for each move at its end); what is true at this moment
(states of VMs, the moves that are open) is read at the scrape from a snapshot, so that nothing can be left standing.

A move is counted by both hosts (`direction`), its figures by its source alone, and its network gap by its target, which
is the one that sees it: a sum over all hosts has each figure once.
"""

import asyncio
from collections.abc import Iterator, Mapping

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, Info, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kvmhv.model import HostSettings, IoStall, Mode, MoveReport, Outcome, Phase, Struct, Vm, VmState, VmSummary

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

BLACKOUT_BUCKETS_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
PHASE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0, 600.0, 1800.0, 7200.0, 28800.0)
PASS_BUCKETS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
LATENCY_BUCKETS_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
LAG_PROBE_S = 1.0


class Snapshot(Struct, frozen=True, kw_only=True):
    """What a scrape shows of this moment."""

    vms: tuple[VmSummary, ...]
    moves: tuple[MoveReport, ...]
    """The moves that are open."""
    settings: HostSettings
    running_since: Mapping[str, float] = msgspec.field(default_factory=dict)
    """By the VM's id: since when (UNIX time) its guest runs here."""
    stalls: tuple[tuple[Vm, IoStall], ...] = ()
    """Disks that answer nothing."""
    queued: Mapping[str, int] = msgspec.field(default_factory=dict)
    """How many moves wait for what."""


class Metrics:
    """The agent's metrics."""

    def __init__(self, version: str, host: str) -> None:
        self._registry = registry = CollectorRegistry()
        self._present = _Present()
        registry.register(self._present)
        ProcessCollector(registry=registry)
        Info("kvmhv_build", "Version of the agent, and its host.", registry=registry).info(
            {"version": version, "host": host}
        )
        self._figures = _Figures(registry)
        self._peer_refused = Counter(
            "kvmhv_peer_refused",
            "Connections that were refused before their first request, by cause.",
            ("cause",),
            registry=registry,
        )
        self._refused = Counter(
            "kvmhv_migrations_refused",
            "Moves that were asked for or offered and not admitted here, by the error's code.",
            ("direction", "reason"),
            registry=registry,
        )
        for direction in ("out", "in"):
            self._refused.labels(direction, "limit-reached")
        self._lag_s = _latency(registry, "event_loop_lag", "How late the agent's event loop came to a timer.")
        self._qmp_s = _latency(registry, "qmp_command", "How long QEMU took to answer a QMP command.")
        self._journal_s = _latency(
            registry, "journal_write", "How long a move waited for its journal: on disk, or on tmpfs.", ("durable",)
        )

    def observe_move(self, report: MoveReport) -> None:
        """Count a move at its end: called once for each move on each side."""
        self._figures.count(report)
        if report.direction == "in":
            self.observe_network_gap(report)
        else:
            self.observe_answer_gap(report)

    def observe_network_gap(self, report: MoveReport) -> None:
        """Count a network gap: on the target, once, at the move's end or when it is known."""
        if report.network_gap_ms is not None:
            self._figures.network_gap_s.observe(report.network_gap_ms / 1000)

    def observe_answer_gap(self, report: MoveReport) -> None:
        """Count the gap to a probe's first answer: on the source, once, at the move's end or when it is known."""
        if report.answer_gap_ms is not None:
            self._figures.answer_gap_s.observe(report.answer_gap_ms / 1000)

    def move_refused(self, direction: str, reason: str) -> None:
        """Count a move that was not admitted; `reason` is an error's code."""
        self._refused.labels(direction, reason).inc()

    def peer_refused(self, cause: str) -> None:
        """Count a refused connection; `cause` is one of a few fixed words."""
        self._peer_refused.labels(cause).inc()

    def qmp_answered(self, seconds: float) -> None:
        """Note how long a QMP command took."""
        self._qmp_s.observe(seconds)

    def journal_written(self, durable: bool, seconds: float) -> None:
        """Note how long a journal entry took."""
        self._journal_s.labels("true" if durable else "false").observe(seconds)

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


def _latency(registry: CollectorRegistry, name: str, doc: str, labels: tuple[str, ...] = ()) -> Histogram:
    return Histogram(f"kvmhv_{name}_seconds", doc, labels, buckets=LATENCY_BUCKETS_S, registry=registry)


class _Figures:
    """What the moves that ended took."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, doc: str, buckets: tuple[float, ...], labels: tuple[str, ...] = ()) -> Histogram:
            return Histogram(f"kvmhv_migration_{name}", doc, labels, buckets=buckets, registry=registry)

        def counter(name: str, doc: str, *labels: str) -> Counter:
            return Counter(f"kvmhv_migration{name}", doc, labels, registry=registry)

        self._phase_s = histogram(
            "phase_seconds", "Time of each phase of the moves that ended well.", PHASE_BUCKETS_S, ("phase", "mode")
        )
        self._blackout_s = histogram("blackout_seconds", "Time in which the VM ran nowhere.", BLACKOUT_BUCKETS_S)
        self.network_gap_s = histogram(
            "network_gap_seconds",
            "From the VM's stop to its first frame that the target's switch saw (counted by the target).",
            BLACKOUT_BUCKETS_S,
        )
        self.answer_gap_s = histogram(
            "answer_gap_seconds",
            "From the VM's stop to its first answer to its probe (counted by the source; only VMs with a probe).",
            BLACKOUT_BUCKETS_S,
        )
        self._held_s = histogram(
            "writes_held_seconds",
            "How long a guest's disk requests waited while a storage move changed its images.",
            BLACKOUT_BUCKETS_S,
        )
        self._passes = histogram("passes", "Complete passes of pre-copy before the guest was stopped.", PASS_BUCKETS)
        self._migrations = counter("s", "Moves that ended.", "direction", "mode", "outcome", "reason")
        self._bytes = counter("_bytes", "Bytes that moves sent, however they ended.", "kind")
        self._saved = counter("_saved_bytes", "Bytes that moves did not have to send, and why.", "reason")
        self._switchovers = counter("_switchovers", "Why guests were stopped: threshold or pass-limit.", "reason")
        self._findings = counter("_findings", "Findings of the checks of moves.", "id")
        for kind in ("memory", "pages", "disk", "wire"):
            self._bytes.labels(kind)
        self._asked_pages = counter("_pages_waited_for", "Post-copy: pages that guests asked for before their turn.")
        for why in ("base", "unallocated", "zeros", "zero-pages"):
            self._saved.labels(why)

    def count(self, report: MoveReport) -> None:
        mode = report.mode.value if report.mode is not None else "none"
        reason = report.error.code if report.error is not None else "none"
        self._migrations.labels(report.direction, mode, report.outcome.value, reason).inc()
        if report.direction == "in":
            return
        self._bytes.labels("memory").inc(report.memory_bytes)
        self._bytes.labels("pages").inc(report.pages.sent_bytes if report.pages is not None else 0)
        self._asked_pages.inc(report.pages.requests if report.pages is not None else 0)
        self._bytes.labels("disk").inc(report.disk_bytes)
        self._bytes.labels("wire").inc(report.wire_bytes or 0)
        for saving in report.savings:
            self._saved.labels("base").inc(saving.base_bytes)
            self._saved.labels("unallocated").inc(saving.unallocated_bytes)
            self._saved.labels("zeros").inc(saving.zero_bytes or 0)
        self._saved.labels("zero-pages").inc(report.memory_zero_bytes or 0)
        for finding in report.findings:
            self._findings.labels(finding.id).inc()
        if report.switchover is not None:
            self._switchovers.labels(report.switchover.reason).inc()
        if report.outcome is not Outcome.DONE:
            return
        for phase in report.phases:
            self._phase_s.labels(phase.phase.value, mode).observe(phase.seconds)
        if report.blackout_ms is not None:
            self._blackout_s.observe(report.blackout_ms / 1000)
        if report.writes_held_ms is not None:
            self._held_s.observe(report.writes_held_ms / 1000)
        if report.switchover is not None:
            self._passes.observe(report.switchover.pass_number)


class _Present(Collector):
    """Gauges of this moment, made from the newest snapshot."""

    def __init__(self) -> None:
        self.snapshot = Snapshot(vms=(), moves=(), settings=HostSettings())

    def collect(self) -> Iterator[Metric]:
        moves = self.snapshot.moves
        yield self._vms()
        yield self._running()
        yield self._stalls()
        yield from self._slots()
        yield from _live(moves)
        yield from _estimates(moves)

    def _vms(self) -> Metric:
        family = GaugeMetricFamily("kvmhv_vms", "VMs of this host by state.", labels=("state",))
        counts = dict.fromkeys(VmState, 0)
        for vm in self.snapshot.vms:
            counts[vm.state] += 1
        for state, count in counts.items():
            family.add_metric((state.value,), count)
        return family

    def _running(self) -> Metric:
        family = GaugeMetricFamily(
            "kvmhv_vm_running_since_timestamp_seconds",
            "Since when the guest runs on this host; only for guests that run. More than one host has it for a VM: two "
            "copies run, or it has just moved between two scrapes.",
            labels=("vm", "vm_id"),
        )
        for vm in self.snapshot.vms:
            if vm.id in self.snapshot.running_since:
                family.add_metric((vm.name, vm.id), self.snapshot.running_since[vm.id])
        return family

    def _stalls(self) -> Metric:
        doc = "For how long a disk has answered nothing while its VM waits; only while it does."
        family = GaugeMetricFamily("kvmhv_vm_io_stalled_seconds", doc, labels=("vm", "disk"))
        for vm, stall in self.snapshot.stalls:
            family.add_metric((vm.name, stall.disk), stall.seconds)
        return family

    def _slots(self) -> Iterator[Metric]:
        settings, moves = self.snapshot.settings, self.snapshot.moves
        used = GaugeMetricFamily("kvmhv_migration_slots_in_use", "Moves that are open now.", labels=("direction",))
        free = GaugeMetricFamily("kvmhv_migration_slots_free", "Moves that may yet begin.", labels=("direction",))
        for direction, most in (("out", settings.moves_out), ("in", settings.moves_in)):
            count = sum(move.direction == direction for move in moves)
            used.add_metric((direction,), count)
            free.add_metric((direction,), max(0, most - count))
        doc = "Moves out that wait for a slot, by the limit that they wait for."
        queued = GaugeMetricFamily("kvmhv_migrations_queued", doc, labels=("reason",))
        for reason, length in self.snapshot.queued.items():
            queued.add_metric((reason,), length)
        yield used
        yield free
        yield queued
        yield GaugeMetricFamily(
            "kvmhv_migration_enabled", "1 if this host takes part in moves.", value=int(settings.enabled)
        )


class _PerVm:
    """One gauge of each VM that moves."""

    def __init__(self, name: str, doc: str, *labels: str) -> None:
        self.family = GaugeMetricFamily(f"kvmhv_migration_{name}", doc, labels=("vm", "direction", *labels))

    def add(self, move: MoveReport, value: float, *labels: str) -> None:
        self.family.add_metric((move.vm, move.direction, *labels), value)


def _live(moves: tuple[MoveReport, ...]) -> Iterator[Metric]:
    phase = _PerVm("phase", "1 for the phase that the VM's move is in.", "phase")
    number = _PerVm("pass", "Number of the pass that runs, or of the last one.")
    remaining = _PerVm("remaining_bytes", "Memory that the running pass has still to send.")
    dirty = _PerVm("dirty_bytes", "Memory that was dirty when the running pass began.")
    dirty_rate = _PerVm("dirty_bytes_per_second", "How fast the guest dirties memory, by the last complete pass.")
    rate = _PerVm("throughput_bytes_per_second", "What travels now, disks or memory.")
    progress = _PerVm("progress_ratio", "0 to 1, never goes backward.")
    operator = _PerVm("needs_operator", "1 if the move waits for somebody to decide.")
    for move in moves:
        for name in Phase:
            phase.add(move, int(move.phase is name), name.value)
        passes = len(move.passes)
        number.add(move, passes + (move.phase is Phase.MEMORY and move.switchover is None))
        remaining.add(move, move.remaining_bytes)
        dirty.add(move, move.dirty_bytes)
        dirty_rate.add(move, move.dirty_bytes_per_s)
        rate.add(move, move.throughput_bytes_per_s)
        progress.add(move, move.progress)
        operator.add(move, int(move.outcome is Outcome.NEEDS_OPERATOR))
    for one in (phase, number, remaining, dirty, dirty_rate, rate, progress, operator):
        yield one.family


def _estimates(moves: tuple[MoveReport, ...]) -> Iterator[Metric]:
    left = _PerVm("estimated_seconds_left", "Time until the move's end, by a bound of its estimate.", "bound")
    blackout = _PerVm("expected_blackout_seconds", "The blackout that the move will probably cost.")
    for move in moves:
        seen = move.estimate
        if seen is not None:
            for bound, seconds in (
                ("low", seen.seconds_low),
                ("likely", seen.seconds_likely),
                ("high", seen.seconds_high),
            ):
                left.add(move, seconds, bound)
            if move.mode is not Mode.STORAGE:
                blackout.add(move, seen.blackout_ms / 1000)
    yield left.family
    yield blackout.family
