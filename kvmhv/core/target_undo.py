"""The target gives up before it ran: refused on disk, taken back, and only then said."""

from kvmhv.core import facts, handover
from kvmhv.core.effects import ClearTimer, Effect, Finish, Journal, NeedOperator, Prepare, Send, SetTimer, UndoTarget
from kvmhv.core.target_state import PEER_TIMER, STEP_TIMER, Result, TargetState, TargetStep, report, update
from kvmhv.messages import Abort, Refused
from kvmhv.model import ErrorBody, Outcome

UNDO_TRIES = 3
UNKILLABLE = "qemu-unkillable"
"""ports.Hypervisor.kill: the process is still there."""


def refuse(state: TargetState, error: ErrorBody) -> Result:
    """Refuse for good: what was made is taken back, then it is said."""
    state = update(state, hold=handover.refuse(state.hold), step=TargetStep.UNDOING, failure=error)
    if state.preparing:
        timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.prepare_s)
        return state, [Journal(), timer, ClearTimer(name=PEER_TIMER)]
    timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.undo_s)
    return state, [Journal(), timer, ClearTimer(name=PEER_TIMER), UndoTarget(plan=state.plan)]


def prepared_in_vain(state: TargetState, fact: facts.Fact) -> Result:
    """Prepare answered after the refusal: now all that it made is known, and goes."""
    return undo_again(state, fact) if state.preparing else (state, [])


def undone(state: TargetState, fact: facts.Fact) -> Result:
    """What was made is gone: now the refusal is said."""
    warnings = fact.warnings if isinstance(fact, facts.Undone) else ()
    return _end_refused(update(state, warnings=(*state.warnings, *warnings)))


def undo_failed(state: TargetState, fact: facts.Fact) -> Result:
    """Tried again: the refusal is said when its QEMU is surely gone, the rest may be left with a warning."""
    assert isinstance(fact, facts.Failed)
    if fact.effect == Prepare.__name__:
        return prepared_in_vain(state, fact)
    if fact.effect != UndoTarget.__name__:
        return state, []
    state = update(state, undo_tries=state.undo_tries + 1, between_tries=True)
    if state.undo_tries < UNDO_TRIES or fact.error.code == UNKILLABLE:
        tell: list[Effect] = [NeedOperator(error=fact.error)] if state.undo_tries == UNDO_TRIES else []
        state = update(state, stuck=fact.error) if state.undo_tries >= UNDO_TRIES else state
        return state, [SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.undo_s / 10), *tell]
    return _end_refused(update(state, warnings=(*state.warnings, fact.error.message)))


def undo_again(state: TargetState, fact: facts.Fact) -> Result:
    """Until its QEMU is surely gone the refusal may not be said."""
    state = update(state, preparing=False, between_tries=False)
    return state, [UndoTarget(plan=state.plan), SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.undo_s)]


def undo_too_long(state: TargetState, fact: facts.Fact) -> Result:
    """Nothing answers: tried again for as long as it takes, and the operator hears of it."""
    if state.between_tries:
        return undo_again(state, fact)
    after, effects = undo_again(update(state, undo_tries=state.undo_tries + 1), fact)
    if after.undo_tries != UNDO_TRIES:
        return after, effects
    error = ErrorBody(
        code="cleanup-failed",
        message=f"what the move of {state.vm.name} made on {state.target} cannot be taken back: it takes too long",
        todo="it is tried again by itself; see the agent's log there for what hangs",
        host=state.target,
        exit_status=5,
    )
    return after, [*effects, NeedOperator(error=error)]


def _end_refused(state: TargetState) -> Result:
    error = state.failure
    assert error is not None
    outcome = Outcome.CANCELLED if error.code == "cancelled" else Outcome.FAILED
    state = update(state, step=TargetStep.ENDED, outcome=outcome, stuck=None)
    refused = Refused(epoch=state.hold.epoch, error=error)
    return state, [Send(message=refused), Finish(report=report(state))]


def aborted(state: TargetState, fact: facts.Fact) -> Result:
    """The source takes the move back: nothing runs here, so nothing is lost."""
    message = facts.message_of(fact, Abort)
    if message.epoch != state.hold.epoch:
        return state, []
    return refuse(state, message.error)


def failed(state: TargetState, fact: facts.Fact) -> Result:
    """Something here failed before the run."""
    assert isinstance(fact, facts.Failed | facts.QemuGone | facts.MemoryFailed)
    if isinstance(fact, facts.Failed) and fact.effect == Prepare.__name__:
        state = update(state, preparing=False)  # it has answered: there is nothing to wait for before the undoing
    return refuse(state, fact.error)


def source_lost(state: TargetState) -> Result:
    """The source has no copy any more, and the one here is not known to be whole: it is given up before it ran."""
    error = ErrorBody(
        code="source-lost",
        message=f"{state.source} lost its copy of {state.vm.name} in the switchover and cannot prove that the one "
        f"on {state.target} is the newest; the VM is stopped on {state.source}, with all its acknowledged writes",
        todo=f"start it on {state.source}",
        host=state.source,
    )
    return refuse(state, error)


def timed_out(state: TargetState, fact: facts.Fact) -> Result:
    """A wait was too long. A complete copy is never given up for that: it may be the only one."""
    assert isinstance(fact, facts.TimerFired)
    vm = state.vm.name
    if state.transferred:
        error = ErrorBody(
            code="grant-missing",
            message=f"{vm} is complete on {state.target} and stands still: {state.source} has neither granted it nor "
            "taken it back",
            todo=f"bring {state.source} or the connection back: the move then ends by itself; if that will never be: "
            f"kvmhv move resolve {state.move_id}",
            host=state.target,
            exit_status=5,
        )
        return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [NeedOperator(error=error)]
    lost = fact.name == PEER_TIMER
    error = ErrorBody(
        code="peer-lost" if lost else "timeout",
        message=f"the connection to {state.source} was lost" if lost else f"{vm} did not arrive in time",
        todo=f"see the agent's log on {state.source}",
        host=state.source if lost else state.target,
    )
    return refuse(state, error)
