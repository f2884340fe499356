"""The source takes the move back: failure, cancel, refusal. The guest goes on here, then the rest is cleared."""

from kvmhv.core import facts, handover, source_switchover
from kvmhv.core.effects import Effect, Finish, Journal, NeedOperator, Send, UndoSource
from kvmhv.core.handover import SourceHold, SourceRight
from kvmhv.core.source_state import (
    IDLE_TIMER,
    PEER_TIMER,
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


def undo(state: SourceState, at_ms: float, outcome: Outcome, error: ErrorBody) -> Result:
    """Take the move back: the guest goes on here first, the rest is cleared behind it."""
    if state.step is SourceStep.ENQUIRING:
        return end(state, at_ms, outcome, error)
    state = update(state, outcome=outcome, failure=error)
    after, effects = enter(state, SourceStep.UNDOING, state.timeouts.undo_s)
    return after, [
        *effects,
        UndoSource(timeout_s=state.timeouts.undo_s / 2),
        Send(message=Abort(epoch=state.hold.epoch, error=error)),
    ]


def fail(state: SourceState, at_ms: float, error: ErrorBody) -> Result:
    """Give the move up from outside of the table (a restarted agent does): the guest goes on here."""
    return undo(state, at_ms, Outcome.FAILED, error)


def end(state: SourceState, at_ms: float, outcome: Outcome, error: ErrorBody) -> Result:
    """The move is over without having moved the VM."""
    state = update(state, step=SourceStep.ENDED, outcome=outcome, failure=error).end_phases(at_ms)
    return state, [Finish(report=report(state, at_ms))]


def undone(state: SourceState, fact: facts.Fact) -> Result:
    """What was made here is taken back: the guest goes on."""
    assert isinstance(fact, facts.Undone)
    state = update(state, undone=True, warnings=(*state.warnings, *fact.warnings))
    effects = handover.resume_at_source(state.hold, state.vm.id)
    after, more = _end_when_undone(update(state, guest_runs=not state.hold.copy_lost), fact.at_ms)
    return after, [*effects, Journal(), *more] if after.step is not SourceStep.ENDED else [*effects, *more]


def target_undone(state: SourceState, fact: facts.Fact) -> Result:
    """The target has taken its side back."""
    message = facts.message_of(fact, Refused)
    hold = handover.take_refusal(state.hold, message.epoch) if message.epoch == state.hold.epoch else state.hold
    return _end_when_undone(update(state, hold=hold, target_undone=True), fact.at_ms)


def target_undone_unknown(state: SourceState, fact: facts.Fact) -> Result:
    """The target cannot tell, but what was not granted it cannot have run."""
    return _end_when_undone(update(state, target_undone=True), fact.at_ms)


def _end_when_undone(state: SourceState, at_ms: float) -> Result:
    if not state.undone or not (state.target_undone or not state.connected):
        return state, []
    assert state.failure is not None
    return end(state, at_ms, state.outcome, state.failure)


def undo_too_long(state: SourceState, fact: facts.Fact) -> Result:
    """The target did not confirm in time (it clears up by itself later), or QEMU here hangs."""
    warning = f"{state.target} has not confirmed that it has taken everything back"
    effects: list[Effect] = []
    if not state.undone:
        warning = "QEMU did not answer while the move was taken back"
        effects = handover.resume_at_source(state.hold, state.vm.id)
        state = update(state, guest_runs=not state.hold.copy_lost)
    assert state.failure is not None
    after, more = end(update(state, warnings=(*state.warnings, warning)), fact.at_ms, state.outcome, state.failure)
    return after, [*effects, *more]


def undo_lost_peer(state: SourceState, fact: facts.Fact) -> Result:
    """Nobody is there to confirm: the target clears up by itself."""
    return _end_when_undone(update(state, connected=False), fact.at_ms)


def undo_failed(state: SourceState, fact: facts.Fact) -> Result:
    """Taking back failed: the guest goes on all the same."""
    assert isinstance(fact, facts.Failed)
    return undone(state, facts.Undone(at_ms=fact.at_ms, warnings=(fact.error.message,)))


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
    outcome = Outcome.FAILED if state.outcome is not Outcome.CANCELLED else Outcome.CANCELLED
    return undo(update(state, hold=hold, target_undone=True), fact.at_ms, outcome, message.error)


def unknown(state: SourceState, fact: facts.Fact) -> Result:
    """The target cannot tell whether it ran: harmless before a grant, a matter for the operator after it."""
    message = facts.message_of(fact, Unknown)
    if state.hold.right is SourceRight.HOLDS:
        return undo(update(state, target_undone=True), fact.at_ms, Outcome.FAILED, message.error)
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=message.error), [NeedOperator(error=message.error)]


def qemu_gone(state: SourceState, fact: facts.Fact) -> Result:
    """The source has no copy any more."""
    assert isinstance(fact, facts.QemuGone)
    hold = SourceHold(epoch=state.hold.epoch, right=state.hold.right, copy_lost=True)
    state = update(state, hold=hold, guest_runs=False)
    if state.step in (SourceStep.STOPPING, SourceStep.SWITCHING) and state.connected:
        return source_switchover.grant_it(state)  # nothing is left to run here: the target may have it all
    if state.step in UNDOABLE:
        return undo(state, fact.at_ms, Outcome.FAILED, fact.error)
    return state, []


def timed_out(state: SourceState, fact: facts.Fact) -> Result:
    """A wait before the grant was too long."""
    assert isinstance(fact, facts.TimerFired)
    where = state.target if state.step in (SourceStep.ENQUIRING, SourceStep.OFFERING) else state.source
    if fact.name == PEER_TIMER:
        text = f"the connection to {state.target} was lost and did not come back"
        error = failed_body(
            state, "peer-lost", text, f"see that {state.target} and its agent can be reached", state.target
        )
    elif fact.name == IDLE_TIMER:
        text = f"no progress in the {state.phase} phase for too long"
        error = failed_body(
            state, "no-progress", text, "see the network between the hosts and the target's disk", where
        )
    else:
        text = f"the {state.phase} phase did not end in time"
        error = failed_body(state, "timeout", text, f"see the agent's log on {state.target}", where)
    return undo(state, fact.at_ms, Outcome.FAILED, error)


def cancel(state: SourceState, fact: facts.Fact) -> Result:
    """Take the move back on request."""
    assert isinstance(fact, facts.CancelRequested)
    text = f"cancelled by {fact.caller}; the VM runs on {state.source}"
    error = ErrorBody(code="cancelled", message=text, todo="", host=state.source, exit_status=6)
    return undo(state, fact.at_ms, Outcome.CANCELLED, error)
