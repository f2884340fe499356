"""What performs the effects of moves that another program makes (ports.Runtime), and what its events mean."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from kvmhv.agent.runner import State
from kvmhv.core import facts, steered, steered_target
from kvmhv.core.effects import (
    Adopt,
    Cont,
    Effect,
    EndCopy,
    Look,
    Prepare,
    RemoveCopy,
    Steer,
    StopGuest,
    UndoSource,
    UndoTarget,
)
from kvmhv.core.source_state import SourceState, report
from kvmhv.core.target_state import TargetState
from kvmhv.core.target_state import report as target_report
from kvmhv.errors import KvmhvError
from kvmhv.model import IncomingAddress, MoveReport, Plan, Stay, Whereabouts
from kvmhv.ports import Clock, QemuEvent, Runtime

NO_PORT = 1
"""The two programs agree on their ports by themselves."""
POLL_S = 0.25
"""Between two looks at the progress; decisions hang on events, not on this."""


class SteeredSource:
    """runner.Machine for the side that gives the VM away."""

    role = "source"

    def __init__(self, state: SourceState, runtime: Runtime, clock: Clock) -> None:
        self._vm = state.vm
        self._runtime = runtime
        self._clock = clock
        self.put: Callable[[facts.Fact], None] = lambda fact: None
        """Where facts go that come while an effect is under way (progress)."""
        self._polling = False
        self._told_ms: float | None = None

    def step(self, state: State, fact: facts.Fact) -> tuple[State, list[Effect]]:
        """Decide."""
        assert isinstance(state, SourceState)
        return steered.step(state, fact)

    def report(self, state: State, now_ms: float) -> MoveReport:
        """Show."""
        assert isinstance(state, SourceState)
        return report(state, now_ms)

    def performer(self, effect: Effect) -> Callable[[], Awaitable[facts.Fact | None]]:
        """Return what performs an effect."""
        match effect:
            case Steer(plan=plan):
                return partial(self._steer, plan)
            case StopGuest():
                return self._stop_guest
            case UndoSource(timeout_s=timeout_s):
                return partial(self._abort, timeout_s)
            case Look():
                return self._look
            case Cont():
                return self._cont
            case EndCopy():
                return self._end_copy
            case RemoveCopy(plan=plan):
                return partial(self._remove_copy, plan)
        raise AssertionError(f"{type(effect).__name__} is no effect of a source that another program moves")

    # --- effects

    async def _steer(self, plan: Plan) -> facts.Fact:
        self._polling = True
        polling = asyncio.create_task(self._poll())
        error = None
        try:
            await self._runtime.move(self._vm, plan)
        except KvmhvError as caught:
            error = caught.body()
        finally:
            self._polling = False
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
        return facts.Handed(at_ms=self._clock.monotonic_ms(), error=error)

    async def _poll(self) -> None:
        while self._polling:
            await asyncio.sleep(POLL_S)
            with contextlib.suppress(KvmhvError):
                await self._look_at_progress()

    async def _look_at_progress(self) -> None:
        memory, disks = await self._runtime.progress(self._vm.id)
        now_ms = self._clock.monotonic_ms()
        if not memory.total_bytes and disks.total_bytes:
            copied, total = disks.copied_bytes, disks.total_bytes
            self.put(facts.MirrorProgress(at_ms=now_ms, copied_bytes=copied, total_bytes=total))
        elif memory.total_bytes and self._polling:
            self.put(
                facts.MemoryProgress(
                    at_ms=now_ms,
                    sent_bytes=memory.transferred_bytes,
                    remaining_bytes=memory.remaining_bytes,
                    total_bytes=memory.total_bytes,
                    dirty_bytes_per_s=memory.dirty_bytes_per_s,
                )
            )

    async def _stop_guest(self) -> facts.Fact:
        self._polling = False  # nothing else is asked in the blackout
        self._told_ms = self._clock.monotonic_ms()
        await self._runtime.stop_guest(self._vm.id)
        return facts.GuestStopped(at_ms=self._clock.monotonic_ms(), told_ms=self._told_ms)

    async def _abort(self, timeout_s: float) -> facts.Fact:
        await self._runtime.abort(self._vm.id, timeout_s)
        return facts.Undone(at_ms=self._clock.monotonic_ms())

    async def _look(self) -> facts.Fact:
        found = await self._runtime.look(self._vm.id)
        return facts.Looked(at_ms=self._clock.monotonic_ms(), found=found)

    async def _cont(self) -> facts.Fact:
        resumed_ms = await self._runtime.resume(self._vm.id)
        return facts.GuestRuns(at_ms=self._clock.monotonic_ms(), resumed_ms=resumed_ms)

    async def _end_copy(self) -> facts.Fact:
        await self._runtime.end_copy(self._vm.id)
        return facts.CopyEnded(at_ms=self._clock.monotonic_ms())

    async def _remove_copy(self, plan: Plan) -> facts.Fact:
        stay = await self._runtime.remove_disks(self._vm, tuple(copy.disk for copy in plan.disk_copies))
        warnings = tuple(f"a VM here uses {path}: it stays" for path in stay)
        return facts.CopyRemoved(at_ms=self._clock.monotonic_ms(), warnings=warnings)

    # --- events

    async def hear(self, event: QemuEvent) -> facts.Fact | None:
        """Turn what the program said into a fact."""
        number = event.data.get("pass")
        if isinstance(number, int) and self._polling:
            memory, _ = await self._runtime.progress(self._vm.id)
            return facts.PassStarted(
                at_ms=event.at_ms,
                number=number,
                sent_bytes=memory.transferred_bytes,
                remaining_bytes=memory.remaining_bytes,
                total_bytes=memory.total_bytes,
                dirty_bytes_per_s=memory.dirty_bytes_per_s,
            )
        if event.name == "STOP" and self._polling:
            return facts.PreSwitchover(at_ms=event.at_ms, stopped_ms=event.at_ms)
        return None


class SteeredTarget:
    """runner.Machine for the side that takes the VM."""

    role = "target"

    def __init__(self, state: TargetState, runtime: Runtime, clock: Clock) -> None:
        self._vm = state.vm
        self._runtime = runtime
        self._clock = clock
        self._watch = 0
        """The unbroken time in which the VM was to arrive; 0: something may have been missed."""
        self._ran = state.resumed_ms is not None
        self._ended_before_it_ran = False
        self._ending = False
        self._prepared = state.address is not None
        """The images are this move's own: only then may they be deleted."""

    def step(self, state: State, fact: facts.Fact) -> tuple[State, list[Effect]]:
        """Decide."""
        assert isinstance(state, TargetState)
        return steered_target.step(state, fact)

    def report(self, state: State, now_ms: float) -> MoveReport:
        """Show."""
        assert isinstance(state, TargetState)
        return target_report(state)

    def performer(self, effect: Effect) -> Callable[[], Awaitable[facts.Fact | None]]:
        """Return what performs an effect."""
        match effect:
            case Prepare(plan=plan):
                return partial(self._prepare, plan)
            case Look():
                return self._look
            case EndCopy():
                return self._end_arrival
            case Adopt():
                return self._adopt
            case UndoTarget(plan=plan):
                return partial(self._undo, plan)
        raise AssertionError(f"{type(effect).__name__} is no effect of a target that another program moves to")

    async def _prepare(self, plan: Plan) -> facts.Fact:
        self._watch = self._runtime.watch
        await self._runtime.prepare(self._vm, tuple(copy.disk for copy in plan.disk_copies))
        self._prepared = True
        address = IncomingAddress(memory_port=NO_PORT, disk_port=None)
        return facts.IncomingReady(at_ms=self._clock.monotonic_ms(), address=address)

    async def _look(self) -> facts.Fact:
        found = await self._runtime.look(self._vm.id)
        return facts.Looked(at_ms=self._clock.monotonic_ms(), found=self._with_past(found))

    def _with_past(self, found: Whereabouts) -> Whereabouts:
        """Add what was seen before: who watched all the time, or ended it while it waited, knows that it never ran."""
        if self._ran or found.stay is Stay.RUNNING:
            return msgspec.structs.replace(found, ran=True)
        watched = self._watch != 0 and self._watch == self._runtime.watch
        return msgspec.structs.replace(found, ran=False if watched or self._ended_before_it_ran else None)

    async def _end_arrival(self) -> facts.Fact:
        if not self._ending:  # a program that does not come to it is not asked again on top
            self._ending = True
            try:
                if await self._runtime.end_arrival(self._vm.id):
                    self._ended_before_it_ran = True
            finally:
                self._ending = False
        return facts.CopyEnded(at_ms=self._clock.monotonic_ms())

    async def _adopt(self) -> facts.Fact:
        await self._runtime.adopt(self._vm)
        return facts.Adopted(at_ms=self._clock.monotonic_ms())

    async def _undo(self, plan: Plan) -> facts.Fact:
        names = tuple(copy.disk for copy in plan.disk_copies)
        stay = await self._runtime.remove_disks(self._vm, names) if names and self._prepared else ()
        warnings = tuple(f"a VM here uses {path}: it stays" for path in stay)
        return facts.Undone(at_ms=self._clock.monotonic_ms(), warnings=warnings)

    async def hear(self, event: QemuEvent) -> facts.Fact | None:
        """Turn what the program said into a fact."""
        if event.name == "RESUME" and not self._ran:
            self._ran = True
            return facts.GuestRuns(at_ms=event.at_ms, resumed_ms=event.at_ms)
        return None
