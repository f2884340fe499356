"""A storage move explored: agent, QEMU and host die between any two parts of it, and no record ever lacks a write."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kvmhv.core import facts, storage_move
from kvmhv.core.storage_move import ON_FACT
from kvmhv.core.storage_state import StorageState, StorageStep
from kvmhv.model import Outcome
from tests import storage_world
from tests.storage_world import Broken

FAULTS = 3
FAULTS_OF_MISTAKES = 2
S = StorageStep


def explore(faults: int) -> dict[str, int]:
    """Go through every world that can be reached; returns how often the move ended how. Raises Broken."""
    first = replace(storage_world.start(), faults=faults)
    seen = {first}
    ends: dict[str, int] = {}
    queue = deque([(first, ())])
    while queue:
        world, way = queue.popleft()
        try:
            world.check()
        except Broken as broken:
            raise Broken("\n".join((*way, str(broken)))) from None
        following = list(storage_world.nexts(world))
        if not following:
            if not world.ended:
                raise Broken("\n".join((*way, "nothing can happen any more, and the move has not ended")))
            end = f"{world.record} {world.state.outcome if world.state else 'never begun'}"
            ends[end] = ends.get(end, 0) + 1
        for what, after in following:
            if after not in seen:
                seen.add(after)
                queue.append((after, (*way, what)))
    return ends


def test_whatever_dies_when_the_record_names_all_that_was_acknowledged() -> None:
    ends = explore(FAULTS)
    assert {"new done", "old failed", "old cancelled", "old never begun"} == set(ends)


def _release_at_once(state: StorageState, fact: facts.Fact) -> Any:
    state, effects = ON_FACT_BEFORE[S.SWITCHING, facts.WritesHeld](state, fact)
    return state, [*effects, storage_move.ReleaseWrites()]


def _no_journal(state: StorageState, fact: facts.Fact) -> Any:
    state, effects = ON_FACT_BEFORE[S.SWITCHING, facts.WritesHeld](state, fact)
    return state, [effect for effect in effects if not isinstance(effect, storage_move.Journal)]


def _record_too_early(state: StorageState, fact: facts.Fact) -> Any:
    state, effects = ON_FACT_BEFORE[S.COPYING, facts.MirrorsReady](state, fact)
    return state, [*effects, storage_move.Redefine(vm=state.target_vm)]


def _forget_to_release(state: StorageState, fact: facts.Fact) -> Any:
    return ON_FACT_BEFORE[S.SWITCHED, facts.WritesReleased](state, facts.WritesReleased(at_ms=0.0))


def _cancel_late(state: StorageState, fact: facts.Fact) -> Any:
    return _undone_all_the_same(state)


def _undone_all_the_same(state: StorageState) -> Any:
    state = storage_move.update(state, step=S.SWITCHING)
    return storage_move.undo(state, Outcome.CANCELLED, storage_world.ERROR)


def _delete_the_new(state: StorageState, fact: facts.Fact) -> Any:
    state, effects = ON_FACT_BEFORE[S.SWITCHED, facts.WritesReleased](state, fact)
    layers = tuple(copy.target_layers for copy in state.copies)
    return state, [*effects[:-1], storage_move.RemoveImages(layers=layers)]


ON_FACT_BEFORE = dict(ON_FACT)

MISTAKES: dict[str, tuple[tuple[StorageStep, type], Callable[..., Any]]] = {
    "the guest goes on before the record is written": ((S.SWITCHING, facts.WritesHeld), _release_at_once),
    "the change is not journalled": ((S.SWITCHING, facts.WritesHeld), _no_journal),
    "the record is written before the guest's requests are held": ((S.COPYING, facts.MirrorsReady), _record_too_early),
    "the guest never goes on": ((S.SWITCHED, facts.Redefined), _forget_to_release),
    "a cancel comes after the change": ((S.SWITCHED, facts.CancelRequested), _cancel_late),
    "QEMU's end after the change is a reason to undo": ((S.SWITCHED, facts.QemuGone), _cancel_late),
    "the new image is deleted": ((S.SWITCHED, facts.WritesReleased), _delete_the_new),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_exploration_finds(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at, handler = MISTAKES[mistake]
    monkeypatch.setitem(ON_FACT, at, handler)
    with pytest.raises(Broken):
        explore(FAULTS_OF_MISTAKES)


def test_an_agent_that_undoes_what_was_switched_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def recover(state: StorageState, found: facts.Restarted) -> Any:
        if state.step is S.SWITCHED:
            return _undone_all_the_same(state)
        return before(state, found)

    before = storage_move.recover
    monkeypatch.setattr(storage_move, "recover", recover)
    with pytest.raises(Broken):
        explore(FAULTS_OF_MISTAKES)
