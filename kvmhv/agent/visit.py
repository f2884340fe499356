"""Another agent's connection about a move that this host has no open state of: questions, an offer, or a late word."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from kvmhv.agent.link import Link
from kvmhv.agent.runner import Runner
from kvmhv.core import recover
from kvmhv.errors import KvmhvError, PeerBroke
from kvmhv.messages import Abort, Answer, AnyMessage, Enquire, FilesSent, Grant, MirrorsEnded, Offer, Refused
from kvmhv.model import MoveReport
from kvmhv.ports import Clock, PeerConnection
from kvmhv.wire.session import SOURCE, TARGET, Hello, read_hello

log = structlog.get_logger(__name__)

LATE_MESSAGES = (Offer, Grant, Abort, MirrorsEnded, FilesSent)
"""What must have an answer, even from a target that forgot the move or has ended it."""


class Visit:
    """Serves one such connection until it ends. An accepted offer hands the connection over to the new runner."""

    def __init__(
        self,
        connection: PeerConnection,
        hello: Hello,
        own_name: str,
        clock: Clock,
        connect_s: float,
        ended: MoveReport | None,
        answer: Callable[[Enquire], Awaitable[Answer]],
        accept: Callable[[Offer, Link], Awaitable[Runner | None]],
    ) -> None:
        """`hello` is the visitor's; `ended` the report of the move if it has ended here."""
        self._connection = connection
        self._hello = hello
        self._host = own_name
        self._ended = ended
        self._make_answer = answer
        self._accept = accept
        self._tasks: set[asyncio.Task[None]] = set()
        own_role = TARGET if hello.role == SOURCE else SOURCE
        own_hello = Hello(move_id=hello.move_id, host=own_name, role=own_role, epoch=hello.epoch)
        self.link = Link(own_hello, clock, connect_s, self._connected, self._lost, self._heard)

    async def serve(self, first_frame: bytes) -> None:
        """Talk until the connection ends."""
        try:
            await self.link.serve(self._connection, first_frame)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _connected(self) -> None:
        if self._ended is None:
            return
        if self._hello.role == SOURCE:
            self.link.send(recover.answer_as_target(self._ended, self._hello.epoch, self._host))
            return
        answer = recover.answer_as_source(self._ended, self._hello.epoch, self._host)
        if answer is not None:
            self.link.send(answer)

    def _lost(self, error: KvmhvError) -> None:
        pass

    def _heard(self, message: AnyMessage) -> None:
        if isinstance(message, Enquire):
            self._spawn(self._answer(message))
        elif isinstance(message, Offer) and self._ended is None:
            self._spawn(self._take(message))
        elif isinstance(message, LATE_MESSAGES):
            self.link.send(recover.answer_as_target(self._ended, self._hello.epoch, self._host))

    async def _answer(self, message: Enquire) -> None:
        try:
            self.link.send(await self._make_answer(message))
        except KvmhvError as error:
            self._refuse(self._hello.epoch, error)

    async def _take(self, message: Offer) -> None:
        try:
            runner = await self._accept(message, self.link)
        except KvmhvError as error:
            self._refuse(message.epoch, error)
            return
        if runner is None:
            await self.link.close()  # who connects again finds its move open
        else:
            self.link.attach(runner.connected, runner.lost, runner.heard)

    def _refuse(self, epoch: int, error: KvmhvError) -> None:
        log.warning("refused a move", source=self._hello.host, move=self._hello.move_id, error=str(error))
        body = error.body()
        self.link.send(Refused(epoch=epoch, error=msgspec.structs.replace(body, host=body.host or self._host)))

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def first_hello(connection: PeerConnection, timeout_s: float) -> tuple[bytes, Hello]:
    """Read the frame with which a connection begins. Raises PeerBroke `protocol-order`, `protocol-frame`."""
    try:
        async with asyncio.timeout(timeout_s):
            async for frame in connection.frames():
                return frame, read_hello(frame)
    except TimeoutError:
        pass
    raise PeerBroke("protocol-order", "the other agent did not say Hello", host=connection.peer_name)
