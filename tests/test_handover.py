"""The rule of the handover: every transition that it allows, and every one that it refuses."""

import itertools

import pytest

from kvmhv.core import handover
from kvmhv.core.effects import Cont, Journal, Send
from kvmhv.core.handover import HandoverViolation, SourceHold, SourceRight, TargetHold, TargetRight
from kvmhv.messages import Grant

EPOCH = 7


def source(right: SourceRight, *, copy_lost: bool = False) -> SourceHold:
    return SourceHold(epoch=EPOCH, right=right, copy_lost=copy_lost)


def target(right: TargetRight) -> TargetHold:
    return TargetHold(epoch=EPOCH, right=right)


def test_the_rights_are_these() -> None:
    """A new one changes the rule: it wants its own lines here and in the exploration."""
    assert len(SourceRight) == 4
    assert len(TargetRight) == 3


@pytest.mark.parametrize(("right", "copy_lost"), list(itertools.product(SourceRight, (False, True))))
def test_who_may_run_at_the_source(right: SourceRight, copy_lost: bool) -> None:
    expected = right in (SourceRight.HOLDS, SourceRight.HOLDS_AGAIN) and not copy_lost
    assert source(right, copy_lost=copy_lost).may_run() is expected


@pytest.mark.parametrize("right", TargetRight)
def test_who_may_run_at_the_target(right: TargetRight) -> None:
    assert target(right).may_run() is (right is TargetRight.OWNS)


@pytest.mark.parametrize("right", [SourceRight.HOLDS, SourceRight.GRANTED])
def test_a_grant_is_journalled_before_it_is_sent(right: SourceRight) -> None:
    hold, effects = handover.grant(source(right), sent=True)
    assert hold.right is SourceRight.GRANTED
    assert effects == [Journal(durable=False), Send(message=Grant(epoch=EPOCH, sent=True))]


def test_what_was_not_announced_on_disk_is_not_granted() -> None:
    hold = SourceHold(epoch=EPOCH, announced=False)
    for lost in (hold, hold.without_copy()):
        with pytest.raises(HandoverViolation, match="not announced"):
            handover.grant(lost, sent=True)
    announced, effects = handover.announce(hold)
    assert effects == [Journal(durable=True)]
    assert handover.grant(announced, sent=True)[0].right is SourceRight.GRANTED
    assert handover.announce(announced) == (announced, [])


@pytest.mark.parametrize("right", [SourceRight.YIELDED, SourceRight.HOLDS_AGAIN])
def test_what_was_given_or_refused_is_not_granted_again(right: SourceRight) -> None:
    with pytest.raises(HandoverViolation):
        handover.grant(source(right), sent=True)


def test_no_grant_before_all_is_sent_but_without_a_copy() -> None:
    with pytest.raises(HandoverViolation):
        handover.grant(source(SourceRight.HOLDS), sent=False)
    _, effects = handover.grant(source(SourceRight.HOLDS, copy_lost=True), sent=False)
    assert effects[-1] == Send(message=Grant(epoch=EPOCH, sent=False))


@pytest.mark.parametrize("right", SourceRight)
def test_only_what_was_granted_can_be_yielded(right: SourceRight) -> None:
    if right in (SourceRight.GRANTED, SourceRight.YIELDED):
        assert handover.yield_copy(source(right), EPOCH).right is SourceRight.YIELDED
    else:
        with pytest.raises(HandoverViolation):
            handover.yield_copy(source(right), EPOCH)


@pytest.mark.parametrize(
    ("right", "after"),
    [
        (SourceRight.HOLDS, SourceRight.HOLDS),
        (SourceRight.GRANTED, SourceRight.HOLDS_AGAIN),
        (SourceRight.HOLDS_AGAIN, SourceRight.HOLDS_AGAIN),
    ],
)
def test_a_refusal_gives_the_vm_back(right: SourceRight, after: SourceRight) -> None:
    assert handover.take_refusal(source(right), EPOCH).right is after


def test_no_refusal_after_the_run() -> None:
    with pytest.raises(HandoverViolation):
        handover.take_refusal(source(SourceRight.YIELDED), EPOCH)


@pytest.mark.parametrize("right", SourceRight)
def test_the_source_resumes_only_what_it_holds(right: SourceRight) -> None:
    assert handover.resume_at_source(source(right, copy_lost=True), "vm") == []
    if source(right).may_run():
        assert handover.resume_at_source(source(right), "vm") == [Cont(vm_id="vm", epoch=EPOCH - 1)]
    else:
        with pytest.raises(HandoverViolation):
            handover.resume_at_source(source(right), "vm")


def run(hold: TargetHold, *, epoch: int = EPOCH, loaded: bool = True, newest: bool = True) -> TargetHold:
    after, effects = handover.run_at_target(hold, "vm", granted_epoch=epoch, loaded=loaded, newest=newest)
    assert effects == [Journal(durable=False), Cont(vm_id="vm", epoch=EPOCH)]
    return after


@pytest.mark.parametrize("right", [TargetRight.ACCEPTS, TargetRight.OWNS])
def test_the_run_is_journalled_before_cont(right: TargetRight) -> None:
    assert run(target(right)).right is TargetRight.OWNS


def test_no_run_after_a_refusal_before_all_is_there_or_of_what_may_be_old() -> None:
    for attempt in (
        lambda: run(target(TargetRight.REFUSED)),
        lambda: run(target(TargetRight.ACCEPTS), loaded=False),
        lambda: run(target(TargetRight.ACCEPTS), newest=False),
        lambda: run(target(TargetRight.ACCEPTS), epoch=EPOCH - 1),
    ):
        with pytest.raises(HandoverViolation):
            attempt()


def test_a_refusal_is_for_good_and_never_after_the_run() -> None:
    assert handover.refuse(target(TargetRight.ACCEPTS)).right is TargetRight.REFUSED
    assert handover.refuse(target(TargetRight.REFUSED)).right is TargetRight.REFUSED
    with pytest.raises(HandoverViolation):
        handover.refuse(target(TargetRight.OWNS))


def test_proof_of_a_run_owns_but_not_against_a_refusal() -> None:
    assert handover.own_by_proof(target(TargetRight.ACCEPTS), granted_epoch=EPOCH).right is TargetRight.OWNS
    with pytest.raises(HandoverViolation):
        handover.own_by_proof(target(TargetRight.REFUSED), granted_epoch=EPOCH)


def test_another_epoch_proves_nothing() -> None:
    for attempt in (
        lambda: handover.yield_copy(source(SourceRight.GRANTED), EPOCH + 1),
        lambda: handover.take_refusal(source(SourceRight.GRANTED), EPOCH - 1),
        lambda: handover.own_by_proof(target(TargetRight.ACCEPTS), granted_epoch=EPOCH - 1),
    ):
        with pytest.raises(HandoverViolation):
            attempt()
