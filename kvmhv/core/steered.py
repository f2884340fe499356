"""The source's side of a move that another program makes (libvirt): steer it, then ask both sides, then conclude.

    enquiring -> offering -> [storage] -> memory -> stopping -> concluding -> cleanup -> ended
         |           |           |          |          |            |
         |           |           `----------+----------'            `-> undoing -> ended     (the VM stays)
         |           |     failure, cancel: aborting -> concluding
         `-----------`-> ended

The program hands the VM over by itself, without kvmhv's grant, and its answer can be lost when the VM runs at the
target already. So no answer of it is taken for proof: after it, whatever it was, both sides are asked where the VM is
(whereabouts.py), and the move ends when that leaves one conclusion only.
"""

import msgspec

from kvmhv.core import blackout, facts, source_setup, source_switchover, source_undo
from kvmhv.core.effects import ClearTimer, Effect, Journal, Send, SetTimer, Steer, UndoSource
from kvmhv.core.source_state import (
    IDLE_TIMER,
    STEP_TIMER,
    Handler,
    Result,
    SourceState,
    SourceStep,
    enter,
    failed_body,
    mark,
    update,
)
from kvmhv.core.steered_end import (
    LOOK_TIMER,
    cleanup_failed,
    conclude,
    copy_removed,
    ended_copy,
    look_again,
    looked,
    nobody_says,
    resumed,
    say_again,
    stays_unconfirmed,
    target_looked,
    target_undone,
)
from kvmhv.messages import Abort, Answer, Enquire, Ready, Refused, Running, Seen, Unknown
from kvmhv.messages import Look as LookThere
from kvmhv.model import ErrorBody, Outcome, Phase


def step(state: SourceState, fact: facts.Fact) -> Result:
    """Return the next state and what is to be done. A fact that no longer matters changes nothing."""
    if isinstance(fact, facts.Received):
        handler = ON_MESSAGE.get((state.step, type(fact.message)))
    elif isinstance(fact, facts.TimerFired):
        handler = ON_TIMER.get((state.step, fact.name))
    else:
        handler = ON_FACT.get((state.step, type(fact)))
    return handler(state, fact) if handler else (state, [])


def recover(state: SourceState, at_ms: float) -> Result:
    """Return how a new agent goes on: a program that is still at it is told to end it, then both sides are asked."""
    state = update(state, connected=False)
    text = f"the agent on {state.source} was restarted in the {state.phase} phase"
    error = failed_body(state, "agent-restarted", text, "move it again", state.source)
    if state.step in (S.CONCLUDING, S.CLEANUP):
        return conclude(state, at_ms)
    if state.step is S.UNDOING:
        return say_again(state)
    return give_up(state, at_ms, error)


# --- setup


def _connected(state: SourceState, fact: facts.Fact) -> Result:
    """Say again what the target may lack."""
    state = update(state, connected=True)
    effects: list[Effect] = []
    if state.step is S.ENQUIRING:
        effects.append(Send(message=Enquire(vm=state.vm, request=state.request)))
    elif state.step is S.OFFERING:
        effects.append(Send(message=state.offer()))
    elif state.step is S.CONCLUDING:
        effects.append(Send(message=LookThere(epoch=state.hold.epoch)))
    elif state.step is S.UNDOING and state.failure is not None:
        effects.append(Send(message=Abort(epoch=state.hold.epoch, error=state.failure)))
    return state, effects


def _peer_lost(state: SourceState, fact: facts.Fact) -> Result:
    """The two programs talk on without the agents; before they do, the move ends."""
    assert isinstance(fact, facts.PeerLost)
    if state.step in (S.ENQUIRING, S.OFFERING):
        return give_up(update(state, connected=False), fact.at_ms, fact.error)
    return update(state, connected=False, there=None), []


def _refused(state: SourceState, fact: facts.Fact) -> Result:
    message = facts.message_of(fact, Refused)
    if message.epoch != state.hold.epoch:
        return state, []
    return source_undo.end(state, fact.at_ms, Outcome.FAILED, message.error)


def _ready(state: SourceState, fact: facts.Fact) -> Result:
    """The target has made what is needed: the program begins."""
    message = facts.message_of(fact, Ready)
    if message.epoch != state.hold.epoch:
        return state, []
    if state.rule.on_overrun == blackout.THROTTLE:  # the program slows no guest down in the middle
        state = update(state, rule=msgspec.structs.replace(state.rule, on_overrun="cancel"))
    made, limits = state.planned(), state.timeouts
    copies = bool(made.disk_copies)
    state = state.begin_phase(Phase.STORAGE if copies else Phase.MEMORY, fact.at_ms)
    limit_s = limits.storage_s if copies else limits.memory_s
    idle_s = limits.storage_idle_s if copies else limits.memory_idle_s
    after, effects = enter(state, S.STORAGE if copies else S.MEMORY, limit_s)
    return after, [Journal(), *effects, SetTimer(name=IDLE_TIMER, after_s=idle_s), Steer(plan=made)]


# --- disks and memory go over


def _memory_begins(state: SourceState, fact: facts.Fact) -> Result:
    """The first pass: every disk is copied, and each write goes to both sides."""
    state = update(state, copied_bytes=max(state.copied_bytes, state.disk_total_bytes))
    after, effects = enter(state.begin_phase(Phase.MEMORY, fact.at_ms), S.MEMORY, state.timeouts.memory_s)
    after, more = _pass_started(after, fact)
    return after, [*effects, *more]


def _pass_started(state: SourceState, fact: facts.Fact) -> Result:
    """The rule decides as for kvmhv's own VMs; a move that it takes back is taken back by the program."""
    after, effects = source_setup.pass_started(state, fact)
    if after.step is S.UNDOING:
        assert after.failure is not None
        return give_up(
            msgspec.structs.replace(after, step=state.step, outcome=state.outcome), fact.at_ms, after.failure
        )
    return after, effects


def _stopped(state: SourceState, fact: facts.Fact) -> Result:
    """The blackout has begun, by the lever."""
    assert isinstance(fact, facts.GuestStopped)
    state = update(state, stopped_ms=fact.told_ms, halted_ms=fact.at_ms).begin_phase(Phase.STATE, fact.told_ms)
    return mark(state, "stopped", fact.at_ms), []


def _converged(state: SourceState, fact: facts.Fact) -> Result:
    """The program stopped the guest by itself: so little was left that it did not wait for the lever."""
    assert isinstance(fact, facts.PreSwitchover)
    state = source_switchover.converged_by_itself(state, fact.at_ms)
    state = update(state, step=S.STOPPING, guest_runs=False)
    stopped_ms = fact.at_ms if fact.stopped_ms is None else fact.stopped_ms
    after, _ = _stopped(state, facts.GuestStopped(at_ms=fact.at_ms, told_ms=stopped_ms))
    return after, [ClearTimer(name=IDLE_TIMER), *source_switchover.blackout_timer(after)]


def _running(state: SourceState, fact: facts.Fact) -> Result:
    """The guest was let go at the target. When is measured; that it is so is asked again at the end."""
    message = facts.message_of(fact, Running)
    if message.epoch != state.hold.epoch or state.resumed_ms is not None:
        return state, []
    state = update(state, resumed_ms=message.resumed_ms, clock_uncertainty_ms=message.uncertainty_ms)
    state = mark(state, "running", message.resumed_ms, state.target)
    return state.begin_phase(Phase.CLEANUP, message.resumed_ms), []


def _handed(state: SourceState, fact: facts.Fact) -> Result:
    """The program's move has ended; where the VM is now both sides are to say."""
    assert isinstance(fact, facts.Handed)
    if state.failure is None and fact.error is not None:
        state = update(state, failure=fact.error)
    return conclude(state, fact.at_ms)


# --- it is to end


def give_up(state: SourceState, at_ms: float, error: ErrorBody) -> Result:
    """End the move: at once before the program began, else by telling it to end; then both sides are asked."""
    outcome = Outcome.CANCELLED if error.code == "cancelled" else Outcome.FAILED
    if state.step is S.ENQUIRING:
        return source_undo.end(state, at_ms, outcome, error)
    state = update(state, failure=error)
    if state.step is S.OFFERING:
        return say_again(state)
    after, effects = enter(state, S.ABORTING, state.timeouts.undo_s)
    abort = UndoSource(timeout_s=state.timeouts.undo_s / 2)
    return after, [Journal(), *effects, ClearTimer(name=IDLE_TIMER), abort]


def _cancel(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.CancelRequested)
    text = f"cancelled by {fact.caller}; the VM runs on {state.source}"
    error = ErrorBody(code="cancelled", message=text, todo="", host=state.source, exit_status=6)
    return give_up(state, fact.at_ms, error)


def _failed(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.Failed)
    return give_up(state, fact.at_ms, fact.error)


def _timed_out(state: SourceState, fact: facts.Fact) -> Result:
    assert isinstance(fact, facts.TimerFired)
    return give_up(state, fact.at_ms, source_undo.too_long(state, fact))


def _aborted(state: SourceState, fact: facts.Fact) -> Result:
    """It is told to end, and has or has not: the answer is where the VM is."""
    return conclude(state, fact.at_ms)


# --- the table

S = SourceStep

BEGUN = (S.STORAGE, S.MEMORY, S.STOPPING)
ENDING = (S.ABORTING, S.CONCLUDING)

ON_MESSAGE: dict[tuple[SourceStep, type], Handler] = {
    (S.ENQUIRING, Answer): source_setup.answered,
    (S.ENQUIRING, Refused): _refused,
    (S.OFFERING, Refused): _refused,
    (S.OFFERING, Ready): _ready,
    (S.CONCLUDING, Seen): target_looked,
    (S.UNDOING, Refused): target_undone,
    (S.UNDOING, Unknown): target_undone,
    **{(at, Running): _running for at in (*BEGUN, *ENDING)},
}

ON_FACT: dict[tuple[SourceStep, type], Handler] = {
    (S.ENQUIRING, facts.Started): source_setup.started,
    (S.STORAGE, facts.MirrorProgress): source_setup.mirror_progress,
    (S.STORAGE, facts.PassStarted): _memory_begins,
    (S.MEMORY, facts.PassStarted): _pass_started,
    (S.MEMORY, facts.PreSwitchover): _converged,
    (S.STOPPING, facts.GuestStopped): _stopped,
    (S.ABORTING, facts.Undone): _aborted,
    (S.ABORTING, facts.Failed): _aborted,
    (S.CONCLUDING, facts.Looked): looked,
    (S.CONCLUDING, facts.GuestRuns): resumed,
    (S.CONCLUDING, facts.CopyEnded): ended_copy,
    (S.CLEANUP, facts.CopyRemoved): copy_removed,
    (S.CLEANUP, facts.Failed): cleanup_failed,
    (S.UNDOING, facts.PeerLost): stays_unconfirmed,
    **{(at, facts.MemoryProgress): source_setup.memory_progress for at in (S.MEMORY, S.STOPPING)},
    **{(at, facts.Handed): _handed for at in (*BEGUN, S.ABORTING)},
    **{(at, facts.Failed): _failed for at in BEGUN},
    **{(at, facts.CancelRequested): _cancel for at in (S.ENQUIRING, S.OFFERING, *BEGUN)},
    **{(at, facts.PeerConnected): _connected for at in S},
    **{(at, facts.PeerLost): _peer_lost for at in S if at is not S.UNDOING},
}

ON_TIMER: dict[tuple[SourceStep, str], Handler] = {
    **{(at, STEP_TIMER): _timed_out for at in (S.ENQUIRING, S.OFFERING, *BEGUN)},
    **{(at, IDLE_TIMER): _timed_out for at in (S.STORAGE, S.MEMORY)},
    (S.ABORTING, STEP_TIMER): _aborted,
    (S.CONCLUDING, LOOK_TIMER): look_again,
    (S.CONCLUDING, STEP_TIMER): nobody_says,
    (S.CLEANUP, STEP_TIMER): cleanup_failed,
    (S.UNDOING, STEP_TIMER): stays_unconfirmed,
}
