"""An arriving VM's first frame: watched for from before it runs, told to its move, or to its record if that is over.

Nothing waits for it. A VM that says nothing for FIRST_FRAME_S has no network gap.
"""

import asyncio
from collections.abc import Callable

import structlog

from kvmhv.errors import KvmhvError
from kvmhv.model import Vm
from kvmhv.ports import Frames, FrameWatch

FIRST_FRAME_S = 10.0

log = structlog.get_logger(__name__)


class NetworkGap:
    """One move's look at the VM's taps on this host."""

    def __init__(self, frames: Frames, vm: Vm, on_seen: Callable[[float], None]) -> None:
        """`on_seen` hears how many milliseconds after RESUME the first frame came, at most once."""
        self.after_resume_ms: float | None = None
        self._frames = frames
        self._vm = vm
        self._on_seen = on_seen
        self._watch: FrameWatch | None = None
        self._looking: asyncio.Task[None] | None = None

    async def open(self, taps: dict[str, str]) -> None:
        """Begin to look at the VM's taps (nic -> tap); if that cannot be done the move goes on without the figure."""
        if not taps:
            return
        try:
            self._watch = await self._frames.watch({taps[nic.name]: nic.mac for nic in self._vm.nics})
        except KvmhvError as error:
            log.warning("the network gap will not be measured", vm=self._vm.name, error=str(error))

    def resumed(self, resumed_ms: float) -> None:
        """Note when the VM began to run, on this host's clock; the first frame is waited for beside everything else."""
        if self._watch is not None and self._looking is None:
            self._looking = asyncio.create_task(self._look(self._watch, resumed_ms))

    async def close(self, *, let_it_look: bool) -> None:
        """End the look: at once, or when the frame has come or been given up."""
        if self._looking is not None:
            if not let_it_look:
                self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        if self._watch is not None:
            await self._watch.close()

    async def _look(self, watch: FrameWatch, resumed_ms: float) -> None:
        seen_ms = await watch.first_ms(FIRST_FRAME_S)
        if seen_ms is not None:
            # On a busy host QEMU's RESUME arrives late, and the frame, which the kernel stamps, may be before it.
            self.after_resume_ms = seen_ms - resumed_ms
            self._on_seen(self.after_resume_ms)
