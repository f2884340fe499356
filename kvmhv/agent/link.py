"""One move's connection to the other agent, made again when it breaks. It knows sessions, not moves.

Either side may connect. What is sent goes over the newest connection, what arrives over any counts. What is sent
without a connection is dropped: the machines repeat what matters once PeerConnected arrives.
"""

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from kvmhv.errors import KvmhvError, PeerBroke, PeerUnreachable
from kvmhv.messages import AnyMessage
from kvmhv.ports import Clock, Peer, PeerConnection
from kvmhv.wire.session import Greeted, Heard, Hello, Session

RETRY_FIRST_S = 0.2
RETRY_LONGEST_S = 3.0
CLOCK_PINGS = 5
CLOCK_PING_EVERY_S = 10.0
OUTBOX_FRAMES = 100

log = structlog.get_logger(__name__)


class Link:
    """Connects, keeps and serves connections; what arrives goes to the three callbacks."""

    def __init__(
        self,
        hello: Hello,
        clock: Clock,
        connect_s: float,
        on_connected: Callable[[], None],
        on_lost: Callable[[KvmhvError], None],
        on_message: Callable[[AnyMessage], None],
    ) -> None:
        """`connect_s`: for a connection, and for the first word on it."""
        self._hello = hello
        self._clock = clock
        self._connect_s = connect_s
        self._conversations: list[_Conversation] = []
        self.attach(on_connected, on_lost, on_message)

    def attach(
        self,
        on_connected: Callable[[], None],
        on_lost: Callable[[KvmhvError], None],
        on_message: Callable[[AnyMessage], None],
    ) -> None:
        """Give what arrives from now on to others."""
        self._on_connected = on_connected
        self._on_lost = on_lost
        self._on_message = on_message

    @property
    def connected(self) -> bool:
        """Whether a greeted connection stands now."""
        return bool(self._conversations)

    def send(self, message: AnyMessage) -> None:
        """Say it on the newest connection; without one it is dropped."""
        if self._conversations:
            self._conversations[-1].say(message)

    async def drain(self, timeout_s: float) -> None:
        """Wait until what was said has gone out, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(conversation.drained() for conversation in self._conversations))

    async def close(self) -> None:
        """End every connection: whoever is there is not to wait for answers that nobody gives any more."""
        await asyncio.gather(*(conversation.end() for conversation in self._conversations))

    async def keep(self, peer: Peer, host: str, first_after_s: float = 0.0) -> None:
        """Connect to the host, and again whenever no connection stands; ends by cancellation."""
        await asyncio.sleep(first_after_s)
        retry_s = RETRY_FIRST_S
        while True:
            if not self.connected:
                try:
                    connection = await peer.connect(host, self._connect_s)
                except KvmhvError as error:
                    if not self.connected:
                        self._on_lost(error)
                else:
                    retry_s = RETRY_FIRST_S
                    await self.serve(connection)
            await asyncio.sleep(retry_s)
            retry_s = min(RETRY_LONGEST_S, retry_s * 2)

    async def serve(self, connection: PeerConnection, first_frame: bytes | None = None) -> None:
        """Talk on a connection until it ends. `first_frame` was read already (the other side's Hello)."""
        conversation = _Conversation(connection, Session(self._hello), self._clock, self._connect_s)
        error: KvmhvError = PeerUnreachable(
            "peer-lost", f"the connection to {connection.peer_name} was lost", host=connection.peer_name
        )
        try:
            await conversation.talk(self, first_frame)
        except KvmhvError as caught:
            error = caught
            if isinstance(caught, PeerBroke):
                log.warning("peer broke the protocol", peer=connection.peer_name, error=str(caught))
        finally:
            await connection.close()
            stood = conversation in self._conversations
            if stood:
                self._conversations.remove(conversation)
            if not self.connected:
                self._on_lost(error)
            elif stood:  # its last words may be lost: they are said again on the connection that is left
                self._on_connected()

    def _greeted(self, conversation: "_Conversation") -> None:
        self._conversations.append(conversation)
        self._on_connected()

    def _heard(self, message: AnyMessage) -> None:
        self._on_message(message)


class _Conversation:
    """One connection's life: Hello both ways, clock pings, messages."""

    def __init__(self, connection: PeerConnection, session: Session, clock: Clock, hello_s: float) -> None:
        self._connection = connection
        self._session = session
        self._clock = clock
        self._hello_s = hello_s
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue(OUTBOX_FRAMES)

    def say(self, message: AnyMessage) -> None:
        """Queue a message; a full outbox means that the other side does not read, and ends the connection."""
        with contextlib.suppress(asyncio.QueueFull):
            self._outbox.put_nowait(self._session.frame(message))

    async def end(self) -> None:
        """Close the connection."""
        await self._connection.close()

    async def drained(self) -> None:
        """Wait until the outbox is empty."""
        await self._outbox.join()

    async def talk(self, link: Link, first_frame: bytes | None) -> None:
        await self._connection.send(self._session.hello_frame())
        tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._align_clocks())]
        try:
            async with asyncio.timeout(self._hello_s) as hello_deadline:
                if first_frame is not None:
                    await self._take(link, first_frame, hello_deadline)
                async for frame in self._connection.frames():
                    await self._take(link, frame, hello_deadline)
        except TimeoutError:
            raise PeerBroke("protocol-order", "the other agent did not say Hello in time") from None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, link: Link, frame: bytes, hello_deadline: asyncio.Timeout) -> None:
        for event in self._session.receive(frame, self._clock.monotonic_ms()):
            if isinstance(event, Greeted):
                hello_deadline.reschedule(None)
                link._greeted(self)
            elif isinstance(event, Heard):
                link._heard(event.message)
        for reply in self._session.replies():
            await self._connection.send(reply)

    async def _write(self) -> None:
        while True:
            frame = await self._outbox.get()
            try:
                await self._connection.send(frame)
            except PeerUnreachable:
                return  # the reader notices too, and says so
            self._outbox.task_done()

    async def _align_clocks(self) -> None:
        pings = 0
        while True:
            try:
                await self._connection.send(self._session.ping_frame(self._clock.monotonic_ms()))
            except PeerUnreachable:
                return
            pings += 1
            await asyncio.sleep(0.05 if pings < CLOCK_PINGS else CLOCK_PING_EVERY_S)
