"""A move that another program makes, as the source decides it: steered by the rule, concluded by both sides' words."""

import msgspec
import pytest

from kvmhv.core import facts, steered
from kvmhv.core.effects import (
    Cont,
    Effect,
    EndCopy,
    Finish,
    Look,
    NeedOperator,
    RemoveCopy,
    Send,
    Steer,
    StopGuest,
    UndoSource,
)
from kvmhv.core.source_state import STEP_TIMER, SourceState, SourceStep
from kvmhv.core.steered_end import LOOK_TIMER, LOOKS_ALIKE
from kvmhv.messages import Abort, Answer, AnyMessage, EndArrival, Finished, Offer, Ready, Refused, Running, Seen
from kvmhv.messages import Look as LookThere
from kvmhv.model import MIB, ErrorBody, IncomingAddress, Inventory, Outcome, Phase, RuntimeInfo, Stay, Whereabouts
from tests.sim import examples

VM = msgspec.structs.replace(examples.vm(), runtime="libvirt", definition="all of it")
INFO = RuntimeInfo(version="11.3.0", encrypts=True, commands={"end": "virsh destroy", "resume": "virsh resume"})
ERROR = ErrorBody(code="libvirt-move", message="libvirt did not move web01: connection reset", todo="see its log")
HERE, THERE = Whereabouts(stay=Stay.RUNNING), Whereabouts(stay=Stay.ABSENT, ran=False)


def host(name: str, octet: int) -> Inventory:
    made = examples.inventory(name, octet=octet, running=VM if octet == 1 else None)
    return msgspec.structs.replace(made, runtimes={"libvirt": INFO})


def sent(play: "Play", kind: type) -> bool:
    return any(isinstance(one, Send) and isinstance(one.message, kind) for one in play.all)


class Play:
    """A source, and all that it asked for."""

    def __init__(self, *, passes: int = 10) -> None:
        state = examples.source_state(VM)
        rule = msgspec.structs.replace(state.rule, max_passes=passes)
        self.state: SourceState = msgspec.structs.replace(state, inventory=host("host1", 1), rule=rule)
        self.now_ms = 0.0
        self.all: list[Effect] = []

    def put(self, fact: facts.Fact) -> list[Effect]:
        self.state, effects = steered.step(self.state, fact)
        self.all += effects
        return effects

    def after_ms(self, ms: float) -> float:
        self.now_ms += ms
        return self.now_ms

    def hear(self, message: AnyMessage) -> list[Effect]:
        return self.put(facts.Received(at_ms=self.after_ms(1), message=message))

    def begin(self) -> "Play":
        self.put(facts.Started(at_ms=0.0))
        self.put(facts.PeerConnected(at_ms=self.after_ms(1)))
        offered = self.hear(Answer(inventory=host("host2", 2)))
        assert [type(one.message) for one in offered if isinstance(one, Send)] == [Offer], self.state.findings
        ready = self.hear(Ready(epoch=1, address=IncomingAddress(memory_port=1, disk_port=None)))
        assert any(isinstance(one, Steer) for one in ready)
        assert self.state.step is SourceStep.STORAGE
        return self

    def start_pass(self, number: int, remaining_bytes: int) -> list[Effect]:
        return self.put(
            facts.PassStarted(
                at_ms=self.after_ms(100),
                number=number,
                sent_bytes=number * MIB,
                remaining_bytes=remaining_bytes,
                total_bytes=256 * MIB,
                dirty_bytes_per_s=1e6,
            )
        )

    def stopped(self) -> "Play":
        """Steered to the last pass, with the guest stopped."""
        self.begin()
        self.start_pass(1, 200 * MIB)
        assert any(isinstance(one, StopGuest) for one in self.start_pass(2, MIB // 2))
        self.put(facts.GuestStopped(at_ms=self.after_ms(5), told_ms=self.now_ms - 4))
        return self

    def handed(self, error: ErrorBody | None = None) -> list[Effect]:
        return self.put(facts.Handed(at_ms=self.after_ms(50), error=error))

    def asked_both(self, effects: list[Effect]) -> bool:
        there = [one for one in effects if isinstance(one, Send) and isinstance(one.message, LookThere)]
        return bool(there) and any(isinstance(one, Look) for one in effects)

    def answers(self, here: Whereabouts, there: Whereabouts) -> list[Effect]:
        first = self.put(facts.Looked(at_ms=self.after_ms(1), found=here))
        return [*first, *self.hear(Seen(epoch=1, there=there))]

    def again(self) -> list[Effect]:
        effects = self.put(facts.TimerFired(at_ms=self.after_ms(1000), name=LOOK_TIMER))
        assert self.asked_both(effects)
        return effects

    def ended(self) -> Outcome:
        finish = [one for one in self.all if isinstance(one, Finish)]
        assert len(finish) == 1
        return finish[0].report.outcome


MOVED = Whereabouts(stay=Stay.ABSENT), Whereabouts(stay=Stay.RUNNING, ran=True)


def test_a_move_is_steered_and_ends_when_both_sides_have_said_where_it_is() -> None:
    play = Play().stopped()
    play.hear(Running(epoch=1, resumed_ms=play.now_ms + 20, uncertainty_ms=1.0))
    assert play.asked_both(play.handed())
    assert any(isinstance(one, RemoveCopy) for one in play.answers(*MOVED))
    last = play.put(facts.CopyRemoved(at_ms=play.after_ms(1)))
    assert any(isinstance(one, Send) and isinstance(one.message, Finished) for one in last)
    assert play.ended() is Outcome.DONE
    report = next(one.report for one in last if isinstance(one, Finish))
    assert [one.phase for one in report.phases] == [
        Phase.SETUP,
        Phase.STORAGE,
        Phase.MEMORY,
        Phase.STATE,
        Phase.CLEANUP,
    ]
    assert [one.number for one in report.passes] == [1]
    assert report.blackout_ms is not None
    assert report.switchover is not None
    assert report.switchover.reason == "threshold"


def test_the_pass_limit_is_exact() -> None:
    play = Play(passes=3).begin()
    for number in (1, 2, 3):
        assert not any(isinstance(one, StopGuest) for one in play.start_pass(number, 100 * MIB))
    assert any(isinstance(one, StopGuest) for one in play.start_pass(4, 100 * MIB))
    assert len(play.state.passes) == 3


def test_the_programs_yes_proves_nothing() -> None:
    play = Play().stopped()
    play.handed()
    play.answers(HERE, THERE)
    play.hear(Refused(epoch=1, error=ERROR))
    assert play.ended() is Outcome.FAILED


def test_the_programs_no_proves_nothing() -> None:
    play = Play().stopped()
    play.handed(ERROR)
    assert any(isinstance(one, RemoveCopy) for one in play.answers(*MOVED))


def test_a_lost_last_answer_that_leaves_two_guests_is_told_at_once_and_ends_by_itself() -> None:
    play = Play().stopped()
    play.handed(ERROR)
    twice = Whereabouts(stay=Stay.RUNNING), Whereabouts(stay=Stay.RUNNING, ran=True)
    told = [one for one in play.answers(*twice) if isinstance(one, NeedOperator)]
    assert [one.error.code for one in told] == ["runs-twice"]
    assert "virsh destroy web01" in told[0].error.todo
    play.again()
    assert not any(isinstance(one, NeedOperator) for one in play.answers(*twice))  # told once
    play.again()
    play.answers(Whereabouts(stay=Stay.OFF), twice[1])
    play.put(facts.CopyRemoved(at_ms=play.after_ms(1)))
    assert play.ended() is Outcome.DONE
    assert not any(isinstance(one, Cont | EndCopy) for one in play.all)


def test_a_guest_that_stands_still_goes_on_only_if_the_target_proves_that_it_never_ran() -> None:
    paused = Whereabouts(stay=Stay.PAUSED)
    play = Play().stopped()
    play.handed(ERROR)
    assert any(isinstance(one, Cont) for one in play.answers(paused, Whereabouts(stay=Stay.ABSENT, ran=False)))
    play = Play().stopped()
    play.handed(ERROR)
    for _ in range(LOOKS_ALIKE):
        play.answers(paused, Whereabouts(stay=Stay.ABSENT))
        play.again()
    assert not any(isinstance(one, Cont | EndCopy) for one in play.all)
    assert [one.error.code for one in play.all if isinstance(one, NeedOperator)] == ["whereabouts-unclear"]


def test_a_program_that_did_not_hear_that_its_move_is_to_end_is_told_again() -> None:
    play = Play().begin()
    play.start_pass(1, 100 * MIB)
    play.state, effects = steered.recover(play.state, play.after_ms(1))
    assert any(isinstance(one, UndoSource) for one in effects)
    play.put(facts.Failed(at_ms=play.after_ms(1), effect="UndoSource", error=ERROR))
    play.answers(Whereabouts(stay=Stay.SILENT), THERE)
    assert not any(isinstance(one, UndoSource) for one in play.again())
    play.answers(Whereabouts(stay=Stay.RUNNING, busy=True), Whereabouts(stay=Stay.ARRIVING, busy=True))
    assert any(isinstance(one, UndoSource) for one in play.again())


def test_what_never_ran_at_the_target_and_cannot_be_ended_there_does_not_keep_the_move_open() -> None:
    arriving = Whereabouts(stay=Stay.ARRIVING, busy=True)
    play = Play().stopped()
    play.handed(ERROR)
    for _ in range(2 * LOOKS_ALIKE - 1):
        play.answers(Whereabouts(stay=Stay.PAUSED), arriving)
        play.again()
    assert not any(isinstance(one, Cont) for one in play.all)
    play.answers(Whereabouts(stay=Stay.PAUSED), arriving)
    assert any(isinstance(one, Cont) for one in play.all)
    play.again()
    play.answers(HERE, arriving)
    assert play.state.step is SourceStep.UNDOING
    assert "virsh destroy" in play.state.warnings[-1]


@pytest.mark.parametrize("here", [HERE, Whereabouts(stay=Stay.PAUSED)])
def test_what_still_waits_at_the_target_is_ended_when_nothing_moves_it_any_more(here: Whereabouts) -> None:
    arriving = Whereabouts(stay=Stay.ARRIVING, busy=True)
    play = Play().stopped()
    play.handed(ERROR)
    for _ in range(LOOKS_ALIKE - 1):
        play.answers(here, arriving)
        play.again()
    assert not sent(play, EndArrival)
    play.answers(here, arriving)
    assert sent(play, EndArrival)
    play.again()
    if here.stay is Stay.PAUSED:
        assert any(isinstance(one, Cont) for one in play.answers(here, THERE))
        play.again()
    play.answers(HERE, THERE)
    assert play.state.step is SourceStep.UNDOING


def test_a_copy_that_was_succeeded_is_ended() -> None:
    play = Play().stopped()
    play.handed(ERROR)
    assert any(isinstance(one, EndCopy) for one in play.answers(Whereabouts(stay=Stay.PAUSED), MOVED[1]))
    play.put(facts.CopyEnded(at_ms=play.after_ms(1)))
    play.again()
    assert any(isinstance(one, RemoveCopy) for one in play.answers(*MOVED))


@pytest.mark.parametrize("silent", ["host1", "host2"])
def test_a_silent_side_is_waited_for_and_named(silent: str) -> None:
    play = Play().stopped()
    play.handed(ERROR)
    quiet = Whereabouts(stay=Stay.SILENT)
    play.answers(*((quiet, THERE) if silent == "host1" else (HERE, quiet)))
    told = play.put(facts.TimerFired(at_ms=play.after_ms(15000), name=STEP_TIMER))
    errors = [one.error for one in told if isinstance(one, NeedOperator)]
    assert [error.code for error in errors] == ["whereabouts-unknown"]
    assert f"and {silent} cannot say" in errors[0].message
    play.again()
    play.answers(HERE, THERE)
    assert play.state.failure is not None
    assert play.state.failure.code != "whereabouts-unknown", "it is known now"
    play.hear(Refused(epoch=1, error=ERROR))
    assert play.ended() is Outcome.FAILED


def test_a_guest_that_is_on_neither_side_has_ended() -> None:
    play = Play().stopped()
    play.handed(ERROR)
    for _ in range(LOOKS_ALIKE - 1):
        play.answers(Whereabouts(stay=Stay.OFF), THERE)
        play.again()
    play.answers(Whereabouts(stay=Stay.OFF), THERE)
    play.hear(Refused(epoch=1, error=ERROR))
    assert play.ended() is Outcome.FAILED
    assert play.state.failure is not None
    assert play.state.failure.code == "vm-ended"


def test_a_cancel_tells_the_program_to_end_it_and_believes_the_sides() -> None:
    play = Play().begin()
    play.start_pass(1, 200 * MIB)
    told = play.put(facts.CancelRequested(at_ms=play.after_ms(1), caller="local uid 0"))
    assert any(isinstance(one, UndoSource) for one in told)
    assert play.asked_both(play.handed(ERROR))
    play.answers(HERE, Whereabouts(stay=Stay.PAUSED))  # its libvirt is still clearing up
    play.again()
    stays = play.answers(HERE, THERE)
    assert [one.message.error.code for one in stays if isinstance(one, Send) and isinstance(one.message, Abort)] == [
        "cancelled"
    ]
    play.hear(Refused(epoch=1, error=ERROR))
    assert play.ended() is Outcome.CANCELLED


def test_a_cancel_that_comes_too_late_is_a_move() -> None:
    play = Play().stopped()
    play.put(facts.CancelRequested(at_ms=play.after_ms(1), caller="local uid 0"))
    play.handed()
    play.answers(*MOVED)
    play.put(facts.CopyRemoved(at_ms=play.after_ms(1)))
    assert play.ended() is Outcome.DONE
    assert "too late" in play.state.warnings[0]


def test_a_new_agent_ends_what_goes_on_and_asks_both_sides() -> None:
    play = Play().begin()
    play.start_pass(1, 200 * MIB)
    play.state, effects = steered.recover(play.state, play.after_ms(1))
    assert any(isinstance(one, UndoSource) for one in effects)
    assert play.asked_both(play.put(facts.Undone(at_ms=play.after_ms(1))))


def test_a_target_without_the_program_is_a_finding() -> None:
    play = Play()
    play.put(facts.Started(at_ms=0.0))
    play.hear(Answer(inventory=msgspec.structs.replace(host("host2", 2), runtimes={})))
    assert play.ended() is Outcome.FAILED
    assert [one.id for one in play.state.findings] == ["runtime-missing"]
