"""Post-copy at the source: the guest runs at the target, and the pages that it lacks still go over.

QEMU's own rule: from `postcopy-active` on the source's QEMU refuses to let its guest go on, and the target's needs it.
So the way back ends there, and not with the grant; from the target's run on, the source's QEMU only serves pages.
A connection that breaks stops both QEMUs; they are connected anew as often as it takes. If either QEMU or host is lost,
so is what the guest had in memory: the target, which alone knows whether it lacks a page, says so.
"""

from kvmhv.core import facts, source_switchover
from kvmhv.core.effects import (
    ClearTimer,
    Effect,
    EndCopy,
    Journal,
    NeedOperator,
    ResumePages,
    Send,
    ServePages,
    SetTimer,
)
from kvmhv.core.source_state import IDLE_TIMER, STEP_TIMER, Result, SourceState, SourceStep, enter, mark, update
from kvmhv.messages import PagesDone, PagesEnd, PagesFrom, PagesHalted
from kvmhv.model import ErrorBody, Outcome, Phase


def follow(state: SourceState, fact: facts.Fact) -> Result:
    """QEMU hands the state on: there is no way back here, so the VM is given away, connected or not."""
    state = update(mark(state, "state-sent", fact.at_ms), handed_on=True)
    return source_switchover.grant_it(state)


def all_sent(state: SourceState, fact: facts.Fact) -> Result:
    """Every page is there before the target has said that it runs."""
    return update(state, memory_sent=True), []


def stopped_early(state: SourceState, fact: facts.Fact) -> Result:
    """The connection broke before the target has said that it runs."""
    return _halt(state), []


def _halt(state: SourceState) -> SourceState:
    return update(state, halted=True, attempt=state.attempt + 1)


def serve(state: SourceState, at_ms: float) -> Result:
    """The target runs it: see the rest of its pages go."""
    state = state.begin_phase(Phase.PAGES, state.resumed_ms or at_ms)
    after, timer = _watch(update(state, step=SourceStep.SERVING))
    return after, [Journal(), ClearTimer(name=STEP_TIMER), *timer, ServePages(), *said(after)]


def _watch(state: SourceState) -> Result:
    wait_s = state.timeouts.grant_s if state.halted or state.hold.copy_lost else state.timeouts.memory_idle_s
    return state, [SetTimer(name=IDLE_TIMER, after_s=wait_s)]


def said(state: SourceState) -> list[Effect]:
    """Say what the target may not have heard."""
    epoch = state.hold.epoch
    if state.hold.copy_lost:
        return [Send(message=PagesEnd(epoch=epoch))]
    return [Send(message=PagesHalted(epoch=epoch, attempt=state.attempt))] if state.halted else []


def progress(state: SourceState, fact: facts.Fact) -> Result:
    """As long as pages go over all is well."""
    before = state.memory_sent_bytes
    state, _ = counted(state, fact)
    if state.memory_sent_bytes <= before:
        return state, []
    return _watch(update(state, outcome=Outcome.RUNNING, failure=None))


def counted(state: SourceState, fact: facts.Fact) -> Result:
    """What went over so far: figures for the records."""
    assert isinstance(fact, facts.MemoryProgress)
    if not state.handed_on:
        return state, []
    return update(
        state,
        memory_sent_bytes=max(state.memory_sent_bytes, fact.sent_bytes),
        memory_remaining_bytes=fact.remaining_bytes,
        pages_bytes=max(state.pages_bytes, fact.pages_bytes),
        pages_requests=max(state.pages_requests, fact.pages_requests),
    ), []


def stopped(state: SourceState, fact: facts.Fact) -> Result:
    """The connection broke: the target's QEMU is to wait for a new one."""
    if state.halted or fact.at_ms < state.followed_ms:
        return state, []  # an attempt has failed: the timer makes the next one; or it is the one before that broke
    after, timer = _watch(_halt(state))
    return after, [*timer, *said(after)]


def gone(state: SourceState, fact: facts.Fact) -> Result:
    """No page comes from here any more; whether the target lacks one it knows alone."""
    after, timer = _watch(update(state, hold=state.hold.without_copy()))
    return after, [*timer, *said(after)]


def resume(state: SourceState, fact: facts.Fact) -> Result:
    """The target's QEMU waits for a new connection."""
    message = facts.message_of(fact, PagesFrom)
    current = message.epoch == state.hold.epoch and message.attempt == state.attempt
    if not current or state.hold.copy_lost or not state.halted or state.resuming:
        return state, []  # one at a time: a second one would break what the first one made
    return update(state, resuming=True), [ResumePages(plan=state.planned(), address=message.address)]


def resumed(state: SourceState, fact: facts.Fact) -> Result:
    """The pages go over again."""
    return _watch(
        update(state, halted=False, resuming=False, followed_ms=fact.at_ms, outcome=Outcome.RUNNING, failure=None)
    )


def failed(state: SourceState, fact: facts.Fact) -> Result:
    """The connection was not made: the timer makes the next attempt."""
    assert isinstance(fact, facts.Failed)
    return (update(state, resuming=False), []) if fact.effect == ResumePages.__name__ else (state, [])


def heard_again(state: SourceState, fact: facts.Fact) -> Result:
    """The target's agent says again that the VM runs: it may be a new one."""
    return state, said(state)


def too_long(state: SourceState, fact: facts.Fact) -> Result:
    """No page went over for so long: connected anew, and the operator hears of it."""
    error = ErrorBody(
        code="pages-missing",
        message=f"{state.vm.name} runs on {state.target} and lacks pages of its memory that are on {state.source}, and "
        "none goes over",
        todo=f"bring the network between them and the agent of {state.target} back: it then goes on by itself; do not "
        f"end the VM's QEMU on {state.source}, or what {state.vm.name} has in memory is lost",
        host=state.source,
        exit_status=5,
    )
    tell: list[Effect] = [] if state.outcome is Outcome.NEEDS_OPERATOR else [NeedOperator(error=error)]
    state = update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error)
    if state.resuming:  # its effect ends by itself
        return state, [*_watch(state)[1], *tell]
    after, timer = _watch(_halt(state))
    return after, [*timer, *said(after), *tell]


def done(state: SourceState, fact: facts.Fact) -> Result:
    """The target lacks no page, by its own word or by QEMU's here; or the guest is lost there."""
    if not isinstance(fact, facts.Received):
        return settled(state, fact.at_ms, None)
    message = facts.message_of(fact, PagesDone)
    return settled(state, fact.at_ms, message.error) if message.epoch == state.hold.epoch else (state, [])


def settled(state: SourceState, at_ms: float, lost: ErrorBody | None) -> Result:
    """No page is wanted any more."""
    state = update(state, lost=lost, memory_sent=True, halted=False, outcome=Outcome.RUNNING, failure=None)
    state = state.begin_phase(Phase.CLEANUP, at_ms)
    after, effects = enter(state, SourceStep.CLEANUP, state.timeouts.undo_s)
    return after, [Journal(), ClearTimer(name=IDLE_TIMER), *effects, EndCopy()]
