"""The target of a move that another program makes: it says what it sees, and takes back only what it made."""

import msgspec

from kvmhv.core import facts, steered_target
from kvmhv.core.effects import Adopt, Effect, EndCopy, Finish, Look, NeedOperator, Prepare, Send, UndoTarget
from kvmhv.core.target_state import PEER_TIMER, STEP_TIMER, TargetState, TargetStep
from kvmhv.core.target_undo import UNDO_TRIES
from kvmhv.messages import Abort, AnyMessage, EndArrival, Finished, Offer, Ready, Refused, Running, Seen
from kvmhv.messages import Look as LookHere
from kvmhv.model import IncomingAddress, Outcome, Stay, Whereabouts
from tests.sim import examples
from tests.test_steered import ERROR, Play

ADDRESS = IncomingAddress(memory_port=1, disk_port=None)


class Target:
    """A target that was offered the move of test_steered's source."""

    def __init__(self) -> None:
        play = Play().begin()
        offer = next(one.message for one in play.all if isinstance(one, Send) and isinstance(one.message, Offer))
        self.state: TargetState = examples.target_state(play.state, offer)
        self.source = play
        self.all: list[Effect] = []

    def put(self, fact: facts.Fact) -> list[Effect]:
        self.state, effects = steered_target.step(self.state, fact)
        self.all += effects
        return effects

    def hear(self, message: AnyMessage) -> list[Effect]:
        return self.put(facts.Received(at_ms=1.0, message=message))

    def waiting(self) -> "Target":
        assert any(isinstance(one, Prepare) for one in self.put(facts.Offered(at_ms=0.0)))
        assert said(self.put(facts.IncomingReady(at_ms=1.0, address=ADDRESS)), Ready)
        return self

    def ended(self) -> Outcome:
        return next(one.report.outcome for one in self.all if isinstance(one, Finish))


def said(effects: list[Effect], kind: type) -> bool:
    return any(isinstance(one, Send) and isinstance(one.message, kind) for one in effects)


def test_it_tells_when_the_guest_runs_and_answers_where_it_is() -> None:
    target = Target().waiting()
    assert said(target.put(facts.GuestRuns(at_ms=5.0, resumed_ms=4.0)), Running)
    assert [type(one) for one in target.hear(LookHere(epoch=1))] == [Look]
    found = Whereabouts(stay=Stay.RUNNING, ran=True)
    assert said(target.put(facts.Looked(at_ms=6.0, found=found)), Seen)


def test_what_waits_in_vain_is_ended_on_the_sources_word() -> None:
    target = Target().waiting()
    assert target.hear(EndArrival(epoch=7)) == []
    assert target.hear(EndArrival(epoch=1)) == [EndCopy()]
    assert target.put(facts.CopyEnded(at_ms=5.0)) == []
    assert target.state.step is TargetStep.WAITING


def test_the_sources_word_ends_it() -> None:
    target = Target().waiting()
    report = msgspec.structs.replace(steered_target.report(target.state), outcome=Outcome.DONE)
    assert any(isinstance(one, Adopt) for one in target.hear(Finished(epoch=1, report=report)))
    target.put(facts.Adopted(at_ms=2.0))
    assert target.ended() is Outcome.DONE


def test_what_could_not_be_set_besides_is_a_warning() -> None:
    target = Target().waiting()
    report = msgspec.structs.replace(steered_target.report(target.state), outcome=Outcome.DONE)
    early = facts.Failed(at_ms=1.0, effect="Look", error=ERROR)
    assert target.put(early) == []
    target.put(facts.PeerLost(at_ms=1.0, error=ERROR))
    target.put(facts.TimerFired(at_ms=1.0, name=PEER_TIMER))
    target.hear(Finished(epoch=1, report=report))
    assert target.state.outcome is Outcome.RUNNING
    target.put(facts.Failed(at_ms=2.0, effect="Adopt", error=ERROR))
    assert target.ended() is Outcome.DONE
    assert target.state.warnings == (ERROR.message,)


def test_what_is_taken_back_is_said_when_it_is_gone() -> None:
    target = Target().waiting()
    assert any(isinstance(one, UndoTarget) for one in target.hear(Abort(epoch=1, error=ERROR)))
    assert not said(target.all, Refused)
    assert said(target.put(facts.Undone(at_ms=3.0)), Refused)
    assert target.ended() is Outcome.FAILED


def test_what_hangs_while_it_is_taken_back_is_tried_again_and_told() -> None:
    target = Target().waiting()
    target.hear(Abort(epoch=1, error=ERROR))
    tries = [target.put(facts.TimerFired(at_ms=9.0, name=STEP_TIMER)) for _ in range(UNDO_TRIES)]
    assert all(any(isinstance(one, UndoTarget) for one in effects) for effects in tries)
    assert [one.error.code for one in tries[-1] if isinstance(one, NeedOperator)] == ["cleanup-failed"]


def test_a_silent_source_is_told_and_nothing_is_decided() -> None:
    target = Target().waiting()
    target.put(facts.PeerLost(at_ms=2.0, error=ERROR))
    told = target.put(facts.TimerFired(at_ms=9.0, name=PEER_TIMER))
    assert [one.error.code for one in told if isinstance(one, NeedOperator)] == ["source-silent"]
    assert target.state.step is TargetStep.WAITING
    target.put(facts.PeerConnected(at_ms=10.0))
    assert target.state.outcome is Outcome.RUNNING


def test_a_new_agent_waits_for_the_sources_word() -> None:
    target = Target().waiting()
    state, effects = steered_target.recover(target.state)
    assert state.step is TargetStep.WAITING
    assert not any(isinstance(one, UndoTarget | Adopt) for one in effects)
