"""The source's machine where the stories do not go: refusals, waits that are too long, what fails in which step."""

import msgspec
import pytest

from kvmhv.core import effects as ef
from kvmhv.core import facts, source
from kvmhv.core.effects import Effect, Finish, Send
from kvmhv.core.handover import SourceHold, SourceRight
from kvmhv.core.source_state import SourceState, SourceStep, report
from kvmhv.core.source_undo import UNDO_TRIES
from kvmhv.messages import (
    Abort,
    Answer,
    AnyMessage,
    FilesSent,
    FilesWanted,
    Grant,
    Owned,
    Ready,
    Refused,
    Running,
    Unknown,
)
from kvmhv.model import DirectKernel, ErrorBody, IncomingAddress, MoveReport, Outcome, Phase, Refusal, Vm
from tests.sim import examples

S = SourceStep
ERROR = ErrorBody(code="broken", message="it broke", todo="")
ADDRESS = IncomingAddress(memory_port=49152, disk_port=49153)
GONE = facts.QemuGone(at_ms=50, error=ERROR)
LOST = facts.PeerLost(at_ms=50, error=ERROR)


class Driven:
    """A source that is told facts."""

    def __init__(self, moving: Vm | None = None) -> None:
        self.state: SourceState = examples.source_state(moving or examples.vm())
        self.effects: list[Effect] = []

    def told(self, *some: facts.Fact) -> "Driven":
        for fact in some:
            self.state, self.effects = source.step(self.state, fact)
            encoded = msgspec.msgpack.encode(self.state)
            assert msgspec.msgpack.decode(encoded, type=SourceState) == self.state
        return self

    def hears(self, *messages: AnyMessage) -> "Driven":
        return self.told(*(facts.Received(at_ms=50, message=message) for message in messages))

    def said(self) -> list[AnyMessage]:
        return [effect.message for effect in self.effects if isinstance(effect, Send)]

    def kinds(self) -> list[type[Effect]]:
        return [type(effect) for effect in self.effects]

    def final(self) -> MoveReport:
        (finish,) = [effect for effect in self.effects if isinstance(effect, Finish)]
        assert self.state.step is S.ENDED
        return finish.report


def passes(number: int, remaining_bytes: int = 0) -> facts.PassStarted:
    return facts.PassStarted(
        at_ms=number * 10.0,
        number=number,
        sent_bytes=number * 100,
        remaining_bytes=remaining_bytes,
        total_bytes=1000,
        dirty_bytes_per_s=0,
    )


def at(step: SourceStep, moving: Vm | None = None) -> Driven:
    """A source that has come to this step the straight way."""
    driven = Driven(moving)
    way: list[tuple[SourceStep, list[facts.Fact | AnyMessage]]] = [
        (S.ENQUIRING, [facts.Started(at_ms=0), facts.PeerConnected(at_ms=0)]),
        (S.OFFERING, [Answer(inventory=examples.inventory("host2", octet=2))]),
        (S.STORAGE, [Ready(epoch=1, address=ADDRESS)]),
        (S.MEMORY, [facts.MirrorsReady(at_ms=5, copied_bytes=1)]),
        (S.STOPPING, [passes(1, 900), passes(2)]),
        (
            S.SWITCHING,
            [
                facts.GuestStopped(at_ms=23, told_ms=20),
                facts.MirrorsFinished(at_ms=25),
                facts.PreSwitchover(at_ms=30),
            ],
        ),
        (S.GRANTED, [facts.PagesFollow(at_ms=40) if step is S.SERVING else facts.MemorySent(at_ms=40)]),
        (S.SERVING if step is S.SERVING else S.CLEANUP, [Running(epoch=1, resumed_ms=45)]),
    ]
    for reached, told in way:
        for one in told:
            driven.told(one) if isinstance(one, facts.Fact) else driven.hears(one)
        assert driven.state.step is reached
        if reached is step:
            return driven
    raise AssertionError(step)


UNDOABLE = [S.OFFERING, S.STORAGE, S.MEMORY, S.STOPPING, S.SWITCHING]


def undone(driven: Driven) -> Driven:
    """The way out of an undo, as it should be."""
    kinds = driven.kinds()
    assert kinds.index(ef.Journal) < kinds.index(ef.UndoSource)
    assert Abort in {type(message) for message in driven.said()}
    assert not driven.told(facts.Undone(at_ms=60)).state.resumed
    assert driven.kinds() == [ef.Cont]
    driven.told(facts.GuestRuns(at_ms=61, resumed_ms=61))
    return driven if driven.state.step is S.ENDED else driven.hears(Refused(epoch=1, error=ERROR))


# --- setup


def test_a_refusal_of_the_targets_settings_ends_it_with_the_setting() -> None:
    refusal = Refusal(code="limit-reached", host="host2", setting="migration.moves_in", text="full")
    inventory = msgspec.structs.replace(examples.inventory("host2", octet=2), refusal=refusal)
    final = at(S.ENQUIRING).hears(Answer(inventory=inventory)).final()
    assert final.error is not None
    assert (final.outcome, final.error.code, final.error.exit_status) == (Outcome.FAILED, "limit-reached", 4)
    assert "migration.moves_in" in final.error.todo


def test_findings_end_it_all_at_once() -> None:
    inventory = msgspec.structs.replace(examples.inventory("host2", octet=2), switches=(), locations=())
    final = at(S.ENQUIRING).hears(Answer(inventory=inventory)).final()
    assert final.error is not None
    assert final.error.exit_status == 3
    assert {finding.id for finding in final.findings} == {"switch-missing", "location-missing"}
    assert final.error.findings == final.findings


def test_kernel_files_go_before_the_target_makes_ready() -> None:
    moving = msgspec.structs.replace(examples.vm(), kernel=DirectKernel(kernel_sha256="0" * 64, kernel_bytes=1))
    driven = at(S.OFFERING, moving).hears(FilesWanted())
    assert driven.kinds() == [ef.SendFiles]
    assert driven.told(facts.FilesUploaded(at_ms=1)).said() == [FilesSent()]
    assert driven.told(facts.PeerConnected(at_ms=2)).said() == [FilesSent()]


def test_zero_pages_are_counted_as_long_as_qemu_tells_them() -> None:
    driven = at(S.MEMORY)
    assert report(driven.state, 10.0).memory_zero_bytes is None
    told = facts.MemoryProgress(
        at_ms=10, sent_bytes=1, remaining_bytes=1, total_bytes=9, dirty_bytes_per_s=0, zero_bytes=4
    )
    driven.told(told, msgspec.structs.replace(passes(1, 900), zero_bytes=8), passes(2, 800))
    assert report(driven.state, 10.0).memory_zero_bytes == 8


def test_without_disks_memory_goes_at_once() -> None:
    driven = at(S.OFFERING, examples.vm(disks=0)).hears(Ready(epoch=1, address=ADDRESS))
    assert driven.state.step is S.MEMORY
    driven.told(passes(1), passes(2), facts.GuestStopped(at_ms=23, told_ms=20), facts.PreSwitchover(at_ms=30))
    assert driven.state.step is S.SWITCHING


@pytest.mark.parametrize("step", [S.ENQUIRING, S.OFFERING])
def test_a_target_that_cannot_be_reached_at_first_ends_it(step: SourceStep) -> None:
    driven = at(step).told(LOST)
    if step is S.OFFERING:
        driven.told(facts.Undone(at_ms=1), facts.GuestRuns(at_ms=1, resumed_ms=1))
    assert driven.final().outcome is Outcome.FAILED


# --- what fails before the grant


@pytest.mark.parametrize("step", UNDOABLE)
@pytest.mark.parametrize("why", ["cancel", "step", "failed", "refused", "unknown"])
def test_before_the_grant_everything_ends_with_the_vm_here(step: SourceStep, why: str) -> None:
    driven = at(step)
    if why == "cancel":
        driven.told(facts.CancelRequested(at_ms=50, caller="somebody"))
    elif why == "step":
        driven.told(facts.TimerFired(at_ms=50, name="step"))
    elif why == "failed":
        driven.told(facts.Failed(at_ms=50, effect="Whatever", error=ERROR))
    else:
        driven.hears(Refused(epoch=1, error=ERROR) if why == "refused" else Unknown(epoch=1, error=ERROR))
    final = undone(driven).final() if driven.state.step is not S.ENDED else driven.final()
    assert final.outcome is (Outcome.CANCELLED if why == "cancel" else Outcome.FAILED)
    assert driven.state.guest_runs
    assert final.error is not None
    assert final.error.exit_status == (6 if why == "cancel" else 1)


@pytest.mark.parametrize(("step", "name"), [(S.STORAGE, "idle"), (S.MEMORY, "idle"), (S.MEMORY, "peer")])
def test_each_wait_says_what_it_waited_for(step: SourceStep, name: str) -> None:
    driven = at(step).told(facts.TimerFired(at_ms=50, name=name))
    assert driven.state.failure is not None
    assert driven.state.failure.code == {"idle": "no-progress", "peer": "peer-lost"}[name]
    assert "the VM runs on host1" in driven.state.failure.message


@pytest.mark.parametrize(
    ("step", "name"), [(S.STOPPING, "idle"), (S.GRANTED, "idle"), (S.GRANTED, "peer"), (S.CLEANUP, "peer")]
)
def test_a_timer_of_an_earlier_step_means_nothing(step: SourceStep, name: str) -> None:
    before = at(step)
    state = before.state
    assert before.told(facts.TimerFired(at_ms=50, name=name)).state == state
    assert before.effects == []


def test_a_connection_may_come_back_for_a_while() -> None:
    driven = at(S.MEMORY).told(LOST)
    assert driven.effects == [ef.SetTimer(name="peer", after_s=30.0)]
    assert driven.told(LOST).effects == []
    assert driven.told(facts.PeerConnected(at_ms=51)).effects == [ef.ClearTimer(name="peer")]


def test_all_sent_without_a_connection_is_granted_when_it_is_back() -> None:
    driven = at(S.SWITCHING).told(LOST, facts.MemorySent(at_ms=51))
    assert driven.state.hold.right is SourceRight.HOLDS
    driven.told(facts.PeerConnected(at_ms=52))
    assert driven.state.hold.right is SourceRight.GRANTED
    assert Grant(epoch=1) in driven.said()


@pytest.mark.parametrize("step", [S.STORAGE, S.MEMORY, S.STOPPING])
def test_a_qemu_that_dies_before_the_switchover_is_a_vm_that_is_stopped(step: SourceStep) -> None:
    driven = at(step).told(GONE)
    driven.told(facts.Failed(at_ms=51, effect="UndoSource", error=ERROR)).hears(Refused(epoch=1, error=ERROR))
    final = driven.final()
    assert final.reason is not None
    assert "is gone: the VM is stopped there" in final.reason
    assert not driven.state.guest_runs


@pytest.mark.parametrize(("step", "effect"), [(S.STORAGE, "MirrorDisks"), (S.MEMORY, "SendMemory")])
def test_why_it_failed_is_the_cause_at_the_target_and_not_what_was_felt_here(step: SourceStep, effect: str) -> None:
    felt = ErrorBody(code="mirror-failed", message="an input/output error", todo="", host="host1")
    cause = ErrorBody(code="qemu-gone", message="QEMU was ended by signal 9", todo="", host="host2")
    driven = at(step).told(facts.Failed(at_ms=50, effect=effect, error=felt)).hears(Refused(epoch=1, error=cause))
    driven.told(facts.Undone(at_ms=60), facts.GuestRuns(at_ms=61, resumed_ms=61))
    error = driven.final().error
    assert error is not None
    assert (error.code, error.host, error.message) == (
        "qemu-gone",
        "host2",
        "QEMU was ended by signal 9; the VM runs on host1",
    )


def test_the_blackout_begins_when_qemu_stopped_the_guest_by_itself() -> None:
    driven = at(S.MEMORY).told(facts.PreSwitchover(at_ms=30, stopped_ms=12))
    assert driven.state.stopped_ms == 12
    assert at(S.MEMORY).told(facts.PreSwitchover(at_ms=30)).state.stopped_ms == 30


def test_a_target_that_repeats_what_it_heard_changes_nothing() -> None:
    felt = ErrorBody(code="mirror-failed", message="an input/output error", todo="", host="host1")
    driven = at(S.STORAGE).told(facts.Failed(at_ms=50, effect="MirrorDisks", error=felt))
    driven.told(facts.Undone(at_ms=60), facts.GuestRuns(at_ms=61, resumed_ms=61)).hears(Refused(epoch=1, error=felt))
    assert driven.final().error == felt


def test_cancelled_is_not_said_of_a_vm_that_does_not_run() -> None:
    driven = at(S.MEMORY).told(facts.CancelRequested(at_ms=50, caller="somebody"), GONE)
    driven.told(facts.Failed(at_ms=51, effect="UndoSource", error=ERROR)).hears(Refused(epoch=1, error=ERROR))
    final = driven.final()
    assert final.outcome is Outcome.FAILED
    assert final.reason == "cancelled by somebody; its QEMU on host1 is gone: the VM is stopped there"


def test_a_qemu_that_dies_in_the_switchover_leaves_it_to_the_target() -> None:
    driven = at(S.SWITCHING).told(GONE)
    assert driven.state.step is S.GRANTED
    assert driven.said() == [Grant(epoch=1, sent=False)]


# --- the undo


def test_only_its_own_failure_ends_the_undo() -> None:
    driven = at(S.STORAGE).told(facts.CancelRequested(at_ms=50, caller="x"))
    driven.told(facts.Failed(at_ms=51, effect="MirrorDisks", error=ERROR), facts.MemoryFailed(at_ms=51, error=ERROR))
    assert driven.effects == []
    assert not driven.state.undone


def test_an_undo_that_fails_lets_the_guest_go_on_and_is_tried_again() -> None:
    driven = at(S.MEMORY).told(facts.CancelRequested(at_ms=50, caller="x"))
    failed = facts.Failed(at_ms=51, effect="UndoSource", error=ERROR)
    assert driven.told(failed).kinds() == [ef.Cont, ef.SetTimer]
    driven.told(facts.GuestRuns(at_ms=52, resumed_ms=52)).hears(Refused(epoch=1, error=ERROR))
    for _ in range(UNDO_TRIES - 1):
        assert driven.state.step is S.UNDOING
        assert ef.UndoSource in driven.told(facts.TimerFired(at_ms=60, name="step")).kinds()
        driven.told(failed)
    final = driven.final()
    assert (final.outcome, final.warnings) == (Outcome.CANCELLED, ("it broke",))


def test_as_long_as_the_guest_stands_still_the_taking_back_is_not_given_up() -> None:
    driven = at(S.STOPPING).told(facts.CancelRequested(at_ms=50, caller="x"))
    for _ in range(2 * UNDO_TRIES):
        driven.told(facts.Failed(at_ms=51, effect="UndoSource", error=ERROR))
        assert ef.UndoSource in driven.told(facts.TimerFired(at_ms=60, name="step")).kinds()
        driven.told(facts.Failed(at_ms=61, effect="Cont", error=ERROR))
    driven.told(facts.Undone(at_ms=70), facts.GuestRuns(at_ms=71, resumed_ms=71)).hears(Refused(epoch=1, error=ERROR))
    assert driven.final().outcome is Outcome.CANCELLED


def test_a_guest_that_does_not_go_on_is_told_and_tried_again() -> None:
    driven = at(S.STOPPING).told(facts.CancelRequested(at_ms=50, caller="x"), facts.Undone(at_ms=51))
    driven.told(facts.Failed(at_ms=52, effect="Cont", error=ERROR)).hears(Unknown(epoch=1, error=ERROR))
    assert driven.state.step is S.UNDOING
    driven.told(facts.TimerFired(at_ms=60, name="step"))
    assert [kind for kind in driven.kinds() if kind in (ef.Cont, ef.NeedOperator)] == [ef.Cont, ef.NeedOperator]
    shown = report(driven.state, 60)
    assert (shown.outcome, shown.error and shown.error.code) == (Outcome.NEEDS_OPERATOR, "resume-failed")
    driven.told(facts.TimerFired(at_ms=60, name="step"))
    assert [kind for kind in driven.kinds() if kind in (ef.Cont, ef.NeedOperator)] == [ef.Cont]
    assert driven.told(facts.GuestRuns(at_ms=61, resumed_ms=61)).final().outcome is Outcome.CANCELLED


def test_a_target_that_does_not_confirm_is_a_warning() -> None:
    driven = at(S.MEMORY).told(facts.CancelRequested(at_ms=50, caller="x"), facts.Undone(at_ms=51))
    driven.told(facts.GuestRuns(at_ms=52, resumed_ms=52), facts.TimerFired(at_ms=60, name="step"))
    assert "has not confirmed" in driven.final().warnings[0]


def test_a_refusal_lets_a_guest_try_again_whose_disks_the_target_held() -> None:
    driven = at(S.SWITCHING).told(facts.CancelRequested(at_ms=50, caller="x"), facts.Undone(at_ms=51))
    driven.told(facts.Failed(at_ms=52, effect="Cont", error=ERROR))
    assert driven.hears(Refused(epoch=1, error=ERROR)).kinds() == [ef.Cont]


def test_a_lost_peer_does_not_hold_the_undo_up() -> None:
    driven = at(S.MEMORY).told(facts.CancelRequested(at_ms=50, caller="x"), facts.Undone(at_ms=51))
    driven.told(facts.GuestRuns(at_ms=52, resumed_ms=52), LOST)
    assert driven.final().outcome is Outcome.CANCELLED


# --- after the grant


def test_after_the_grant_nothing_but_proof_counts() -> None:
    driven = at(S.GRANTED)
    state = driven.state
    for fact in (
        facts.CancelRequested(at_ms=50, caller="x"),
        facts.Failed(at_ms=50, effect="SendMemory", error=ERROR),
        facts.MemoryFailed(at_ms=50, error=ERROR),
    ):
        assert driven.told(fact).state == state
    for message in (
        Running(epoch=2, resumed_ms=1),
        Owned(epoch=0),
        Refused(epoch=2, error=ERROR),
        Unknown(epoch=2, error=ERROR),
    ):
        assert driven.hears(message).state == state
    assert driven.told(LOST).state.hold.right is SourceRight.GRANTED


def test_silence_needs_the_operator_and_proof_still_ends_it() -> None:
    driven = at(S.GRANTED).told(facts.TimerFired(at_ms=50, name="step"))
    assert driven.state.outcome is Outcome.NEEDS_OPERATOR
    assert driven.state.failure is not None
    assert driven.state.failure.exit_status == 5
    driven.hears(Owned(epoch=1)).told(facts.CopyEnded(at_ms=51), facts.CopyRemoved(at_ms=52))
    assert driven.final().outcome is Outcome.DONE
    assert driven.final().error is None


def test_unknown_after_the_grant_needs_the_operator() -> None:
    driven = at(S.GRANTED).hears(Unknown(epoch=1, error=ERROR))
    assert (driven.state.outcome, driven.state.step) == (Outcome.NEEDS_OPERATOR, S.GRANTED)


def test_the_copy_is_removed_only_when_the_target_owns_it_on_disk() -> None:
    driven = at(S.CLEANUP).told(facts.CopyEnded(at_ms=50))
    assert driven.effects == []
    driven.told(facts.TimerFired(at_ms=60, name="step"))
    assert driven.state.failure is not None
    assert driven.state.failure.code == "ownership-unconfirmed"
    assert driven.hears(Owned(epoch=1)).kinds() == [ef.RemoveCopy]
    assert driven.hears(Owned(epoch=1)).effects == []


@pytest.mark.parametrize("effect", ["EndCopy", "RemoveCopy"])
def test_a_clean_up_that_fails_is_tried_again_and_never_ends_with_the_vm_on_both_hosts(effect: str) -> None:
    driven = at(S.CLEANUP).hears(Owned(epoch=1))
    if effect == "RemoveCopy":
        driven.told(facts.CopyEnded(at_ms=50))
    driven.told(facts.Failed(at_ms=51, effect=effect, error=ERROR))
    assert driven.state.step is S.CLEANUP
    assert driven.state.outcome is Outcome.NEEDS_OPERATOR
    assert effect in [kind.__name__ for kind in driven.told(facts.TimerFired(at_ms=60, name="step")).kinds()]
    if effect == "EndCopy":
        assert driven.told(facts.CopyEnded(at_ms=61)).kinds() == [ef.RemoveCopy]
    assert driven.told(facts.CopyRemoved(at_ms=62, warnings=("w",))).final().warnings == ("w",)


def test_what_else_fails_in_the_clean_up_does_not_matter() -> None:
    driven = at(S.CLEANUP)
    state = driven.state
    assert driven.told(facts.Failed(at_ms=50, effect="SendMemory", error=ERROR)).state == state


# --- figures


def test_the_blackout_is_from_the_stop_to_the_targets_resume() -> None:
    driven = at(S.CLEANUP)
    assert report(driven.state, 100).blackout_ms == 25
    assert report(at(S.MEMORY).state, 100).blackout_ms is None


def test_a_pass_is_kept_when_it_is_complete() -> None:
    driven = at(S.MEMORY).told(passes(1, 1000), passes(2, 10**9), passes(2, 10**9))
    assert [one.number for one in driven.state.passes] == [1]
    assert driven.state.passes[0].sent_bytes == 100


def test_the_invariants_are_asserted() -> None:
    """A state that the rule forbids does not go on."""
    driven = at(S.MEMORY)
    driven.state = msgspec.structs.replace(driven.state, hold=SourceHold(epoch=1, right=SourceRight.GRANTED))
    with pytest.raises(AssertionError):
        driven.told(facts.PeerConnected(at_ms=1))


def test_a_switchover_that_comes_as_a_surprise_is_announced_before_the_guest_stops() -> None:
    """Memory that takes long: the first pass announces nothing, and then the guest has stopped writing."""
    driven = at(S.OFFERING)
    driven.state = msgspec.structs.replace(
        driven.state, inventory=examples.inventory("host1", running=driven.state.vm, used_bytes=1 << 36)
    )
    driven.hears(Ready(epoch=1, address=ADDRESS)).told(facts.MirrorsReady(at_ms=5, copied_bytes=1), passes(1))
    assert not driven.state.hold.announced
    driven.told(passes(2))
    assert driven.state.hold.announced
    assert driven.kinds()[:2] == [ef.Journal, ef.StopGuest]


def test_a_switchover_that_is_near_is_announced_while_the_guest_runs() -> None:
    driven = at(S.MEMORY).told(passes(1))
    assert driven.state.hold.announced
    assert driven.kinds()[0] is ef.Journal
    driven.told(passes(2))
    assert ef.Journal not in driven.kinds()


def test_qemu_that_switches_over_unannounced_waits_for_the_disk() -> None:
    driven = at(S.MEMORY).told(facts.PreSwitchover(at_ms=20))
    assert driven.state.hold.announced
    assert driven.kinds()[0] is ef.Journal


def test_a_guest_that_was_stopped_by_qemu_itself_does_not_run() -> None:
    driven = at(S.MEMORY).told(facts.PreSwitchover(at_ms=30, stopped_ms=29))
    assert (driven.state.step, driven.state.guest_runs) == (S.STOPPING, False)


def test_a_refusal_after_an_undo_that_hangs_lets_the_guest_go_on_at_once() -> None:
    driven = at(S.SWITCHING).told(facts.Failed(at_ms=50, effect="ContinueSwitchover", error=ERROR))
    driven.told(facts.TimerFired(at_ms=60, name="step"))
    assert ef.UndoSource in driven.kinds()
    assert ef.Cont in driven.hears(Refused(epoch=1, error=ERROR)).kinds()


def test_the_phases_follow_each_other() -> None:
    shown = report(at(S.CLEANUP).state, 99.0)
    assert [one.phase for one in shown.phases] == [one for one in Phase if one is not Phase.PAGES]
    assert shown.phase is Phase.CLEANUP


def test_the_first_frame_at_the_target_is_told_with_its_word() -> None:
    driven = at(S.GRANTED).hears(Running(epoch=1, resumed_ms=45), Owned(epoch=1))
    assert driven.state.first_frame_after_ms is None
    assert driven.hears(Owned(epoch=1, first_frame_after_ms=7.0)).state.first_frame_after_ms == 7.0
    assert driven.hears(Owned(epoch=1)).state.first_frame_after_ms == 7.0


def test_memory_that_goes_over_is_not_idle() -> None:
    def sent(sent_bytes: int) -> facts.MemoryProgress:
        return facts.MemoryProgress(
            at_ms=30, sent_bytes=sent_bytes, remaining_bytes=900, total_bytes=1000, dirty_bytes_per_s=0.0
        )

    driven = at(S.MEMORY).told(passes(1, 900))
    assert [one.name for one in driven.told(sent(500)).effects if isinstance(one, ef.SetTimer)] == ["idle"]
    assert ef.SetTimer not in driven.told(sent(500)).kinds()


def test_a_copy_that_does_not_end_is_ended_again_while_the_target_is_silent() -> None:
    driven = at(S.CLEANUP)
    late = facts.TimerFired(at_ms=99, name="step")
    assert driven.told(late).kinds() == [ef.EndCopy, ef.SetTimer, ef.NeedOperator]
    assert driven.told(facts.CopyEnded(at_ms=100), late).kinds() == [ef.SetTimer, ef.NeedOperator]
