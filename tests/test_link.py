"""A move's connections: what is told when one breaks."""

import asyncio
from collections.abc import AsyncIterator

from kvmhv.agent.link import Link
from kvmhv.wire.session import SOURCE, TARGET, Hello, Session


class Clock:
    """ports.Clock that stands still."""

    def monotonic_ms(self) -> float:
        return 0.0

    def wall_s(self) -> float:
        return 0.0


class Connection:
    """ports.PeerConnection on which nothing arrives until it breaks."""

    peer_name = "host2"
    peer_ip = "10.0.0.2"

    def __init__(self) -> None:
        self.broken = asyncio.Event()

    async def send(self, frame: bytes) -> None:
        pass

    async def frames(self) -> AsyncIterator[bytes]:
        yield Session(Hello(move_id="move-1", host="host2", role=TARGET, epoch=1)).hello_frame()
        await self.broken.wait()

    async def close(self) -> None:
        pass


async def test_when_one_of_two_breaks_what_matters_is_said_again() -> None:
    told: asyncio.Queue[str] = asyncio.Queue()
    hello = Hello(move_id="move-1", host="host1", role=SOURCE, epoch=1)
    link = Link(
        hello,
        Clock(),
        10.0,
        lambda: told.put_nowait("connected"),
        lambda error: told.put_nowait("lost"),
        lambda message: None,
    )
    older, newer = Connection(), Connection()
    async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        for connection in (older, newer):
            tasks.create_task(link.serve(connection))
            assert await told.get() == "connected"
        newer.broken.set()
        assert await told.get() == "connected"
        older.broken.set()
        assert await told.get() == "lost"
    assert told.empty()
