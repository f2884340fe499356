"""Planted mistakes, each with its name: the exploration has to find every one (test_explore.py)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from kvmhv.core import effects as ef
from kvmhv.core import (
    facts,
    handover,
    recover,
    source,
    source_pages,
    source_switchover,
    source_undo,
    target,
    target_pages,
    target_undo,
)
from kvmhv.core.handover import SourceHold, SourceRight, TargetHold, TargetRight
from kvmhv.core.source_state import SourceStep
from kvmhv.core.target_state import Pages, TargetStep
from kvmhv.messages import Abort, Grant, Owned, PagesFrom, PagesHalted, Refused, Unknown
from kvmhv.model import MoveReport, Outcome

S, T = SourceStep, TargetStep
Plant = Callable[["Patches"], None]
MUTANTS: dict[str, Plant] = {}


class Patches:
    """What a mutant has changed, to be put back."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def attribute(self, owner: Any, name: str, value: Any) -> Any:
        """Replace an attribute; returns the old one."""
        old = getattr(owner, name)
        setattr(owner, name, value)
        self._undo.append(lambda: setattr(owner, name, old))
        return old

    def entry(self, table: dict[Any, Any], key: Any, value: Any) -> Any:
        """Replace an entry of a table, None removes it; returns the old one."""
        old = table.get(key)
        self._undo.append(lambda: table.__setitem__(key, old) if old is not None else table.pop(key, None))
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value
        return old

    def take_back(self) -> None:
        """Put everything back."""
        for undo in reversed(self._undo):
            undo()


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Have one mistake in the code."""
    patches = Patches()
    try:
        MUTANTS[name](patches)
        yield
    finally:
        patches.take_back()


def mutant(name: str) -> Callable[[Plant], Plant]:
    """Register a mistake under its name."""

    def register(plant: Plant) -> Plant:
        MUTANTS[name] = plant
        return plant

    return register


def without(effects: list[ef.Effect], *kinds: type[ef.Effect]) -> list[ef.Effect]:
    """Leave effects of these kinds out."""
    return [effect for effect in effects if not isinstance(effect, kinds)]


def _drop(patches: Patches, owner: Any, name: str, *kinds: type[ef.Effect]) -> None:
    """A function that returns (state, effects) forgets effects."""

    def forgetful(*args: Any, **named: Any) -> Any:
        state, effects = old(*args, **named)
        return state, without(effects, *kinds)

    old = patches.attribute(owner, name, forgetful)


@mutant("the grant is not journalled")
def _(patches: Patches) -> None:
    _drop(patches, handover, "grant", ef.Journal)


@mutant("the run is not journalled")
def _(patches: Patches) -> None:
    _drop(patches, handover, "run_at_target", ef.Journal)


@mutant("the refusal is not journalled")
def _(patches: Patches) -> None:
    _drop(patches, target_undo, "refuse", ef.Journal)


@mutant("the announcement is not journalled")
def _(patches: Patches) -> None:
    _drop(patches, handover, "announce", ef.Journal)


@mutant("the announcement is not on disk")
def _(patches: Patches) -> None:
    def hasty(hold: SourceHold) -> Any:
        after, effects = old(hold)
        return after, [ef.Journal(durable=False) for _ in effects]

    old = patches.attribute(handover, "announce", hasty)


@mutant("a source that rebooted takes back what it may have granted")
def _(patches: Patches) -> None:
    patches.attribute(recover, "MAYBE_COMPLETE", ())


@mutant("the undo is not journalled")
def _(patches: Patches) -> None:
    _drop(patches, source_undo, "undo", ef.Journal)


@mutant("the grant is sent before it is journalled")
def _(patches: Patches) -> None:
    def hasty(*args: Any, **named: Any) -> Any:
        state, effects = old(*args, **named)
        return state, effects[::-1]

    old = patches.attribute(handover, "grant", hasty)


@mutant("silence after a grant is taken for a refusal")
def _(patches: Patches) -> None:
    patches.attribute(SourceHold, "may_run", lambda hold: not hold.copy_lost)
    patches.entry(source.ON_FACT, (S.GRANTED, facts.TimerFired), source_undo.timed_out)


@mutant("a lost connection after a grant is taken for a refusal")
def _(patches: Patches) -> None:
    patches.attribute(SourceHold, "may_run", lambda hold: not hold.copy_lost)

    def resume(state: Any, fact: facts.Fact) -> Any:
        assert isinstance(fact, facts.PeerLost)
        return source_undo.fail(state, 0, fact.error)

    patches.entry(source.ON_FACT, (S.GRANTED, facts.PeerLost), resume)


@mutant("a restarted source forgets that it granted")
def _(patches: Patches) -> None:
    def forgetful(state: Any, found: facts.Restarted) -> Any:
        if state.step is S.GRANTED:
            hold = SourceHold(epoch=state.hold.epoch)
            state = msgspec.structs.replace(state, step=S.MEMORY, hold=hold)
        return old(state, found)

    old = patches.attribute(recover, "recover_source", forgetful)


@mutant("the target runs what is loaded without a grant")
def _(patches: Patches) -> None:
    def eager(state: Any, fact: facts.Fact) -> Any:
        return old(msgspec.structs.replace(state, granted_epoch=state.hold.epoch, unexported=True), fact)

    old = patches.entry(target.ON_FACT, (T.WAITING, facts.MemorySent), eager)


@mutant("the target runs before everything is loaded")
def _(patches: Patches) -> None:
    def eager(state: Any, fact: facts.Fact) -> Any:
        return old(msgspec.structs.replace(state, transferred=True, unexported=True), fact)

    old = patches.entry(target.ON_MESSAGE, (T.WAITING, Grant), eager)


@mutant("an abort is obeyed after the run")
def _(patches: Patches) -> None:
    def obedient(state: Any, fact: facts.Fact) -> Any:
        assert isinstance(fact, facts.Received)
        assert isinstance(fact.message, Abort)
        return target_undo.refuse(state, fact.message.error)

    patches.attribute(handover, "refuse", lambda hold: TargetHold(epoch=hold.epoch, right=TargetRight.REFUSED))
    patches.entry(
        target.ON_FACT, (T.STARTING, facts.TimerFired), lambda state, fact: target_undo.refuse(state, _error())
    )
    patches.entry(target.ON_MESSAGE, (T.STARTING, Abort), obedient)


@mutant("a restarted target forgets that it was about to run")
def _(patches: Patches) -> None:
    def forgetful(state: Any, found: facts.Restarted) -> Any:
        if state.step is T.STARTING:
            state = msgspec.structs.replace(state, step=T.WAITING, hold=TargetHold(epoch=state.hold.epoch))
            return target_undo.refuse(state, _error())
        return old(state, found)

    old = patches.attribute(recover, "recover_target", forgetful)


@mutant("a target whose host rebooted refuses")
def _(patches: Patches) -> None:
    patches.attribute(recover, "_without_process", lambda state, found: target_undo.refuse(state, _error()))


@mutant("a refusal is said before the incoming QEMU has ended")
def _(patches: Patches) -> None:
    def hasty(state: Any, error: Any) -> Any:
        after, effects = old(state, error)
        return after, [*effects, ef.Send(message=Refused(epoch=state.hold.epoch, error=error))]

    old = patches.attribute(target_undo, "refuse", hasty)


@mutant("any failed effect ends the target's undo")
def _(patches: Patches) -> None:
    patches.entry(target.ON_FACT, (T.UNDOING, facts.Failed), lambda state, fact: target_undo._end_refused(state))


@mutant("the source deletes as soon as the target runs")
def _(patches: Patches) -> None:
    def hasty(state: Any, fact: facts.Fact) -> Any:
        after, effects = old(state, fact)
        return msgspec.structs.replace(after, target_owns=True), effects

    old = patches.entry(source.ON_MESSAGE, (S.GRANTED, source_switchover.Running), hasty)


@mutant("the target says that it owns before it is on disk")
def _(patches: Patches) -> None:
    def hasty(state: Any, fact: facts.Fact) -> Any:
        after, effects = old(state, fact)
        return after, [ef.Send(message=Owned(epoch=state.hold.epoch)), *effects]

    old = patches.entry(target.ON_FACT, (T.STARTING, facts.GuestRuns), hasty)


@mutant("a source without a copy is believed whatever its guest did")
def _(patches: Patches) -> None:
    def trusting(state: Any, fact: facts.Fact) -> Any:
        return old(msgspec.structs.replace(state, held=True), fact)

    old = patches.entry(target.ON_MESSAGE, (T.WAITING, Grant), trusting)


@mutant("the device state goes over before the mirrors have ended")
def _(patches: Patches) -> None:
    def hasty(state: Any, fact: facts.Fact) -> Any:
        return old(msgspec.structs.replace(state, mirrors_finished=True), fact)

    old = patches.entry(source.ON_FACT, (S.STOPPING, facts.PreSwitchover), hasty)


@mutant("a target that rebooted takes its own disks for the shared ones")
def _(patches: Patches) -> None:
    def trusting(state: Any, fact: facts.Fact) -> Any:
        message = facts.message_of(fact, Grant)
        ran = message.ran or not message.sent
        return old(state, facts.Received(at_ms=0, message=Grant(epoch=message.epoch, ran=ran)))

    old = patches.entry(target.ON_MESSAGE, (T.STANDING, Grant), trusting)


@mutant("a grant that was lost is not said again")
def _(patches: Patches) -> None:
    def silent(state: Any, fact: facts.Fact) -> Any:
        after, effects = old(state, fact)
        return after, [one for one in effects if not (isinstance(one, ef.Send) and isinstance(one.message, Grant))]

    old = patches.entry(source.ON_FACT_ANYWHERE, facts.PeerConnected, silent)


@mutant("a target that rebooted is not told that it ran")
def _(patches: Patches) -> None:
    patches.entry(source.ON_MESSAGE, (S.CLEANUP, Unknown), None)
    patches.attribute(source_switchover, "proof", lambda state: Grant(epoch=state.hold.epoch))


@mutant("the source ends before its guest goes on")
def _(patches: Patches) -> None:
    def forgetful(hold: SourceHold, vm_id: str) -> list[ef.Effect]:
        return []

    patches.attribute(handover, "resume_at_source", forgetful)


@mutant("a target that ended the move well says that it refused")
def _(patches: Patches) -> None:
    def wrong(ended: MoveReport | None, epoch: int, host: str) -> Any:
        if ended is not None and ended.outcome is Outcome.DONE:
            return Refused(epoch=epoch, error=_error())
        return old(ended, epoch, host)

    old = patches.attribute(recover, "answer_as_target", wrong)


@mutant("a source that was granted away resumes on Unknown")
def _(patches: Patches) -> None:
    def resume(state: Any, fact: facts.Fact) -> Any:
        hold = SourceHold(epoch=state.hold.epoch, right=SourceRight.HOLDS_AGAIN, copy_lost=state.hold.copy_lost)
        return source_undo.fail(msgspec.structs.replace(state, hold=hold, target_undone=True), 0, _error())

    patches.entry(source.ON_MESSAGE, (S.GRANTED, Unknown), resume)


@mutant("a guest that QEMU stopped by itself counts as held")
def _(patches: Patches) -> None:
    def trusting(state: Any, fact: facts.Fact) -> Any:
        assert isinstance(fact, facts.PreSwitchover)
        return old(msgspec.structs.replace(state, halted_ms=fact.at_ms - 1), fact)

    old = patches.entry(source.ON_FACT, (S.STOPPING, facts.PreSwitchover), trusting)


@mutant("a restarted source does not see that its QEMU is gone")
def _(patches: Patches) -> None:
    def blind(state: Any, found: facts.Restarted) -> Any:
        return old(state, msgspec.structs.replace(found, process=True))

    old = patches.attribute(recover, "recover_source", blind)


@mutant("a restarted target believes that its exports are closed")
def _(patches: Patches) -> None:
    def trusting(state: Any, found: facts.Restarted) -> Any:
        after, effects = old(state, found)
        return msgspec.structs.replace(after, mirrors_ended=state.mirrors_ended), effects

    old = patches.attribute(recover, "recover_target", trusting)


@mutant("a restarted target that ran the VM does not record it")
def _(patches: Patches) -> None:
    def forgetful(state: Any, found: facts.Restarted) -> Any:
        after, effects = old(state, found)
        return after, without(effects, ef.Adopt, ef.SetTimer)

    old = patches.attribute(recover, "recover_target", forgetful)


PAGES = "pages: "
"""How the names begin of mistakes that only post-copy shows."""


@mutant("pages: the source ends its QEMU as soon as the target runs")
def _(patches: Patches) -> None:
    patches.attribute(source_pages, "serve", lambda state, at_ms: source_pages.settled(state, at_ms, None))


@mutant("pages: a restarted source ends the QEMU that has them")
def _(patches: Patches) -> None:
    def hasty(state: Any, found: facts.Restarted) -> Any:
        return source_pages.settled(state, 0, None)

    patches.attribute(recover, "_serving_again", hasty)


@mutant("pages: a target that lacks them runs after a source that lost its copy")
def _(patches: Patches) -> None:
    def trusting(state: Any, at_ms: float) -> Any:
        return msgspec.structs.replace(old(state, at_ms), pages=Pages.TOGETHER)

    old = patches.attribute(target_pages, "loaded", trusting)


@mutant("pages: a connection that broke is not made anew")
def _(patches: Patches) -> None:
    patches.entry(source.ON_MESSAGE, (S.SERVING, PagesFrom), None)


@mutant("pages: a connection that broke counts as their loss")
def _(patches: Patches) -> None:
    def hasty(state: Any, fact: facts.Fact) -> Any:
        return state, [ef.EndLost()]

    patches.entry(target.ON_MESSAGE, (T.SETTLING, PagesHalted), hasty)


@mutant("pages: that none comes any more is not said")
def _(patches: Patches) -> None:
    patches.attribute(source_pages, "said", lambda state: [])


@mutant("pages: a source that rebooted does not ask for them")
def _(patches: Patches) -> None:
    def forgetful(state: Any, at_ms: float) -> Any:
        if not state.handed_on:
            state = msgspec.structs.replace(state, rule=msgspec.structs.replace(state.rule, post_copy=False))
        return old(state, at_ms)

    old = patches.attribute(source_switchover, "_yield", forgetful)


def _error() -> Any:
    from tests.explore.acts import ERROR  # noqa: PLC0415 - acts imports the world, which no mutant needs

    return ERROR
