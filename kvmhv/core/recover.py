"""What a new agent makes of an old journal and of the QEMU that outlived it.

Evidence goes before memory: a source that has not granted (its volatile journal would say so) may go on; a source whose
QEMU is gone has nothing to run: it grants if it had announced the switchover, else it takes the move back; a target
whose volatile journal does not say that it was about to run has not run. Only a target whose host rebooted, which takes
the volatile journal with it, cannot tell.
"""

import msgspec

from kvmhv.core import handover, source, source_undo, target, target_pages, target_undo
from kvmhv.core.effects import (
    Effect,
    EndCopy,
    Finish,
    Journal,
    NeedOperator,
    ServePages,
    SetTimer,
    UndoSource,
    UndoTarget,
)
from kvmhv.core.facts import MemorySent, QemuGone, Restarted
from kvmhv.core.source_state import IDLE_TIMER, STEP_TIMER, SourceState, SourceStep, failed_body
from kvmhv.core.target_state import Pages, TargetState, TargetStep
from kvmhv.messages import Abort, Finished, Owned, Refused, Unknown
from kvmhv.model import ErrorBody, MoveReport, Outcome

POST_COPY = "postcopy-"
"""How the states begin in which QEMU's source cannot let its guest go on, and its target lacks pages."""
PAUSED = "postcopy-paused"

MAYBE_COMPLETE = (SourceStep.MEMORY, SourceStep.STOPPING, SourceStep.SWITCHING)
"""Steps in which a source that died may have sent everything."""


LOADED = (TargetStep.WAITING, TargetStep.STARTING)


def recover_source(state: SourceState, found: Restarted) -> tuple[SourceState, list[Effect]]:
    """Return how the source goes on. Its guest runs again at once, unless it was granted."""
    hold = state.hold
    if not found.process:
        hold = hold.without_copy()
    state = msgspec.structs.replace(state, hold=hold, connected=False, guest_runs=state.guest_runs and found.process)
    if state.step is SourceStep.SERVING:
        return _serving_again(state, found)
    if state.step is SourceStep.GRANTED:
        halted, sent = found.migration == PAUSED, state.memory_sent or found.migration == "completed"
        state = msgspec.structs.replace(state, halted=halted, memory_sent=sent)
        return state, [SetTimer(name=STEP_TIMER, after_s=state.timeouts.grant_s)]
    if state.step is SourceStep.CLEANUP:
        timer = SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s)
        return msgspec.structs.replace(state, removing=False, copy_ended=False), [timer, EndCopy()]
    if state.step is SourceStep.UNDOING:
        timer = SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s)
        return state, [timer, UndoSource(timeout_s=state.timeouts.undo_s / 2)]
    maybe_granted = hold.announced and state.step in MAYBE_COMPLETE
    if found.rebooted and found.process and found.migration == "completed" and maybe_granted:
        # The volatile journal was lost without a reboot: whether it was granted is not known any more.
        given, effects = handover.grant(hold, sent=True)
        state = msgspec.structs.replace(state, hold=given, step=SourceStep.GRANTED, guest_runs=False)
        return state, [*effects, Journal(), SetTimer(name=STEP_TIMER, after_s=state.timeouts.grant_s)]
    if found.process and found.migration.startswith(POST_COPY) and maybe_granted:
        given, effects = handover.grant(hold, sent=True)
        halted = found.migration == PAUSED
        state = msgspec.structs.replace(
            state, hold=given, step=SourceStep.GRANTED, guest_runs=False, handed_on=True, halted=halted
        )
        return state, [*effects, Journal(), SetTimer(name=STEP_TIMER, after_s=state.timeouts.grant_s)]
    if hold.copy_lost and maybe_granted:
        given, effects = handover.grant(hold, sent=False)
        state = msgspec.structs.replace(state, hold=given, step=SourceStep.GRANTED, guest_runs=False)
        return state, [*effects, Journal(), SetTimer(name=STEP_TIMER, after_s=state.timeouts.grant_s)]
    if hold.copy_lost:
        error = ErrorBody(
            code="qemu-gone",
            message=f"QEMU on {state.source} was gone when its agent came back",
            todo="start the VM again",
            host=state.source,
        )
        return source.step(state, QemuGone(at_ms=found.at_ms, error=error))
    text = f"the agent on {state.source} was restarted in the {state.phase} phase"
    error = failed_body(state, "agent-restarted", text, "move it again", state.source)
    return source_undo.fail(state, found.at_ms, error)


def _serving_again(state: SourceState, found: Restarted) -> tuple[SourceState, list[Effect]]:
    if found.process and found.migration == "completed":
        return source.step(state, MemorySent(at_ms=found.at_ms))
    attempt = state.attempt + 1
    state = msgspec.structs.replace(
        state, halted=found.migration == PAUSED, attempt=attempt, resuming=False, followed_ms=0.0
    )
    return state, [SetTimer(name=IDLE_TIMER, after_s=state.timeouts.grant_s), ServePages()]


def recover_target(state: TargetState, found: Restarted) -> tuple[TargetState, list[Effect]]:
    """Return how the target goes on."""
    state = msgspec.structs.replace(state, connected=False, preparing=False)
    timeouts = state.plan.timeouts
    if state.step in (TargetStep.RECEIVING, TargetStep.PREPARING):
        return target_undo.refuse(state, _restarted(state))
    if state.step is TargetStep.ENDED:
        return state, [Finish(report=target.report(state))]
    if state.step is TargetStep.UNDOING:
        timer = SetTimer(name=target.STEP_TIMER, after_s=timeouts.undo_s)
        return state, [timer, UndoTarget(plan=state.plan)]
    # A `cont` that was sent was noted before: where that note is lost (the volatile journal was), QEMU is the evidence.
    ran = state.step is TargetStep.WAITING and found.process and found.ever_ran
    if found.process and found.migration.startswith(POST_COPY) and state.step in LOADED:
        state = target_pages.loaded(state, found.at_ms)
    if found.migration == "completed" and state.step in LOADED and state.pages is Pages.MISSING:
        state = msgspec.structs.replace(state, pages=Pages.THERE)  # only the agent that is gone heard it
    if ran or state.step is TargetStep.STARTING:
        if not found.process:
            return target.step(state, QemuGone(at_ms=found.at_ms, error=_gone(state)))
        hold, effects = handover.run_at_target(
            state.hold, state.vm.id, granted_epoch=state.hold.epoch, loaded=True, newest=True
        )
        state = msgspec.structs.replace(state, hold=hold, step=TargetStep.STARTING)
        return state, [*effects, SetTimer(name=target.STEP_TIMER, after_s=timeouts.grant_s)]
    if state.step is TargetStep.SETTLING:
        return _settling_again(state, found)
    if state.step is TargetStep.WAITING and not found.process:
        return _without_process(state, found)
    if state.step is TargetStep.WAITING:
        if found.migration in ("failed", "cancelled"):
            return target_undo.refuse(state, _restarted(state))
        loaded = found.migration == "completed" or found.migration.startswith(POST_COPY)
        state = msgspec.structs.replace(state, transferred=loaded, granted_epoch=None, mirrors_ended=False)
        return state, [
            SetTimer(name=target.STEP_TIMER, after_s=timeouts.storage_s + timeouts.memory_s),
            SetTimer(name=target.PEER_TIMER, after_s=timeouts.reconnect_s),
        ]
    return state, []


def _settling_again(state: TargetState, found: Restarted) -> tuple[TargetState, list[Effect]]:
    effects: list[Effect] = []
    state = msgspec.structs.replace(state, attempt=0, pages_address=None)
    if found.migration == "completed":
        state, effects = target_pages.complete(state, found)
    elif not found.process:
        state, effects = target_pages.gone(state, QemuGone(at_ms=found.at_ms, error=_gone(state)))
    return state, [*effects, *target.adopt(state)]


def _without_process(state: TargetState, found: Restarted) -> tuple[TargetState, list[Effect]]:
    if not found.rebooted:
        return target_undo.refuse(state, _gone(state))
    error = ErrorBody(
        code="target-cannot-tell",
        message=f"{state.target} rebooted while it was about to take {state.vm.name} over: it cannot tell "
        "whether the VM ran there",
        todo=f"if {state.source} has not granted it or knows that it ran, the move ends by itself; else: "
        f"kvmhv move resolve {state.move_id}, here and there",
        host=state.target,
        exit_status=5,
    )
    state = msgspec.structs.replace(state, step=TargetStep.STANDING, outcome=Outcome.NEEDS_OPERATOR, failure=error)
    return state, [Journal(), NeedOperator(error=error)]


def _gone(state: TargetState) -> ErrorBody:
    return ErrorBody(
        code="qemu-gone",
        message=f"QEMU on {state.target} was gone when its agent came back",
        todo=f"see the agent's log on {state.target}",
        host=state.target,
    )


def _restarted(state: TargetState) -> ErrorBody:
    return ErrorBody(
        code="agent-restarted",
        message=f"the agent on {state.target} was restarted while it made ready",
        todo="move the VM again",
        host=state.target,
    )


def answer_as_target(ended: MoveReport | None, epoch: int, host: str) -> Owned | Refused | Unknown:
    """Return what a target says to a source about a move that it has no open state of.

    It ended well: it owns the VM. It ended otherwise: refused. It knows nothing of it: that proves nothing.
    """
    if ended is not None and ended.outcome is Outcome.DONE:
        return Owned(epoch=epoch, ended=True, lost=ended.error)
    if ended is not None:
        error = ended.error or ErrorBody(code="move-ended", message=f"the move had ended on {host}", todo="", host=host)
        return Refused(epoch=epoch, error=error)
    error = ErrorBody(
        code="move-unknown",
        message=f"{host} has no record of this move",
        todo=f"see whether the state of {host} was lost or put back from an old backup",
        host=host,
        exit_status=5,
    )
    return Unknown(epoch=epoch, error=error)


def answer_as_source(ended: MoveReport | None, epoch: int, host: str) -> Abort | Finished | None:
    """Return what a source says to a target about a move that it has no open state of; None: it knows nothing of it.

    It ended well: the target owns the VM. It ended otherwise: the source has taken it back, or was refused.
    """
    if ended is None:
        return None
    if ended.outcome is Outcome.DONE:
        return Finished(epoch=epoch, report=ended)
    error = ended.error or ErrorBody(code="move-ended", message=f"the move had ended on {host}", todo="", host=host)
    return Abort(epoch=epoch, error=error)
