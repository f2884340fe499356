"""QEMUs that are to start at the same time start one after the other, as many at a time as there are cores."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

TURN_S = 3.0
"""A start that waited so long goes ahead: one that hangs on its storage keeps no other from starting."""


class Starts:
    """Turns to start. Eight at once would all be ready at the end; in turns the first is ready, and moves, at once."""

    def __init__(self, turn_s: float = TURN_S) -> None:
        """Let as many start at a time as there are cores; nobody waits for longer than `turn_s`."""
        self._turn_s = turn_s
        self._places = asyncio.Semaphore(os.cpu_count() or 1)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place and keep it; without one after `turn_s`."""
        try:
            async with asyncio.timeout(self._turn_s):
                await self._places.acquire()
        except TimeoutError:
            yield
            return
        try:
            yield
        finally:
            self._places.release()
