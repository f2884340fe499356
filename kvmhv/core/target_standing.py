"""The target's host rebooted when it was about to run the VM: it stands, and cannot tell whether it ran."""

from kvmhv.core import facts, handover, target_pages
from kvmhv.core.effects import Adopt, Effect, Journal, Send, SetTimer
from kvmhv.core.target_state import STEP_TIMER, Result, TargetState, TargetStep, update
from kvmhv.messages import Grant, Unknown
from kvmhv.model import Outcome


def adopt(state: TargetState) -> list[Effect]:
    """Make the VM this host's own."""
    return [Adopt(vm=state.vm), SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.undo_s)]


def granted(state: TargetState, fact: facts.Fact) -> Result:
    """A grant does not say whether it was run before the reboot; the source's proof does.

    If the source has lost its copy too, only the disks are left: where both hosts share them, nothing is at stake.
    """
    message = facts.message_of(fact, Grant)
    both_lost = not message.sent and not state.plan.disk_copies
    if (message.ran or both_lost) and message.epoch == state.hold.epoch:
        hold = handover.own_by_proof(state.hold, granted_epoch=message.epoch)
        when = "after it had taken" if message.ran else f"as {state.source} did, when it was about to take"
        warning = f"{state.target} rebooted {when} {state.vm.name} over: the VM is stopped"
        after = update(
            state,
            hold=hold,
            step=TargetStep.SETTLING,
            outcome=Outcome.RUNNING,
            failure=None,
            warnings=(*state.warnings, warning),
        )
        if state.plan.rule.post_copy:
            after = target_pages.lose(after, warning)
        return after, [Journal(), *adopt(after), *target_pages.said(after)]
    assert state.failure is not None
    return state, [Send(message=Unknown(epoch=state.hold.epoch, error=state.failure))]
