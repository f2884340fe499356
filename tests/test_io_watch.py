"""A disk that answers nothing is told of, once, and so is its going on; what comes on, or waits for nobody, is not."""

import asyncio
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kvmhv.agent import io_watch
from kvmhv.agent.io_watch import IoWatch
from kvmhv.core import io_stall
from kvmhv.errors import HostError
from kvmhv.model import Disk, DiskFormat, DiskIo, Event, Layer, MoveReport, Phase, Vm
from tests.test_metrics import RUNNING

VM = Vm(
    id="id-1",
    name="web01",
    memory_bytes=1 << 20,
    cpus=1,
    disks=(
        Disk(
            name="disk0",
            size_bytes=1 << 20,
            pci_slot=4,
            layers=(Layer(location="smb", path="web01/disk0.raw", format=DiskFormat.RAW),),
        ),
    ),
)


def look(answered: int, *, waits: bool) -> DiskIo:
    return DiskIo(answered=answered, waits=waits)


@pytest.mark.parametrize(
    ("looks", "stalled_ms"),
    [
        ([look(5, waits=True), look(5, waits=True), look(5, waits=True)], 2000.0),
        ([look(5, waits=True), look(6, waits=True), look(6, waits=True)], 1000.0),
        ([look(5, waits=True), look(6, waits=True), look(7, waits=True)], 0.0),
        ([look(5, waits=False), look(5, waits=False), look(5, waits=False)], 0.0),
        ([look(5, waits=True), look(5, waits=True), look(6, waits=False)], 0.0),
        ([look(5, waits=False), look(5, waits=True), look(5, waits=True)], 1000.0),
        ([look(5, waits=True), look(2, waits=True), look(2, waits=True)], 1000.0),
    ],
)
def test_a_request_waits_from_the_first_look_that_saw_it(looks: list[DiskIo], stalled_ms: float) -> None:
    known = None
    for second, one in enumerate(looks):
        known = io_stall.step(known, one, second * 1000.0)
    assert known is not None
    assert known.stalled_ms(2000.0) == stalled_ms


class Host:
    """The parts of Hypervisor, Clock and Events that are used; each look takes ten seconds of its clock."""

    def __init__(self, looks: Iterator[Any]) -> None:
        self.looks = looks
        self.now_s = 0.0
        self.events: list[Event] = []
        self.over = asyncio.Event()
        self.moves: tuple[MoveReport, ...] = ()

    async def disk_io(self, vm: Vm) -> dict[str, DiskIo]:
        self.now_s += 10.0
        found = next(self.looks, None)
        if found is None:
            self.over.set()
            await asyncio.Event().wait()
        if isinstance(found, Exception):
            raise found
        return {"disk0": found}

    def monotonic_ms(self) -> float:
        return self.now_s * 1000

    def wall_s(self) -> float:
        """Somebody sets it back by a day."""
        return 1_000_000.0 + self.now_s - (86_400.0 if self.now_s > 30.0 else 0.0)

    def add(self, *added: Event) -> None:
        self.events += added


async def watched(monkeypatch: pytest.MonkeyPatch, *looks: Any) -> tuple[Host, IoWatch]:
    monkeypatch.setattr(io_watch, "LOOK_AGAIN_S", 0.0)
    host: Any = Host(iter(looks))
    watch = IoWatch(host, host, host, 15.0, vms=lambda: (VM,), moves=lambda: host.moves)
    task = asyncio.create_task(watch.watch())
    await host.over.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return host, watch


async def test_a_stall_is_told_once_and_its_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = look(5, waits=True)
    host, watch = await watched(monkeypatch, stuck, stuck, stuck, stuck)
    assert [event.kind for event in host.events] == ["io-stalled"]
    assert host.events[0].text == "disk0 of web01 (smb/web01/disk0.raw) has answered nothing for 20 s: the VM waits"
    (stall,) = watch.of("id-1")
    assert (stall.disk, stall.since, round(stall.seconds)) == ("disk0", 1_000_010.0, 40)
    assert watch.all() == ((VM, stall),)

    host, watch = await watched(monkeypatch, stuck, stuck, stuck, look(6, waits=True))
    assert [event.kind for event in host.events] == ["io-stalled", "io-goes-on"]
    assert host.events[1].text.endswith("answers again, after 30 s")
    assert watch.of("id-1") == watch.all() == ()


async def test_a_qemu_that_is_gone_stalls_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = look(5, waits=True)
    host, watch = await watched(monkeypatch, stuck, stuck, stuck, HostError("qemu-gone", "it is gone"))
    assert [event.kind for event in host.events] == ["io-stalled"]
    assert watch.all() == ()


async def test_nobody_is_asked_in_the_blackout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(io_watch, "LOOK_AGAIN_S", 0.0)
    host: Any = Host(iter(()))
    moves = (msgspec.structs.replace(RUNNING, vm_id=VM.id, phase=Phase.STATE),)
    watch = IoWatch(host, host, host, 15.0, vms=lambda: (VM,), moves=lambda: moves)
    task = asyncio.create_task(watch.watch())
    for _ in range(20):
        await asyncio.sleep(0)
    assert host.now_s == 0.0
    moves = (msgspec.structs.replace(RUNNING, vm_id=VM.id, phase=Phase.MEMORY),)
    await host.over.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
