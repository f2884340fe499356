"""What the source knows of its move: the state that source.py steps, the journal keeps and report() shows."""

import enum
from collections.abc import Callable

import msgspec

from kvmhv.core.effects import Effect, SetTimer
from kvmhv.core.facts import Fact, PassStarted
from kvmhv.core.handover import SourceHold
from kvmhv.messages import Offer
from kvmhv.model import (
    ErrorBody,
    Finding,
    IncomingAddress,
    Inventory,
    MoveReport,
    MoveRequest,
    Outcome,
    Pass,
    Phase,
    PhaseTime,
    Plan,
    Rule,
    Struct,
    Switchover,
    Timeouts,
    Vm,
)


class SourceStep(enum.StrEnum):
    """Where the source is."""

    ENQUIRING = "enquiring"
    OFFERING = "offering"
    STORAGE = "storage"
    MEMORY = "memory"
    STOPPING = "stopping"
    SWITCHING = "switching"
    GRANTED = "granted"
    CLEANUP = "cleanup"
    UNDOING = "undoing"
    ENDED = "ended"


class PhaseMark(Struct, frozen=True, kw_only=True):
    """When a phase began."""

    phase: Phase
    at_ms: float


class SourceState(Struct, frozen=True, kw_only=True):
    """Immutable; source.step makes the next one. Journalled whole, so a new agent has all that the old one knew."""

    move_id: str
    source: str
    target: str
    vm: Vm
    request: MoveRequest
    rule: Rule
    timeouts: Timeouts
    inventory: Inventory
    psk_hex: str
    hold: SourceHold
    started_wall_s: float
    volatile_id: str
    """Names the volatile journal in which this move began; another one after a reboot."""
    throughput_bytes_per_s: float | None = None
    """What earlier moves to this target reached, for the estimate."""

    step: SourceStep = SourceStep.ENQUIRING
    outcome: Outcome = Outcome.RUNNING
    failure: ErrorBody | None = None
    findings: tuple[Finding, ...] = ()
    warnings: tuple[str, ...] = ()
    plan: Plan | None = None
    address: IncomingAddress | None = None
    connected: bool = False
    files_sent: bool = False

    marks: tuple[PhaseMark, ...] = ()
    ended_ms: float | None = None
    disk_total_bytes: int = 0
    copied_bytes: int = 0
    memory_sent_bytes: int = 0
    memory_remaining_bytes: int = 0
    memory_total_bytes: int = 0
    passes: tuple[Pass, ...] = ()
    pass_begun: PassStarted | None = None

    switchover: Switchover | None = None
    guest_runs: bool = True
    """As far as this move stopped it."""
    stopped_ms: float | None = None
    resumed_ms: float | None = None
    """The target's RESUME in the source's clock."""
    clock_uncertainty_ms: float | None = None
    pre_switchover: bool = False
    mirrors_finished: bool = False
    memory_sent: bool = False

    copy_ended: bool = False
    target_owns: bool = False
    removing: bool = False
    undone: bool = False
    resumed: bool = False
    """After the undo the guest was seen to run here."""
    target_undone: bool = False

    @property
    def phase(self) -> Phase:
        """The phase that runs, or the last one that did."""
        return self.marks[-1].phase if self.marks else Phase.SETUP

    def planned(self) -> Plan:
        """The plan, where the step implies that there is one."""
        assert self.plan is not None
        return self.plan

    def offer(self) -> Offer:
        """The offer of this plan."""
        return Offer(epoch=self.hold.epoch, plan=self.planned(), psk_hex=self.psk_hex)

    def begin_phase(self, phase: Phase, at_ms: float) -> "SourceState":
        """Note when a phase begins; a phase that runs already is not begun again."""
        if self.marks and self.marks[-1].phase is phase:
            return self
        return msgspec.structs.replace(self, marks=(*self.marks, PhaseMark(phase=phase, at_ms=at_ms)))

    def end_phases(self, at_ms: float) -> "SourceState":
        """Note when the move ended."""
        return msgspec.structs.replace(self, ended_ms=at_ms)


Result = tuple[SourceState, list[Effect]]
Handler = Callable[[SourceState, Fact], Result]

STEP_TIMER = "step"
"""How long the step may take."""
IDLE_TIMER = "idle"
"""How long a phase may go without progress."""
PEER_TIMER = "peer"
"""How long the other agent may be out of reach."""

BEFORE_BLACKOUT = (SourceStep.ENQUIRING, SourceStep.OFFERING, SourceStep.STORAGE, SourceStep.MEMORY)
UNDOABLE = (*BEFORE_BLACKOUT, SourceStep.STOPPING, SourceStep.SWITCHING)


def update(state: SourceState, **changes: object) -> SourceState:
    """Return the state with some of its fields changed."""
    return msgspec.structs.replace(state, **changes)


def enter(state: SourceState, to: SourceStep, timeout_s: float, **changes: object) -> Result:
    """Go to a step that may take so long."""
    return update(state, step=to, **changes), [SetTimer(name=STEP_TIMER, after_s=timeout_s)]


def failed_body(state: SourceState, code: str, text: str, todo: str, host: str) -> ErrorBody:
    """Return an error that says which side failed, and that the VM goes on at the source."""
    return ErrorBody(code=code, message=f"{text}; the VM runs on {state.source}", todo=todo, host=host, exit_status=1)


def report(state: SourceState, now_ms: float) -> MoveReport:
    """Return the move as people see it."""
    blackout_ms = None
    if state.stopped_ms is not None and state.resumed_ms is not None:
        blackout_ms = max(0.0, state.resumed_ms - state.stopped_ms)
    return MoveReport(
        id=state.move_id,
        vm=state.vm.name,
        vm_id=state.vm.id,
        source=state.source,
        target=state.target,
        direction="out",
        mode=state.plan.mode if state.plan else None,
        outcome=Outcome.RUNNING if state.step is SourceStep.UNDOING else state.outcome,
        reason=state.failure.message if state.failure else None,
        error=state.failure,
        phase=state.phase,
        phases=phase_times(state, now_ms),
        passes=state.passes,
        switchover=state.switchover,
        blackout_ms=blackout_ms,
        blackout_uncertainty_ms=state.clock_uncertainty_ms if blackout_ms is not None else None,
        memory_bytes=state.memory_sent_bytes,
        disk_bytes=state.copied_bytes,
        findings=state.findings,
        progress=progress(state),
        remaining_bytes=state.memory_remaining_bytes,
        storage_total_bytes=state.disk_total_bytes,
        storage_copied_bytes=state.copied_bytes,
        warnings=state.warnings,
        started_at=state.started_wall_s,
        ended_at=None,
    )


def phase_times(state: SourceState, now_ms: float) -> tuple[PhaseTime, ...]:
    """Return how long each phase took, the running one up to now."""
    if not state.marks:
        return ()
    ends = [mark.at_ms for mark in state.marks[1:]] + [state.ended_ms if state.ended_ms is not None else now_ms]
    return tuple(
        PhaseTime(phase=mark.phase, seconds=max(0.0, end - mark.at_ms) / 1000)
        for mark, end in zip(state.marks, ends, strict=True)
    )


def progress(state: SourceState) -> float:
    """Return 0..1: bytes of disks and of the first pass, then passes against their limit; never goes backward."""
    if state.step is SourceStep.ENDED and state.outcome is Outcome.DONE:
        return 1.0
    if state.plan is None or not state.marks:
        return 0.0
    memory_weight = max(1, state.memory_total_bytes or state.vm.memory_bytes)
    disk_weight = max(state.disk_total_bytes, sum(copy.used_bytes for copy in state.plan.disk_copies))
    disk_share = min(1.0, state.copied_bytes / disk_weight) if disk_weight else 1.0
    memory_share = 0.0
    if state.switchover is not None:
        memory_share = 0.95
    elif state.passes:
        memory_share = 0.8 + 0.15 * len(state.passes) / (state.rule.max_passes + 1)
    elif state.phase is Phase.MEMORY and state.memory_total_bytes:
        memory_share = 0.8 * max(0.0, 1 - state.memory_remaining_bytes / state.memory_total_bytes)
    if state.phase in (Phase.MEMORY, Phase.STATE, Phase.CLEANUP):
        disk_share = 1.0
    return (disk_share * disk_weight + memory_share * memory_weight) / (disk_weight + memory_weight)
