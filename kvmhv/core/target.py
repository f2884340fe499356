"""The target's side of a move, as a table of (step, fact).

    receiving -> preparing -> waiting -> starting -> settling -> ended
        |            |           |
        `------------+-----------+-> undoing -> ended      (refused: irrevocable, journalled, then said)

Once all is loaded (`transferred`) the target never gives the VM up by itself: the source may be dead, and this may be
the only copy. It waits for the grant or for the source's abort, and tells the operator.
"""

from kvmhv.core import facts, handover, target_pages, target_standing, target_undo
from kvmhv.core.effects import (
    ClearTimer,
    Cont,
    Effect,
    Finish,
    Journal,
    NeedOperator,
    Prepare,
    Send,
    SetTimer,
    Unexport,
)
from kvmhv.core.handover import TargetRight
from kvmhv.core.target_standing import adopt
from kvmhv.core.target_state import (
    BEFORE_RUN,
    PEER_TIMER,
    STEP_TIMER,
    Handler,
    Pages,
    Result,
    TargetState,
    TargetStep,
    report,
    update,
)
from kvmhv.messages import (
    Abort,
    FilesSent,
    FilesWanted,
    Finished,
    Grant,
    MirrorsEnded,
    Offer,
    Owned,
    PagesEnd,
    PagesHalted,
    Ready,
    Running,
    Unknown,
)
from kvmhv.model import ErrorBody, Outcome

__all__ = ["PEER_TIMER", "STEP_TIMER", "TargetState", "TargetStep", "adopt", "report", "step"]


def step(state: TargetState, fact: facts.Fact) -> Result:
    """Return the next state and what is to be done. A fact that no longer matters changes nothing."""
    if isinstance(fact, facts.Received):
        handler = ON_MESSAGE.get((state.step, type(fact.message)))
    elif isinstance(fact, facts.TimerFired) and state.step not in TIMERS[fact.name]:
        handler = None
    else:
        handler = ON_FACT.get((state.step, type(fact))) or ON_FACT_ANYWHERE.get(type(fact))
    after, effects = handler(state, fact) if handler else (state, [])
    _check(after)
    return after, effects


def _check(state: TargetState) -> None:
    """Assert what must hold after each step."""
    right = state.hold.right
    if state.step in (TargetStep.STARTING, TargetStep.SETTLING):
        assert right is TargetRight.OWNS, f"{state.step} while {right}"
    if state.step in BEFORE_RUN:
        assert right is TargetRight.ACCEPTS, f"{state.step} while {right}"
    if state.step is TargetStep.ENDED:
        assert state.outcome is not Outcome.RUNNING
        assert (right is TargetRight.OWNS) == (state.outcome is Outcome.DONE)


# --- getting ready


def _offered(state: TargetState, fact: facts.Fact) -> Result:
    if state.vm.kernel is None:
        return _prepare(state)
    return state, [
        Journal(),
        SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.prepare_s),
        Send(message=FilesWanted()),
    ]


def _files_sent(state: TargetState, fact: facts.Fact) -> Result:
    return _prepare(state)


def _prepare(state: TargetState) -> Result:
    after = update(state, step=TargetStep.PREPARING, preparing=True)
    timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.prepare_s)
    return after, [Journal(), timer, Prepare(plan=state.plan)]


def _incoming_ready(state: TargetState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.IncomingReady)
    if state.failure is not None:  # it died while the answer was on its way
        return target_undo.refuse(update(state, preparing=False), state.failure)
    state = update(
        state,
        step=TargetStep.WAITING,
        preparing=False,
        address=fact.address,
        unexported=not state.plan.disk_copies,
    )
    limit_s = state.plan.timeouts.storage_s + state.plan.timeouts.memory_s
    timer = SetTimer(name=STEP_TIMER, after_s=limit_s)
    return state, [Journal(), timer, Send(message=Ready(epoch=state.hold.epoch, address=fact.address))]


def _died_preparing(state: TargetState, fact: facts.Fact) -> Result:
    """Prepare answers for itself: it knows why it failed, and may have ended this QEMU for that."""
    assert isinstance(fact, facts.QemuGone)
    return update(state, failure=fact.error), []


# --- the blackout, seen from here


def _mirrors_ended(state: TargetState, fact: facts.Fact) -> Result:
    message = facts.message_of(fact, MirrorsEnded)
    if message.epoch != state.hold.epoch or (state.mirrors_ended and state.held >= message.held):
        return state, []
    after = update(state, mirrors_ended=True, held=state.held or message.held)
    close: list[Effect] = [] if state.mirrors_ended or not state.plan.disk_copies else [Unexport()]
    return after, [*close, Journal(durable=False)]


def _unexported(state: TargetState, fact: facts.Fact) -> Result:
    return _run_when_granted(update(state, unexported=True))


def _loaded(state: TargetState, fact: facts.Fact) -> Result:
    return _run_when_granted(update(state, transferred=True, pages=Pages.TOGETHER, loaded_ms=fact.at_ms))


def _state_loaded(state: TargetState, fact: facts.Fact) -> Result:
    return _run_when_granted(target_pages.loaded(state, fact.at_ms))


def _grant(state: TargetState, fact: facts.Fact) -> Result:
    message = facts.message_of(fact, Grant)
    if message.epoch != state.hold.epoch:
        return state, []
    effects: list[Effect] = []
    if not (state.unexported or state.mirrors_ended):  # its MirrorsEnded was lost; who grants does not write any more
        effects.append(Unexport())
    first = state.granted_epoch is None
    if first and not state.transferred:  # it will be said at once, or never: the source's QEMU is gone
        effects.append(SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.grant_s / 2))
    if not message.sent and not state.held:
        return target_undo.source_lost(state)
    state = update(state, granted_epoch=message.epoch, granted_ms=fact.at_ms)
    after, more = _run_when_granted(update(state, granted_sent=message.sent, mirrors_ended=True))
    return after, [*effects, *more]


def _run_when_granted(state: TargetState) -> Result:
    if state.granted_epoch is not None and not state.granted_sent and state.pages is Pages.MISSING:
        return target_undo.source_lost(state)
    if state.granted_epoch is None or not (state.transferred and state.unexported):
        return state, []
    hold, effects = handover.run_at_target(
        state.hold,
        state.vm.id,
        granted_epoch=state.granted_epoch,
        loaded=state.transferred,
        newest=state.granted_sent or state.held,
    )
    after = update(state, hold=hold, step=TargetStep.STARTING, outcome=Outcome.RUNNING, failure=None)
    return after, [*effects, SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.grant_s)]


def _runs(state: TargetState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.GuestRuns)
    after = update(state, step=TargetStep.SETTLING, resumed_ms=fact.resumed_ms, outcome=Outcome.RUNNING, failure=None)
    return after, [
        Send(message=_running(after, fact.resumed_ms)),
        *adopt(after),
    ]


def _running(state: TargetState, resumed_ms: float) -> Running:
    return Running(
        epoch=state.hold.epoch,
        resumed_ms=resumed_ms,
        loaded_before_ms=None if state.loaded_ms is None else resumed_ms - state.loaded_ms,
        granted_before_ms=None if state.granted_ms is None else resumed_ms - state.granted_ms,
    )


def _owned(state: TargetState) -> Owned:
    return Owned(epoch=state.hold.epoch, first_frame_after_ms=state.first_frame_after_ms)


def _first_frame(state: TargetState, fact: facts.Fact) -> Result:
    """The network knows where the guest is: a figure for the records, said with or after Owned."""
    assert isinstance(fact, facts.FirstFrame)
    state = update(state, first_frame_after_ms=fact.after_resume_ms)
    return state, [Send(message=_owned(state))] if state.adopted else []


def _died_starting(state: TargetState, fact: facts.Fact) -> Result:
    """QEMU died under the Cont: the guest may have run, so the VM is this host's all the same, and stopped here."""
    assert isinstance(fact, facts.QemuGone)
    state = update(state, step=TargetStep.SETTLING, warnings=(*state.warnings, fact.error.message))
    state, said = target_pages.gone(state, fact)
    return state, [*said, *adopt(state)]


def _cannot_run(state: TargetState, fact: facts.Fact) -> Result:
    """The Cont failed or hangs: tried again. The source keeps its copy until the guest is seen to run here."""
    if isinstance(fact, facts.Failed) and fact.effect != Cont.__name__:
        return state, []
    text = fact.error.message if isinstance(fact, facts.Failed) else "QEMU does not answer"
    error = ErrorBody(
        code="run-failed",
        message=f"{state.vm.name} is complete on {state.target} and is its own, but stands still: {text}",
        todo="it is tried again and again (do its disks' servers answer?); if QEMU hangs for good, end its process: "
        "the VM can then be started again",
        host=state.target,
        exit_status=5,
    )
    state = update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error)
    timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.grant_s)
    if isinstance(fact, facts.Failed):
        return state, [timer, NeedOperator(error=error)]
    hold, again = handover.run_at_target(
        state.hold, state.vm.id, granted_epoch=state.hold.epoch, loaded=True, newest=True
    )
    return update(state, hold=hold), [*again, timer, NeedOperator(error=error)]


def _runs_late(state: TargetState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.GuestRuns)
    state = update(state, resumed_ms=fact.resumed_ms)
    return state, _say_it_runs(state)


def _adopted(state: TargetState, fact: facts.Fact) -> Result:
    state = update(state, adopted=True, outcome=Outcome.RUNNING, failure=None)
    timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.undo_s + state.plan.timeouts.reconnect_s)
    return state, [Journal(), timer, Send(message=_owned(state))]


def _finished(state: TargetState, fact: facts.Fact) -> Result:
    return _end_owning(update(state, source_report=facts.message_of(fact, Finished).report))


def _settled(state: TargetState, fact: facts.Fact) -> Result:
    """The source does not say that it has finished: all that is this host's to do is done."""
    if state.adopted and state.pages is Pages.MISSING:
        return target_pages.wait_on(state)
    if state.adopted:
        return _end_owning(state)
    error = ErrorBody(
        code="ownership-unconfirmed",
        message=f"{state.vm.name} is {state.target}'s own, whose agent cannot record that on its disk; "
        f"{state.source} keeps its disks until then",
        todo=f"see the agent's log and the disk of state_dir on {state.target}: it is tried again by itself",
        host=state.target,
        exit_status=5,
    )
    state = update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error)
    return state, [*adopt(state), NeedOperator(error=error)]


def _end_owning(state: TargetState) -> Result:
    if not state.adopted:
        return state, []
    state = update(state, step=TargetStep.ENDED, outcome=Outcome.DONE, failure=None)
    return state, [Finish(report=report(state))]


def _abort_too_late(state: TargetState, fact: facts.Fact) -> Result:
    return state, _say_it_runs(state)


def _say_it_runs(state: TargetState) -> list[Effect]:
    effects: list[Effect] = []
    if state.resumed_ms is not None:
        effects.append(Send(message=_running(state, state.resumed_ms)))
    if state.adopted:
        effects.append(Send(message=_owned(state)))
    return [*effects, *target_pages.said(state)]


# --- the connection


def _connected(state: TargetState, fact: facts.Fact) -> Result:
    """Say again what the source may lack."""
    state = update(state, connected=True)
    effects: list[Effect] = [ClearTimer(name=PEER_TIMER)]
    if state.step is TargetStep.RECEIVING:
        effects.append(Send(message=FilesWanted()))
    elif state.step is TargetStep.WAITING and state.address is not None:
        effects.append(Send(message=Ready(epoch=state.hold.epoch, address=state.address)))
    elif state.step is TargetStep.SETTLING:
        effects += _say_it_runs(state)
    elif state.step is TargetStep.STANDING and state.failure is not None:
        effects.append(Send(message=Unknown(epoch=state.hold.epoch, error=state.failure)))
    return state, effects


def _offered_again(state: TargetState, fact: facts.Fact) -> Result:
    """The offer was repeated: say again where this side is."""
    return _connected(state, fact)


def _peer_lost(state: TargetState, fact: facts.Fact) -> Result:
    if not state.connected or state.step not in BEFORE_RUN:
        return update(state, connected=False), []  # one more attempt failed: the timer runs already
    return update(state, connected=False), [SetTimer(name=PEER_TIMER, after_s=state.plan.timeouts.reconnect_s)]


# --- the table

S = TargetStep

TIMERS = {STEP_TIMER: tuple(S), PEER_TIMER: BEFORE_RUN}
"""In which steps a timer means something."""

ON_MESSAGE: dict[tuple[TargetStep, type], Handler] = {
    (S.RECEIVING, FilesSent): _files_sent,
    (S.WAITING, MirrorsEnded): _mirrors_ended,
    (S.WAITING, Grant): _grant,
    (S.SETTLING, Finished): _finished,
    (S.SETTLING, PagesEnd): target_pages.ended,
    (S.SETTLING, PagesHalted): target_pages.halted,
    (S.STANDING, Grant): target_standing.granted,
    **{(at, Abort): target_undo.aborted for at in (*BEFORE_RUN, S.STANDING)},
    **{(at, Abort): _abort_too_late for at in (S.STARTING, S.SETTLING)},
    **{(at, Grant): _abort_too_late for at in (S.STARTING, S.SETTLING)},
    **{(at, Offer): _offered_again for at in (S.RECEIVING, S.WAITING, S.SETTLING, S.STANDING)},
}

ON_FACT: dict[tuple[TargetStep, type], Handler] = {
    (S.RECEIVING, facts.Offered): _offered,
    (S.PREPARING, facts.IncomingReady): _incoming_ready,
    (S.WAITING, facts.Unexported): _unexported,
    (S.WAITING, facts.MemorySent): _loaded,
    (S.WAITING, facts.StateLoaded): _state_loaded,
    (S.STARTING, facts.MemorySent): target_pages.complete,
    (S.SETTLING, facts.MemorySent): target_pages.complete,
    (S.SETTLING, facts.QemuGone): target_pages.gone,
    (S.SETTLING, facts.MemoryFailed): target_pages.failed,
    (S.SETTLING, facts.IncomingReady): target_pages.waits,
    (S.WAITING, facts.MemoryFailed): target_undo.failed,
    (S.STARTING, facts.GuestRuns): _runs,
    (S.STARTING, facts.Failed): _cannot_run,
    (S.STARTING, facts.QemuGone): _died_starting,
    (S.STARTING, facts.TimerFired): _cannot_run,
    (S.SETTLING, facts.GuestRuns): _runs_late,
    (S.SETTLING, facts.Adopted): _adopted,
    (S.SETTLING, facts.FirstFrame): _first_frame,
    (S.SETTLING, facts.TimerFired): _settled,
    (S.UNDOING, facts.IncomingReady): target_undo.prepared_in_vain,
    (S.UNDOING, facts.Undone): target_undo.undone,
    (S.UNDOING, facts.Failed): target_undo.undo_failed,
    (S.UNDOING, facts.TimerFired): target_undo.undo_too_long,
    **{(at, facts.Failed): target_undo.failed for at in BEFORE_RUN},
    (S.PREPARING, facts.QemuGone): _died_preparing,
    **{(at, facts.QemuGone): target_undo.failed for at in BEFORE_RUN if at is not S.PREPARING},
    **{(at, facts.TimerFired): target_undo.timed_out for at in BEFORE_RUN},
}

ON_FACT_ANYWHERE: dict[type, Handler] = {
    facts.PeerConnected: _connected,
    facts.PeerLost: _peer_lost,
}
