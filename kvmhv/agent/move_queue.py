"""Moves out of this host that wait for a slot, in their order, until their time is over (core/move_queue.py decides).

Each is on disk, too: a new agent goes on with the queue that the old one had. Its entry goes when the move has ended:
one that an agent's death caught at its beginning is either in the journal or still in the queue.
"""

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

import msgspec
import structlog

from kvmhv.agent import events, past_moves
from kvmhv.agent.chronicle import Chronicle
from kvmhv.agent.open_moves import OpenMoves
from kvmhv.agent.settings import Settings
from kvmhv.config import Config
from kvmhv.core import admission, move_queue
from kvmhv.core.move_queue import Queued
from kvmhv.errors import Cancelled, HostError, KvmhvError, PeerUnreachable, Refused
from kvmhv.model import Asked, MoveReport, MoveRequest, Outcome, Phase, QueuePlace, Refusal, Struct, Vm
from kvmhv.ports import Clock, Journal, Records
from kvmhv.wire.session import SOURCE

log = structlog.get_logger(__name__)

KIND = "queue"
LOOK_S = 1.0
"""So often the queue is looked at beside the moments in which a slot becomes free: for deadlines and changed limits."""
PROMISE_S = 60.0
TRANSIENT = (admission.LIMIT, "vm-in-move", "vm-busy")
"""What a move in the queue waits for instead of ending; a target that cannot be reached, too."""


class Entry(Struct, frozen=True, kw_only=True):
    """What is kept of a move that waits."""

    move_id: str
    vm_id: str
    with_storage: bool
    request: MoveRequest
    asked: Asked
    since: float
    until: float
    """UNIX times."""


class _Waiting:
    """A move in the queue."""

    def __init__(self, key: str, entry: Entry, until_ms: float) -> None:
        self.key, self.entry, self.until_ms = key, entry, until_ms
        self.failure: KvmhvError | None = None
        """Why it can never begin."""
        self.now = Queued(move_id=entry.move_id, target=entry.request.target, with_storage=entry.with_storage)


Ask = Callable[[MoveRequest, str], Awaitable[Refusal | None]]
Begin = Callable[[MoveRequest, Asked, str, float], Awaitable[MoveReport]]


class MoveQueue:
    """Takes moves in, begins each when its turn has come, and ends those whose time is over."""

    def __init__(
        self,
        *,
        config: Config,
        settings: Settings,
        records: Records,
        journal: Journal,
        clock: Clock,
        open_moves: OpenMoves,
        chronicle: Chronicle,
    ) -> None:
        self._config = config
        self._settings = settings
        self._records = records
        self._journal = journal
        self._clock = clock
        self._open = open_moves
        self._chronicle = chronicle
        self._waiting: dict[str, _Waiting] = {}
        self._number = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        open_moves.on_slot = self._wake.set

    def serve_with(self, ask: Ask, begin: Begin) -> None:
        """Say how a target is asked whether it has a slot, and how a move begins."""
        self._ask, self._begin = ask, begin

    # --- for agent/moves

    def recover(self) -> None:
        """After a restart: what waited waits on; what began is the journal's."""
        for key, value in self._records.all(KIND):
            self._number = int(key)
            try:
                entry = msgspec.json.decode(value, type=Entry)
            except msgspec.MsgspecError as error:
                log.error("an entry of the queue cannot be read; its move does not begin", key=key, error=str(error))
                continue
            has_ended = any(past_moves.find(self._journal.reports(), entry.move_id))
            if has_ended or self._open.any(entry.move_id) is not None:
                self._records.delete(KIND, key)
                continue
            left_s = min(entry.until - self._clock.wall_s(), entry.request.queue_s or 0.0)
            self._waiting[entry.move_id] = _Waiting(key, entry, self._clock.monotonic_ms() + left_s * 1000)
            log.info("move waits on", move=entry.move_id, vm=entry.request.vm)

    def holds(self, move_id: str) -> bool:
        """Whether the move waits here."""
        return move_id in self._waiting

    def refuse_second(self, vm: str) -> None:
        """Raise Refused `vm-in-move` if the VM waits for its move."""
        for waiting in self._waiting.values():
            if waiting.entry.request.vm == vm:
                move_id = waiting.entry.move_id
                todo = f"wait for it (`kvmhv move watch {move_id}`) or cancel it"
                text = f"VM {vm} waits in the queue for move {move_id}"
                raise Refused("vm-in-move", text, todo, host=self._config.name, http_status=409)

    def join(self, vm: Vm, request: MoveRequest, asked: Asked) -> MoveReport:
        """Put a move at the end of the queue; it is on disk when this returns. Raises Refused `queue-full`."""
        if len(self._waiting) >= self._config.limits.queued_moves:
            text = f"{len(self._waiting)} moves wait on {self._config.name} already"
            raise Refused(
                "queue-full", text, "wait, or raise limits.queued_moves in agent.toml", host=self._config.name
            )
        assert request.queue_s is not None
        now_s = self._clock.wall_s()
        entry = Entry(
            move_id=str(uuid.uuid4()),
            vm_id=vm.id,
            with_storage=request.include_storage and bool(vm.disks),
            request=request,
            asked=asked,
            since=now_s,
            until=now_s + request.queue_s,
        )
        self._number += 1
        key = f"{self._number:012}"
        self._records.put(KIND, key, msgspec.json.encode(entry))
        waiting = _Waiting(key, entry, self._clock.monotonic_ms() + request.queue_s * 1000)
        self._waiting[entry.move_id] = waiting
        self._wake.set()
        log.info("move queued", move=entry.move_id, vm=vm.name, target=request.target, caller=str(asked))
        report = self.report(entry.move_id)
        self._chronicle.tell(events.move_queued(report, asked))
        return report

    def reports(self) -> tuple[MoveReport, ...]:
        """Return the moves that wait, in their order."""
        return tuple(self.report(move_id) for move_id in self._waiting)

    def lengths(self) -> dict[str, int]:
        """Return how many moves wait for what, with a 0 for what none waits for; not the ones that just begin."""
        counts = dict.fromkeys(move_queue.REASONS, 0)
        for waiting in self._waiting.values():
            if waiting.now.refusal is not None:
                counts[move_queue.reason(waiting.now, self._config.name)] += 1
        return counts

    def report(self, move_id: str) -> MoveReport:
        """Return a move that waits."""
        waiting = self._waiting[move_id]
        entry, refusal = waiting.entry, waiting.now.refusal
        place = QueuePlace(
            place=[*self._waiting].index(move_id) + 1,
            until=entry.until,
            reason=refusal.text if refusal else "",
            setting=refusal.setting if refusal else None,
            host=refusal.host if refusal else None,
        )
        return MoveReport(
            id=move_id,
            vm=entry.request.vm,
            vm_id=entry.vm_id,
            source=self._config.name,
            target=entry.request.target,
            direction="out",
            mode=None,
            outcome=Outcome.RUNNING,
            reason=None,
            error=None,
            phase=Phase.SETUP,
            phases=(),
            passes=(),
            switchover=None,
            blackout_ms=None,
            blackout_uncertainty_ms=None,
            memory_bytes=0,
            disk_bytes=0,
            findings=(),
            progress=0.0,
            remaining_bytes=0,
            storage_total_bytes=0,
            storage_copied_bytes=0,
            warnings=(),
            started_at=entry.since,
            ended_at=None,
            asked=entry.asked,
            request=entry.request,
            queue=place,
            queued_seconds=self._queued_s(entry),
        )

    async def changes(self, move_id: str) -> AsyncIterator[MoveReport]:
        """Yield how the move stands in the queue, now and after each change, until it is there no more."""
        while self.holds(move_id):
            yield self.report(move_id)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S), self._changed:
                    await self._changed.wait()

    async def cancel(self, move_id: str, asked: Asked) -> None:
        """Take the move out of the queue, with a record; one that begins at this moment stays what it becomes."""
        while self.holds(move_id) and self._waiting[move_id].now.trying:
            async with self._changed:
                await self._changed.wait()
        if self.holds(move_id):
            text = f"cancelled by {asked} while it waited for a slot; the VM runs on {self._config.name}"
            self._end(self._waiting[move_id], Outcome.CANCELLED, Cancelled("cancelled", text, host=self._config.name))
            await self._notify()

    # --- the queue's own life

    async def keep(self) -> None:
        """Serve the queue until cancelled."""
        try:
            while True:
                self._wake.clear()
                try:
                    self._look()
                except HostError as error:
                    log.error("the queue cannot be kept; it is tried again", error=str(error))
                await self._notify()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S if self._waiting else None):
                        await self._wake.wait()
        finally:
            for task in self._tasks:
                task.cancel()

    def _look(self) -> None:
        now_ms = self._clock.monotonic_ms()
        for waiting in [it for it in self._waiting.values() if not it.now.trying]:
            if waiting.failure is not None or now_ms >= waiting.until_ms:
                self._end(waiting, Outcome.FAILED, waiting.failure or self._time_over(waiting))
        queue = [waiting.now for waiting in self._waiting.values()]
        for now in move_queue.look(self._settings.current, self._config.name, self._open.load(), queue, now_ms):
            waiting = self._waiting[now.move_id]
            begins = now.trying and not waiting.now.trying
            waiting.now = now
            if begins:
                self._open.promise(now.move_id, out=True, with_storage=now.with_storage, for_s=PROMISE_S)
                self._spawn(self._try(waiting))

    async def _try(self, waiting: _Waiting) -> None:
        """Ask the target for a slot and begin. What says no only for now leaves the move in the queue."""
        entry, host = waiting.entry, self._config.name
        try:
            refusal = await self._ask(entry.request, entry.move_id)
            if refusal is None or refusal.code != admission.LIMIT:
                await self._begin(entry.request, entry.asked, entry.move_id, self._queued_s(entry))
                del self._waiting[entry.move_id]
                self._spawn(self._forget(waiting))
                return
        except KvmhvError as error:
            refusal = Refusal(code=error.code, host=error.host or host, setting=None, text=error.message)
            if error.code not in TRANSIENT and not isinstance(error, PeerUnreachable):
                waiting.failure = error
        except Exception as error:
            log.exception("a queued move could not begin", move=entry.move_id)
            waiting.failure = HostError("internal", repr(error), "see the agent's log", host=host)
            refusal = Refusal(code="internal", host=host, setting=None, text=repr(error))
        finally:
            self._wake.set()
        self._open.withdraw(entry.move_id)
        waiting.now = move_queue.refused(waiting.now, refusal, self._clock.monotonic_ms())

    async def _forget(self, waiting: _Waiting) -> None:
        """The journal has the move until it has ended; the queue's entry is only for what the journal does not know."""
        runner = self._open.any(waiting.entry.move_id)
        if runner is not None:
            await runner.ended.wait()
        with contextlib.suppress(HostError):  # the next agent forgets it
            self._records.delete(KIND, waiting.key)

    def _end(self, waiting: _Waiting, outcome: Outcome, error: KvmhvError) -> None:
        """End a move that never began. Raises HostError `database`; then it is in the queue as before."""
        move_id = waiting.entry.move_id
        report = msgspec.structs.replace(
            self.report(move_id),
            outcome=outcome,
            reason=error.message,
            error=error.body(),
            ended_at=self._clock.wall_s(),
            queue=None,
        )
        self._journal.end(move_id, SOURCE, msgspec.json.encode(report))
        self._records.delete(KIND, waiting.key)
        del self._waiting[move_id]
        log.info("move ended in the queue", move=move_id, vm=report.vm, outcome=str(outcome), reason=report.reason)
        self._chronicle.ended(report)

    def _time_over(self, waiting: _Waiting) -> Refused:
        entry, refusal = waiting.entry, waiting.now.refusal
        why = f": {refusal.text}" if refusal is not None else ""
        text = f"{entry.request.vm} waited for a slot for {(entry.until - entry.since) / 60:.0f} min{why}"
        todo = "move it again, and let it wait longer (--queue MINUTES)"
        if refusal is not None and refusal.setting is not None:
            todo += f", or allow more: on {refusal.host}: kvmhv host set {refusal.setting}=..."
        return Refused("queue-time-over", text, todo, host=refusal.host if refusal else self._config.name)

    def _queued_s(self, entry: Entry) -> float:
        return max(0.0, self._clock.wall_s() - entry.since)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="queue")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
