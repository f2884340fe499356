"""The source takes the move back: failure, cancel, refusal. The guest goes on here, then the rest is cleared."""

import msgspec

from kvmhv.core import facts, handover, source_switchover
from kvmhv.core.effects import (
    ClearTimer,
    Effect,
    Finish,
    Journal,
    NeedOperator,
    Send,
    SetTimer,
    UndoSource,
)
from kvmhv.core.handover import SourceRight
from kvmhv.core.source_state import (
    IDLE_TIMER,
    PEER_TIMER,
    STEP_TIMER,
    UNDOABLE,
    Result,
    SourceState,
    SourceStep,
    enter,
    failed_body,
    report,
    update,
)
from kvmhv.messages import Abort, Refused, Unknown
from kvmhv.model import ErrorBody, Outcome

UNDO_TRIES = 3


def undo(state: SourceState, at_ms: float, outcome: Outcome, error: ErrorBody) -> Result:
    """Take the move back. It is on disk before the guest can go on: a host that reboots never grants it any more."""
    if state.step is SourceStep.ENQUIRING:
        return end(state, at_ms, outcome, error)
    state = update(state, outcome=outcome, failure=error)
    after, effects = enter(state, SourceStep.UNDOING, state.timeouts.undo_s)
    return after, [
        Journal(),
        *effects,
        ClearTimer(name=IDLE_TIMER),
        ClearTimer(name=PEER_TIMER),
        UndoSource(timeout_s=state.timeouts.undo_s / 2),
        Send(message=Abort(epoch=state.hold.epoch, error=error)),
    ]


def fail(state: SourceState, at_ms: float, error: ErrorBody) -> Result:
    """Give the move up from outside of the table (a restarted agent does): the guest goes on here."""
    return undo(state, at_ms, Outcome.FAILED, error)


def end(state: SourceState, at_ms: float, outcome: Outcome, error: ErrorBody) -> Result:
    """The move is over without having moved the VM; says so if its QEMU is gone, then it does not run here."""
    if state.hold.copy_lost:
        text = error.message.removesuffix(f"; the VM runs on {state.source}")
        text = f"{text}; its QEMU on {state.source} is gone: the VM is stopped there"
        error = msgspec.structs.replace(error, message=text, exit_status=1)
        outcome = Outcome.FAILED  # nobody may read "cancelled" as "it runs"
    state = update(state, step=SourceStep.ENDED, outcome=outcome, failure=error, stuck=None).end_phases(at_ms)
    return state, [Finish(report=report(state, at_ms))]


def undone(state: SourceState, fact: facts.Fact) -> Result:
    """What was made here is taken back: the guest goes on."""
    assert isinstance(fact, facts.Undone)
    first = not state.undone
    wire_bytes = state.wire_bytes if fact.wire_bytes is None else fact.wire_bytes
    warnings = (*state.warnings, *fact.warnings)
    state = update(state, undone=True, cleared=True, warnings=warnings, wire_bytes=wire_bytes)
    return _resume(state, fact.at_ms) if first else _end_when_undone(state, fact.at_ms)


def _resume(state: SourceState, at_ms: float) -> Result:
    effects = handover.resume_at_source(state.hold, state.vm.id)
    after, more = _end_when_undone(state, at_ms)
    return after, [*effects, *more]


def resumed(state: SourceState, fact: facts.Fact) -> Result:
    """The guest runs here again."""
    state = update(state, resumed=True, guest_runs=state.hold.may_run(), stuck=None)
    return _end_when_undone(state, fact.at_ms)


def target_undone(state: SourceState, fact: facts.Fact) -> Result:
    """The target has taken its side back; a guest that could not go on (the target had its disks) can now."""
    message = facts.message_of(fact, Refused)
    if message.epoch != state.hold.epoch:
        return state, []
    first = not state.target_undone
    hold = handover.take_refusal(state.hold, message.epoch)
    state = update(state, hold=hold, target_undone=True, failure=_cause(state, message.error))
    if first and state.undone and not state.resumed:
        return _resume(state, fact.at_ms)
    return _end_when_undone(state, fact.at_ms)


SYMPTOMS = ("mirror-failed", "memory-failed", "migrate-failed")
"""What a fault of either side looks like from the other one: a connection of QEMU's that broke."""


def _cause(state: SourceState, said: ErrorBody) -> ErrorBody | None:
    """Return why the move failed: the target's own reason, where this side has only felt its consequence.

    A target that heard of the failure from here says the same back.
    """
    felt = state.failure
    if felt is None or felt.code not in SYMPTOMS or said.code in SYMPTOMS or state.hold.copy_lost:
        return felt
    return msgspec.structs.replace(said, message=f"{said.message}; the VM runs on {state.source}")


def target_undone_unknown(state: SourceState, fact: facts.Fact) -> Result:
    """The target cannot tell, but what was not granted it cannot have run."""
    if facts.message_of(fact, Unknown).epoch != state.hold.epoch:
        return state, []
    return _end_when_undone(update(state, target_undone=True), fact.at_ms)


def _end_when_undone(state: SourceState, at_ms: float) -> Result:
    here = (state.cleared and state.resumed) or state.hold.copy_lost
    if not here or not (state.target_undone or not state.connected):
        return state, []
    assert state.failure is not None
    return end(state, at_ms, state.outcome, state.failure)


def undo_too_long(state: SourceState, fact: facts.Fact) -> Result:
    """The target did not confirm in time (it clears up by itself later), or QEMU here hangs: it is tried again."""
    assert state.failure is not None
    runs = state.resumed or state.hold.copy_lost
    if runs and state.cleared:
        warning = f"{state.target} has not confirmed that it has taken everything back"
        failure = state.failure
        return end(update(state, warnings=(*state.warnings, warning)), fact.at_ms, state.outcome, failure)
    if not state.between_tries:  # else the try that failed has been counted
        state = _count_try(state, "QEMU did not answer while the move was taken back")
    state = update(state, undone=True, between_tries=False)
    effects: list[Effect] = [SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s)]
    if not state.cleared:
        effects.append(UndoSource(timeout_s=state.timeouts.undo_s / 2))
    if runs:
        after, more = _end_when_undone(state, fact.at_ms)
        return after, [*effects, *more]
    error = ErrorBody(
        code="resume-failed",
        message=f"the move was taken back, but QEMU does not let {state.vm.name} go on: it stands still on "
        f"{state.source}",
        todo="it is tried again and again (do its disks' servers answer?); if QEMU hangs for good, end its process: "
        "the VM can then be started again",
        host=state.source,
        exit_status=5,
    )
    tell = [] if state.stuck is not None else [NeedOperator(error=error)]
    return update(state, stuck=error), [*effects, *handover.resume_at_source(state.hold, state.vm.id), *tell]


def _count_try(state: SourceState, why: str) -> SourceState:
    """Note that QEMU did not let the move be taken back; after so many tries what is left is told as a warning.

    Not as long as the guest stands still: a migration that is not taken back does not let it go on (seen on QEMU 10).
    """
    tries = state.undo_tries + 1
    runs = state.resumed or state.hold.copy_lost
    if state.cleared or tries < UNDO_TRIES or not runs:
        return update(state, undo_tries=tries)
    return update(state, undo_tries=tries, cleared=True, warnings=(*state.warnings, why))


def undo_lost_peer(state: SourceState, fact: facts.Fact) -> Result:
    """Nobody is there to confirm: the target clears up by itself."""
    return _end_when_undone(update(state, connected=False), fact.at_ms)


def undo_failed(state: SourceState, fact: facts.Fact) -> Result:
    """Taking back failed: the guest goes on all the same, and it is tried again: a mirror left behind would hold it up.

    A Cont that failed is tried again by the step's timer.
    """
    assert isinstance(fact, facts.Failed)
    if fact.effect != UndoSource.__name__:
        return state, []
    first = not state.undone
    state = update(_count_try(state, fact.error.message), undone=True, between_tries=True)
    after, effects = _resume(state, fact.at_ms) if first else _end_when_undone(state, fact.at_ms)
    if after.step is SourceStep.UNDOING and not state.cleared:
        effects.append(SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s / 10))
    return after, effects


# --- why


def failed(state: SourceState, fact: facts.Fact) -> Result:
    """Something here failed before the grant."""
    assert isinstance(fact, facts.Failed | facts.MemoryFailed)
    return undo(state, fact.at_ms, Outcome.FAILED, fact.error)


def refused(state: SourceState, fact: facts.Fact) -> Result:
    """The target gives up before it ran: proof that the VM may go on here."""
    message = facts.message_of(fact, Refused)
    if message.epoch != state.hold.epoch:
        return state, []
    hold = handover.take_refusal(state.hold, message.epoch)
    return undo(update(state, hold=hold, target_undone=True), fact.at_ms, Outcome.FAILED, message.error)


def unknown(state: SourceState, fact: facts.Fact) -> Result:
    """The target cannot tell whether it ran: harmless before a grant, a matter for the operator after it."""
    message = facts.message_of(fact, Unknown)
    if message.epoch != state.hold.epoch:
        return state, []
    if state.hold.right is SourceRight.HOLDS:
        return undo(update(state, target_undone=True), fact.at_ms, Outcome.FAILED, message.error)
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=message.error), [NeedOperator(error=message.error)]


def qemu_gone(state: SourceState, fact: facts.Fact) -> Result:
    """The source has no copy any more."""
    assert isinstance(fact, facts.QemuGone)
    state = update(state, hold=state.hold.without_copy(), guest_runs=False)
    if state.step is SourceStep.SWITCHING:
        return source_switchover.grant_it(state)  # nothing is left to run here: the target may have it all
    if state.step is SourceStep.GRANTED and state.handed_on and not state.memory_sent:
        return source_switchover.grant_it(state)  # a target that has not run it yet must know that it will lack pages
    if state.step in UNDOABLE:
        return undo(state, fact.at_ms, Outcome.FAILED, fact.error)
    if state.step is SourceStep.UNDOING:
        return _end_when_undone(state, fact.at_ms)
    return state, []


def timed_out(state: SourceState, fact: facts.Fact) -> Result:
    """A wait before the grant was too long."""
    assert isinstance(fact, facts.TimerFired)
    return undo(state, fact.at_ms, Outcome.FAILED, too_long(state, fact))


def too_long(state: SourceState, fact: facts.TimerFired) -> ErrorBody:
    """Return what was waited for in vain."""
    where = state.target if state.step in (SourceStep.ENQUIRING, SourceStep.OFFERING) else state.source
    if fact.name == PEER_TIMER:
        text = f"the connection to {state.target} was lost and did not come back"
        todo = f"see that {state.target} and its agent can be reached"
        return failed_body(state, "peer-lost", text, todo, state.target)
    if fact.name == IDLE_TIMER:
        text = f"no progress in the {state.phase} phase for too long"
        return failed_body(state, "no-progress", text, "see the network between the hosts and the target's disk", where)
    text = f"the {state.phase} phase did not end in time"
    return failed_body(state, "timeout", text, f"see the agent's log on {state.target}", where)


def cancel(state: SourceState, fact: facts.Fact) -> Result:
    """Take the move back on request."""
    assert isinstance(fact, facts.CancelRequested)
    if state.step is SourceStep.SWITCHING and state.pages_follow:
        return state, []  # QEMU may have handed the state on already: it is about to say so
    text = f"cancelled by {fact.caller}; the VM runs on {state.source}"
    error = ErrorBody(code="cancelled", message=text, todo="", host=state.source, exit_status=6)
    return undo(state, fact.at_ms, Outcome.CANCELLED, error)
