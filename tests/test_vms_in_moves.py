"""agent/vms.py as moves use it: claims, arrivals, departures; each call can be repeated."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from kvmhv.errors import CallerError, HostError, KvmhvError, Refused
from kvmhv.model import (
    GIB,
    MIB,
    Disk,
    Layer,
    Vm,
    VmState,
)
from tests.one_host import NOTHING, QCOW2, SPEC, World, one_host, running


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with one_host(tmp_path) as host:
        yield host


def arriving() -> Vm:
    layers = tuple(Layer(location="default", path=f"web01/disk0{part}.qcow2", format=QCOW2) for part in ("", ".base1"))
    shared = Layer(location="fast", path="shared.qcow2", format=QCOW2)
    return Vm(
        id="arriving",
        name="web01",
        memory_bytes=MIB,
        cpus=1,
        disks=(
            Disk(name="disk0", size_bytes=GIB, layers=layers, pci_slot=8),
            Disk(name="disk1", size_bytes=GIB, layers=(shared,), pci_slot=9),
        ),
        epoch=1,
    )


async def test_a_vm_in_a_move_is_left_alone(world: World) -> None:
    details = await running(world)
    world.vms.claim("web01", "move1")
    world.vms.claim("web01", "move1")
    with pytest.raises(Refused):
        world.vms.claim("web01", "move2")
    calls = [
        world.vms.start("web01"), world.vms.stop("web01", force=True, timeout_s=None),
        world.vms.remove("web01", keep_disks=False), world.vms.create(SPEC),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(Refused, match="move1") as refused:
            await call
        assert (refused.value.code, refused.value.exit_status, refused.value.http_status) == ("vm-in-move", 4, 409)
    assert (await world.vms.show("web01")).move == "move1"
    world.vms.release("web01", "move2")
    assert (await world.vms.show("web01")).move == "move1"

    world.hypervisor.end(details.vm.id)
    await world.settled()
    assert world.network.made != {}  # the move looks after them
    world.vms.release("web01", "move1")
    await world.settled()
    shown = await world.vms.show("web01")
    assert (shown.state, shown.exit_reason, shown.move) == (VmState.CRASHED, "QEMU was ended by signal 11", None)
    assert world.network.made == {}


async def test_no_claim_while_an_operation_runs(world: World) -> None:
    await running(world)
    world.hypervisor.obeys = False
    world.hypervisor.gone.clear()
    stopping = asyncio.create_task(world.vms.stop("web01", force=False, timeout_s=1000.0))
    await world.hypervisor.waits.wait()
    with pytest.raises(CallerError) as busy:
        world.vms.claim("web01", "move1")
    assert busy.value.code == "vm-busy"
    world.hypervisor.gone.set()
    await stopping
    world.vms.claim("web01", "move1")


async def test_a_vm_arrives(world: World) -> None:
    vm = arriving()
    world.disks.files["fast/shared.qcow2"] = (GIB, None)
    world.vms.claim(vm.name, "move1", vm)
    assert await world.state() is VmState.INCOMING
    for _ in range(2):
        await world.vms.disks.make_empty(vm, {"disk0"})
    assert world.disks.files == {
        "fast/shared.qcow2": (GIB, None),
        "default/web01/disk0.base1.qcow2": (GIB, None),
        "default/web01/disk0.qcow2": (GIB, "default/web01/disk0.base1.qcow2"),
    }
    world.hypervisor.running[vm.id] = "inmigrate"
    assert await world.state() is VmState.INCOMING
    for _ in range(2):
        await world.vms.define(vm)
    world.hypervisor.running[vm.id] = "running"
    world.vms.release(vm.name, "move1")
    await world.settled()
    assert await world.state() is VmState.RUNNING
    world.agent()
    await world.vms.recover()
    assert await world.state() is VmState.RUNNING
    await world.vms.stop("web01", force=True, timeout_s=None)
    await world.vms.remove("web01", keep_disks=False)
    assert world.left() == NOTHING


async def test_an_arrival_is_undone_also_by_the_next_agent(world: World) -> None:
    vm = arriving()
    world.disks.files["fast/shared.qcow2"] = (GIB, None)
    await world.vms.disks.make_empty(vm, {"disk0"})
    world.agent()
    await world.vms.recover()
    assert "default/web01/disk0.qcow2" in world.disks.files  # the move's recovery decides
    for _ in range(2):
        await world.vms.remove_disks(vm)
        await world.vms.forget(vm.id)
    assert world.left() == {**NOTHING, "files": ["fast/shared.qcow2"]}


async def test_an_arrival_that_could_not_be_undone_is_undone_by_the_next_agent(world: World) -> None:
    """Nor does the VM's next arrival take those images, which are not empty, for its own."""
    vm = arriving()
    world.disks.files["fast/shared.qcow2"] = (GIB, None)
    await world.vms.disks.make_empty(vm, {"disk0"})
    world.faults.failing["remove_disk"] = 0
    with pytest.raises(HostError, match="remove_disk does not work"):
        await world.vms.remove_disks(vm)
    with pytest.raises(HostError, match="remove_disk does not work"):
        await world.vms.disks.make_empty(vm, {"disk0"})
    del world.faults.failing["remove_disk"]
    world.agent()
    await world.vms.recover()
    assert world.left() == {**NOTHING, "files": ["fast/shared.qcow2"]}


async def test_an_arrival_over_another_ones_file_leaves_that_file(world: World) -> None:
    vm = arriving()
    world.disks.files["default/web01/disk0.qcow2"] = (5, None)
    for _ in range(2):
        with pytest.raises(HostError) as failed:
            await world.vms.disks.make_empty(vm, {"disk0"})
        assert failed.value.code == "file-exists"
        await world.vms.remove_disks(vm)
    assert world.left() == {**NOTHING, "files": ["default/web01/disk0.qcow2"]}


async def test_a_vm_leaves(world: World) -> None:
    details = await running(world)
    world.vms.claim("web01", "move1")
    await world.hypervisor.kill(details.vm.id)
    for _ in range(2):
        await world.vms.drop_taps(details.vm)
        await world.vms.remove_disks(details.vm, {"disk0"})
        await world.vms.forget(details.vm.id)
    world.vms.release("web01", "move1")
    await world.settled()
    assert world.left() == NOTHING
    assert await world.vms.list() == ()


async def test_a_vm_leaves_its_shared_disks(world: World) -> None:
    vm = arriving()
    await world.vms.define(vm, running=False)
    world.disks.files |= {"fast/shared.qcow2": (GIB, None), "default/web01/disk0.qcow2": (GIB, None)}
    await world.vms.remove_disks(vm, {"disk0"})
    assert list(world.disks.files) == ["fast/shared.qcow2"]


async def test_a_name_that_another_vm_has_cannot_be_defined(world: World) -> None:
    await world.vms.create(SPEC)
    with pytest.raises(CallerError) as refused:
        await world.vms.define(arriving())
    assert refused.value.code == "vm-exists"


async def test_taps_are_made_twice_without_harm_and_undone_only_if_made(world: World) -> None:
    details = await world.vms.create(msgspec.structs.replace(SPEC, switches=("lan", "dmz")))
    names = await world.vms.ensure_taps(details.vm)
    assert sorted(world.network.made) == sorted(names.values())
    world.faults.failing["add_tap"] = 1
    with pytest.raises(KvmhvError):
        await world.vms.ensure_taps(details.vm)
    assert sorted(world.network.made) == sorted(names.values())
    for _ in range(2):
        await world.vms.drop_taps(details.vm)
    assert world.network.made == {}
