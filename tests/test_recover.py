"""A new agent, an old journal, and the QEMU that it finds: every step of both machines, every kind of evidence."""

import itertools

import msgspec
import pytest

from kvmhv.core import effects as ef
from kvmhv.core import facts, handover, recover
from kvmhv.core.handover import SourceRight, TargetRight
from kvmhv.core.source_state import SourceState, SourceStep
from kvmhv.core.target_state import TargetState, TargetStep
from kvmhv.messages import Abort, Finished, Owned, Refused, Unknown
from kvmhv.model import ErrorBody, MoveReport, Outcome
from tests.test_source import at
from tests.test_target import Driven, loaded, settling, standing, starting, waiting

S, T = SourceStep, TargetStep
ERROR = ErrorBody(code="broken", message="it broke", todo="")
STEERED = (S.ABORTING, S.CONCLUDING)
"""Steps of moves that another program makes: tests/test_steered.py."""
LIVE = [step for step in S if step not in (S.UNDOING, S.ENDED, *STEERED)]


def found(*, process: bool = True, status: str = "", migration: str = "", rebooted: bool = False) -> facts.Restarted:
    return facts.Restarted(at_ms=0, process=process, status=status, migration=migration, rebooted=rebooted)


def kinds(effects: list[ef.Effect]) -> list[type[ef.Effect]]:
    return [type(effect) for effect in effects]


def undoing() -> SourceState:
    return at(S.MEMORY).told(facts.CancelRequested(at_ms=1, caller="x")).state


def again(state: SourceState, evidence: facts.Restarted) -> tuple[SourceState, list[type[ef.Effect]]]:
    after, effects = recover.recover_source(state, evidence)
    assert not after.connected
    return after, kinds(effects)


# --- source


@pytest.mark.parametrize("step", [S.OFFERING, S.STORAGE, S.MEMORY, S.STOPPING, S.SWITCHING])
def test_what_was_not_granted_is_taken_back(step: SourceStep) -> None:
    after, effects = again(at(step).state, found(status="paused", migration="completed"))
    assert (after.step, after.hold.right) == (S.UNDOING, SourceRight.HOLDS)
    assert effects.index(ef.Journal) < effects.index(ef.UndoSource)


def test_a_lost_volatile_journal_makes_a_completed_source_a_granted_one() -> None:
    evidence = found(status="postmigrate", migration="completed", rebooted=True)
    after, effects = again(at(S.SWITCHING).state, evidence)
    assert (after.step, after.hold.right) == (S.GRANTED, SourceRight.GRANTED)
    assert ef.Cont not in effects
    assert effects.count(ef.Journal) == 2, "on disk too: the volatile journal has been lost once"


def test_before_the_offer_there_is_nothing_to_take_back() -> None:
    after, effects = again(at(S.ENQUIRING).state, found())
    assert after.step is S.ENDED
    assert effects == [ef.Finish]


@pytest.mark.parametrize("process", [True, False])
def test_a_grant_stands(process: bool) -> None:
    after, effects = again(at(S.GRANTED).state, found(process=process))
    assert (after.step, after.hold.copy_lost) == (S.GRANTED, not process)
    assert effects == [ef.SetTimer]


def test_the_clean_up_begins_again() -> None:
    owned = at(S.CLEANUP).hears(Owned(epoch=1)).told(facts.CopyEnded(at_ms=1)).state
    assert (owned.removing, owned.copy_ended) == (True, True)
    after, effects = again(owned, found(process=False))
    assert (after.removing, after.copy_ended) == (False, False)
    assert effects == [ef.SetTimer, ef.EndCopy]


@pytest.mark.parametrize("step", [S.MEMORY, S.STOPPING, S.SWITCHING])
def test_a_source_without_a_copy_may_have_sent_everything_so_it_grants(step: SourceStep) -> None:
    state = at(step).state
    announced = msgspec.structs.replace(state, hold=handover.announce(state.hold)[0])
    after, effects = again(announced, found(process=False, rebooted=True))
    assert (after.step, after.hold.right, after.guest_runs) == (S.GRANTED, SourceRight.GRANTED, False)
    assert effects[0] is ef.Journal


@pytest.mark.parametrize("rebooted", [True, False])
@pytest.mark.parametrize("step", [S.OFFERING, S.STORAGE, S.MEMORY])
def test_without_a_copy_and_an_announcement_it_has_failed(step: SourceStep, rebooted: bool) -> None:
    """A power cut of both hosts while the guest still ran here: nothing was granted, and this side can say so."""
    after, effects = again(at(step).state, found(process=False, rebooted=rebooted))
    assert (after.step, after.hold.right, after.guest_runs) == (S.UNDOING, SourceRight.HOLDS, False)
    assert effects[0] is ef.Journal


def test_the_journal_of_a_version_that_did_not_announce_proves_nothing() -> None:
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(at(S.MEMORY).state))
    del old["hold"]["announced"]
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=SourceState)
    after, _ = again(state, found(process=False, rebooted=True))
    assert after.step is S.GRANTED


@pytest.mark.parametrize("process", [True, False])
def test_a_move_that_was_being_taken_back_never_grants(process: bool) -> None:
    running = msgspec.structs.replace(undoing(), guest_runs=True)
    after, effects = again(running, found(process=process, rebooted=not process))
    assert (after.step, after.hold.right) == (S.UNDOING, SourceRight.HOLDS)
    assert effects == [ef.SetTimer, ef.UndoSource]
    assert after.guest_runs is process


@pytest.mark.parametrize(
    ("step", "process", "migration", "rebooted"),
    list(itertools.product(LIVE, (True, False), ("", "active", "completed", "failed"), (True, False))),
)
def test_no_evidence_makes_a_granted_source_run(
    step: SourceStep, process: bool, migration: str, rebooted: bool
) -> None:
    """And its state always goes back into the journal and out of it."""
    state = at(step).state
    after, effects = recover.recover_source(state, found(process=process, migration=migration, rebooted=rebooted))
    assert ef.Cont not in kinds(effects)
    if state.hold.right in (SourceRight.GRANTED, SourceRight.YIELDED):
        assert after.hold.right is state.hold.right
        assert ef.UndoSource not in kinds(effects)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(after), type=SourceState) == after


# --- target


def take(state: TargetState, evidence: facts.Restarted) -> tuple[TargetState, list[type[ef.Effect]]]:
    after, effects = recover.recover_target(state, evidence)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(after), type=TargetState) == after
    return after, kinds(effects)


@pytest.mark.parametrize("kernel", [True, False])
def test_what_was_being_made_ready_is_refused_and_undone(kernel: bool) -> None:
    after, effects = take(Driven(kernel=kernel).state, found(process=False))
    assert after.hold.right is TargetRight.REFUSED
    assert effects[0] is ef.Journal
    assert ef.UndoTarget in effects


@pytest.mark.parametrize(("migration", "transferred"), [("", False), ("active", False), ("completed", True)])
def test_an_incoming_qemu_goes_on_waiting(migration: str, transferred: bool) -> None:
    after, effects = take(waiting().state, found(status="inmigrate", migration=migration))
    assert (after.step, after.transferred, after.granted_epoch) == (T.WAITING, transferred, None)
    assert effects == [ef.SetTimer, ef.SetTimer]


@pytest.mark.parametrize("migration", ["failed", "cancelled"])
def test_a_failed_migration_is_refused(migration: str) -> None:
    assert take(waiting().state, found(migration=migration))[0].hold.right is TargetRight.REFUSED


def test_a_waiting_qemu_that_is_gone_has_not_run_unless_the_host_rebooted() -> None:
    assert take(loaded().state, found(process=False))[0].hold.right is TargetRight.REFUSED
    after, effects = take(loaded().state, found(process=False, rebooted=True))
    assert (after.step, after.outcome) == (T.STANDING, Outcome.NEEDS_OPERATOR)
    assert effects == [ef.Journal, ef.NeedOperator]


def test_what_was_about_to_run_runs_or_is_owned() -> None:
    after, effects = take(starting().state, found(status="paused", migration="completed"))
    assert after.hold.right is TargetRight.OWNS
    assert effects[:2] == [ef.Journal, ef.Cont]
    after, effects = take(starting().state, found(process=False))
    assert (after.step, after.hold.right) == (T.SETTLING, TargetRight.OWNS)
    assert ef.Adopt in effects


def test_what_ran_is_adopted() -> None:
    assert ef.Adopt in take(settling().state, found(status="running"))[1]


def test_what_stands_goes_on_standing() -> None:
    assert take(standing().state, found(process=False)) == (
        msgspec.structs.replace(standing().state, connected=False),
        [],
    )


def test_a_refusal_is_undone_again_whatever_was_under_way() -> None:
    driven = Driven().hears(Abort(epoch=1, error=ERROR))
    assert driven.state.preparing
    after, effects = take(driven.state, found(process=True))
    assert effects == [ef.SetTimer, ef.UndoTarget]
    assert not after.preparing


def test_an_end_that_was_cut_short_is_ended() -> None:
    driven = waiting().hears(Abort(epoch=1, error=ERROR)).told(facts.Undone(at_ms=1))
    assert take(driven.state, found(process=False))[1] == [ef.Finish]


# --- what is said of moves that have ended


def ended(outcome: Outcome, *, error: bool = True) -> MoveReport:
    report = at(S.MEMORY).told(facts.QemuGone(at_ms=1, error=ERROR)).state
    from kvmhv.core.source_state import report as show  # noqa: PLC0415 - the name is a fixture's everywhere else

    return msgspec.structs.replace(show(report, 1), outcome=outcome, error=ERROR if error else None)


def test_what_a_target_says_of_an_ended_move() -> None:
    assert recover.answer_as_target(ended(Outcome.DONE), 3, "host2") == Owned(epoch=3, ended=True, lost=ERROR)
    assert recover.answer_as_target(ended(Outcome.FAILED), 3, "host2") == Refused(epoch=3, error=ERROR)
    unnamed = recover.answer_as_target(ended(Outcome.CANCELLED, error=False), 3, "host2")
    assert isinstance(unnamed, Refused)
    assert unnamed.error.code == "move-ended"
    assert isinstance(recover.answer_as_target(None, 3, "host2"), Unknown)


def test_what_a_source_says_of_an_ended_move() -> None:
    done = ended(Outcome.DONE)
    assert recover.answer_as_source(done, 3, "host1") == Finished(epoch=3, report=done)
    assert recover.answer_as_source(ended(Outcome.CANCELLED), 3, "host1") == Abort(epoch=3, error=ERROR)
    unnamed = recover.answer_as_source(ended(Outcome.FAILED, error=False), 3, "host1")
    assert isinstance(unnamed, Abort)
    assert unnamed.error.code == "move-ended"
    assert recover.answer_as_source(None, 3, "host1") is None


def test_a_qemu_that_was_told_to_run_is_evidence_where_the_journal_is_lost() -> None:
    """The note that it was about to run is gone with the volatile journal: it is not refused, for it may be running."""
    for status in ("running", "paused"):
        evidence = msgspec.structs.replace(found(status=status, migration="completed", rebooted=True), ever_ran=True)
        after, effects = take(waiting().state, evidence)
        assert (after.step, after.hold.may_run()) == (T.STARTING, True)
        assert ef.Cont in effects
        assert ef.UndoTarget not in effects
