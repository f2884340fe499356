"""The handover: who may run the VM. Never two running copies; never a silent none.

An operator's reading of the rule, for one epoch (one change of host):

    SOURCE   HOLDS ----grant----> GRANTED ----proof that the target runs it----> YIELDED
               |                     |
               | may run             | may run again only on proof that the target REFUSED this epoch -> HOLDS_AGAIN
    TARGET   ACCEPTS ---grant of this epoch, all loaded---> OWNS
                |
                `---- REFUSED: irrevocable; its incoming QEMU is ended before anybody hears of it

1. The source grants once its QEMU has sent everything (or has no copy any more). That the grant was given is in the
   volatile journal before it is sent, so an agent that restarts knows it; a host that reboots has no copy left.
   In post-copy that is when QEMU hands the state on: it cannot let its guest go on from there (source_pages.py).
2. The target runs only on the grant for its epoch. That it is about to is in its volatile journal before `cont`.
   A source without a copy cannot say what its guest did last. Its grant counts only if the target knows that the guest
   was held: stopped by the source's agent, so that QEMU could not let it go on when the switchover failed.
3. A source that HOLDS has not granted: the target cannot run, so the source may always let its guest go on. That it
   takes the move back is on disk before it does: after a reboot it would otherwise grant a copy that is old.
4. A source that has GRANTED stands still until it has proof: Running or Owned (it yields for ever) or Refused (it may
   go on). Silence proves nothing: it waits, and tells the operator.
5. Before the switchover can come, while the guest still runs, the source *announces* it: on disk. A source whose host
   rebooted has no volatile journal; without an announcement it knows that it has not granted, and takes the move back.
6. What stays: the switchover was announced, and the target's host died before the source heard Running. Nobody can
   prove whether the guest ran there: both stand still until the operator decides. Nothing else stands still for good.

This is the only file that makes a `Cont`, so it is the only place where a VM can come to run twice.
"""

import enum

from kvmhv.core.effects import Cont, Effect, Journal, Send
from kvmhv.messages import Grant
from kvmhv.model import Struct


class SourceRight(enum.StrEnum):
    """What the source may do with its copy."""

    HOLDS = "holds"
    GRANTED = "granted"
    YIELDED = "yielded"
    HOLDS_AGAIN = "holds-again"


class TargetRight(enum.StrEnum):
    """What the target may do with its copy."""

    ACCEPTS = "accepts"
    OWNS = "owns"
    REFUSED = "refused"


class SourceHold(Struct, frozen=True, kw_only=True):
    """The source's right over its copy in one epoch."""

    epoch: int
    right: SourceRight = SourceRight.HOLDS
    copy_lost: bool = False
    """Its QEMU is gone: it has nothing that could run."""
    announced: bool = True
    """It is on disk that the switchover may come. Without it nothing was granted, whatever else was forgotten.

    A new move begins without; the journal of a version that did not announce yet proves nothing.
    """

    def may_run(self) -> bool:
        """Whether the guest may run at the source."""
        return not self.copy_lost and self.right in (SourceRight.HOLDS, SourceRight.HOLDS_AGAIN)

    def without_copy(self) -> "SourceHold":
        """The same right when QEMU is gone."""
        return SourceHold(epoch=self.epoch, right=self.right, copy_lost=True, announced=self.announced)


class TargetHold(Struct, frozen=True, kw_only=True):
    """The target's right over its copy in one epoch."""

    epoch: int
    right: TargetRight = TargetRight.ACCEPTS

    def may_run(self) -> bool:
        """Whether the guest may run at the target."""
        return self.right is TargetRight.OWNS


class HandoverViolation(AssertionError):
    """A step that the rule forbids was asked for: a mistake in kvmhv. Nothing was done."""


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise HandoverViolation(text)


# --- source


def announce(hold: SourceHold) -> tuple[SourceHold, list[Effect]]:
    """Have it on disk that the switchover may come, before it is let come. Done once; the guest runs meanwhile."""
    if hold.announced:
        return hold, []
    announced = SourceHold(epoch=hold.epoch, right=hold.right, copy_lost=hold.copy_lost, announced=True)
    return announced, [Journal()]


def grant(hold: SourceHold, *, sent: bool) -> tuple[SourceHold, list[Effect]]:
    """Give the VM away: journalled (volatile: no disk write in the blackout) before it is said. May be repeated.

    `sent`: the source's QEMU has completed, or has handed all but pages on and still has those. A source without a copy
    may grant as well: it has nothing to run.
    """
    _require(hold.announced, "a grant that was not announced")
    _require(sent or hold.copy_lost, "a grant before everything was sent")
    _require(hold.right in (SourceRight.HOLDS, SourceRight.GRANTED), f"a grant by a source that {hold.right}")
    granted = _replace_source(hold, SourceRight.GRANTED)
    return granted, [Journal(durable=False), Send(message=Grant(epoch=hold.epoch, sent=sent))]


def yield_copy(hold: SourceHold, epoch: int) -> SourceHold:
    """Take note of the proof that the target runs this epoch: the source never runs its copy again."""
    _require(epoch == hold.epoch, f"proof for epoch {epoch} in epoch {hold.epoch}")
    _require(hold.right in (SourceRight.GRANTED, SourceRight.YIELDED), "the target runs what was not granted")
    return _replace_source(hold, SourceRight.YIELDED)


def take_refusal(hold: SourceHold, epoch: int) -> SourceHold:
    """Take note of the proof that the target refused this epoch for good."""
    _require(epoch == hold.epoch, f"refusal for epoch {epoch} in epoch {hold.epoch}")
    _require(hold.right is not SourceRight.YIELDED, "a refusal after the target ran it")
    if hold.right is SourceRight.HOLDS:
        return hold
    return _replace_source(hold, SourceRight.HOLDS_AGAIN)


def resume_at_source(hold: SourceHold, vm_id: str) -> list[Effect]:
    """Let the guest go on at the source. Empty if its copy is lost."""
    if hold.copy_lost:
        return []
    _require(hold.may_run(), f"run at a source that {hold.right}")
    return [Cont(vm_id=vm_id, epoch=hold.epoch - 1)]


def _replace_source(hold: SourceHold, right: SourceRight) -> SourceHold:
    return SourceHold(epoch=hold.epoch, right=right, copy_lost=hold.copy_lost, announced=hold.announced)


# --- target


def run_at_target(
    hold: TargetHold, vm_id: str, *, granted_epoch: int, loaded: bool, newest: bool
) -> tuple[TargetHold, list[Effect]]:
    """Run the VM at the target: the intent is in the volatile journal before `cont`. May be repeated.

    `newest`: the source said that it sent everything, or its guest is known to have been held.
    """
    _require(newest, "run what may be old")
    _require(granted_epoch == hold.epoch, f"grant for epoch {granted_epoch} in epoch {hold.epoch}")
    _require(loaded, "run before everything was loaded")
    _require(hold.right is not TargetRight.REFUSED, "run after a refusal")
    owned = TargetHold(epoch=hold.epoch, right=TargetRight.OWNS)
    return owned, [Journal(durable=False), Cont(vm_id=vm_id, epoch=hold.epoch)]


def own_by_proof(hold: TargetHold, *, granted_epoch: int) -> TargetHold:
    """Own what the source knows to have run here: the host has rebooted since, so there is nothing left to run.

    Or what the source has granted and has no copy of either, if all disks are shared: they are the whole VM then.
    """
    _require(granted_epoch == hold.epoch, f"proof for epoch {granted_epoch} in epoch {hold.epoch}")
    _require(hold.right is not TargetRight.REFUSED, "proof of a run after a refusal")
    return TargetHold(epoch=hold.epoch, right=TargetRight.OWNS)


def refuse(hold: TargetHold) -> TargetHold:
    """Refuse this epoch for good. The caller ends the incoming QEMU, journals durably, and only then says Refused."""
    _require(hold.right is not TargetRight.OWNS, "a refusal by a target that owns the VM")
    return TargetHold(epoch=hold.epoch, right=TargetRight.REFUSED)
