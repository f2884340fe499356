"""The one loop between the core that decides and the drivers that act.

A fact comes in, `step` makes the next state and a list of effects, the effects are performed in their order: Journal,
Send and timers at once, the others each in a task of its own that answers with a fact. One runner per move and side; it
owns every task that it started.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import msgspec
import structlog

from kvmhv.agent.effect_times import EffectTimes
from kvmhv.agent.link import Link
from kvmhv.core import facts
from kvmhv.core.effects import (
    ClearTimer,
    Effect,
    EndCopy,
    Finish,
    Journal,
    NeedOperator,
    Send,
    SetTimer,
    UndoSource,
    UndoStorage,
    UndoTarget,
)
from kvmhv.core.source_state import SourceState
from kvmhv.core.storage_state import StorageState
from kvmhv.core.target import TargetState
from kvmhv.errors import HostError, KvmhvError
from kvmhv.messages import AnyMessage
from kvmhv.model import ErrorBody, MoveReport, Outcome
from kvmhv.ports import Clock, QemuEvent
from kvmhv.ports import Journal as JournalPort
from kvmhv.wire.session import SOURCE

log = structlog.get_logger(__name__)

State = SourceState | TargetState | StorageState
TAKES_BACK = (UndoSource, UndoTarget, UndoStorage, EndCopy)
WORK = (
    *("SendFiles", "MirrorDisks", "SendMemory", "StopGuest", "FinishMirrors", "ContinueSwitchover", "Unexport"),
    *("MakeImages", "CopyDisks", "HoldWrites"),
)
"""Effects that have lost their meaning when the move's traces are taken back."""

JOURNAL_AGAIN_S = 1.0
"""A journal that cannot be written (the disk is full) is tried again so often: nothing may be done before it is."""


class Machine(Protocol):
    """One side of a move: its pure step, and what performs its effects."""

    role: str

    def step(self, state: State, fact: facts.Fact) -> tuple[State, list[Effect]]:
        """Decide."""
        ...

    def report(self, state: State, now_ms: float) -> MoveReport:
        """Show."""
        ...

    def performer(self, effect: Effect) -> Callable[[], Awaitable[facts.Fact | None]]:
        """Return what performs an effect; it returns the fact that answers it, or raises KvmhvError."""
        ...

    async def hear(self, event: QemuEvent) -> facts.Fact | None:
        """Turn what QEMU said into a fact."""
        ...


class Runner:
    """Runs one side of one move from its first fact to Finish."""

    def __init__(
        self,
        machine: Machine,
        state: State,
        clock: Clock,
        journal: JournalPort,
        queue_limit: int,
        cont_s: float,
    ) -> None:
        """`cont_s`: how long a guest that is let run may take before a move that has ended is put away."""
        self.machine = machine
        self.state = state
        self.final: MoveReport | None = None
        self.ended = asyncio.Event()
        self.link: Link | None = None
        self.on_need_operator: Callable[[MoveReport], None] = lambda report: None
        self.on_end: Callable[[], None] = lambda: None
        """Told in the moment in which the move is seen to have ended: whoever sees that sees what follows from it."""
        self.on_step: Callable[[State], None] = lambda state: None
        """Told after each step, when its effects are under way."""
        self._clock = clock
        self._times = EffectTimes(clock.monotonic_ms)
        self._journal = journal
        self._cont_s = cont_s
        self._facts: asyncio.Queue[facts.Fact] = asyncio.Queue(queue_limit)
        self._events: asyncio.Queue[QemuEvent] = asyncio.Queue(queue_limit)
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._fired: set[str] = set()
        """Timers that are over and were not set anew or cleared since."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Condition()
        self._not_kept: ErrorBody | None = None
        """Why the journal cannot be written now."""
        self._log = log.bind(move=state.move_id, role=machine.role)

    # --- facts in

    def put(self, fact: facts.Fact) -> None:
        """Hand a fact in. A full queue means that something floods this move: the fact is dropped and logged."""
        try:
            self._facts.put_nowait(self._located(fact))
        except asyncio.QueueFull:
            self._log.error("too many facts wait", fact=type(fact).__name__)

    def _located(self, fact: facts.Fact) -> facts.Fact:
        """An error that names no host happened on this one; it is told on the other side too."""
        if not isinstance(fact, facts.Failed | facts.MemoryFailed | facts.QemuGone) or fact.error.host is not None:
            return fact
        here = self.state.source if isinstance(self.state, SourceState) else self.state.target
        return msgspec.structs.replace(fact, error=msgspec.structs.replace(fact.error, host=here))

    def put_event(self, event: QemuEvent) -> None:
        """Hand in what QEMU said; events are turned into facts in their order."""
        with contextlib.suppress(asyncio.QueueFull):
            self._events.put_nowait(event)

    def connected(self) -> None:
        """Note that a connection stands."""
        self._times.connected()
        self.put(facts.PeerConnected(at_ms=self._clock.monotonic_ms()))

    def lost(self, error: KvmhvError) -> None:
        """Note that no connection stands."""
        self.put(facts.PeerLost(at_ms=self._clock.monotonic_ms(), error=error.body()))

    def heard(self, message: AnyMessage) -> None:
        """Note what the other agent said."""
        self._times.heard(type(message).__name__)
        self.put(facts.Received(at_ms=self._clock.monotonic_ms(), message=message))

    # --- the loop

    async def run(self, first: list[Effect]) -> MoveReport:
        """Perform `first` (what recovery asked for), then handle facts until the move has ended; returns its report."""
        listener = asyncio.create_task(self._listen())
        if self.link is not None and self.machine.role == SOURCE:
            self._times.connecting()
        try:
            await self._perform_all(first)
            while self.final is None:
                fact = await self._facts.get()
                if isinstance(fact, facts.TimerFired) and fact.name not in self._fired:
                    continue  # it was set anew or cleared while it waited here
                before = self.state
                self.state, effects = self.machine.step(before, fact)
                self._tell(fact, before, effects)
                await self._perform_all(effects)
                self.on_step(self.state)
                await self._notify()
            return self.final
        finally:
            listener.cancel()
            for timer in self._timers.values():
                timer.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(listener, *self._tasks, return_exceptions=True)
            self.ended.set()
            await self._notify()

    def report(self) -> MoveReport:
        """Return the move as it stands now."""
        report = self.final or self._timed(self.machine.report(self.state, self._clock.monotonic_ms()))
        if self._not_kept is None:
            return report
        error = self._not_kept
        return msgspec.structs.replace(report, outcome=Outcome.NEEDS_OPERATOR, reason=error.message, error=error)

    def _timed(self, report: MoveReport) -> MoveReport:
        return msgspec.structs.replace(report, effects=self._times.ended)

    async def changes(self) -> AsyncIterator[MoveReport]:
        """Yield the report now and after each change, the last one when the move has ended."""
        while True:
            report = self.report()
            yield report
            if report.outcome is not Outcome.RUNNING:
                return
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._changed.wait()

    async def _perform_all(self, effects: list[Effect]) -> None:
        for effect in effects:
            await self._perform(effect)

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case Journal(durable=durable):
                state = msgspec.msgpack.encode(self.state)
                write = self._journal.write
                with self._times.of("Journal") if durable else contextlib.nullcontext():
                    await self._kept(lambda: write(self.state.move_id, self.machine.role, state, durable=durable))
            case Send(message=message):
                if self.link is not None:
                    self.link.send(message)
                    self._times.said(type(message).__name__)
            case SetTimer(name=name, after_s=after_s):
                self._clear_timer(name)
                self._timers[name] = asyncio.get_running_loop().call_later(after_s, self._fire, name)
            case ClearTimer(name=name):
                self._clear_timer(name)
            case NeedOperator(error=error):
                self._log.error("the move needs the operator", error=error.message, todo=error.todo)
                self.on_need_operator(self.report())
            case Finish(report=report):
                await self._finish(report)
            case _:
                task = asyncio.create_task(self._answer(effect), name=type(effect).__name__)
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _answer(self, effect: Effect) -> None:
        name = type(effect).__name__
        if isinstance(effect, TAKES_BACK):
            await self._end_work()
        try:
            with self._times.of(name):
                fact = await self.machine.performer(effect)()
        except KvmhvError as error:
            self._log.warning("effect failed", effect=name, error=str(error))
            fact = facts.Failed(at_ms=self._clock.monotonic_ms(), effect=name, error=error.body())
        except Exception as error:
            self._log.exception("effect broke", effect=name)
            body = HostError("internal", f"{name}: {error!r}", "see the agent's log").body()
            fact = facts.Failed(at_ms=self._clock.monotonic_ms(), effect=name, error=body)
        if fact is not None:
            self.put(fact)

    async def _end_work(self) -> None:
        """What is still under way must not go on beside the taking back; what QEMU was told before comes before it."""
        under_way = [task for task in self._tasks if task.get_name() in WORK]
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _finish(self, report: MoveReport) -> None:
        pending = [task for task in self._tasks if task.get_name() == "Cont"]
        if pending:
            await asyncio.wait(pending, timeout=self._cont_s)
        report = msgspec.structs.replace(self._timed(report), ended_at=self._clock.wall_s())
        await self._kept(lambda: self._journal.end(self.state.move_id, self.machine.role, msgspec.json.encode(report)))
        self.final = report
        self.on_end()

    async def _kept(self, write: Callable[[], None]) -> None:
        """Return when something is in the journal; the move stands still until it is, and says so."""
        while True:
            try:
                write()
            except HostError as error:
                if self._not_kept is None:
                    self._log.error("the journal cannot be written: the move stands still", error=str(error))
                    self._not_kept = error.body()
                    with contextlib.suppress(HostError):  # to tell it may want the same disk
                        self.on_need_operator(self.report())
                    await self._notify()
                await asyncio.sleep(JOURNAL_AGAIN_S)
            else:
                self._not_kept = None
                return

    # --- QEMU's events, timers, watchers

    async def _listen(self) -> None:
        while True:
            event = await self._events.get()
            try:
                fact = await self.machine.hear(event)
            except KvmhvError as error:
                self._log.warning("event not understood", qemu_event=event.name, error=str(error))
                continue
            if fact is not None:
                self.put(fact)

    def _fire(self, name: str) -> None:
        self._timers.pop(name, None)
        self._fired.add(name)
        self.put(facts.TimerFired(at_ms=self._clock.monotonic_ms(), name=name))

    def _clear_timer(self, name: str) -> None:
        self._fired.discard(name)
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _tell(self, fact: facts.Fact, before: State, effects: list[Effect]) -> None:
        name = type(fact.message if isinstance(fact, facts.Received) else fact).__name__
        if before.step != self.state.step:
            self._log.info("step", fact=name, left=str(before.step), entered=str(self.state.step))
        self._log.debug("fact", fact=name, step=str(self.state.step), effects=[type(e).__name__ for e in effects])
