"""The source's side of a move, as a table of (step, fact).

    enquiring -> offering -> [storage] -> memory -> stopping -> switching -> granted -> cleanup -> ended
         |           |           |          |          |            |           |
         `-----------+-----------+----------+----------+------------+           `-> (refused by the target) -> undoing
                                       failure, cancel  -> undoing -> ended

Before `granted` every failure ends with the VM running here, in the same process. From `granted` on it runs here again
only on the target's proof (handover.py). The handlers stand in source_setup.py, source_switchover.py, source_undo.py.
"""

from kvmhv.core import facts, savings, source_pages, source_setup, source_switchover, source_undo
from kvmhv.core.effects import ClearTimer, Effect, Send, SetTimer
from kvmhv.core.handover import SourceRight
from kvmhv.core.source_state import (
    BEFORE_BLACKOUT,
    IDLE_TIMER,
    PEER_TIMER,
    STEP_TIMER,
    UNDOABLE,
    Handler,
    Result,
    SourceState,
    SourceStep,
    update,
)
from kvmhv.messages import (
    Abort,
    Answer,
    Enquire,
    FilesSent,
    FilesWanted,
    Owned,
    PagesDone,
    PagesFrom,
    Ready,
    Refused,
    Running,
    Unknown,
)
from kvmhv.model import Outcome


def step(state: SourceState, fact: facts.Fact) -> Result:
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


def _check(state: SourceState) -> None:
    """Assert what must hold after each step."""
    hold = state.hold
    if state.step in BEFORE_BLACKOUT:
        assert hold.right is SourceRight.HOLDS, f"{state.step} while {hold.right}"
    if state.step in (SourceStep.SERVING, SourceStep.CLEANUP):
        assert hold.right is SourceRight.YIELDED, f"{state.step} while {hold.right}"
    if state.guest_runs:
        assert hold.may_run(), f"the guest runs at a source that {hold.right}"
    if state.step is SourceStep.ENDED:
        assert state.outcome is not Outcome.RUNNING


# --- the connection


def _connected(state: SourceState, fact: facts.Fact) -> Result:
    """Say again what the target may lack: every message can be repeated."""
    state = update(state, connected=True)
    effects: list[Effect] = [ClearTimer(name=PEER_TIMER)]
    epoch = state.hold.epoch
    if state.step is SourceStep.ENQUIRING:
        effects.append(Send(message=Enquire(vm=state.vm, request=state.request, bases=savings.bases(state.inventory))))
    elif state.step is SourceStep.OFFERING:
        effects.append(Send(message=FilesSent() if state.files_sent else state.offer()))
    elif state.step in BEFORE_PROOF and state.mirrors_finished:
        effects.append(Send(message=source_switchover.mirrors_ended(state)))
    if (
        state.step is SourceStep.SWITCHING and (state.memory_sent or state.hold.copy_lost)
    ) or state.step is SourceStep.GRANTED:
        state, more = source_switchover.grant_it(state)
        effects += more
    elif state.step is SourceStep.UNDOING and state.failure is not None:
        effects.append(Send(message=Abort(epoch=epoch, error=state.failure)))
    elif state.step in (SourceStep.SERVING, SourceStep.CLEANUP) and not state.target_owns:
        effects.append(Send(message=source_switchover.proof(state)))
    if state.step is SourceStep.SERVING:
        effects += source_pages.said(state)
    return state, effects


def _peer_lost(state: SourceState, fact: facts.Fact) -> Result:
    """Before the offer is taken up the move ends; later a connection may come back for a while."""
    assert isinstance(fact, facts.PeerLost)
    if state.step in (SourceStep.ENQUIRING, SourceStep.OFFERING):
        return source_undo.undo(update(state, connected=False), fact.at_ms, Outcome.FAILED, fact.error)
    if not state.connected or state.step not in UNDOABLE:
        return update(state, connected=False), []  # one more attempt failed: the timer runs already
    return update(state, connected=False), [SetTimer(name=PEER_TIMER, after_s=state.timeouts.reconnect_s)]


# --- the table

S = SourceStep

BEFORE_PROOF = (S.STOPPING, S.SWITCHING, S.GRANTED)
"""Where the target may wait to hear that the mirrors have ended."""

TIMERS = {STEP_TIMER: tuple(S), IDLE_TIMER: (S.STORAGE, S.MEMORY, S.SERVING), PEER_TIMER: UNDOABLE}
"""In which steps a timer means something."""

ON_MESSAGE: dict[tuple[SourceStep, type], Handler] = {
    (S.ENQUIRING, Answer): source_setup.answered,
    (S.OFFERING, FilesWanted): source_setup.files_wanted,
    (S.OFFERING, Ready): source_setup.ready,
    (S.GRANTED, Running): source_switchover.running,
    (S.GRANTED, Owned): source_switchover.owned,
    (S.SERVING, Running): source_pages.heard_again,
    (S.SERVING, PagesFrom): source_pages.resume,
    (S.SERVING, PagesDone): source_pages.done,
    **{(at, Owned): source_switchover.owned for at in (S.SERVING, S.CLEANUP)},
    **{(at, Unknown): source_switchover.forgotten for at in (S.SERVING, S.CLEANUP)},
    (S.UNDOING, Refused): source_undo.target_undone,
    (S.UNDOING, Unknown): source_undo.target_undone_unknown,
    **{(at, Refused): source_undo.refused for at in (*UNDOABLE, S.GRANTED)},
    **{(at, Unknown): source_undo.unknown for at in (*UNDOABLE, S.GRANTED)},
}

ON_FACT: dict[tuple[SourceStep, type], Handler] = {
    (S.ENQUIRING, facts.Started): source_setup.started,
    (S.OFFERING, facts.FilesUploaded): source_setup.files_uploaded,
    (S.STORAGE, facts.MirrorProgress): source_setup.mirror_progress,
    (S.STORAGE, facts.MirrorsReady): source_setup.mirrors_ready,
    (S.MEMORY, facts.PassStarted): source_setup.pass_started,
    (S.MEMORY, facts.PreSwitchover): source_switchover.converged,
    (S.MEMORY, facts.HeldBack): source_setup.held_back,
    (S.STOPPING, facts.GuestStopped): source_switchover.guest_stopped,
    (S.STOPPING, facts.PreSwitchover): source_switchover.pre_switchover,
    (S.STOPPING, facts.MirrorsFinished): source_switchover.mirrors_finished,
    (S.SWITCHING, facts.MemorySent): source_switchover.memory_sent,
    (S.SWITCHING, facts.PagesFollow): source_pages.follow,
    (S.GRANTED, facts.MemorySent): source_pages.all_sent,
    (S.GRANTED, facts.PagesStopped): source_pages.stopped_early,
    (S.CLEANUP, facts.MemoryProgress): source_pages.counted,
    (S.SERVING, facts.MemoryProgress): source_pages.progress,
    (S.SERVING, facts.Failed): source_pages.failed,
    (S.SERVING, facts.PagesStopped): source_pages.stopped,
    (S.SERVING, facts.PagesResumed): source_pages.resumed,
    (S.SERVING, facts.MemorySent): source_pages.done,
    (S.SERVING, facts.QemuGone): source_pages.gone,
    (S.SERVING, facts.TimerFired): source_pages.too_long,
    (S.GRANTED, facts.TimerFired): source_switchover.granted_too_long,
    (S.CLEANUP, facts.CopyEnded): source_switchover.copy_ended,
    (S.CLEANUP, facts.CopyRemoved): source_switchover.copy_removed,
    (S.CLEANUP, facts.Failed): source_switchover.cleanup_failed,
    (S.CLEANUP, facts.TimerFired): source_switchover.cleanup_too_long,
    (S.UNDOING, facts.Undone): source_undo.undone,
    (S.UNDOING, facts.GuestRuns): source_undo.resumed,
    (S.UNDOING, facts.Failed): source_undo.undo_failed,
    (S.UNDOING, facts.TimerFired): source_undo.undo_too_long,
    (S.UNDOING, facts.PeerLost): source_undo.undo_lost_peer,
    **{(at, facts.MemoryProgress): source_setup.memory_progress for at in (S.MEMORY, S.STOPPING, S.SWITCHING)},
    **{(at, facts.Failed): source_undo.failed for at in UNDOABLE},
    **{(at, facts.MemoryFailed): source_undo.failed for at in (S.MEMORY, S.STOPPING, S.SWITCHING)},
    **{(at, facts.TimerFired): source_undo.timed_out for at in UNDOABLE},
    **{(at, facts.CancelRequested): source_undo.cancel for at in UNDOABLE},
}

ON_FACT_ANYWHERE: dict[type, Handler] = {
    facts.PeerConnected: _connected,
    facts.PeerLost: _peer_lost,
    facts.QemuGone: source_undo.qemu_gone,
    facts.Answered: source_switchover.answered,
    facts.ProbeSilent: source_switchover.probe_silent,
}
