"""Moves over one network that make room for the one whose guest is about to be stopped (core/lead.py)."""

import asyncio
from collections.abc import Callable

import structlog

from kvmhv.core import lead
from kvmhv.core.lead import Lead, Leaving
from kvmhv.core.source_state import SourceState
from kvmhv.errors import KvmhvError
from kvmhv.ports import Clock, Hypervisor

log = structlog.get_logger(__name__)


class Leads:
    """Looks at each step of a move that leaves, and holds the others back or lets them go. No move waits for this."""

    def __init__(self, hypervisor: Hypervisor, clock: Clock) -> None:
        self._hypervisor = hypervisor
        self._clock = clock
        self._moves: dict[str, Leaving] = {}
        self._vms: dict[str, str] = {}
        self._leads: tuple[Lead, ...] = ()
        self._led: frozenset[str] = frozenset()
        self._held: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_held: Callable[[str], None] = lambda move_id: None
        """Told which move is held back, so that its slowness is not taken for the network's."""

    def note(self, state: SourceState) -> None:
        """Look at a move that has made a step."""
        before = self._moves.get(state.move_id)
        alone = not self._moves.keys() - {state.move_id}
        now = lead.leaving(state, before, self._clock.monotonic_ms(), alone=alone)
        if now is None:
            if before is not None:
                self.forget(state.move_id)
            return
        self._moves[state.move_id], self._vms[state.move_id] = now, state.vm.id
        if not alone:
            self._look()

    def forget(self, move_id: str) -> None:
        """A move uses the network no more."""
        self._moves.pop(move_id, None)
        self._vms.pop(move_id, None)
        self._held.discard(move_id)
        self._look()

    async def close(self) -> None:
        """Stop; what is held back is let go with its migration's end."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _look(self) -> None:
        moves = tuple(self._moves.values())
        self._leads, self._led = lead.look(self._leads, self._led, moves, self._clock.monotonic_ms())
        wanted = lead.held(self._leads, moves)
        for move_id in self._moves:
            if (move_id in wanted) != (move_id in self._held):
                self._hold(move_id, on=move_id in wanted)

    def _hold(self, move_id: str, *, on: bool) -> None:
        if on:
            self._held.add(move_id)
        else:
            self._held.discard(move_id)
        task = asyncio.create_task(self._tell(move_id, self._vms[move_id], on=on), name=f"hold {move_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, move_id: str, vm_id: str, *, on: bool) -> None:
        try:
            if await self._hypervisor.hold(vm_id, lead.HELD_BYTES_PER_S if on else None):
                if on:
                    self.on_held(move_id)
                return
        except KvmhvError as error:
            log.warning("a move could not be held back for another", move=move_id, on=on, error=str(error))
        self._held.discard(move_id)
