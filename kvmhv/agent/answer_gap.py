"""A leaving VM's first answer to its probe: asked for from the moment its guest stands still here.

The source asks: it knows on its own clock when the guest was told to stop, and it is outside of the target host, so the
answer comes the way that the guest's users take. Nothing waits for it. A guest that does not answer within ANSWER_S has
no figure.
"""

import asyncio
from collections.abc import Callable

from kvmhv.model import Probe
from kvmhv.ports import Probes

ANSWER_S = 15.0
CHECK_S = 2.0
KEEP_WARM_S = 10.0
"""So often it is asked before: the way to the guest (ARP) is to be known when it matters."""


class AnswerGap:
    """One move's questions to its guest."""

    def __init__(self, probes: Probes, probe: Probe | None) -> None:
        self.answered_ms: float | None = None
        self.on_answer: Callable[[float], None] = lambda answered_ms: None
        """Hears once when the guest answered, on this host's monotonic clock."""
        self.on_silence: Callable[[str], None] = lambda probe: None
        """Hears if the guest does not even answer while it runs here."""
        self._probes = probes
        self._probe = probe
        self._checking: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None

    def prepare(self) -> None:
        """See, beside the memory's passes, that it answers at all."""
        if self._probe is not None and self._checking is None:
            self._checking = asyncio.create_task(self._check(self._probe))

    def stopped(self) -> None:
        """The guest stands still: from here on an answer means that it runs again."""
        if self._checking is not None:
            self._checking.cancel()
        if self._probe is not None and self._checking is not None and self._asking is None:
            self._asking = asyncio.create_task(self._ask(self._probe))

    def resumed(self) -> None:
        """The guest goes on here, the move has failed: its answers mean nothing."""
        if self._asking is not None:
            self._asking.cancel()

    async def close(self, *, let_it_ask: bool) -> None:
        """End it: at once, or when it was answered or given up."""
        tasks = [task for task in (self._checking, self._asking) if task is not None]
        for task in tasks:
            if task is self._checking or not let_it_ask:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _check(self, probe: Probe) -> None:
        while True:
            if await self._probes.first_answer_ms(probe, CHECK_S) is None:
                self.on_silence(str(probe))
            await asyncio.sleep(KEEP_WARM_S)

    async def _ask(self, probe: Probe) -> None:
        answered_ms = await self._probes.first_answer_ms(probe, ANSWER_S)
        if answered_ms is not None:
            self.answered_ms = answered_ms
            self.on_answer(answered_ms)
