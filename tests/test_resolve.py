"""The operator's way out: what is offered in which state, and what a decision leads to."""

import msgspec
import pytest

from kvmhv.core import facts, resolve, source, target
from kvmhv.core.effects import Cont, Effect, EndCopy, Finish, RemoveCopy, Send, UndoTarget
from kvmhv.core.handover import SourceHold, SourceRight, TargetRight
from kvmhv.core.resolve import RunAt
from kvmhv.core.source_state import SourceState, SourceStep
from kvmhv.core.target_state import TargetState, TargetStep
from kvmhv.messages import Grant
from kvmhv.model import ErrorBody, Outcome, Plan
from tests.sim import examples

UNSURE = ErrorBody(code="handover-unknown", message="nobody can tell", todo="")


def _plan() -> Plan:
    from kvmhv.core import plan  # noqa: PLC0415 - the name is the fixture's

    moving = examples.vm()
    state = examples.source_state(moving)
    there = examples.inventory("host2", octet=2)
    return plan.make(moving, state.request, state.rule, state.timeouts, state.inventory, there)


def _granted(**changes: object) -> SourceState:
    state = examples.source_state(examples.vm())
    return msgspec.structs.replace(
        state,
        plan=_plan(),
        step=SourceStep.GRANTED,
        hold=SourceHold(epoch=state.hold.epoch, right=SourceRight.GRANTED),
        guest_runs=False,
        memory_sent=True,
        mirrors_finished=True,
        stopped_ms=10.0,
        outcome=Outcome.NEEDS_OPERATOR,
        failure=UNSURE,
        **changes,
    )


def _complete(step: TargetStep) -> TargetState:
    begun = msgspec.structs.replace(examples.source_state(examples.vm()), plan=_plan())
    state = examples.target_state(begun, begun.offer())
    return msgspec.structs.replace(
        state, step=step, transferred=step is TargetStep.WAITING, outcome=Outcome.NEEDS_OPERATOR, failure=UNSURE
    )


def _decide(state: SourceState | TargetState, run_at: RunAt) -> tuple[SourceState | TargetState, list[Effect]]:
    effects: list[Effect] = []
    for fact in resolve.words(state, run_at, 100.0, "root"):
        if isinstance(state, SourceState):
            state, more = source.step(state, fact)
        else:
            state, more = target.step(state, fact)
        effects += more
    return state, effects


def _offered(state: SourceState | TargetState) -> set[RunAt]:
    return {choice.run_at for choice in resolve.choices(state)}


def test_nothing_is_offered_while_the_move_can_end_by_itself() -> None:
    assert _offered(msgspec.structs.replace(_granted(), outcome=Outcome.RUNNING)) == set()
    waiting = msgspec.structs.replace(_complete(TargetStep.WAITING), outcome=Outcome.RUNNING)
    assert _offered(waiting) == set()


def test_a_granted_source_goes_on_at_the_operators_word() -> None:
    state, effects = _decide(_granted(), RunAt.SOURCE)
    assert isinstance(state, SourceState)
    assert (state.step, state.hold.right) == (SourceStep.UNDOING, SourceRight.HOLDS_AGAIN)
    state, effects = source.step(state, facts.Undone(at_ms=110.0))
    assert any(isinstance(effect, Cont) for effect in effects)
    assert state.failure is not None
    assert state.failure.code == "resolved"


def test_a_granted_source_yields_at_the_operators_word_and_keeps_its_disks() -> None:
    state, effects = _decide(_granted(), RunAt.TARGET)
    assert isinstance(state, SourceState)
    assert state.step is SourceStep.CLEANUP
    assert any(isinstance(effect, EndCopy) for effect in effects)
    assert Send(message=Grant(epoch=state.hold.epoch, ran=True)) in effects  # a target that rebooted waits for it
    state, effects = source.step(state, facts.CopyEnded(at_ms=120.0))
    assert not any(isinstance(effect, RemoveCopy) for effect in effects)
    assert not any(isinstance(effect, Cont) for effect in effects)


def test_what_is_left_at_the_source_goes_only_with_a_second_word() -> None:
    state, _ = _decide(_granted(), RunAt.TARGET)
    state, _ = source.step(state, facts.CopyEnded(at_ms=120.0))  # type: ignore[arg-type]
    state, _ = source.step(state, facts.TimerFired(at_ms=1e6, name="step"))
    assert _offered(state) == {RunAt.TARGET}
    _, effects = _decide(state, RunAt.TARGET)
    assert any(isinstance(effect, RemoveCopy) for effect in effects)


def test_restart_gives_the_memory_up_and_runs_nothing() -> None:
    assert resolve.ends_copy(_granted(), RunAt.RESTART)
    state, effects = _decide(_granted(), RunAt.RESTART)
    assert isinstance(state, SourceState)
    state, more = source.step(state, facts.Undone(at_ms=110.0))
    assert not any(isinstance(effect, Cont) for effect in (*effects, *more))
    assert state.outcome is Outcome.FAILED
    assert not any(isinstance(effect, RemoveCopy) for effect in (*effects, *more))


def test_a_source_without_a_copy_is_not_offered_to_go_on() -> None:
    state = _granted()
    lost = msgspec.structs.replace(state, hold=msgspec.structs.replace(state.hold, copy_lost=True))
    assert RunAt.SOURCE not in _offered(lost)


def test_a_complete_target_runs_at_the_operators_word() -> None:
    state, _ = _decide(_complete(TargetStep.WAITING), RunAt.TARGET)
    state, effects = target.step(state, facts.Unexported(at_ms=110.0))  # type: ignore[arg-type]
    assert (state.step, state.hold.right) == (TargetStep.STARTING, TargetRight.OWNS)
    assert any(isinstance(effect, Cont) for effect in effects)


def test_a_complete_target_is_given_up_at_the_operators_word() -> None:
    state, effects = _decide(_complete(TargetStep.WAITING), RunAt.SOURCE)
    assert isinstance(state, TargetState)
    assert state.hold.right is TargetRight.REFUSED
    assert any(isinstance(effect, UndoTarget) for effect in effects)


def test_a_target_that_cannot_tell_owns_the_stopped_vm_at_the_operators_word() -> None:
    state, _ = _decide(_complete(TargetStep.STANDING), RunAt.RESTART)
    assert isinstance(state, TargetState)
    assert (state.step, state.hold.right) == (TargetStep.SETTLING, TargetRight.OWNS)
    state, _ = target.step(state, facts.Adopted(at_ms=110.0))
    state, effects = target.step(state, facts.TimerFired(at_ms=1e6, name="step"))
    assert any(isinstance(effect, Finish) for effect in effects)
    assert state.outcome is Outcome.DONE


@pytest.mark.parametrize("state", [_granted(), _complete(TargetStep.WAITING), _complete(TargetStep.STANDING)])
def test_every_choice_says_what_follows(state: SourceState | TargetState) -> None:
    for choice in resolve.choices(state):
        assert state.vm.name in choice.consequences
        assert resolve.words(state, choice.run_at, 1.0, "root")
