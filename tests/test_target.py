"""The target's machine where the stories do not go: what fails in which step, and what a refusal waits for."""

import msgspec
import pytest

from kvmhv.core import effects as ef
from kvmhv.core import facts, target, target_undo
from kvmhv.core.effects import Effect, Finish, Send
from kvmhv.core.handover import TargetHold, TargetRight
from kvmhv.core.target_state import Pages, TargetState, TargetStep
from kvmhv.messages import (
    Abort,
    AnyMessage,
    FilesSent,
    FilesWanted,
    Finished,
    Grant,
    MirrorsEnded,
    Offer,
    Owned,
    Ready,
    Refused,
    Running,
    Unknown,
)
from kvmhv.model import DirectKernel, ErrorBody, IncomingAddress, MoveReport, Outcome, Phase
from tests.sim import examples
from tests.test_source import S, at

T = TargetStep
ERROR = ErrorBody(code="broken", message="it broke", todo="")
CANCELLED = ErrorBody(code="cancelled", message="cancelled by somebody", todo="")
READY = facts.IncomingReady(at_ms=1, address=IncomingAddress(memory_port=49152, disk_port=49153))
GONE = facts.QemuGone(at_ms=1, error=ERROR)
RUNS = facts.GuestRuns(at_ms=1, resumed_ms=7)
RUNNING = Running(epoch=1, resumed_ms=7, loaded_before_ms=6, granted_before_ms=6)


class Driven:
    """A target that is told facts."""

    def __init__(self, *, disks: int = 1, kernel: bool = False) -> None:
        moving = examples.vm(disks=disks)
        if kernel:
            moving = msgspec.structs.replace(moving, kernel=DirectKernel(kernel_sha256="0" * 64, kernel_bytes=1))
        leaving = at(S.OFFERING, moving).state
        self.state: TargetState = examples.target_state(leaving, leaving.offer())
        self.effects: list[Effect] = []
        self.told(facts.Offered(at_ms=0))

    def told(self, *some: facts.Fact) -> "Driven":
        for fact in some:
            self.state, self.effects = target.step(self.state, fact)
            encoded = msgspec.msgpack.encode(self.state)
            assert msgspec.msgpack.decode(encoded, type=TargetState) == self.state
        return self

    def hears(self, *messages: AnyMessage) -> "Driven":
        return self.told(*(facts.Received(at_ms=1, message=message) for message in messages))

    def said(self) -> list[AnyMessage]:
        return [effect.message for effect in self.effects if isinstance(effect, Send)]

    def kinds(self) -> list[type[Effect]]:
        return [type(effect) for effect in self.effects]

    def final(self) -> MoveReport:
        (finish,) = [effect for effect in self.effects if isinstance(effect, Finish)]
        assert self.state.step is T.ENDED
        return finish.report


def waiting(*, disks: int = 1) -> Driven:
    return Driven(disks=disks).told(READY)


def loaded() -> Driven:
    return waiting().hears(MirrorsEnded(epoch=1, held=True)).told(facts.Unexported(at_ms=1), facts.MemorySent(at_ms=1))


def starting() -> Driven:
    driven = loaded().hears(Grant(epoch=1))
    assert driven.state.step is T.STARTING
    return driven


def settling() -> Driven:
    return starting().told(RUNS)


def standing() -> Driven:
    driven = waiting()
    driven.state = msgspec.structs.replace(driven.state, step=T.STANDING, failure=ERROR)
    return driven


# --- getting ready


def test_kernel_files_are_asked_for_first() -> None:
    driven = Driven(kernel=True)
    assert driven.said() == [FilesWanted()]
    assert driven.told(facts.PeerConnected(at_ms=1)).said() == [FilesWanted()]
    assert driven.hears(FilesSent()).kinds() == [ef.Journal, ef.SetTimer, ef.Prepare]


def test_ready_is_journalled_before_it_is_said_and_said_again() -> None:
    driven = waiting()
    kinds = driven.kinds()
    assert kinds.index(ef.Journal) < kinds.index(ef.Send)
    assert isinstance(driven.told(facts.PeerConnected(at_ms=1)).said()[0], Ready)
    assert isinstance(driven.hears(Offer(epoch=1, plan=driven.state.plan, psk_hex="")).said()[0], Ready)


def test_without_disks_there_is_no_export_to_close() -> None:
    driven = waiting(disks=0)
    assert driven.state.unexported
    assert ef.Unexport not in driven.hears(MirrorsEnded(epoch=1)).kinds()


# --- refusals


def test_a_qemu_that_ends_while_it_is_prepared_is_told_by_what_prepared_it() -> None:
    """It ends its QEMU itself when something fails; the end is not the reason."""
    driven = Driven().told(GONE)
    assert driven.state.step is T.PREPARING
    why = ErrorBody(code="qemu-error", message="the reason", todo="")
    driven.told(facts.Failed(at_ms=1, effect="Prepare", error=why), facts.Undone(at_ms=1))
    assert driven.final().reason == "the reason"


def test_a_qemu_that_ends_when_it_was_just_ready_is_refused() -> None:
    driven = Driven().told(GONE, READY, facts.Undone(at_ms=1))
    assert driven.final().reason == ERROR.message


@pytest.mark.parametrize(
    "fact",
    [
        facts.Failed(at_ms=1, effect="Unexport", error=ERROR),
        GONE,
        facts.MemoryFailed(at_ms=1, error=ERROR),
        facts.TimerFired(at_ms=1, name="step"),
        facts.TimerFired(at_ms=1, name="peer"),
        facts.Received(at_ms=1, message=Abort(epoch=1, error=ERROR)),
    ],
    ids=lambda fact: type(fact).__name__,
)
def test_what_fails_before_the_run_is_refused_on_disk_taken_back_and_then_said(fact: facts.Fact) -> None:
    driven = waiting().told(fact)
    assert driven.state.hold.right is TargetRight.REFUSED
    kinds = driven.kinds()
    assert kinds.index(ef.Journal) < kinds.index(ef.UndoTarget)
    assert driven.said() == []
    driven.told(facts.Undone(at_ms=2, warnings=("w",)))
    (refused,) = driven.said()
    assert isinstance(refused, Refused)
    assert driven.final().outcome is Outcome.FAILED
    assert driven.final().warnings == ("w",)


def test_a_cancelled_move_is_cancelled_here_too() -> None:
    driven = waiting().hears(Abort(epoch=1, error=CANCELLED)).told(facts.Undone(at_ms=2))
    assert driven.final().outcome is Outcome.CANCELLED


@pytest.mark.parametrize("answer", [READY, facts.Failed(at_ms=1, effect="Prepare", error=ERROR)])
def test_what_is_being_prepared_is_taken_back_when_it_is_known(answer: facts.Fact) -> None:
    driven = Driven().hears(Abort(epoch=1, error=ERROR))
    assert driven.state.hold.right is TargetRight.REFUSED
    assert ef.UndoTarget not in driven.kinds()
    assert ef.UndoTarget in driven.told(answer).kinds()
    assert driven.told(READY).effects == []
    assert driven.told(facts.Undone(at_ms=2)).final().outcome is Outcome.FAILED


def test_what_cannot_be_taken_back_is_tried_again_before_it_is_a_warning() -> None:
    driven = waiting().hears(Abort(epoch=1, error=CANCELLED))
    failed = facts.Failed(at_ms=2, effect="UndoTarget", error=ERROR)
    for _ in range(target_undo.UNDO_TRIES - 1):
        assert driven.told(failed).kinds() == [ef.SetTimer]
        assert driven.told(facts.TimerFired(at_ms=3, name="step")).kinds() == [ef.UndoTarget, ef.SetTimer]
    assert driven.told(failed).final().warnings == (ERROR.message,)


def test_a_prepare_that_fails_is_undone_at_once() -> None:
    driven = Driven().told(facts.Failed(at_ms=1, effect="Prepare", error=ERROR))
    assert driven.state.hold.right is TargetRight.REFUSED
    assert ef.UndoTarget in driven.kinds()
    assert driven.told(facts.Undone(at_ms=2)).final().error == ERROR


def test_a_prepare_that_never_answers_is_undone_all_the_same() -> None:
    driven = Driven().hears(Abort(epoch=1, error=ERROR)).told(facts.TimerFired(at_ms=1, name="step"))
    assert ef.UndoTarget in driven.kinds()


def test_a_refusal_is_not_said_while_its_qemu_cannot_be_ended() -> None:
    driven = waiting().hears(Abort(epoch=1, error=ERROR))
    hangs = facts.Failed(at_ms=1, effect="UndoTarget", error=ErrorBody(code="qemu-unkillable", message="", todo=""))
    for _ in range(10):
        assert driven.told(hangs).said() == []
        assert driven.told(facts.TimerFired(at_ms=1, name="step")).kinds() == [ef.UndoTarget, ef.SetTimer]
    shown = target.report(driven.state)
    assert (shown.outcome, shown.error and shown.error.code) == (Outcome.NEEDS_OPERATOR, "qemu-unkillable")
    assert driven.told(facts.Undone(at_ms=2)).said()
    assert driven.final().outcome is Outcome.FAILED


def test_a_qemu_that_cannot_be_ended_is_the_operators_after_some_tries() -> None:
    driven = waiting().hears(Abort(epoch=1, error=ERROR))
    hangs = facts.Failed(at_ms=1, effect="UndoTarget", error=ErrorBody(code="qemu-unkillable", message="", todo=""))
    shown = []
    for _ in range(target_undo.UNDO_TRIES):
        shown.append(target.report(driven.told(hangs).state).outcome)
        driven.told(facts.TimerFired(at_ms=1, name="step"))
    assert shown == [*[Outcome.RUNNING] * (target_undo.UNDO_TRIES - 1), Outcome.NEEDS_OPERATOR]


def test_what_else_cannot_be_removed_is_a_warning_in_the_end() -> None:
    driven = waiting().hears(Abort(epoch=1, error=ERROR))
    failed = facts.Failed(at_ms=1, effect="UndoTarget", error=ERROR)
    driven.told(failed, failed)
    assert driven.state.step is T.UNDOING
    assert driven.told(failed).final().warnings == ("it broke",)


def test_another_effects_failure_does_not_end_the_undo() -> None:
    driven = waiting().hears(Abort(epoch=1, error=ERROR))
    assert driven.told(facts.Failed(at_ms=1, effect="Unexport", error=ERROR)).effects == []


# --- the grant


def test_the_order_in_which_it_all_comes_together_does_not_matter() -> None:
    for order in ("LUG", "LGU", "ULG", "UGL", "GLU", "GUL"):
        driven = waiting().hears(MirrorsEnded(epoch=1))
        for letter in order:
            if letter == "G":
                driven.hears(Grant(epoch=1))
            else:
                driven.told(facts.MemorySent(at_ms=1) if letter == "L" else facts.Unexported(at_ms=1))
        assert driven.state.step is T.STARTING, order
        assert driven.kinds()[:2] == [ef.Journal, ef.Cont], order


def test_a_grant_for_another_epoch_grants_nothing() -> None:
    driven = loaded()
    state = driven.state
    for message in (Grant(epoch=2), Grant(epoch=0), Abort(epoch=2, error=ERROR), MirrorsEnded(epoch=2)):
        assert driven.hears(message).state == state
        assert driven.effects == []


def test_a_grant_stands_for_a_mirrors_ended_that_was_lost() -> None:
    driven = waiting().told(facts.MemorySent(at_ms=1)).hears(Grant(epoch=1))
    assert ef.Unexport in driven.kinds()
    assert driven.told(facts.Unexported(at_ms=1)).state.step is T.STARTING


def test_granted_but_never_loaded_is_refused_soon() -> None:
    driven = waiting().hears(MirrorsEnded(epoch=1, held=True), Grant(epoch=1, sent=False))
    assert any(isinstance(effect, ef.SetTimer) and effect.after_s < 10 for effect in driven.effects)
    assert driven.told(facts.TimerFired(at_ms=1, name="step")).state.hold.right is TargetRight.REFUSED


def test_a_source_without_a_copy_is_not_believed_while_pages_are_missing() -> None:
    """They were in its memory."""
    driven = waiting().hears(MirrorsEnded(epoch=1, held=True)).told(facts.Unexported(at_ms=1))
    driven.state = msgspec.structs.replace(driven.state, transferred=True, pages=Pages.MISSING)
    assert driven.hears(Grant(epoch=1, sent=False)).state.hold.right is TargetRight.REFUSED


@pytest.mark.parametrize("held", [True, False])
def test_a_source_without_a_copy_is_believed_only_if_its_guest_was_held(held: bool) -> None:
    driven = (
        waiting().hears(MirrorsEnded(epoch=1, held=held)).told(facts.Unexported(at_ms=1), facts.MemorySent(at_ms=1))
    )
    driven.hears(Grant(epoch=1, sent=False))
    assert driven.state.hold.right is (TargetRight.OWNS if held else TargetRight.REFUSED)


def test_a_complete_copy_is_never_given_up_by_itself() -> None:
    driven = loaded()
    for name in ("step", "peer"):
        driven.told(facts.TimerFired(at_ms=1, name=name))
        assert driven.state.step is T.WAITING
        assert driven.state.outcome is Outcome.NEEDS_OPERATOR
    driven.hears(Grant(epoch=1))
    assert (driven.state.step, driven.state.outcome) == (T.STARTING, Outcome.RUNNING)


# --- starting and settling


def test_too_late_to_abort() -> None:
    assert starting().hears(Abort(epoch=1, error=ERROR)).said() == []
    assert settling().hears(Abort(epoch=1, error=ERROR)).said() == [RUNNING]


def test_a_cont_that_fails_or_hangs_is_tried_again_until_it_runs() -> None:
    driven = starting().told(facts.Failed(at_ms=1, effect="Cont", error=ERROR))
    assert driven.kinds() == [ef.SetTimer, ef.NeedOperator]
    driven.told(facts.TimerFired(at_ms=1, name="step"))
    assert driven.kinds()[:2] == [ef.Journal, ef.Cont]
    assert driven.state.step is T.STARTING
    driven.told(RUNS)
    assert (driven.state.step, driven.state.outcome, driven.state.failure) == (T.SETTLING, Outcome.RUNNING, None)


def test_another_effects_failure_does_not_touch_the_start() -> None:
    driven = starting()
    state = driven.state
    assert driven.told(facts.Failed(at_ms=1, effect="Unexport", error=ERROR)).state == state


def test_a_qemu_that_dies_under_the_cont_may_have_run_so_it_is_owned() -> None:
    driven = starting().told(GONE)
    assert ef.Adopt in driven.kinds()
    assert driven.told(facts.Adopted(at_ms=1)).said() == [Owned(epoch=1)]
    assert driven.told(facts.TimerFired(at_ms=1, name="step")).final().warnings == ("it broke",)


def test_a_run_that_is_seen_late_is_said_late() -> None:
    driven = starting().told(GONE, facts.Adopted(at_ms=1), RUNS)
    assert driven.said() == [RUNNING, Owned(epoch=1)]


def test_owned_is_said_when_it_is_on_disk_and_again() -> None:
    driven = settling()
    assert Owned(epoch=1) not in driven.said()
    assert driven.told(facts.Adopted(at_ms=1)).said() == [Owned(epoch=1)]
    kinds = driven.kinds()
    assert kinds.index(ef.Journal) < kinds.index(ef.Send)
    assert driven.hears(Grant(epoch=1)).said() == [RUNNING, Owned(epoch=1)]
    assert driven.told(facts.PeerConnected(at_ms=1)).said() == [RUNNING, Owned(epoch=1)]


def test_an_adoption_that_hangs_is_tried_again_and_nothing_ends_before_it() -> None:
    driven = settling().told(facts.TimerFired(at_ms=1, name="step"))
    assert ef.Adopt in driven.kinds()
    leaving = at(S.CLEANUP).hears(Owned(epoch=1)).told(facts.CopyEnded(at_ms=1), facts.CopyRemoved(at_ms=2))
    finished = Finished(epoch=1, report=leaving.final())
    assert driven.hears(finished).state.step is T.SETTLING
    final = driven.told(facts.Adopted(at_ms=1)).hears(finished).final()
    assert (final.direction, final.outcome, final.blackout_ms) == ("in", Outcome.DONE, 25)


@pytest.mark.parametrize("step", [starting, settling])
def test_a_timer_of_an_earlier_step_means_nothing(step: object) -> None:
    driven = step()  # type: ignore[operator]
    state = driven.state
    assert driven.told(facts.TimerFired(at_ms=1, name="peer")).state == state


# --- standing


def test_a_target_that_cannot_tell_says_so_and_obeys_who_can() -> None:
    assert standing().hears(Grant(epoch=1)).said() == [Unknown(epoch=1, error=ERROR)]
    assert standing().told(facts.PeerConnected(at_ms=1)).said() == [Unknown(epoch=1, error=ERROR)]
    assert standing().hears(Grant(epoch=2, ran=True)).state.step is T.STANDING
    proved = standing().hears(Grant(epoch=1, ran=True))
    assert (proved.state.step, proved.state.hold.right) == (T.SETTLING, TargetRight.OWNS)
    assert proved.kinds()[0] is ef.Journal
    assert standing().hears(Abort(epoch=1, error=ERROR)).state.hold.right is TargetRight.REFUSED


@pytest.mark.parametrize("make", [Driven, waiting, loaded, starting, settling, standing])
def test_every_step_can_be_shown(make: object) -> None:
    driven = make()  # type: ignore[operator]
    report = target.report(driven.state)
    assert (report.direction, report.id) == ("in", "move-1")
    assert 0 <= report.progress <= 1


@pytest.mark.parametrize(
    ("make", "phase"),
    [
        (Driven, Phase.SETUP),
        (waiting, Phase.MEMORY),
        (loaded, Phase.STATE),
        (starting, Phase.STATE),
        (settling, Phase.CLEANUP),
    ],
)
def test_the_phase_is_what_it_can_see(make: object, phase: Phase) -> None:
    assert target.report(make().state).phase is phase  # type: ignore[operator]


def test_the_invariants_are_asserted() -> None:
    driven = waiting()
    driven.state = msgspec.structs.replace(driven.state, hold=TargetHold(epoch=1, right=TargetRight.OWNS))
    with pytest.raises(AssertionError):
        driven.told(facts.PeerConnected(at_ms=1))
