"""What VMs do, known without asking: asked in the background, at once if something happened, never while they move."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from kvmhv.agent import vm_states
from kvmhv.agent.vm_records import Identity, VmRecord
from kvmhv.agent.vm_states import VmStates
from kvmhv.model import Vm, VmDetails, VmState
from kvmhv.ports import QemuEvent

ONE = Vm(id="id-1", name="web01", memory_bytes=1 << 20, cpus=1)
TWO = Vm(id="id-2", name="web02", memory_bytes=1 << 20, cpus=2)


class Host:
    """The parts of Vms and Hypervisor that are used."""

    def __init__(self, *vms: Vm) -> None:
        self.vms = list(vms)
        self.records = self
        self.states = {vm.id: VmState.RUNNING for vm in vms}
        self.asked: list[str] = []
        self.moving: tuple[Vm, ...] = ()
        self.now_s = 100.0
        self.sink: Callable[[QemuEvent], None] = lambda event: None

    def defined(self) -> tuple[Vm, ...]:
        return tuple(self.vms)

    def read(self) -> tuple[tuple[VmRecord, ...], tuple[Identity, ...]]:
        return tuple(VmRecord(vm=vm) for vm in self.vms), ()

    async def show(self, name: str) -> VmDetails:
        self.asked.append(name)
        vm = next(vm for vm in self.vms if vm.name == name)
        return VmDetails(
            vm=vm,
            state=self.states[vm.id],
            host="host1",
            pid=None,
            accel=None,
            qemu_version=None,
            started_at=None,
            move=None,
            console=None,
        )

    def on_event(self, sink: Callable[[QemuEvent], None]) -> None:
        self.sink = sink


@asynccontextmanager
async def watching(host: Any) -> AsyncIterator[VmStates]:
    states = VmStates("host1", host, host, lambda: host.moving, lambda: host.now_s)
    task = asyncio.create_task(states.watch())
    try:
        yield states
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def shown(states: VmStates) -> dict[str, VmState]:
    return {vm.name: vm.state for vm in states.summaries()}


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_one_after_the_other_is_asked_and_at_once_when_something_happened(monkeypatch: Any) -> None:
    monkeypatch.setattr(vm_states, "SWEEP_S", 1000.0)
    host = Host(ONE, TWO)
    async with watching(host) as states:
        assert shown(states) == {"web01": VmState.STOPPED, "web02": VmState.STOPPED}
        await settle()
        assert host.asked == ["web01"]
        assert shown(states)["web01"] is VmState.RUNNING
        host.states["id-1"] = VmState.PAUSED
        host.sink(QemuEvent(vm_id="id-1", name="BLOCK_JOB_READY", at_ms=0, data={}))
        await settle()
        assert shown(states)["web01"] is VmState.RUNNING, "not a change of state"
        host.sink(QemuEvent(vm_id="id-1", name="STOP", at_ms=0, data={}))
        await settle()
        assert shown(states)["web01"] is VmState.PAUSED
        before = list(host.asked)
        assert states.summaries()
        assert host.asked == before, "a look asks nobody"


async def test_a_vm_that_moves_is_left_alone(monkeypatch: Any) -> None:
    monkeypatch.setattr(vm_states, "SWEEP_S", 1000.0)
    host = Host(ONE)
    arriving = msgspec.structs.replace(TWO, id="id-3", name="web03")
    async with watching(host) as states:
        await settle()
        host.moving = (ONE, arriving)
        asked = len(host.asked)
        host.sink(QemuEvent(vm_id="id-1", name="STOP", at_ms=0, data={}))
        await settle()
        assert len(host.asked) == asked
        assert shown(states) == {"web01": VmState.RUNNING, "web03": VmState.INCOMING}
        host.moving = ()
        host.states["id-1"] = VmState.STOPPED
        host.sink(QemuEvent(vm_id="id-1", name="GONE", at_ms=0, data={}))
        await settle()
        assert shown(states) == {"web01": VmState.STOPPED}


async def test_a_vm_that_was_removed_is_forgotten() -> None:
    host = Host(ONE)
    async with watching(host) as states:
        await settle()
        host.vms.clear()
        assert states.summaries() == ()


async def test_qemu_s_events_say_since_when_a_guest_runs_also_while_it_moves(monkeypatch: Any) -> None:
    monkeypatch.setattr(vm_states, "SWEEP_S", 1000.0)
    host = Host(ONE)
    arriving = msgspec.structs.replace(TWO, id="id-3", name="web03")

    def say(vm: Vm, name: str, at_s: float) -> None:
        host.now_s = at_s
        host.sink(QemuEvent(vm_id=vm.id, name=name, at_ms=0, data={}))

    async with watching(host) as states:
        await settle()
        assert states.running_since() == {"id-1": 100.0}, "seen to run when it was asked"
        host.moving = (ONE, arriving)
        say(ONE, "STOP", 110.0)
        assert states.running_since() == {}, "it stands still: not asked, told"
        say(arriving, "RESUME", 111.0)
        say(arriving, "RESUME", 112.0)
        assert states.running_since() == {"id-3": 111.0}
        say(ONE, "RESUME", 113.0)
        assert states.running_since() == {"id-1": 113.0, "id-3": 111.0}, "two machines: two copies would be seen"
        host.moving = ()
        say(arriving, "GONE", 120.0)
        host.states["id-1"] = VmState.PAUSED
        say(ONE, "STOP", 121.0)
        say(ONE, "RESUME", 122.0)
        await settle()
        assert states.running_since() == {}, "an answer that is newer than the event"
