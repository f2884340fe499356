"""What of each disk went over the wire: which of QEMU's connections carries which disk, and TCP's count of each.

QEMU does not say it: its jobs count zeros that were only named, and its block statistics know the guest's devices, not
the nodes of a job. But each export is opened by one connection, so the one that is new after `blockdev-add` is its own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

Look = Callable[[], Mapping[int, int]]
"""Returns the bytes sent by each of QEMU's connections to the target's exports, by its local port."""


class DiskWire:
    """Counts for one move."""

    def __init__(self, look: Look | None) -> None:
        """`look` is None where the connections cannot be told apart (MPTCP): then nothing is known."""
        self._look = look
        self._disk_of: dict[int, str] = {}
        self._sent: dict[int, int] = {}
        self._opening = asyncio.Lock()

    @asynccontextmanager
    async def opens(self, disk: str) -> AsyncIterator[None]:
        """Whatever QEMU connects inside belongs to this disk; one at a time."""
        async with self._opening:
            before = self._now()
            yield
            self._disk_of |= dict.fromkeys(self._now().keys() - before.keys(), disk)

    def note(self) -> None:
        """Keep the figures as they are now: of a connection that ends nothing is known later."""
        self._sent |= self._now()

    def sent_bytes(self, disk: str) -> int | None:
        """Return what was sent of a disk until the last note; None if that cannot be told."""
        ports = [port for port, its in self._disk_of.items() if its == disk]
        return sum(self._sent.get(port, 0) for port in ports) if ports else None

    def _now(self) -> Mapping[int, int]:
        return self._look() if self._look is not None else {}
