"""Post-copy at the target: the guest runs and lacks pages, until QEMU has them all or no page will come any more."""

from kvmhv.core import facts
from kvmhv.core.effects import AwaitPages, Effect, EndLost, Journal, NeedOperator, Send, SetTimer
from kvmhv.core.target_state import STEP_TIMER, Pages, Result, TargetState, update
from kvmhv.messages import PagesDone, PagesEnd, PagesFrom, PagesHalted
from kvmhv.model import ErrorBody, Outcome


def loaded(state: TargetState, at_ms: float) -> TargetState:
    """All but pages is here, or about to be."""
    return update(state, transferred=True, pages=Pages.MISSING, loaded_ms=at_ms)


def complete(state: TargetState, fact: facts.Fact) -> Result:
    """QEMU has every page."""
    if state.pages is not Pages.MISSING:
        return state, []
    state = update(state, pages=Pages.THERE, outcome=Outcome.RUNNING, failure=None)
    return state, said(state)


def said(state: TargetState) -> list[Effect]:
    """Say how it stands with the pages, if that is settled."""
    if state.pages is Pages.THERE:
        return [Send(message=PagesDone(epoch=state.hold.epoch))]
    return [Send(message=PagesDone(epoch=state.hold.epoch, error=state.lost))] if state.pages is Pages.LOST else []


def gone(state: TargetState, fact: facts.Fact) -> Result:
    """QEMU is gone before it had every page: the guest is lost, the VM is this host's, and stopped."""
    assert isinstance(fact, facts.QemuGone)
    if state.pages is not Pages.MISSING:
        return state, []
    state = lose(state, fact.error.message)
    return state, [Journal(), *said(state)]


def failed(state: TargetState, fact: facts.Fact) -> Result:
    """QEMU gives the missing pages up: they cannot come any more."""
    return state, [EndLost()] if state.pages is Pages.MISSING else []


def lose(state: TargetState, why: str) -> TargetState:
    """Note that the guest is lost."""
    vm, here = state.vm.name, state.target
    error = ErrorBody(
        code="post-copy-lost",
        message=f"what {vm} had in memory is lost: it ran on {here} and lacked pages that were still on {state.source} "
        f"({why}); the VM is stopped on {here}, with all its acknowledged writes",
        todo=f"on {here}: kvmhv vm start {vm}",
        host=here,
        exit_status=5,
    )
    return update(state, pages=Pages.LOST, lost=error, outcome=Outcome.RUNNING, failure=None)


def ended(state: TargetState, fact: facts.Fact) -> Result:
    """No page comes any more."""
    if facts.message_of(fact, PagesEnd).epoch != state.hold.epoch:
        return state, []
    return state, [EndLost()] if state.pages is Pages.MISSING else _answer(state)


def halted(state: TargetState, fact: facts.Fact) -> Result:
    """The source wants to be connected anew."""
    message = facts.message_of(fact, PagesHalted)
    if message.epoch != state.hold.epoch:
        return state, []
    if state.pages is not Pages.MISSING:
        return state, _answer(state)
    if message.attempt == state.attempt:
        return state, _from(state)
    return update(state, attempt=message.attempt, pages_address=None), [AwaitPages(plan=state.plan)]


def _answer(state: TargetState) -> list[Effect]:
    return said(state) or [Send(message=PagesDone(epoch=state.hold.epoch))]


def wait_on(state: TargetState) -> Result:
    """The guest cannot go on for long without the source: who does not hear of it tells the operator."""
    timer = SetTimer(name=STEP_TIMER, after_s=state.plan.timeouts.undo_s)
    if state.connected or state.outcome is Outcome.NEEDS_OPERATOR:
        return state, [timer]
    vm, here, there = state.vm.name, state.target, state.source
    error = ErrorBody(
        code="pages-missing",
        message=f"{vm} runs on {here} and lacks pages of its memory that are on {there}, which cannot be reached",
        todo=f"bring {there} or the connection back: it then goes on by itself, or it is known that what {vm} had in "
        "memory is lost",
        host=here,
        exit_status=5,
    )
    return update(state, outcome=Outcome.NEEDS_OPERATOR, failure=error), [timer, NeedOperator(error=error)]


def waits(state: TargetState, fact: facts.Fact) -> Result:
    """QEMU waits for the pages that it lacks."""
    assert isinstance(fact, facts.IncomingReady)
    state = update(state, pages_address=fact.address)
    return state, _from(state)


def _from(state: TargetState) -> list[Effect]:
    if state.pages_address is None:
        return []
    return [Send(message=PagesFrom(epoch=state.hold.epoch, attempt=state.attempt, address=state.pages_address))]
