"""The source in the blackout and after it: the last pass, the grant, the proof, the clean-up.

No journal on disk and no round trip lies between the guest's stop here and its run at the target, but the grant itself.
"""

from kvmhv.core import blackout, facts, handover, precopy, source_pages
from kvmhv.core.effects import (
    ClearTimer,
    ContinueSwitchover,
    Effect,
    EndCopy,
    Finish,
    FinishMirrors,
    Journal,
    NeedOperator,
    RemoveCopy,
    Send,
    SetTimer,
)
from kvmhv.core.handover import SourceRight
from kvmhv.core.source_state import IDLE_TIMER, STEP_TIMER, Result, SourceState, SourceStep, enter, mark, report, update
from kvmhv.messages import Finished, Grant, MirrorsEnded, Owned, Running, Unknown
from kvmhv.model import ErrorBody, Outcome, Phase


def announce(state: SourceState) -> Result:
    """Have it on disk that the switchover may come."""
    hold, effects = handover.announce(state.hold)
    return update(state, hold=hold), effects


def blackout_timer(state: SourceState) -> list[Effect]:
    """Bound the blackout from the guest's stop to the end of the transfer."""
    return [SetTimer(name=STEP_TIMER, after_s=blackout.timeout_s(state.rule, state.timeouts.switchover_s))]


def guest_stopped(state: SourceState, fact: facts.Fact) -> Result:
    """The blackout has begun: end the mirrors, or go on if no disk travels."""
    assert isinstance(fact, facts.GuestStopped)
    state = update(state, stopped_ms=fact.told_ms).begin_phase(Phase.STATE, fact.told_ms)
    state = mark(state, "stopped", fact.at_ms)
    state = update(state, halted_ms=fact.at_ms)
    if state.planned().disk_copies:
        return state, [FinishMirrors()]
    return _continue_when_ready(update(state, mirrors_finished=True))


def converged(state: SourceState, fact: facts.Fact) -> Result:
    """QEMU reached its switchover by itself: so little was left that it did not wait for the lever.

    That this was not announced before means that the agent was held up for seconds; then it is, here in the blackout.
    """
    assert isinstance(fact, facts.PreSwitchover)
    state, entry = announce(state)
    state = converged_by_itself(state, fact.at_ms)
    state = update(state, step=SourceStep.STOPPING, guest_runs=False, pre_switchover=True)
    stopped_ms = fact.at_ms if fact.stopped_ms is None else fact.stopped_ms
    after, effects = guest_stopped(state, facts.GuestStopped(at_ms=fact.at_ms, told_ms=stopped_ms))
    return after, [*entry, *effects, ClearTimer(name=IDLE_TIMER), *blackout_timer(after)]


def converged_by_itself(state: SourceState, at_ms: float) -> SourceState:
    """Note why a guest was stopped that nobody told to stop, and the pass that it was in."""
    complete = state.pass_begun.number if state.pass_begun else 1
    begun = state.pass_begun or _first_pass(state)
    if begun is not None:  # the passes that QEMU did not tell of are one for the records
        ended = facts.PassStarted(
            at_ms=at_ms,
            number=begun.number + 1,
            sent_bytes=state.memory_sent_bytes,
            remaining_bytes=0,
            total_bytes=begun.total_bytes,
            dirty_bytes_per_s=0.0,
        )
        state = update(state, passes=(*state.passes, precopy.complete_pass(begun, ended)))
    return update(state, switchover=precopy.converged(complete))


def _first_pass(state: SourceState) -> facts.PassStarted | None:
    """The first pass as it must have begun, where QEMU was through with it before it said so."""
    at_ms = next((one.at_ms for one in state.marks if one.phase is Phase.MEMORY), None)
    if at_ms is None:
        return None
    return facts.PassStarted(
        at_ms=at_ms, number=1, sent_bytes=0, remaining_bytes=0, total_bytes=0, dirty_bytes_per_s=0.0
    )


def pre_switchover(state: SourceState, fact: facts.Fact) -> Result:
    """QEMU waits with the device state."""
    held = state.halted_ms is not None and state.halted_ms < fact.at_ms
    state = mark(state, "memory-sent", fact.at_ms)
    return _continue_when_ready(update(state, pre_switchover=True, held=held))


def mirrors_finished(state: SourceState, fact: facts.Fact) -> Result:
    """Nobody writes to the exports any more: the target may close them meanwhile."""
    state = mark(state, "mirrors-ended", fact.at_ms)
    after, effects = _continue_when_ready(update(state, mirrors_finished=True))
    return after, effects or [Send(message=mirrors_ended(after))]


def mirrors_ended(state: SourceState) -> MirrorsEnded:
    """What the target may know of the switchover so far."""
    return MirrorsEnded(epoch=state.hold.epoch, held=state.held)


def _continue_when_ready(state: SourceState) -> Result:
    if not (state.pre_switchover and state.mirrors_finished):
        return state, []
    return update(state, step=SourceStep.SWITCHING), [ContinueSwitchover(), Send(message=mirrors_ended(state))]


def memory_sent(state: SourceState, fact: facts.Fact) -> Result:
    """Everything is sent and acknowledged: the VM can be given away."""
    state = update(mark(state, "state-sent", fact.at_ms), memory_sent=True)
    if not state.connected:
        return state, []  # nobody to grant it to: the step's timer decides
    return grant_it(state)


def grant_it(state: SourceState) -> Result:
    """Give the VM away and wait for the proof; that it is said again does not make the wait longer."""
    sent = state.memory_sent or (state.handed_on and not state.hold.copy_lost)
    hold, effects = handover.grant(state.hold, sent=sent)
    after = update(state, hold=hold, step=SourceStep.GRANTED, guest_runs=False)
    if state.step is SourceStep.GRANTED:
        return after, effects
    return after, [*effects, SetTimer(name=STEP_TIMER, after_s=state.timeouts.grant_s)]


def granted_too_long(state: SourceState, fact: facts.Fact) -> Result:
    """Silence proves nothing: the copy stands still, and the operator is told."""
    error = ErrorBody(
        code="handover-unknown",
        message=f"the VM was granted to {state.target}, which does not say whether it runs there; "
        f"the copy on {state.source} stands still",
        todo=f"bring {state.target} or the connection back (the move then ends by itself); if that will never be: "
        f"kvmhv move resolve {state.move_id}",
        host=state.source,
        exit_status=5,
    )
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [NeedOperator(error=error)]


def running(state: SourceState, fact: facts.Fact) -> Result:
    """Proof: the target runs it."""
    message = facts.message_of(fact, Running)
    if not _is_proof(state, message.epoch):
        return state, []
    state = update(state, resumed_ms=message.resumed_ms, clock_uncertainty_ms=message.uncertainty_ms)
    for name, before_ms in (("loaded", message.loaded_before_ms), ("granted", message.granted_before_ms)):
        if before_ms is not None:
            state = mark(state, name, message.resumed_ms - before_ms, state.target)
    state = mark(state, "running", message.resumed_ms, state.target)
    return _yield(state, fact.at_ms)


def _is_proof(state: SourceState, epoch: int) -> bool:
    return epoch == state.hold.epoch and state.hold.right in (SourceRight.GRANTED, SourceRight.YIELDED)


def _yield(state: SourceState, at_ms: float) -> Result:
    """The target runs it: from here on nothing can bring the VM back to this host but another move."""
    stood = state.outcome is Outcome.NEEDS_OPERATOR  # then the target may have said that it cannot tell
    hold = handover.yield_copy(state.hold, state.hold.epoch)
    state = update(state, hold=hold, outcome=Outcome.RUNNING, failure=None)
    served = state.handed_on or (state.rule.post_copy and state.hold.copy_lost)  # who rebooted does not know any more
    if served and not state.memory_sent:
        after, effects = source_pages.serve(state, at_ms)
        return after, [*effects, Send(message=proof(state))] if stood else effects
    state = state.begin_phase(Phase.CLEANUP, state.resumed_ms or at_ms)
    after, effects = enter(state, SourceStep.CLEANUP, state.timeouts.undo_s)
    tell: list[Effect] = [Send(message=proof(state))] if stood else []
    return after, [Journal(), *effects, EndCopy(), *tell]


# --- clean-up


def proof(state: SourceState) -> Grant:
    """Tell a target that may have forgotten it that it runs (or ran) the VM."""
    return Grant(epoch=state.hold.epoch, ran=True)


def forgotten(state: SourceState, fact: facts.Fact) -> Result:
    """The target's host rebooted and it cannot tell whether it ran: this side can."""
    if facts.message_of(fact, Unknown).epoch != state.hold.epoch:
        return state, []
    return state, [Send(message=proof(state))]


def owned(state: SourceState, fact: facts.Fact) -> Result:
    """Proof, and more: the VM is on the target's disk, so this side may delete its own."""
    message = facts.message_of(fact, Owned)
    if not _is_proof(state, message.epoch):
        return state, []
    if message.first_frame_after_ms is not None:
        state = update(state, first_frame_after_ms=message.first_frame_after_ms)
    effects: list[Effect] = []
    if state.step is SourceStep.GRANTED:  # its Running was lost with a connection
        state, effects = _yield(state, fact.at_ms)
    state = update(state, target_owns=True)
    if state.step is SourceStep.SERVING and message.ended:
        after, more = source_pages.settled(state, fact.at_ms, message.lost)
    else:
        after, more = _remove_when_owned(state)
    return after, [*effects, *more]


def copy_ended(state: SourceState, fact: facts.Fact) -> Result:
    """The source's QEMU is gone."""
    return _remove_when_owned(update(state, copy_ended=True))


def _remove_when_owned(state: SourceState) -> Result:
    if not (state.target_owns and state.copy_ended) or state.removing:
        return state, []
    return update(state, removing=True), [RemoveCopy(plan=state.planned())]


def copy_removed(state: SourceState, fact: facts.Fact) -> Result:
    """Nothing is left here: done."""
    assert isinstance(fact, facts.CopyRemoved)
    state = update(state, warnings=(*state.warnings, *fact.warnings), wire_bytes=fact.wire_bytes)
    return _finish_done(state, fact.at_ms)


# --- the probe


def answered(state: SourceState, fact: facts.Fact) -> Result:
    """The guest answers its probe: a figure for the records."""
    assert isinstance(fact, facts.Answered)
    return update(state, answered_ms=state.answered_ms or fact.answered_ms), []


def probe_silent(state: SourceState, fact: facts.Fact) -> Result:
    """Whoever set the probe is told why there will be no figure."""
    assert isinstance(fact, facts.ProbeSilent)
    text = f"{state.vm.name} does not answer {fact.probe} from {state.source} although it runs there"
    warning = f"{text}: the gap to its first answer cannot be measured"
    return (state, []) if warning in state.warnings else (update(state, warnings=(*state.warnings, warning)), [])


def cleanup_failed(state: SourceState, fact: facts.Fact) -> Result:
    """The VM has moved, but as long as a copy or a record of it is here it could be started twice: tried again."""
    assert isinstance(fact, facts.Failed)
    if fact.effect not in (EndCopy.__name__, RemoveCopy.__name__):
        return state, []
    return _cleanup_stuck(state, fact.error.message)


def cleanup_too_long(state: SourceState, fact: facts.Fact) -> Result:
    """Without Owned the disks stay; with it the clean-up here hangs, and is tried again."""
    if state.target_owns:
        again: list[Effect] = [RemoveCopy(plan=state.planned())] if state.copy_ended else [EndCopy()]
        timer = SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s)
        after, told = _cleanup_stuck(state, "it did not end in time")
        return update(after, removing=state.copy_ended), [*again, timer, *told]
    error = ErrorBody(
        code="ownership-unconfirmed",
        message=f"the VM runs on {state.target}, which has not confirmed that it has recorded it; "
        f"its disks on {state.source} are kept until then",
        todo=f"bring the agent of {state.target} back: the move then ends by itself; if that will never be: "
        f"kvmhv move resolve {state.move_id}",
        host=state.target,
        exit_status=5,
    )
    timer = SetTimer(name=STEP_TIMER, after_s=state.timeouts.undo_s)
    again = [] if state.copy_ended else [EndCopy()]
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [*again, timer, NeedOperator(error=error)]


def _cleanup_stuck(state: SourceState, why: str) -> Result:
    error = ErrorBody(
        code="cleanup-failed",
        message=f"the VM has moved to {state.target}; what was left of it on {state.source} cannot be removed: {why}",
        todo="mend that; it is tried again by itself, and until then the VM cannot be started or moved here",
        host=state.source,
        exit_status=5,
    )
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [NeedOperator(error=error)]


def _finish_done(state: SourceState, at_ms: float) -> Result:
    state = update(state, step=SourceStep.ENDED, outcome=Outcome.DONE, failure=None).end_phases(at_ms)
    too_long = blackout.overrun(report(state, at_ms), state.rule)
    if too_long is not None:
        state = update(state, warnings=(*state.warnings, too_long))
    final = report(state, at_ms)
    return state, [Send(message=Finished(epoch=state.hold.epoch, report=final)), Finish(report=final)]
