"""What the host's VMs do, known without asking anybody: for scrapes and the live page.

A look at all VMs asks every QEMU, which would cost a scrape of 200 VMs too much, and a VM in its blackout even more. So
one VM after the other is asked in the background, at once when its QEMU says that something happened; a VM that is
moving is not asked at all.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from kvmhv.agent.vm_records import damaged_rows
from kvmhv.agent.vms import Vms
from kvmhv.errors import KvmhvError
from kvmhv.model import Vm, VmState, VmSummary
from kvmhv.ports import Hypervisor, QemuEvent, Runtime

SWEEP_S = 10.0
"""Every VM is asked within so long."""
PAUSE_MIN_S = 0.05
"""Between two VMs, so that the agent's other work comes first."""
TELLING = frozenset({"RESUME", "STOP", "SHUTDOWN", "GONE", "SUSPEND", "WAKEUP"})
"""What QEMU says when a VM's state changes."""
STANDING = TELLING - {"RESUME"}
"""After these a guest does not run before RESUME, or before it is asked."""


class VmStates:
    """Keeps the newest known state of each VM."""

    def __init__(
        self,
        host: str,
        vms: Vms,
        hypervisor: Hypervisor,
        moving: Callable[[], tuple[Vm, ...]],
        wall_s: Callable[[], float] = time.time,
        runtime: Runtime | None = None,
    ) -> None:
        """`moving` gives the VMs that are in a move now, `wall_s` the UNIX time; `runtime` knows of its own VMs."""
        self._host = host
        self._vms = vms
        self._moving = moving
        self._wall_s = wall_s
        self._since_s: dict[str, float] = {}
        self._known: dict[str, VmState] = {}
        self._urgent: dict[str, None] = {}
        self._woken = asyncio.Event()
        self._runtime = runtime
        hypervisor.on_event(self._on_event)
        if runtime is not None:
            runtime.on_event(self._on_event)

    def summaries(self) -> tuple[VmSummary, ...]:
        """Return every VM by name, those that are arriving too; asks nobody."""
        records, damaged = self._vms.records.read()
        defined = {record.vm.id: record.vm for record in records}
        others = self._others()
        arriving = {vm.id: vm for vm in self._moving() if vm.id not in defined and not vm.runtime}
        shown = [self._summary(vm, self._known.get(vm.id, VmState.STOPPED)) for vm in defined.values()]
        shown += [self._summary(vm, VmState.INCOMING) for vm in arriving.values()]
        shown += damaged_rows(damaged, self._host)
        return tuple(sorted((*shown, *others), key=lambda vm: vm.name))

    def _others(self) -> tuple[VmSummary, ...]:
        return self._runtime.vms() if self._runtime is not None else ()

    def running_since(self) -> Mapping[str, float]:
        """Return since when (UNIX time) each VM's guest is known to run here, by the VM's id; asks nobody.

        QEMU's own events tell it, so it is true in the middle of a move too: never both sides at one moment, unless two
        copies run. After the agent's start it is the time at which a guest was first seen to run.
        """
        return dict(self._since_s)

    async def watch(self) -> None:
        """Keep the states up to date, until cancelled."""
        while True:
            vms = self._vms.defined()
            self._known = {vm.id: self._known[vm.id] for vm in vms if vm.id in self._known}
            others = self._others()
            here = {vm.id for vm in (*vms, *self._moving())} | {other.id for other in others}
            self._since_s = {vm_id: since_s for vm_id, since_s in self._since_s.items() if vm_id in here}
            for other in others:
                if other.state is VmState.RUNNING:
                    self._since_s.setdefault(other.id, self._wall_s())
            for vm in vms:
                await self._look(vm)
                for vm_id in tuple(self._urgent):
                    await self._look_again(vm_id)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(PAUSE_MIN_S, SWEEP_S / len(vms))):
                        await self._woken.wait()
                self._woken.clear()
            if not vms:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await self._woken.wait()
                self._woken.clear()

    def _on_event(self, event: QemuEvent) -> None:
        if event.name == "RESUME":
            self._since_s.setdefault(event.vm_id, self._wall_s())
        elif event.name in STANDING:
            self._since_s.pop(event.vm_id, None)
        if event.name in TELLING:
            self._urgent[event.vm_id] = None
            self._woken.set()

    async def _look_again(self, vm_id: str) -> None:
        if any(vm.id == vm_id for vm in self._moving()):
            return  # asked when the move has ended
        self._urgent.pop(vm_id, None)
        for vm in self._vms.defined():
            if vm.id == vm_id:
                await self._look(vm)

    async def _look(self, vm: Vm) -> None:
        if any(moving.id == vm.id for moving in self._moving()):
            return
        with contextlib.suppress(KvmhvError):
            state = self._known[vm.id] = (await self._vms.show(vm.name)).state
            if any(moving.id == vm.id for moving in self._moving()):
                return  # a move has begun while it was asked: its events are newer than the answer
            if state is VmState.RUNNING:
                self._since_s.setdefault(vm.id, self._wall_s())
            else:
                self._since_s.pop(vm.id, None)

    def _summary(self, vm: Vm, state: VmState) -> VmSummary:
        return VmSummary(
            name=vm.name, id=vm.id, state=state, host=self._host, memory_bytes=vm.memory_bytes, cpus=vm.cpus
        )
