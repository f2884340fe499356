"""Tells when a VM's disk answers nothing: QEMU raises no event while a server is away, its guest just waits.

Every VM is looked at, also one that moves; only in its blackout it is left alone.
"""

import asyncio
from collections.abc import Callable

import msgspec
import structlog

from kvmhv.agent import events
from kvmhv.agent.events import Events
from kvmhv.core import io_stall
from kvmhv.core.io_stall import Waiting
from kvmhv.errors import KvmhvError
from kvmhv.model import Disk, IoStall, MoveReport, Phase, Vm
from kvmhv.ports import Clock, Hypervisor

log = structlog.get_logger(__name__)

LOOK_AGAIN_S = 3.0
LOOKS_AT_ONCE = 4


class IoWatch:
    """Looks at the guests' requests; `of` and `all` say which disks stand still."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        clock: Clock,
        log_of_events: Events,
        stalled_after_s: float,
        *,
        vms: Callable[[], tuple[Vm, ...]],
        moves: Callable[[], tuple[MoveReport, ...]],
    ) -> None:
        """`vms`: those of this host; `moves`: the open ones; a stall is told after `stalled_after_s`."""
        self._hypervisor = hypervisor
        self._clock = clock
        self._events = log_of_events
        self._stalled_after_ms = stalled_after_s * 1000
        self._vms = vms
        self._moves = moves
        self._seen: dict[str, dict[str, Waiting]] = {}
        self._told: dict[tuple[str, str], tuple[IoStall, float]] = {}

    def of(self, vm_id: str) -> tuple[IoStall, ...]:
        """Return the VM's disks that stand still."""
        return tuple(self._now(*told) for key, told in self._told.items() if key[0] == vm_id)

    def all(self) -> tuple[tuple[Vm, IoStall], ...]:
        """Return every disk that stands still, with its VM."""
        vms = {vm.id: vm for vm in self._vms()}
        return tuple((vms[key[0]], self._now(*told)) for key, told in self._told.items() if key[0] in vms)

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        at_once = asyncio.Semaphore(LOOKS_AT_ONCE)
        while True:
            vms = self._vms()
            await asyncio.gather(*(self._look(vm, at_once) for vm in vms))
            for vm_id in {*self._seen, *(key[0] for key in self._told)} - {vm.id for vm in vms}:
                self._forget(vm_id)
            await asyncio.sleep(LOOK_AGAIN_S)

    # ---

    async def _look(self, vm: Vm, at_once: asyncio.Semaphore) -> None:
        if not vm.disks or any(move.vm_id == vm.id and move.phase is Phase.STATE for move in self._moves()):
            return
        async with at_once:
            try:
                looks = await self._hypervisor.disk_io(vm)
            except KvmhvError as error:
                if error.code != "qemu-hangs":  # else it hangs on its storage most likely: what is known stands
                    self._forget(vm.id)
                return
        now_ms = self._clock.monotonic_ms()
        before = self._seen.get(vm.id, {})
        self._seen[vm.id] = {name: io_stall.step(before.get(name), look, now_ms) for name, look in looks.items()}
        for disk in vm.disks:
            self._judge(vm, disk, now_ms)

    def _judge(self, vm: Vm, disk: Disk, now_ms: float) -> None:
        key = (vm.id, disk.name)
        waiting = self._seen[vm.id].get(disk.name)
        stalled_ms = 0.0 if waiting is None else waiting.stalled_ms(now_ms)
        told = self._told.get(key)
        if told is None and stalled_ms >= self._stalled_after_ms:
            place = f"{disk.layers[0].location}/{disk.layers[0].path}"
            since = self._clock.wall_s() - stalled_ms / 1000
            stall = IoStall(disk=disk.name, place=place, since=since, seconds=stalled_ms / 1000)
            self._told[key] = stall, now_ms - stalled_ms
            self._events.add(events.io_stalled(vm, stall))
            log.warning("a disk answers nothing: its VM waits", vm=vm.name, disk=disk.name, place=place)
        elif told is not None and stalled_ms < self._stalled_after_ms:
            ended = self._now(*told)
            del self._told[key]
            self._events.add(events.io_goes_on(vm, ended))
            log.info("a disk answers again", vm=vm.name, disk=disk.name, seconds=round(ended.seconds, 1))

    def _now(self, stall: IoStall, since_ms: float) -> IoStall:
        """Return for how long now: by the clock that nobody sets."""
        return msgspec.structs.replace(stall, seconds=(self._clock.monotonic_ms() - since_ms) / 1000)

    def _forget(self, vm_id: str) -> None:
        self._seen.pop(vm_id, None)
        for key in [key for key in self._told if key[0] == vm_id]:
            del self._told[key]
