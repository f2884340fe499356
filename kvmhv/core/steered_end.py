"""The end of a move that another program made: both sides are asked until they leave one conclusion.

whereabouts.py says which. What only time can confirm (both stand still, or are gone) must be said several times.
"""

from collections.abc import Callable

import msgspec

from kvmhv.core import facts, handover, source_undo
from kvmhv.core.effects import (
    ClearTimer,
    Effect,
    EndCopy,
    Finish,
    Journal,
    Look,
    NeedOperator,
    RemoveCopy,
    Send,
    SetTimer,
    UndoSource,
)
from kvmhv.core.source_state import (
    IDLE_TIMER,
    Result,
    SourceState,
    SourceStep,
    enter,
    failed_body,
    report,
    update,
)
from kvmhv.core.whereabouts import Verdict
from kvmhv.core.whereabouts import conclude as verdict_of
from kvmhv.messages import Abort, EndArrival, Finished, Refused, Seen
from kvmhv.messages import Look as LookThere
from kvmhv.model import ErrorBody, Outcome, Phase, Stay

LOOK_TIMER = "look"
LOOK_S = 1.0
"""Between two questions to both sides."""
LOOKS_ALIKE = 5
PATIENT = (Verdict.GONE, Verdict.STANDS, Verdict.END_ARRIVAL)
"""While a program clears up, a VM may look like this for a moment."""


def conclude(state: SourceState, at_ms: float) -> Result:
    """Ask both sides where the VM is."""
    state = update(state, here=None, there=None)
    after, effects = enter(state.begin_phase(Phase.CLEANUP, at_ms), SourceStep.CONCLUDING, state.timeouts.grant_s)
    return after, [Journal(), ClearTimer(name=IDLE_TIMER), *effects, *_ask(state)]


def _ask(state: SourceState) -> list[Effect]:
    there = Send(message=LookThere(epoch=state.hold.epoch))
    return [Look(), there, SetTimer(name=LOOK_TIMER, after_s=LOOK_S)]


def look_again(state: SourceState, fact: facts.Fact) -> Result:
    """What was said before is old: only two answers to the same question are held against each other.

    A program that is still at a move that is to end did not hear of it: it is told again.
    """
    again: list[Effect] = []
    if state.failure is not None and state.here is not None and state.here.busy:
        again = [UndoSource(timeout_s=LOOK_S)]
    return update(state, here=None, there=None), [*again, *_ask(state)]


def looked(state: SourceState, fact: facts.Fact) -> Result:
    """This side has answered."""
    assert isinstance(fact, facts.Looked)
    return _judge(update(state, here=fact.found), fact.at_ms)


def target_looked(state: SourceState, fact: facts.Fact) -> Result:
    """The target has answered."""
    message = facts.message_of(fact, Seen)
    if message.epoch != state.hold.epoch:
        return state, []
    return _judge(update(state, there=message.there), fact.at_ms)


def _judge(state: SourceState, at_ms: float) -> Result:
    verdict = verdict_of(state.here, state.there)
    if verdict is Verdict.WAIT:
        return state, []
    if verdict in PATIENT:
        state = update(state, looks_alike=state.looks_alike + 1)
        if state.looks_alike < LOOKS_ALIKE:
            return state, []
    else:
        state = update(state, looks_alike=0)
    return ON_VERDICT[verdict](state, at_ms)


# --- verdicts


def _moved(state: SourceState, at_ms: float) -> Result:
    late = state.failure is not None and state.failure.code == "cancelled"
    warnings = (*state.warnings, "it was too late to cancel the move") if late else state.warnings
    state = update(state, failure=None, outcome=Outcome.RUNNING, warnings=warnings, guest_runs=False)
    after, effects = enter(state.begin_phase(Phase.CLEANUP, at_ms), SourceStep.CLEANUP, state.timeouts.undo_s)
    return after, [Journal(), *effects, ClearTimer(name=LOOK_TIMER), RemoveCopy(plan=state.planned())]


def _stays(state: SourceState, at_ms: float) -> Result:
    if state.failure is None or state.outcome is Outcome.NEEDS_OPERATOR:
        text = f"{state.vm.name} did not get to {state.target}"
        error = failed_body(state, "libvirt-move", text, f"see {state.vm.runtime}'s log there", state.target)
        state = update(state, failure=error)
    assert state.failure is not None
    text = state.failure.message.removesuffix(f"; the VM runs on {state.source}")  # proved only now
    error = msgspec.structs.replace(state.failure, message=f"{text}; the VM runs on {state.source}")
    return say_again(update(state, failure=error))


def _resume(state: SourceState, at_ms: float) -> Result:
    return state, handover.resume_at_source(state.hold, state.vm.id)


def resumed(state: SourceState, fact: facts.Fact) -> Result:
    """The guest was let go here: the next look says so."""
    return state, []


def _end_copy(state: SourceState, at_ms: float) -> Result:
    return state, [EndCopy()]


def ended_copy(state: SourceState, fact: facts.Fact) -> Result:
    """What was succeeded is gone: the next look says so."""
    return state, []


def _end_arrival(state: SourceState, at_ms: float) -> Result:
    """A program that does not end it either can no longer run it: it never ran, and nothing brings it memory."""
    here = state.here
    assert here is not None
    if state.looks_alike < 2 * LOOKS_ALIKE:
        return state, [Send(message=EndArrival(epoch=state.hold.epoch))]
    if here.stay is Stay.PAUSED:
        return _resume(state, at_ms)
    warning = (
        f"{state.vm.runtime} on {state.target} keeps a half-made {state.vm.name} that never ran, and does not end it: "
        f"try {_command(state, 'end')} there"
    )
    state = update(state, warnings=(*state.warnings, warning))
    return _stays(state, at_ms) if here.stay is Stay.RUNNING else _gone(state, at_ms)


def _gone(state: SourceState, at_ms: float) -> Result:
    why = f" ({state.failure.message})" if state.failure else ""
    vm, program = state.vm.name, state.vm.runtime
    error = ErrorBody(
        code="vm-ended",
        message=f"{vm} has ended while it moved: it runs neither on {state.source} nor on {state.target}{why}",
        todo=f"see {program}'s log of it on both hosts; where it is still defined it can be started",
        host=state.source,
    )
    return say_again(update(state, failure=error))


def _twice(state: SourceState, at_ms: float) -> Result:
    vm = state.vm.name
    return _need_operator(
        state,
        "runs-twice",
        f"{vm} runs on {state.source} and on {state.target}: {state.vm.runtime} lost the last answer of its own move",
        f"look at both, and end the wrong one at once: {_command(state, 'end')} there; the move then ends by itself",
    )


def _stands(state: SourceState, at_ms: float) -> Result:
    assert state.here is not None
    assert state.there is not None
    vm = state.vm.name
    return _need_operator(
        state,
        "whereabouts-unclear",
        f"{state.vm.runtime} says that {vm} is {state.here.stay} on {state.source} and {state.there.stay} on "
        f"{state.target}, and nobody can prove which of them is the newest",
        f"{_command(state, 'end')} on the host where it shall not run, {_command(state, 'resume')} on the other: the "
        "move then ends by itself",
    )


def _command(state: SourceState, what: str) -> str:
    info = state.inventory.runtimes.get(state.vm.runtime)
    return f"`{info.commands[what]} {state.vm.name}`" if info else what


def nobody_says(state: SourceState, fact: facts.Fact) -> Result:
    """So long without two answers: the operator is told which one is missing. Asking goes on."""
    silent = []
    if state.here is None or state.here.stay is Stay.SILENT:
        silent.append(state.source)
    if state.there is None or state.there.stay is Stay.SILENT:
        silent.append(state.target)
    if not silent:
        return _need_operator(
            state,
            "whereabouts-unknown",
            f"{state.vm.runtime} does not end its move of {state.vm.name} from {state.source} to {state.target}",
            f"it is told again and again; see {state.vm.runtime}'s log on both hosts",
        )
    return _need_operator(
        state,
        "whereabouts-unknown",
        f"{state.vm.runtime}'s move of {state.vm.name} from {state.source} to {state.target} has ended, and "
        f"{' and '.join(silent)} cannot say whether it is there",
        f"see that {state.vm.runtime} and the agent run on {' and '.join(silent)}: the move then ends by itself",
    )


def _need_operator(state: SourceState, code: str, text: str, todo: str) -> Result:
    if state.failure is not None and state.failure.code == code and state.outcome is Outcome.NEEDS_OPERATOR:
        return state, []
    error = ErrorBody(code=code, message=text, todo=todo, host=state.source, exit_status=5)
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [Journal(), NeedOperator(error=error)]


ON_VERDICT: dict[Verdict, Callable[[SourceState, float], Result]] = {
    Verdict.MOVED: _moved,
    Verdict.STAYS: _stays,
    Verdict.RESUME: _resume,
    Verdict.END_ARRIVAL: _end_arrival,
    Verdict.END_COPY: _end_copy,
    Verdict.GONE: _gone,
    Verdict.TWICE: _twice,
    Verdict.STANDS: _stands,
}


# --- it stays


def say_again(state: SourceState) -> Result:
    """Tell the target that the VM stays, so that it takes back what it made."""
    assert state.failure is not None
    after, effects = enter(update(state, outcome=Outcome.RUNNING), SourceStep.UNDOING, state.timeouts.undo_s)
    abort = Send(message=Abort(epoch=state.hold.epoch, error=state.failure))
    return after, [Journal(), ClearTimer(name=LOOK_TIMER), *effects, abort]


def target_undone(state: SourceState, fact: facts.Fact) -> Result:
    """The target has taken everything back, or knows nothing of the move."""
    assert isinstance(fact, facts.Received)
    if isinstance(fact.message, Refused) and fact.message.epoch != state.hold.epoch:
        return state, []
    return _end(state, fact.at_ms)


def stays_unconfirmed(state: SourceState, fact: facts.Fact) -> Result:
    """The target clears up by itself when the agents meet again."""
    warning = f"{state.target} has not confirmed that it has taken everything back"
    return _end(update(state, warnings=(*state.warnings, warning)), fact.at_ms)


def _end(state: SourceState, at_ms: float) -> Result:
    assert state.failure is not None
    outcome = Outcome.CANCELLED if state.failure.code == "cancelled" else Outcome.FAILED
    return source_undo.end(state, at_ms, outcome, state.failure)


# --- it has moved


def copy_removed(state: SourceState, fact: facts.Fact) -> Result:
    """Nothing is left here: done."""
    assert isinstance(fact, facts.CopyRemoved)
    return _finish(update(state, warnings=(*state.warnings, *fact.warnings)), fact.at_ms)


def cleanup_failed(state: SourceState, fact: facts.Fact) -> Result:
    """The VM has moved; that a disk is left here is a warning."""
    why = fact.error.message if isinstance(fact, facts.Failed) else "its removal did not end in time"
    warning = f"a disk that has moved is left on {state.source}: {why}"
    return _finish(update(state, warnings=(*state.warnings, warning)), fact.at_ms)


def _finish(state: SourceState, at_ms: float) -> Result:
    state = update(state, step=SourceStep.ENDED, outcome=Outcome.DONE, failure=None).end_phases(at_ms)
    final = report(state, at_ms)
    return state, [Send(message=Finished(epoch=state.hold.epoch, report=final)), Finish(report=final)]
