"""The target's side of a move that another program makes: make room, watch, say what is seen, take the source's word.

    receiving -> preparing -> waiting -> ended (done)
                     |           |
                     `-----------+-> undoing -> ended

It decides nothing: the source asks both sides and concludes (steered.py, whereabouts.py).
"""

from kvmhv.core import facts, target_undo
from kvmhv.core.effects import Adopt, ClearTimer, EndCopy, Finish, Journal, Look, NeedOperator, Prepare, Send, SetTimer
from kvmhv.core.target_state import (
    PEER_TIMER,
    STEP_TIMER,
    Handler,
    Result,
    TargetState,
    TargetStep,
    report,
    update,
)
from kvmhv.messages import Abort, EndArrival, Finished, Offer, Ready, Running, Seen
from kvmhv.messages import Look as LookHere
from kvmhv.model import ErrorBody, Outcome


def step(state: TargetState, fact: facts.Fact) -> Result:
    """Return the next state and what is to be done. A fact that no longer matters changes nothing."""
    if isinstance(fact, facts.Received):
        handler = ON_MESSAGE.get((state.step, type(fact.message)))
    elif isinstance(fact, facts.TimerFired):
        handler = ON_TIMER.get((state.step, fact.name))
    else:
        handler = ON_FACT.get((state.step, type(fact)))
    return handler(state, fact) if handler else (state, [])


def recover(state: TargetState) -> Result:
    """Return how a new agent goes on. It waits for the source's word, or takes back what was half made."""
    state = update(state, connected=False, preparing=False)
    if state.step in (T.RECEIVING, T.PREPARING):
        text = f"the agent on {state.target} was restarted while it made ready"
        error = ErrorBody(code="agent-restarted", message=text, todo="move the VM again", host=state.target)
        return target_undo.refuse(state, error)
    if state.step is T.UNDOING:
        return target_undo.undo_again(state, facts.TimerFired(at_ms=0.0, name=STEP_TIMER))
    if state.step is T.ENDED:
        return state, [Finish(report=report(state))]
    return state, [SetTimer(name=PEER_TIMER, after_s=state.plan.timeouts.reconnect_s)]


def _offered(state: TargetState, fact: facts.Fact) -> Result:
    after = update(state, step=T.PREPARING, preparing=True)
    timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.prepare_s)
    return after, [Journal(), timer, Prepare(plan=state.plan)]


def _prepared(state: TargetState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.IncomingReady)
    state = update(state, step=T.WAITING, preparing=False, address=fact.address)
    ready = Ready(epoch=state.hold.epoch, address=fact.address)
    return state, [Journal(), ClearTimer(name=STEP_TIMER), Send(message=ready)]


def _offered_again(state: TargetState, fact: facts.Fact) -> Result:
    assert state.address is not None
    return state, [Send(message=Ready(epoch=state.hold.epoch, address=state.address))]


def _runs(state: TargetState, fact: facts.Fact) -> Result:
    """The guest was let go here; the source measures the blackout by it."""
    assert isinstance(fact, facts.GuestRuns)
    state = update(state, transferred=True, resumed_ms=fact.resumed_ms)
    return state, [_running(state, fact.resumed_ms)]


def _running(state: TargetState, resumed_ms: float) -> Send:
    return Send(message=Running(epoch=state.hold.epoch, resumed_ms=resumed_ms))


def _asked(state: TargetState, fact: facts.Fact) -> Result:
    return state, [Look()]


def _looked(state: TargetState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Looked)
    return state, [Send(message=Seen(epoch=state.hold.epoch, there=fact.found))]


def _end_arrival(state: TargetState, fact: facts.Fact) -> Result:
    """What waits here waits in vain; the next look says that it is gone, and that it never ran."""
    message = facts.message_of(fact, EndArrival)
    return state, [EndCopy()] if message.epoch == state.hold.epoch else []


def _finished(state: TargetState, fact: facts.Fact) -> Result:
    """The source has concluded that the VM is here."""
    message = facts.message_of(fact, Finished)
    if message.epoch != state.hold.epoch:
        return state, []
    state = update(state, source_report=message.report, failure=None, outcome=Outcome.RUNNING, adopted=True)
    timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.undo_s)
    return state, [Journal(), ClearTimer(name=PEER_TIMER), timer, Adopt(vm=state.vm)]


def _adopted(state: TargetState, fact: facts.Fact) -> Result:
    """Done; what could not be set besides is a warning."""
    if not state.adopted:
        return state, []
    if isinstance(fact, facts.Failed):
        state = update(state, warnings=(*state.warnings, fact.error.message))
    state = update(state, step=T.ENDED, outcome=Outcome.DONE)
    return state, [Finish(report=report(state))]


def _connected(state: TargetState, fact: facts.Fact) -> Result:
    again = [_running(state, state.resumed_ms)] if state.resumed_ms is not None else []
    needed = state.outcome is Outcome.NEEDS_OPERATOR
    state = update(state, connected=True, **({"outcome": Outcome.RUNNING, "failure": None} if needed else {}))
    return state, [ClearTimer(name=PEER_TIMER), *again]


def _lost(state: TargetState, fact: facts.Fact) -> Result:
    if not state.connected:
        return state, []
    return update(state, connected=False), [SetTimer(name=PEER_TIMER, after_s=state.plan.timeouts.reconnect_s)]


def _source_silent(state: TargetState, fact: facts.Fact) -> Result:
    """Whether the VM is here the source alone may conclude."""
    vm, there = state.vm.name, state.source
    error = ErrorBody(
        code="source-silent",
        message=f"the agent on {there} is silent: whether {vm} has come to {state.target} or stays there is not known",
        todo="bring it back: the move then ends by itself",
        host=there,
        exit_status=5,
    )
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [NeedOperator(error=error)]


T = TargetStep

ON_MESSAGE: dict[tuple[TargetStep, type], Handler] = {
    (T.WAITING, Offer): _offered_again,
    (T.WAITING, LookHere): _asked,
    (T.WAITING, EndArrival): _end_arrival,
    (T.WAITING, Finished): _finished,
    (T.WAITING, Abort): target_undo.aborted,
    (T.PREPARING, Abort): target_undo.aborted,
}

ON_FACT: dict[tuple[TargetStep, type], Handler] = {
    (T.RECEIVING, facts.Offered): _offered,
    (T.PREPARING, facts.IncomingReady): _prepared,
    (T.PREPARING, facts.Failed): target_undo.failed,
    (T.WAITING, facts.GuestRuns): _runs,
    (T.WAITING, facts.Looked): _looked,
    (T.WAITING, facts.Adopted): _adopted,
    (T.WAITING, facts.Failed): _adopted,
    (T.WAITING, facts.PeerConnected): _connected,
    (T.WAITING, facts.PeerLost): _lost,
    (T.UNDOING, facts.Undone): target_undo.undone,
    (T.UNDOING, facts.Failed): target_undo.undo_failed,
    (T.UNDOING, facts.IncomingReady): target_undo.prepared_in_vain,
}

ON_TIMER: dict[tuple[TargetStep, str], Handler] = {
    (T.PREPARING, STEP_TIMER): target_undo.timed_out,
    (T.WAITING, PEER_TIMER): _source_silent,
    (T.WAITING, STEP_TIMER): _adopted,
    (T.UNDOING, STEP_TIMER): target_undo.undo_too_long,
}
