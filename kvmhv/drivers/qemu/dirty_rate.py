"""How fast a guest dirties its memory, by sampled pages (calc-dirty-rate): with KVM and TCG, beside a migration too.

QEMU counts whole MiB in the sampled time, so a short sample is coarse: good enough for a plan. While the first pass
runs there is time for a finer one.
"""

import asyncio
import contextlib

from kvmhv.drivers.qemu.answers import DirtyRate
from kvmhv.drivers.qemu.qmp import Qmp, QmpLost, QmpRefused

SHORT_MS = 200
FINE_S = 1
SAMPLE_PAGES = 4096
IN_MS_SINCE = (8, 2, 0)
POLLS = 20
READ_TIMEOUT_S = 1.0


async def short(qmp: Qmp) -> float | None:
    """Sample for a moment; bytes per second, None when QEMU cannot tell."""
    arguments: dict[str, object] = {"calc-time": 1, "sample-pages": SAMPLE_PAGES}
    wait_s = 1.0
    if qmp.version >= IN_MS_SINCE:
        arguments |= {"calc-time": SHORT_MS, "calc-time-unit": "millisecond"}
        wait_s = SHORT_MS / 1000
    with contextlib.suppress(QmpRefused):
        await qmp.execute("calc-dirty-rate", arguments)
        for _ in range(POLLS):
            await asyncio.sleep(wait_s / 4)
            rate = await _measured(qmp)
            if rate is not None:
                return rate
    return None


class FineSample:
    """A sample of a whole second, taken beside the first pass and read when somebody looks at the pass anyway."""

    def __init__(self) -> None:
        self._running = False
        self._rate: float | None = None

    async def begin(self, qmp: Qmp) -> None:
        """Begin; no error if this QEMU will not."""
        self._rate = None
        with contextlib.suppress(QmpRefused, QmpLost):
            await qmp.execute(
                "calc-dirty-rate", {"calc-time": FINE_S, "sample-pages": SAMPLE_PAGES}, timeout_s=READ_TIMEOUT_S
            )
            self._running = True

    async def read(self, qmp: Qmp) -> float | None:
        """Return bytes per second, None before it is measured; QEMU is asked only until it is."""
        if self._running:
            with contextlib.suppress(QmpRefused, QmpLost):
                self._rate = await _measured(qmp)
            self._running = self._rate is None
        return self._rate

    def end(self) -> None:
        """Ask no more: the blackout begins."""
        self._running = False


async def _measured(qmp: Qmp) -> float | None:
    answer = await qmp.ask(DirtyRate, "query-dirty-rate", timeout_s=READ_TIMEOUT_S)
    measured = answer.status == "measured" and answer.dirty_rate >= 0
    return float(answer.dirty_rate) * 1024 * 1024 if measured else None
