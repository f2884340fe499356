"""What the source knows of its move: the state that source.py steps, the journal keeps and report() shows."""

import enum
from collections.abc import Callable

import msgspec

from kvmhv.core import blackout, first_frame, progress, savings
from kvmhv.core.effects import Effect, SetTimer
from kvmhv.core.facts import Fact, PassStarted
from kvmhv.core.handover import SourceHold
from kvmhv.core.phases import PhaseMark, phase_times
from kvmhv.messages import Offer
from kvmhv.model import (
    Asked,
    BlackoutStep,
    DiskSent,
    ErrorBody,
    Finding,
    HostVersions,
    IncomingAddress,
    Inventory,
    MoveReport,
    MoveRequest,
    Outcome,
    PagesFollowed,
    Pass,
    Phase,
    Plan,
    Rule,
    Struct,
    Switchover,
    Timeouts,
    Vm,
    Whereabouts,
)


class SourceStep(enum.StrEnum):
    """Where the source is. `aborting` and `concluding` are of VMs that another program runs (steered.py)."""

    ENQUIRING = "enquiring"
    OFFERING = "offering"
    STORAGE = "storage"
    MEMORY = "memory"
    STOPPING = "stopping"
    SWITCHING = "switching"
    GRANTED = "granted"
    SERVING = "serving"
    CLEANUP = "cleanup"
    ABORTING = "aborting"
    CONCLUDING = "concluding"
    UNDOING = "undoing"
    ENDED = "ended"


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
    link_bytes_per_s: float | None = None
    """The most that one of the last moves there reached, for the choice of channels."""
    fixed_blackout_ms: float | None = None
    """What earlier moves there took of a blackout beyond their memory."""
    asked: Asked | None = None
    queued_s: float | None = None
    """How long the move waited for a slot before it began."""
    versions: tuple[HostVersions, ...] = ()

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
    disks_sent: tuple[DiskSent, ...] = ()
    memory_sent_bytes: int = 0
    memory_remaining_bytes: int = 0
    memory_zero_bytes: int | None = None
    passes: tuple[Pass, ...] = ()
    pass_begun: PassStarted | None = None
    sampled_dirty_bytes_per_s: float | None = None
    progress: float = 0.0
    """Kept, so that it never goes backward."""
    progress_ms: float | None = None
    """When it was noted."""

    held_back: bool = False
    """It made room for another move: it is faster than its passes say."""
    throttled_ms: float | None = None
    """Since when the guest is slowed down."""
    throttle_percent: int = 0
    switchover: Switchover | None = None
    guest_runs: bool = True
    """As far as this move stopped it."""
    stopped_ms: float | None = None
    resumed_ms: float | None = None
    """The target's RESUME in the source's clock."""
    clock_uncertainty_ms: float | None = None
    blackout_marks: tuple[BlackoutStep, ...] = ()
    """Moments of the blackout in this host's clock."""
    first_frame_after_ms: float | None = None
    """From the target's RESUME to the guest's first frame there."""
    answered_ms: float | None = None
    """When the guest first answered its probe again."""
    wire_bytes: int | None = None
    halted_ms: float | None = None
    """When the lever's `stop` was done."""
    held: bool = False
    """The guest was stopped by this agent before QEMU did it: only this agent can let it go on."""
    pre_switchover: bool = False
    mirrors_finished: bool = False
    memory_sent: bool = False
    pages_follow: bool = False
    """Post-copy: the lever was pulled so that pages go over after the switchover."""
    handed_on: bool = False
    """Post-copy: QEMU has handed the state on, and cannot let the guest go on any more."""
    halted: bool = False  # it has lost its connection
    attempt: int = 0
    resuming: bool = False
    """Post-copy: which one it is to get another; whether that is being made."""
    pages_bytes: int = 0
    pages_requests: int = 0
    """Sent since the guest runs at the target; asked for by it before their turn."""
    followed_ms: float = 0.0
    """Since when the newest one stands: what QEMU said before is of another."""
    lost: ErrorBody | None = None
    """Post-copy: what the guest had in memory is lost, by the target's word."""

    copy_ended: bool = False
    target_owns: bool = False
    removing: bool = False
    undone: bool = False
    """The undo was tried, so the guest may go on."""
    undo_tries: int = 0
    between_tries: bool = False
    """Taking back failed, and its step's timer counts the pause until it is tried again."""
    stuck: ErrorBody | None = None
    """Why the guest does not go on here, while that is tried again."""
    cleared: bool = False
    """What the move made here is taken back, or was given up after so many tries."""
    resumed: bool = False
    """After the undo the guest was seen to run here."""
    target_undone: bool = False

    here: Whereabouts | None = None
    """A VM of another program: what it says of it here, since this side asks."""
    there: Whereabouts | None = None
    looks_alike: int = 0
    """How often both sides in a row left a conclusion that only time confirms."""

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


def mark(state: SourceState, name: str, at_ms: float, host: str | None = None) -> SourceState:
    """Note a moment of the blackout; one that is noted already stays as it is."""
    if any(one.name == name for one in state.blackout_marks):
        return state
    step = BlackoutStep(name=name, host=host or state.source, at_ms=at_ms)
    return update(state, blackout_marks=(*state.blackout_marks, step))


def failed_body(state: SourceState, code: str, text: str, todo: str, host: str) -> ErrorBody:
    """Return an error that says which side failed, and that the VM goes on at the source."""
    return ErrorBody(code=code, message=f"{text}; the VM runs on {state.source}", todo=todo, host=host, exit_status=1)


def report(state: SourceState, now_ms: float) -> MoveReport:
    """Return the move as people see it."""
    blackout_ms = None
    if state.stopped_ms is not None and state.resumed_ms is not None:
        blackout_ms = max(0.0, state.resumed_ms - state.stopped_ms)
    standing = standing_of(state, now_ms)
    failure = state.stuck or state.failure or state.lost
    runs = state.outcome is Outcome.RUNNING and state.step is not SourceStep.UNDOING
    return MoveReport(
        id=state.move_id,
        vm=state.vm.name,
        vm_id=state.vm.id,
        source=state.source,
        target=state.target,
        direction="out",
        mode=state.plan.mode if state.plan else None,
        outcome=_shown_outcome(state),
        reason=failure.message if failure else None,
        error=failure,
        phase=state.phase,
        phases=phase_times(state, now_ms),
        passes=state.passes,
        switchover=state.switchover,
        blackout_ms=blackout_ms,
        blackout_uncertainty_ms=state.clock_uncertainty_ms if blackout_ms is not None else None,
        memory_bytes=state.memory_sent_bytes,
        disk_bytes=state.copied_bytes,
        findings=state.findings,
        progress=_shown_progress(state, standing),
        remaining_bytes=0 if state.memory_sent else state.memory_remaining_bytes,
        storage_total_bytes=state.disk_total_bytes,
        storage_copied_bytes=state.copied_bytes,
        warnings=state.warnings,
        started_at=state.started_wall_s,
        ended_at=None,
        estimate=progress.estimate(standing) if runs else None,
        throughput_bytes_per_s=(progress.throughput_bytes_per_s(standing) or 0.0) if runs else 0.0,
        dirty_bytes=state.pass_begun.remaining_bytes if state.pass_begun and state.passes else 0,
        dirty_bytes_per_s=progress.dirty_bytes_per_s(standing),
        blackout_steps=blackout_steps(state),
        blackout_limit_ms=state.rule.blackout_limit_ms,
        throttle_percent=state.throttle_percent,
        network_gap_ms=first_frame.network_gap_ms(blackout_ms, state.first_frame_after_ms),
        answer_gap_ms=None if blackout_ms is None else _answer_gap_ms(state),
        wire_bytes=state.wire_bytes,
        asked=state.asked,
        request=state.request,
        versions=state.versions,
        plan=state.plan if state.step is SourceStep.ENDED else None,
        queued_seconds=state.queued_s,
        savings=savings.of_disks(state.plan, state.disks_sent),
        memory_zero_bytes=state.memory_zero_bytes,
        pages=_pages(state, now_ms),
    )


def _pages(state: SourceState, now_ms: float) -> PagesFollowed | None:
    if not state.handed_on or state.resumed_ms is None:
        return None
    seconds = sum(one.seconds for one in phase_times(state, now_ms) if one.phase is Phase.PAGES)
    return PagesFollowed(
        sent_bytes=state.pages_bytes,
        requests=state.pages_requests,
        seconds=seconds,
        attempts=state.attempt,
        complete=state.memory_sent and state.lost is None,
    )


def _answer_gap_ms(state: SourceState) -> float | None:
    if state.stopped_ms is None or state.answered_ms is None:
        return None
    return max(0.0, state.answered_ms - state.stopped_ms)


def _shown_outcome(state: SourceState) -> Outcome:
    """A move that is taken back has not ended: it runs, or it cannot be taken back without the operator."""
    if state.step is not SourceStep.UNDOING:
        return state.outcome
    return Outcome.NEEDS_OPERATOR if state.stuck is not None else Outcome.RUNNING


def _shown_progress(state: SourceState, standing: progress.Standing) -> float:
    """Between two facts it stands: what is shown must not depend on when somebody looks."""
    if state.step is SourceStep.ENDED and state.outcome is Outcome.DONE:
        return 1.0
    in_blackout = standing.phase in (Phase.STATE, Phase.PAGES, Phase.CLEANUP)
    return progress.progress(standing, state.progress, 0.0) if in_blackout else state.progress


def blackout_steps(state: SourceState) -> tuple[BlackoutStep, ...]:
    """Return the blackout's moments, counted from its beginning, in their order."""
    stopped_ms = state.stopped_ms
    if stopped_ms is None:
        return ()
    marks = list(state.blackout_marks)
    if state.resumed_ms is not None and state.first_frame_after_ms is not None:
        at_ms = state.resumed_ms + state.first_frame_after_ms
        marks.append(BlackoutStep(name=first_frame.NAME, host=state.target, at_ms=at_ms))
    if state.resumed_ms is not None and state.answered_ms is not None:
        marks.append(BlackoutStep(name=first_frame.ANSWER, host=state.source, at_ms=state.answered_ms))
    steps = (msgspec.structs.replace(one, at_ms=max(0.0, one.at_ms - stopped_ms)) for one in marks)
    return tuple(sorted(steps, key=lambda one: one.at_ms))


def standing_of(state: SourceState, now_ms: float) -> progress.Standing:
    """Return what the estimate is made from."""
    facts_of_vm, begun = state.inventory.facts_of_vm, state.pass_begun
    dirty_before = (facts_of_vm.dirty_bytes_per_s or 0.0) if facts_of_vm else 0.0
    planned_bytes = sum(copy.travelling_bytes for copy in state.plan.disk_copies) if state.plan else 0
    phase_ms = state.marks[-1].at_ms if state.marks else now_ms
    return progress.Standing(
        phase=state.phase if state.switchover is None else Phase.STATE,
        rule=state.rule,
        phase_s=max(0.0, now_ms - phase_ms) / 1000,
        disk_total_bytes=max(state.disk_total_bytes, planned_bytes),
        disk_copied_bytes=state.copied_bytes,
        used_bytes=facts_of_vm.memory_used_bytes if facts_of_vm else state.vm.memory_bytes,
        remaining_bytes=state.memory_remaining_bytes,
        passes=state.passes,
        pass_s=max(0.0, now_ms - begun.at_ms) / 1000 if begun else 0.0,
        pass_sent_bytes=max(0, state.memory_sent_bytes - begun.sent_bytes) if begun else 0,
        expected_dirty_bytes_per_s=state.sampled_dirty_bytes_per_s or dirty_before,
        expected_bytes_per_s=state.throughput_bytes_per_s or 0.0,
        blackout_fixed_s=(blackout.FIXED_MS if state.fixed_blackout_ms is None else state.fixed_blackout_ms) / 1000,
        shrinks=state.plan.channels.ratio if state.plan else 1.0,
    )


def with_progress(state: SourceState, now_ms: float) -> SourceState:
    """Note how far the move is now."""
    before_ms = state.progress_ms if state.progress_ms is not None else state.marks[0].at_ms if state.marks else now_ms
    now = progress.progress(standing_of(state, now_ms), state.progress, max(0.0, now_ms - before_ms) / 1000)
    return update(state, progress=now, progress_ms=now_ms)
