"""What the target knows of its move: the state that target.py steps, the journal keeps and report() shows."""

import enum
from collections.abc import Callable

import msgspec

from kvmhv.core import first_frame
from kvmhv.core.effects import Effect
from kvmhv.core.facts import Fact
from kvmhv.core.handover import TargetHold
from kvmhv.model import ErrorBody, IncomingAddress, MoveReport, Outcome, Phase, Plan, Struct, Vm


class TargetStep(enum.StrEnum):
    """Where the target is."""

    RECEIVING = "receiving"
    PREPARING = "preparing"
    WAITING = "waiting"
    STARTING = "starting"
    SETTLING = "settling"
    UNDOING = "undoing"
    STANDING = "standing"
    ENDED = "ended"


class Pages(enum.StrEnum):
    """Post-copy: how it stands with the guest's pages."""

    TOGETHER = "together"
    """No post-copy: they come before all else is there."""
    MISSING = "missing"
    THERE = "there"
    LOST = "lost"


class TargetState(Struct, frozen=True, kw_only=True):
    """Immutable; step makes the next one. Journalled whole."""

    move_id: str
    source: str
    target: str
    plan: Plan
    psk_hex: str
    hold: TargetHold
    started_wall_s: float
    volatile_id: str
    """Names the volatile journal in which this move began; another one after a reboot."""

    step: TargetStep = TargetStep.RECEIVING
    outcome: Outcome = Outcome.RUNNING
    failure: ErrorBody | None = None
    connected: bool = True
    preparing: bool = False
    """Prepare is under way: what it makes can only be taken back when it has answered."""
    undo_tries: int = 0
    between_tries: bool = False
    """Taking back failed, and its step's timer counts the pause until it is tried again."""
    stuck: ErrorBody | None = None
    """Why it cannot be taken back, while that is tried again."""
    address: IncomingAddress | None = None
    mirrors_ended: bool = False
    held: bool = False
    """The source's guest was stopped by its agent: what is loaded here cannot have been overtaken there."""
    granted_sent: bool = True
    unexported: bool = False
    transferred: bool = False
    pages: Pages = Pages.TOGETHER
    lost: ErrorBody | None = None
    """Why what the guest had in memory is lost."""
    attempt: int = 0
    """Post-copy: which one of the source's to send the rest of the pages is waited for."""
    pages_address: IncomingAddress | None = None
    """Where."""
    granted_epoch: int | None = None
    loaded_ms: float | None = None
    granted_ms: float | None = None
    resumed_ms: float | None = None
    first_frame_after_ms: float | None = None
    adopted: bool = False
    warnings: tuple[str, ...] = ()
    source_report: MoveReport | None = None

    @property
    def vm(self) -> Vm:
        """The VM as it will be here."""
        return self.plan.target_vm


Result = tuple[TargetState, list[Effect]]
Handler = Callable[[TargetState, Fact], Result]

STEP_TIMER = "step"
"""How long the step may take."""
PEER_TIMER = "peer"
"""How long the source may be out of reach."""

BEFORE_RUN = (TargetStep.RECEIVING, TargetStep.PREPARING, TargetStep.WAITING)


def update(state: TargetState, **changes: object) -> TargetState:
    """Return the state with some of its fields changed."""
    return msgspec.structs.replace(state, **changes)


def report(state: TargetState) -> MoveReport:
    """Return the move as people see it on the target: the source's own report where it has arrived."""
    if state.source_report is not None:
        whole = msgspec.structs.replace(
            state.source_report, direction="in", warnings=(*state.source_report.warnings, *state.warnings)
        )
        return first_frame.noted(whole, state.first_frame_after_ms)
    vm, failure, outcome = state.vm, state.stuck or state.failure or state.lost, state.outcome
    if state.step is TargetStep.UNDOING:
        outcome = Outcome.RUNNING if state.stuck is None else Outcome.NEEDS_OPERATOR
    phase = Phase.CLEANUP if state.step in (TargetStep.SETTLING, TargetStep.ENDED) else Phase.SETUP
    if state.step in (TargetStep.WAITING, TargetStep.STARTING):
        phase = Phase.STATE if state.mirrors_ended or state.transferred else Phase.MEMORY
    return MoveReport(
        id=state.move_id,
        vm=vm.name,
        vm_id=vm.id,
        source=state.source,
        target=state.target,
        direction="in",
        mode=state.plan.mode,
        outcome=outcome,
        reason=failure.message if failure else None,
        error=failure,
        phase=phase,
        phases=(),
        passes=(),
        switchover=None,
        blackout_ms=None,
        blackout_uncertainty_ms=None,
        memory_bytes=0,
        disk_bytes=0,
        findings=(),
        progress=1.0 if state.outcome is Outcome.DONE else 0.0,
        remaining_bytes=0,
        storage_total_bytes=0,
        storage_copied_bytes=0,
        warnings=state.warnings,
        started_at=state.started_wall_s,
        ended_at=None,
    )
