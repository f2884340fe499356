"""The source's side of a move, as a table of (step, fact).

    enquiring -> offering -> [storage] -> memory -> stopping -> switching -> granted -> cleanup -> ended
         |           |           |          |          |            |           |
         `-----------+-----------+----------+----------+------------+           `-> (refused by the target) -> undoing
                                       failure, cancel  -> undoing -> ended

Before `granted` every failure ends with the VM running here, in the same process. From `granted` on it runs here again
only on the target's proof (handover.py).
"""

from collections.abc import Callable
from typing import TypeVar

import msgspec

from kvmhv.core import checks, facts, handover, plan, precopy
from kvmhv.core.effects import (
    ClearTimer,
    ContinueSwitchover,
    Effect,
    EndCopy,
    Finish,
    FinishMirrors,
    Journal,
    MirrorDisks,
    NeedOperator,
    RemoveCopy,
    Send,
    SendFiles,
    SendMemory,
    SetTimer,
    StopGuest,
    UndoSource,
)
from kvmhv.core.handover import SourceHold, SourceRight
from kvmhv.core.source_state import SourceState, SourceStep, failed_body, report
from kvmhv.messages import (
    Abort,
    Answer,
    Enquire,
    FilesSent,
    FilesWanted,
    Finished,
    MirrorsEnded,
    Owned,
    Ready,
    Refused,
    Running,
    Unknown,
)
from kvmhv.model import ErrorBody, Outcome, Phase, Severity

Result = tuple[SourceState, list[Effect]]
Handler = Callable[[SourceState, facts.Fact], Result]

STEP_TIMER = "step"
IDLE_TIMER = "idle"
PEER_TIMER = "peer"

BEFORE_BLACKOUT = (SourceStep.ENQUIRING, SourceStep.OFFERING, SourceStep.STORAGE, SourceStep.MEMORY)
UNDOABLE = (*BEFORE_BLACKOUT, SourceStep.STOPPING, SourceStep.SWITCHING)


def step(state: SourceState, fact: facts.Fact) -> Result:
    """Return the next state and what is to be done. A fact that no longer matters changes nothing."""
    if isinstance(fact, facts.Received):
        handler = ON_MESSAGE.get((state.step, type(fact.message)))
        after, effects = handler(state, fact) if handler else _unexpected_message(state, fact)
    else:
        handler = ON_FACT.get((state.step, type(fact))) or ON_FACT_ANYWHERE.get(type(fact))
        after, effects = handler(state, fact) if handler else (state, [])
    _check(after)
    return after, effects


def _check(state: SourceState) -> None:
    """Assert what must hold after each step."""
    hold = state.hold
    if state.step in BEFORE_BLACKOUT:
        assert hold.right is SourceRight.HOLDS, f"{state.step} while {hold.right}"
    if state.step is SourceStep.CLEANUP:
        assert hold.right is SourceRight.YIELDED, f"clean-up while {hold.right}"
    if state.guest_runs:
        assert hold.may_run(), f"the guest runs at a source that {hold.right}"
    if state.step is SourceStep.ENDED:
        assert state.outcome is not Outcome.RUNNING


def _set(state: SourceState, **changes: object) -> SourceState:
    return msgspec.structs.replace(state, **changes)


def _enter(state: SourceState, to: SourceStep, timeout_s: float, **changes: object) -> Result:
    return _set(state, step=to, **changes), [SetTimer(name=STEP_TIMER, after_s=timeout_s)]


# --- setup


def _started(state: SourceState, fact: facts.Fact) -> Result:
    state = state.begin_phase(Phase.SETUP, fact.at_ms)
    return state, [Journal(), SetTimer(name=STEP_TIMER, after_s=state.timeouts.answer_s)]


def _answer(state: SourceState, fact: facts.Fact) -> Result:
    message = _message(fact, Answer)
    if message.inventory.refusal is not None:
        refusal = message.inventory.refusal
        error = ErrorBody(
            code=refusal.code,
            message=refusal.text,
            todo=f"on {refusal.host}: kvmhv host set {refusal.setting}=..." if refusal.setting else "",
            host=refusal.host,
            exit_status=4,
        )
        return _end(state, fact.at_ms, Outcome.FAILED, error)
    findings = checks.check(state.vm, state.request, state.inventory, message.inventory)
    state = _set(state, findings=findings)
    if any(finding.severity is Severity.ERROR for finding in findings):
        error = ErrorBody(
            code="incompatible",
            message=f"the VM cannot move to {state.target}: "
            + "; ".join(finding.text for finding in findings if finding.severity is Severity.ERROR),
            todo="mend each finding and try again",
            host=state.target,
            exit_status=3,
            findings=findings,
        )
        return _end(state, fact.at_ms, Outcome.FAILED, error)
    made = plan.make(
        state.vm,
        state.request,
        state.rule,
        state.timeouts,
        state.inventory,
        message.inventory,
        state.throughput_bytes_per_s,
    )
    state = _set(state, plan=made)
    after, effects = _enter(state, SourceStep.OFFERING, state.timeouts.prepare_s)
    return after, [Journal(), *effects, Send(message=after.offer())]


def _files_wanted(state: SourceState, fact: facts.Fact) -> Result:
    return state, [SendFiles()]


def _files_uploaded(state: SourceState, fact: facts.Fact) -> Result:
    state = _set(state, files_sent=True)
    return state, [Send(message=FilesSent())]


def _ready(state: SourceState, fact: facts.Fact) -> Result:
    message = _message(fact, Ready)
    if message.epoch != state.hold.epoch:
        return _unexpected_message(state, fact)
    state = _set(state, address=message.address)
    made = state.planned()
    if not made.disk_copies:
        return _begin_memory(state, fact.at_ms)
    state = state.begin_phase(Phase.STORAGE, fact.at_ms)
    after, effects = _enter(state, SourceStep.STORAGE, state.timeouts.storage_s)
    return after, [
        Journal(),
        *effects,
        SetTimer(name=IDLE_TIMER, after_s=state.timeouts.storage_idle_s),
        MirrorDisks(plan=made, address=message.address),
    ]


# --- storage and memory


def _mirror_progress(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.MirrorProgress)
    if fact.copied_bytes <= state.copied_bytes:
        return state, []
    after = _set(state, copied_bytes=fact.copied_bytes, disk_total_bytes=fact.total_bytes)
    return after, [SetTimer(name=IDLE_TIMER, after_s=state.timeouts.storage_idle_s)]


def _mirrors_ready(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.MirrorsReady)
    return _begin_memory(_set(state, copied_bytes=fact.copied_bytes), fact.at_ms)


def _begin_memory(state: SourceState, at_ms: float) -> Result:
    address = state.address
    assert address is not None
    state = state.begin_phase(Phase.MEMORY, at_ms)
    after, effects = _enter(state, SourceStep.MEMORY, state.timeouts.memory_s)
    return after, [
        Journal(),
        *effects,
        SetTimer(name=IDLE_TIMER, after_s=state.timeouts.memory_idle_s),
        SendMemory(plan=state.planned(), address=address),
    ]


def _memory_progress(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.MemoryProgress)
    moved = fact.sent_bytes > state.memory_sent_bytes
    after = _set(
        state,
        memory_sent_bytes=max(fact.sent_bytes, state.memory_sent_bytes),
        memory_remaining_bytes=fact.remaining_bytes,
        memory_total_bytes=fact.total_bytes,
    )
    idle: list[Effect] = [SetTimer(name=IDLE_TIMER, after_s=state.timeouts.memory_idle_s)]
    return after, idle if moved and state.step is SourceStep.MEMORY else []


def _pass_started(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.PassStarted)
    passes = state.passes
    if state.pass_begun is not None and fact.number > state.pass_begun.number:
        passes = (*passes, precopy.complete_pass(state.pass_begun, fact))
    state = _set(
        state,
        passes=passes,
        pass_begun=fact,
        memory_sent_bytes=max(fact.sent_bytes, state.memory_sent_bytes),
        memory_remaining_bytes=fact.remaining_bytes,
        memory_total_bytes=fact.total_bytes,
    )
    effects: list[Effect] = [SetTimer(name=IDLE_TIMER, after_s=state.timeouts.memory_idle_s)]
    switchover = precopy.decide(state.rule, fact)
    if switchover is None:
        return state, effects
    state = _set(state, step=SourceStep.STOPPING, switchover=switchover, guest_runs=False)
    return state, [StopGuest(), ClearTimer(name=IDLE_TIMER), *_blackout_timer(state)]


# --- state: the blackout. No journal on disk, no round trip that is not named here.


def _blackout_timer(state: SourceState) -> list[Effect]:
    return [SetTimer(name=STEP_TIMER, after_s=state.timeouts.switchover_s)]


def _guest_stopped(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.GuestStopped)
    state = _set(state, stopped_ms=fact.told_ms).begin_phase(Phase.STATE, fact.told_ms)
    if state.planned().disk_copies:
        return state, [FinishMirrors()]
    return _continue_when_ready(_set(state, mirrors_finished=True))


def _converged(state: SourceState, fact: facts.Fact) -> Result:
    """QEMU reached its switchover by itself: so little was left that it did not wait for the lever."""
    complete = state.pass_begun.number if state.pass_begun else 1
    switchover = precopy.converged(complete)
    state = _set(state, step=SourceStep.STOPPING, switchover=switchover, guest_runs=False, pre_switchover=True)
    after, effects = _guest_stopped(state, facts.GuestStopped(at_ms=fact.at_ms, told_ms=fact.at_ms))
    return after, [*effects, ClearTimer(name=IDLE_TIMER), *_blackout_timer(after)]


def _pre_switchover(state: SourceState, fact: facts.Fact) -> Result:
    return _continue_when_ready(_set(state, pre_switchover=True))


def _mirrors_finished(state: SourceState, fact: facts.Fact) -> Result:
    after, effects = _continue_when_ready(_set(state, mirrors_finished=True))
    return after, [*effects, Send(message=MirrorsEnded(epoch=state.hold.epoch))]


def _continue_when_ready(state: SourceState) -> Result:
    if not (state.pre_switchover and state.mirrors_finished):
        return state, []
    return _set(state, step=SourceStep.SWITCHING), [ContinueSwitchover()]


def _memory_sent(state: SourceState, fact: facts.Fact) -> Result:
    state = _set(state, memory_sent=True)
    if not state.connected:
        return state, []  # nobody to grant it to: the step's timer decides
    return _grant(state)


def _may_grant(state: SourceState) -> bool:
    return state.memory_sent or state.hold.copy_lost


def _grant(state: SourceState) -> Result:
    hold, effects = handover.grant(state.hold, sent=state.memory_sent)
    after = _set(state, hold=hold, step=SourceStep.GRANTED, guest_runs=False)
    return after, [*effects, SetTimer(name=STEP_TIMER, after_s=state.timeouts.grant_s)]


def _granted_too_long(state: SourceState, fact: facts.Fact) -> Result:
    error = ErrorBody(
        code="handover-unknown",
        message=f"the VM was granted to {state.target}, which does not say whether it runs there; "
        f"the copy on {state.source} stands still",
        todo=f"bring {state.target} or the connection back (the move then ends by itself); only if {state.target} is "
        f"surely dead and stays so, its copy may be given up",
        host=state.source,
        exit_status=5,
    )
    return _set(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [NeedOperator(error=error)]


def _running(state: SourceState, fact: facts.Fact) -> Result:
    message = _message(fact, Running)
    if not _is_proof(state, message.epoch):
        return _unexpected_message(state, fact)
    state = _set(state, resumed_ms=message.resumed_ms, clock_uncertainty_ms=message.uncertainty_ms)
    return _yield(state, fact.at_ms)


def _is_proof(state: SourceState, epoch: int) -> bool:
    return epoch == state.hold.epoch and state.hold.right in (SourceRight.GRANTED, SourceRight.YIELDED)


def _yield(state: SourceState, at_ms: float) -> Result:
    """The target runs it: from here on nothing can bring the VM back to this host but another move."""
    hold = handover.yield_copy(state.hold, state.hold.epoch)
    state = _set(state, hold=hold, outcome=Outcome.RUNNING, failure=None)
    state = state.begin_phase(Phase.CLEANUP, state.resumed_ms or at_ms)
    after, effects = _enter(state, SourceStep.CLEANUP, state.timeouts.undo_s)
    return after, [Journal(), *effects, EndCopy()]


# --- clean-up


def _owned(state: SourceState, fact: facts.Fact) -> Result:
    if not _is_proof(state, _message(fact, Owned).epoch):
        return _unexpected_message(state, fact)
    effects: list[Effect] = []
    if state.step is SourceStep.GRANTED:  # its Running was lost with a connection
        state, effects = _yield(state, fact.at_ms)
    after, more = _remove_when_owned(_set(state, target_owns=True))
    return after, [*effects, *more]


def _copy_ended(state: SourceState, fact: facts.Fact) -> Result:
    return _remove_when_owned(_set(state, copy_ended=True))


def _remove_when_owned(state: SourceState) -> Result:
    if not (state.target_owns and state.copy_ended) or state.removing:
        return state, []
    return _set(state, removing=True), [RemoveCopy(plan=state.planned())]


def _copy_removed(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.CopyRemoved)
    return _finish_done(_set(state, warnings=(*state.warnings, *fact.warnings)), fact.at_ms)


def _cleanup_failed(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Failed)
    return _finish_done(_set(state, warnings=(*state.warnings, fact.error.message)), fact.at_ms)


def _cleanup_too_long(state: SourceState, fact: facts.Fact) -> Result:
    if state.target_owns:
        warning = "the clean-up at the source did not end in time"
        return _finish_done(_set(state, warnings=(*state.warnings, warning)), fact.at_ms)
    error = ErrorBody(
        code="ownership-unconfirmed",
        message=f"the VM runs on {state.target}, which has not confirmed that it has recorded it; "
        f"its disks on {state.source} are kept until then",
        todo=f"bring the agent of {state.target} back: the move then ends by itself",
        host=state.target,
        exit_status=5,
    )
    return _set(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [NeedOperator(error=error)]


def _finish_done(state: SourceState, at_ms: float) -> Result:
    state = _set(state, step=SourceStep.ENDED, outcome=Outcome.DONE, failure=None).end_phases(at_ms)
    final = report(state, at_ms)
    return state, [Send(message=Finished(epoch=state.hold.epoch, report=final)), Finish(report=final)]


# --- failure and cancel


def _undo(state: SourceState, at_ms: float, outcome: Outcome, error: ErrorBody) -> Result:
    """Take the move back: the guest goes on here first, the rest is cleared behind it."""
    if state.step is SourceStep.ENQUIRING:
        return _end(state, at_ms, outcome, error)
    state = _set(state, outcome=outcome, failure=error)
    after, effects = _enter(state, SourceStep.UNDOING, state.timeouts.undo_s)
    return after, [
        *effects,
        UndoSource(timeout_s=state.timeouts.undo_s / 2),
        Send(message=Abort(epoch=state.hold.epoch, error=error)),
    ]


def fail(state: SourceState, at_ms: float, error: ErrorBody) -> Result:
    """Give the move up from outside of the table (a restarted agent does): the guest goes on here."""
    return _undo(state, at_ms, Outcome.FAILED, error)


def _undone(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Undone)
    state = _set(state, undone=True, warnings=(*state.warnings, *fact.warnings))
    effects = handover.resume_at_source(state.hold, state.vm.id)
    after, more = _end_when_undone(_set(state, guest_runs=not state.hold.copy_lost), fact.at_ms)
    return after, [*effects, Journal(), *more] if after.step is not SourceStep.ENDED else [*effects, *more]


def _target_undone(state: SourceState, fact: facts.Fact) -> Result:
    message = _message(fact, Refused)
    hold = handover.take_refusal(state.hold, message.epoch) if message.epoch == state.hold.epoch else state.hold
    return _end_when_undone(_set(state, hold=hold, target_undone=True), fact.at_ms)


def _target_undone_unknown(state: SourceState, fact: facts.Fact) -> Result:
    """The target cannot tell, but what was not granted it cannot have run."""
    return _end_when_undone(_set(state, target_undone=True), fact.at_ms)


def _end_when_undone(state: SourceState, at_ms: float) -> Result:
    if not state.undone or not (state.target_undone or not state.connected):
        return state, []
    assert state.failure is not None
    return _end(state, at_ms, state.outcome, state.failure)


def _undo_too_long(state: SourceState, fact: facts.Fact) -> Result:
    """The target did not confirm in time (it clears up by itself later), or QEMU here hangs."""
    warning = f"{state.target} has not confirmed that it has taken everything back"
    effects: list[Effect] = []
    if not state.undone:
        warning = "QEMU did not answer while the move was taken back"
        effects = handover.resume_at_source(state.hold, state.vm.id)
        state = _set(state, guest_runs=not state.hold.copy_lost)
    assert state.failure is not None
    after, more = _end(_set(state, warnings=(*state.warnings, warning)), fact.at_ms, state.outcome, state.failure)
    return after, [*effects, *more]


def _undo_lost_peer(state: SourceState, fact: facts.Fact) -> Result:
    return _end_when_undone(_set(state, connected=False), fact.at_ms)


def _undo_failed(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Failed)
    return _undone(state, facts.Undone(at_ms=fact.at_ms, warnings=(fact.error.message,)))


def _end(state: SourceState, at_ms: float, outcome: Outcome, error: ErrorBody) -> Result:
    state = _set(state, step=SourceStep.ENDED, outcome=outcome, failure=error).end_phases(at_ms)
    return state, [Finish(report=report(state, at_ms))]


def _refused(state: SourceState, fact: facts.Fact) -> Result:
    """The target gives up before it ran: proof that the VM may go on here."""
    message = _message(fact, Refused)
    if message.epoch != state.hold.epoch:
        return _unexpected_message(state, fact)
    hold = handover.take_refusal(state.hold, message.epoch)
    outcome = Outcome.FAILED if state.outcome is not Outcome.CANCELLED else Outcome.CANCELLED
    return _undo(_set(state, hold=hold, target_undone=True), fact.at_ms, outcome, message.error)


def _unknown(state: SourceState, fact: facts.Fact) -> Result:
    message = _message(fact, Unknown)
    if state.hold.right is SourceRight.HOLDS:
        return _undo(_set(state, target_undone=True), fact.at_ms, Outcome.FAILED, message.error)
    return _set(state, outcome=Outcome.NEEDS_OPERATOR, failure=message.error), [NeedOperator(error=message.error)]


def _failed(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Failed | facts.MemoryFailed)
    return _undo(state, fact.at_ms, Outcome.FAILED, fact.error)


def _qemu_gone(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.QemuGone)
    hold = SourceHold(epoch=state.hold.epoch, right=state.hold.right, copy_lost=True)
    state = _set(state, hold=hold, guest_runs=False)
    if state.step in (SourceStep.STOPPING, SourceStep.SWITCHING) and state.connected:
        return _grant(state)  # nothing is left to run here: the target may have it all
    if state.step in UNDOABLE:
        return _undo(state, fact.at_ms, Outcome.FAILED, fact.error)
    return state, []


def _timeout(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.TimerFired)
    where = state.target if state.step in (SourceStep.ENQUIRING, SourceStep.OFFERING) else state.source
    if fact.name == PEER_TIMER:
        text = f"the connection to {state.target} was lost and did not come back"
        error = failed_body(
            state, "peer-lost", text, f"see that {state.target} and its agent can be reached", state.target
        )
    elif fact.name == IDLE_TIMER:
        text = f"no progress in the {state.phase} phase for too long"
        error = failed_body(
            state, "no-progress", text, "see the network between the hosts and the target's disk", where
        )
    else:
        text = f"the {state.phase} phase did not end in time"
        error = failed_body(state, "timeout", text, f"see the agent's log on {state.target}", where)
    return _undo(state, fact.at_ms, Outcome.FAILED, error)


def _cancel(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.CancelRequested)
    text = f"cancelled by {fact.caller}; the VM runs on {state.source}"
    error = ErrorBody(code="cancelled", message=text, todo="", host=state.source, exit_status=6)
    return _undo(state, fact.at_ms, Outcome.CANCELLED, error)


# --- the connection


def _connected(state: SourceState, fact: facts.Fact) -> Result:
    """Say again what the target may lack: every message can be repeated."""
    state = _set(state, connected=True)
    effects: list[Effect] = [ClearTimer(name=PEER_TIMER)]
    epoch = state.hold.epoch
    if state.step is SourceStep.ENQUIRING:
        effects.append(Send(message=Enquire(vm=state.vm, request=state.request)))
    elif state.step is SourceStep.OFFERING:
        effects.append(Send(message=FilesSent() if state.files_sent else state.offer()))
    elif (
        state.step is SourceStep.SWITCHING and (state.memory_sent or state.hold.copy_lost)
    ) or state.step is SourceStep.GRANTED:
        state, more = _grant(state)
        effects += more
    elif state.step is SourceStep.UNDOING and state.failure is not None:
        effects.append(Send(message=Abort(epoch=epoch, error=state.failure)))
    if state.mirrors_finished and state.planned().disk_copies and state.step is not SourceStep.UNDOING:
        effects.append(Send(message=MirrorsEnded(epoch=epoch)))
    return state, effects


def _peer_lost(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.PeerLost)
    if state.step in (SourceStep.ENQUIRING, SourceStep.OFFERING):
        return _undo(_set(state, connected=False), fact.at_ms, Outcome.FAILED, fact.error)
    if not state.connected or state.step not in UNDOABLE:
        return _set(state, connected=False), []  # one more attempt failed: the timer runs already
    return _set(state, connected=False), [SetTimer(name=PEER_TIMER, after_s=state.timeouts.reconnect_s)]


def _unexpected_message(state: SourceState, fact: facts.Fact) -> Result:
    """A repeated or late message: nothing to do."""
    return state, []


MessageType = TypeVar("MessageType")


def _message(fact: facts.Fact, kind: type[MessageType]) -> MessageType:
    assert isinstance(fact, facts.Received)
    assert isinstance(fact.message, kind)
    return fact.message


# --- the table

S = SourceStep

ON_MESSAGE: dict[tuple[SourceStep, type], Handler] = {
    (S.ENQUIRING, Answer): _answer,
    (S.OFFERING, FilesWanted): _files_wanted,
    (S.OFFERING, Ready): _ready,
    (S.GRANTED, Running): _running,
    (S.GRANTED, Owned): _owned,
    (S.CLEANUP, Owned): _owned,
    (S.UNDOING, Refused): _target_undone,
    (S.UNDOING, Unknown): _target_undone_unknown,
    **{(at, Refused): _refused for at in (*UNDOABLE, S.GRANTED)},
    **{(at, Unknown): _unknown for at in (*UNDOABLE, S.GRANTED)},
}

ON_FACT: dict[tuple[SourceStep, type], Handler] = {
    (S.ENQUIRING, facts.Started): _started,
    (S.OFFERING, facts.FilesUploaded): _files_uploaded,
    (S.STORAGE, facts.MirrorProgress): _mirror_progress,
    (S.STORAGE, facts.MirrorsReady): _mirrors_ready,
    (S.MEMORY, facts.PassStarted): _pass_started,
    (S.MEMORY, facts.PreSwitchover): _converged,
    (S.STOPPING, facts.GuestStopped): _guest_stopped,
    (S.STOPPING, facts.PreSwitchover): _pre_switchover,
    (S.STOPPING, facts.MirrorsFinished): _mirrors_finished,
    (S.SWITCHING, facts.MemorySent): _memory_sent,
    (S.GRANTED, facts.TimerFired): _granted_too_long,
    (S.CLEANUP, facts.CopyEnded): _copy_ended,
    (S.CLEANUP, facts.CopyRemoved): _copy_removed,
    (S.CLEANUP, facts.Failed): _cleanup_failed,
    (S.CLEANUP, facts.TimerFired): _cleanup_too_long,
    (S.UNDOING, facts.Undone): _undone,
    (S.UNDOING, facts.Failed): _undo_failed,
    (S.UNDOING, facts.TimerFired): _undo_too_long,
    (S.UNDOING, facts.PeerLost): _undo_lost_peer,
    **{(at, facts.MemoryProgress): _memory_progress for at in (S.MEMORY, S.STOPPING, S.SWITCHING)},
    **{(at, facts.Failed): _failed for at in UNDOABLE},
    **{(at, facts.MemoryFailed): _failed for at in (S.MEMORY, S.STOPPING, S.SWITCHING)},
    **{(at, facts.TimerFired): _timeout for at in UNDOABLE},
    **{(at, facts.CancelRequested): _cancel for at in UNDOABLE},
}

ON_FACT_ANYWHERE: dict[type, Handler] = {
    facts.PeerConnected: _connected,
    facts.PeerLost: _peer_lost,
    facts.QemuGone: _qemu_gone,
}
