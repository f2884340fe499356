"""Post-copy over QMP: the pages' connection made anew, and the end of a guest whose pages will not come.

While its guest waits for a page, the target's main loop may wait too: what is told to it here goes out of band, and
what it says is heard from its events.
"""

import asyncio
import contextlib
import math
from typing import Protocol

from kvmhv.config import Config, Waits
from kvmhv.drivers.qemu import memory
from kvmhv.drivers.qemu.instance import Instance
from kvmhv.drivers.qemu.qmp import QmpLost, QmpRefused
from kvmhv.errors import HostError
from kvmhv.model import IncomingAddress, Plan

ACTIVE = "postcopy-active"
POLL_S = 0.02


async def _pause(instance: Instance, waits: Waits) -> None:
    """Stop what still tries the old connection; no error if QEMU has done so by itself."""
    with contextlib.suppress(QmpRefused):
        await instance.qmp.execute("migrate-pause", timeout_s=waits.yank_s, oob=True)


async def listen(instance: Instance, plan: Plan, ports: tuple[int, int], waits: Waits) -> int:
    """Target: wait for the source on a new port. Raises HostError `qemu-error` if QEMU does not come to it in time.

    A guest that lacks nothing any more is an error, too: `completed` has been said.
    """
    await _pause(instance, waits)
    now_s = asyncio.get_running_loop().time
    deadline_s = now_s() + waits.pages_connect_s
    said = ""
    while now_s() < deadline_s:
        for port in range(ports[0], ports[1] + 1):
            uri = f"tcp:{memory.address(plan.target_address, port)}"
            try:
                await instance.qmp.execute("migrate-recover", {"uri": uri}, timeout_s=waits.yank_s, oob=True)
            except QmpRefused as refused:
                said = refused.description
                if "ddress already in use" not in said:
                    break
            else:
                return port
        await asyncio.sleep(POLL_S)
    raise HostError("qemu-error", f"QEMU does not wait for the missing pages: {said}", "it is tried again by itself")


async def resume(instance: Instance, plan: Plan, port: int, waits: Waits) -> None:
    """Source: send the rest of the pages there. Raises HostError `migrate-failed`; QEMU is then paused again."""
    await _pause(instance, waits)
    uri = f"tcp:{memory.address(plan.target_address, port)}"
    now_s = asyncio.get_running_loop().time
    deadline_s = now_s() + waits.pages_connect_s
    while True:
        try:
            await instance.qmp.execute("migrate", {"uri": uri, "resume": True})
            break
        except QmpRefused:
            if now_s() > deadline_s:
                raise
            await asyncio.sleep(POLL_S)
    while now_s() < deadline_s:
        if (await memory.stats(instance.qmp, waits.memory_stats_s)).status in (ACTIVE, "completed"):
            return
        await asyncio.sleep(POLL_S)
    raise HostError("migrate-failed", "the pages' connection does not come about", "it is tried again by itself")


async def has_all(instance: Instance, waits: Waits) -> bool:
    """Target: whether no page is missing, once the last ones have had a moment to arrive."""
    for _ in range(math.ceil(waits.pages_end_s / POLL_S)):
        if instance.migration not in ("", ACTIVE):
            break
        await asyncio.sleep(POLL_S)
    if not instance.migration:  # an earlier agent has heard its events
        with contextlib.suppress(QmpLost):
            return (await memory.stats(instance.qmp, waits.memory_stats_s)).status == "completed"
    return instance.migration == "completed"


class PostCopy(Protocol):
    """Implements the post-copy of ports.Hypervisor, over what `Qemu` has."""

    _config: Config

    async def await_pages(self, vm_id: str, plan: Plan) -> IncomingAddress:
        """Wait for the source on a new address."""
        port = await listen(await self._instance(vm_id), plan, self._config.migration_ports, self._config.waits)
        return IncomingAddress(memory_port=port, disk_port=None)

    async def resume_pages(self, vm_id: str, plan: Plan, address: IncomingAddress) -> None:
        """Send the rest of the pages there."""
        instance = await self._instance(vm_id)
        instance.remember_peer(plan.target_address, address)
        await resume(instance, plan, address.memory_port, self._config.waits)

    async def end_lost(self, vm_id: str) -> bool:
        """End a QEMU whose pages will not come; True if it has all."""
        if await has_all(await self._instance(vm_id), self._config.waits):
            return True
        await self.kill(vm_id)
        return False

    async def kill(self, vm_id: str) -> None:
        """End the process."""
        ...

    async def _instance(self, vm_id: str) -> Instance: ...
