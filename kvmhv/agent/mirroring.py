"""Following the copies of a VM's disks until nothing is left to copy."""

import asyncio
from collections.abc import Callable

from kvmhv.core import facts
from kvmhv.errors import HostError
from kvmhv.model import DiskSent, Vm
from kvmhv.ports import Clock, Hypervisor

POLL_S = 0.25
"""Between two looks at the progress of disks and memory; decisions hang on events, not on this."""


async def until_ready(
    hypervisor: Hypervisor, clock: Clock, vm: Vm, put: Callable[[facts.Fact], None]
) -> facts.MirrorsReady:
    """Tell `put` of the progress until every copy is ready. Raises HostError `mirror-failed`."""
    while True:
        stats = await hypervisor.mirror_stats(vm.id)
        for mirror in stats:
            if mirror.error:
                raise HostError("mirror-failed", f"copying {mirror.disk} of {vm.name}: {mirror.error}")
        copied_bytes = sum(mirror.copied_bytes for mirror in stats)
        total_bytes = sum(mirror.total_bytes for mirror in stats)
        now_ms = clock.monotonic_ms()
        put(facts.MirrorProgress(at_ms=now_ms, copied_bytes=copied_bytes, total_bytes=total_bytes))
        if stats and all(mirror.ready for mirror in stats):
            sent = tuple(DiskSent(disk=mirror.disk, sent_bytes=mirror.sent_bytes) for mirror in stats)
            return facts.MirrorsReady(at_ms=now_ms, copied_bytes=copied_bytes, sent=sent)
        await asyncio.sleep(POLL_S)
