"""agent/vms.py: states, one operation at a time, and nothing left when a step fails."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from kvmhv.agent.host_vms import HostVms
from kvmhv.config import from_data
from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.drivers.storage.storage import Storage
from kvmhv.errors import CallerError, HostError, Refused
from kvmhv.model import (
    GIB,
    Accel,
    DiskSpec,
    Vm,
    VmState,
    VmSummary,
)
from kvmhv.ports import Runtime
from tests.one_host import NOTHING, RAW, SPEC, World, one_host, running, with_kernel


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with one_host(tmp_path) as host:
        yield host


# --- a VM's life


async def test_create_start_stop_remove(world: World) -> None:
    created = await world.vms.create(SPEC)
    assert (created.state, created.host, created.pid, created.console) == (VmState.STOPPED, "host1", None, None)
    assert world.disks.files == {"default/web01/disk0.qcow2": (GIB, None)}
    assert world.network.made == {}

    started = await world.vms.start("web01")
    assert (started.state, started.pid, started.accel, started.qemu_version) == (
        VmState.RUNNING, 7, Accel.TCG, "10.0.0",
    )  # fmt: skip
    assert started.started_at is not None and started.console is not None
    assert list(world.network.made.values()) == ["lan"]
    assert str(await world.vms.console_socket("web01")) == started.console
    assert [summary.state for summary in await world.vms.list()] == [VmState.RUNNING]

    stopped = await world.vms.stop("web01", force=False, timeout_s=5)
    assert stopped.state is VmState.STOPPED
    assert stopped.exit_reason == "stopped by the guest, on the power button"
    assert world.network.made == {}

    await world.vms.remove("web01", keep_disks=False)
    assert world.left() == NOTHING
    assert await world.vms.list() == ()


async def test_a_guest_that_ignores_the_power_button_is_ended_by_force(world: World) -> None:
    await running(world)
    world.hypervisor.obeys = False
    stopped = await world.vms.stop("web01", force=False, timeout_s=2)
    assert stopped.state is VmState.STOPPED
    assert "by force: the guest did not switch off within 2 s" in (stopped.exit_reason or "")
    assert world.faults.calls.index("power_button") < world.faults.calls.index("kill")


async def test_a_qemu_that_does_not_take_the_power_button_is_ended_by_force(world: World) -> None:
    await running(world)
    world.faults.failing["power_button"] = 0
    stopped = await world.vms.stop("web01", force=False, timeout_s=2)
    assert stopped.state is VmState.STOPPED
    assert "power_button does not work" in (stopped.exit_reason or "")


async def test_force_does_not_ask_the_guest(world: World) -> None:
    await running(world)
    await world.vms.stop("web01", force=True, timeout_s=None)
    assert "power_button" not in world.faults.calls
    assert await world.state() is VmState.STOPPED


async def test_what_the_guest_sees_of_its_balloon_changes_only_while_it_is_stopped(world: World) -> None:
    assert (await world.vms.create(SPEC)).vm.free_page_reporting
    await world.vms.start("web01")
    with pytest.raises(CallerError) as runs:
        await world.vms.settings.set_free_page_reporting("web01", False)
    assert (runs.value.code, runs.value.http_status) == ("vm-running", 409)
    assert world.vms.vm("web01").free_page_reporting
    await world.vms.stop("web01", force=True, timeout_s=None)
    for on in (False, True):
        await world.vms.settings.set_free_page_reporting("web01", on)
        assert world.vms.vm("web01").free_page_reporting is on


async def test_force_cuts_a_stop_short_that_waits_for_the_guest(world: World) -> None:
    await running(world)
    world.hypervisor.obeys = False
    world.hypervisor.gone.clear()
    patient = asyncio.create_task(world.vms.stop("web01", force=False, timeout_s=1000.0))
    await world.hypervisor.waits.wait()
    assert await world.state() is VmState.STOPPING
    with pytest.raises(CallerError) as busy:
        await world.vms.start("web01")
    assert (busy.value.code, busy.value.http_status) == ("vm-busy", 409)
    assert (await world.vms.stop("web01", force=True, timeout_s=None)).state is VmState.STOPPED
    assert (await patient).state is VmState.STOPPED
    assert world.network.made == {}


async def test_start_and_stop_can_be_repeated(world: World) -> None:
    await running(world)
    assert (await world.vms.start("web01")).state is VmState.RUNNING
    assert world.faults.calls.count("start") == 1
    for _ in range(2):
        assert (await world.vms.stop("web01", force=True, timeout_s=None)).state is VmState.STOPPED


async def test_a_paused_vm_is_not_started_and_stops_by_force(world: World) -> None:
    details = await running(world)
    world.hypervisor.running[details.vm.id] = "io-error"
    shown = await world.vms.show("web01")
    assert (shown.state, shown.exit_reason) == (VmState.PAUSED, "io-error")
    world.hypervisor.running[details.vm.id] = "paused"
    with pytest.raises(CallerError, match="paused") as refused:
        await world.vms.start("web01")
    assert refused.value.code == "vm-paused"
    await world.vms.stop("web01", force=False, timeout_s=5)
    assert "power_button" not in world.faults.calls
    assert await world.state() is VmState.STOPPED


async def test_wrong_requests_change_nothing(world: World) -> None:
    await running(world)
    before = world.left()
    unknown = [
        world.vms.start("nobody"), world.vms.stop("nobody", force=True, timeout_s=None), world.vms.show("x" * 300),
        world.vms.remove("nobody", keep_disks=False), world.vms.console_socket("nobody"),
    ]  # fmt: skip
    for call in unknown:
        with pytest.raises(CallerError) as refused:
            await call
        assert (refused.value.code, refused.value.http_status) == ("vm-unknown", 404)
    with pytest.raises(CallerError) as refused:
        await world.vms.remove("web01", keep_disks=False)
    assert refused.value.code == "vm-running"
    with pytest.raises(CallerError) as refused:
        await world.vms.create(SPEC)
    assert refused.value.code == "vm-exists"
    for name in ("a b", "x" * 300, "ü"):
        with pytest.raises(CallerError) as refused:
            await world.vms.create(msgspec.structs.replace(SPEC, name=name))
        assert refused.value.code == "name-invalid"
    assert world.left() == before


async def test_the_limit_of_vms(world: World) -> None:
    world.config = from_data({"state_dir": world.config.state_dir, "limits": {"vms": 1}}, "test")
    world.agent()
    await world.vms.create(SPEC)
    with pytest.raises(Refused) as refused:
        await world.vms.create(msgspec.structs.replace(SPEC, name="web02"))
    assert refused.value.code == "vm-limit"


# --- failures leave nothing


@pytest.mark.parametrize(("call", "after"), [("probe", 0), ("create", 0), ("create", 1), ("copy", 0)], ids=str)
async def test_a_create_that_fails_leaves_nothing(world: World, call: str, after: int) -> None:
    await with_kernel(world)
    base = Path("/srv/base.raw")
    world.disks.chains[base] = (ImageFile(base, RAW, GIB),)
    disks = (DiskSpec(size_bytes=GIB), DiskSpec(size_bytes=GIB), DiskSpec(file=str(base)))
    world.faults.failing[call] = after
    with pytest.raises(HostError, match=f"{call} does not work"):
        await world.vms.create(msgspec.structs.replace(SPEC, disks=disks, image="linux"))
    assert world.left() == NOTHING
    world.faults.failing.clear()
    await world.vms.create(msgspec.structs.replace(SPEC, disks=disks, image="linux"))


async def test_a_create_over_another_ones_file_leaves_that_file(world: World) -> None:
    world.disks.files["default/web01/disk1.qcow2"] = (5, None)
    with pytest.raises(HostError) as failed:
        await world.vms.create(msgspec.structs.replace(SPEC, disks=(DiskSpec(size_bytes=GIB),) * 2))
    assert failed.value.code == "file-exists"
    assert world.left() == {**NOTHING, "files": ["default/web01/disk1.qcow2"]}


@pytest.mark.parametrize(("call", "after"), [("add_tap", 0), ("add_tap", 1), ("start", 0), ("started", 0)])
async def test_a_start_that_fails_leaves_it_stopped(world: World, call: str, after: int) -> None:
    await world.vms.create(msgspec.structs.replace(SPEC, switches=("lan", "dmz")))
    before = world.left()
    world.faults.failing[call] = after
    with pytest.raises(HostError, match=f"{call} does not work"):
        await world.vms.start("web01")
    await world.settled()
    assert world.left() == before
    assert await world.state() is VmState.STOPPED
    world.faults.failing.clear()
    assert (await world.vms.start("web01")).state is VmState.RUNNING


async def test_a_remove_that_fails_can_be_repeated(world: World) -> None:
    await world.vms.create(SPEC)
    world.faults.failing["remove_disk"] = 0
    with pytest.raises(HostError):
        await world.vms.remove("web01", keep_disks=False)
    assert await world.state() is VmState.STOPPED
    world.faults.failing.clear()
    await world.vms.remove("web01", keep_disks=False)
    assert world.left() == NOTHING


# --- ends that nobody asked for


async def test_a_qemu_that_dies_is_a_crash_and_its_taps_go(world: World) -> None:
    details = await running(world)
    world.hypervisor.end(details.vm.id)
    assert await world.state() is VmState.CRASHED
    await world.settled()
    shown = await world.vms.show("web01")
    assert (shown.state, shown.exit_reason) == (VmState.CRASHED, "QEMU was ended by signal 11")
    assert world.network.made == {}
    again = await world.vms.start("web01")
    assert (again.state, again.exit_reason) == (VmState.RUNNING, None)


async def test_a_guest_that_switches_itself_off_is_no_crash(world: World) -> None:
    details = await running(world)
    world.hypervisor.end(details.vm.id, guest=True)
    await world.settled()
    shown = await world.vms.show("web01")
    assert (shown.state, shown.exit_reason) == (VmState.STOPPED, "the guest switched itself off")
    assert world.network.made == {}


async def test_a_guest_that_switches_itself_off_gives_its_disks_up(world: World) -> None:
    """Any host may start it then; one whose QEMU has crashed stays its host's."""
    given_up: list[str] = []

    async def let_go(vm: Vm) -> None:
        given_up.append(vm.name)

    world.vms._ends._let_go = let_go
    details = await running(world)
    world.hypervisor.end(details.vm.id)
    await world.settled()
    assert given_up == []
    await world.vms.start("web01")
    world.hypervisor.end(details.vm.id, guest=True)
    await world.settled()
    assert given_up == ["web01"]


async def test_a_qemu_that_somebody_else_ends_is_a_crash(world: World) -> None:
    details = await running(world)
    del world.hypervisor.running[details.vm.id]
    gone = {"reason": "QEMU was told to end", "shutdown": {"guest": False, "reason": "host-signal"}}
    world.hypervisor.say(details.vm.id, "GONE", gone)
    await world.settled()
    shown = await world.vms.show("web01")
    assert (shown.state, shown.exit_reason) == (VmState.CRASHED, "QEMU was told to end")


async def test_stopping_a_crashed_vm_makes_it_a_stopped_one(world: World) -> None:
    details = await running(world)
    world.hypervisor.end(details.vm.id)
    await world.settled()
    assert (await world.vms.stop("web01", force=False, timeout_s=None)).state is VmState.STOPPED


async def test_an_agent_restart_changes_nothing_for_vms(world: World) -> None:
    await running(world)
    await world.vms.create(msgspec.structs.replace(SPEC, name="web02"))
    before = world.left(), await world.vms.list()
    world.agent()
    assert (world.left(), await world.vms.list()) == before
    await world.vms.recover()
    assert (world.left(), await world.vms.list()) == before


async def test_an_end_that_no_agent_saw(world: World) -> None:
    details = await running(world)
    world.hypervisor.end(details.vm.id, told=False)
    world.agent()
    assert await world.state() is VmState.CRASHED
    await world.vms.recover()
    shown = await world.vms.show("web01")
    assert (shown.state, shown.exit_reason) == (
        VmState.CRASHED, "its QEMU ended while no agent was there to see it",
    )  # fmt: skip
    assert world.network.made == {}


async def test_a_create_that_the_agents_end_cut_short_is_undone(world: World) -> None:
    world.disks.files["default/web01/mine"] = (1, None)
    original = world.records.put

    def dies(kind: str, key: str, value: bytes) -> None:
        if kind == "vm":
            raise SystemExit
        original(kind, key, value)

    world.records.put = dies  # type: ignore[method-assign]
    world.faults.failing["remove_disk"] = 0  # and nothing that it would still do works
    with pytest.raises((SystemExit, HostError)):
        await world.vms.create(SPEC)
    assert world.left() != NOTHING
    world.records.put = original  # type: ignore[method-assign]
    world.faults.failing.clear()
    world.agent()
    await world.vms.recover()
    assert world.left() == {**NOTHING, "files": ["default/web01/mine"]}


async def test_what_stands_still_after_a_disk_error_goes_on(tmp_path: Path) -> None:
    async with one_host(tmp_path) as world:
        details = await running(world)
        world.hypervisor.running[details.vm.id] = "io-error"
        assert await world.state() is VmState.PAUSED
        assert (await world.vms.start("web01")).state is VmState.RUNNING
        world.hypervisor.running[details.vm.id] = "io-error"
        world.vms.claim("web01", "move-1")
        with pytest.raises(Refused, match="move"):
            await world.vms.start("web01")
        assert world.hypervisor.running[details.vm.id] == "io-error", "only the move decides who runs it"


class NoOtherVms:
    """A runtime without VMs."""

    name = "libvirt"

    def vms(self) -> tuple[VmSummary, ...]:
        return ()


async def test_a_damaged_record_is_its_own_vms_trouble(world: World) -> None:
    kept = await running(world)
    host_vms = HostVms(world.config, world.vms, cast(Runtime, NoOtherVms()), cast(Storage, world.disks))
    half = b'{"vm":{"id":"id-2","name":"web02","memory_bytes":"much"}}'
    for vm_id, value in (("id-1", b"\x00\xff"), ("id-2", half)):
        world.records.put("vm", vm_id, value)
    await world.vms.recover()
    rows = {row.name: (row.id, row.state) for row in await host_vms.list()}
    assert rows == {
        "web01": (kept.vm.id, VmState.RUNNING),
        "id-1": ("id-1", VmState.DAMAGED),
        "web02": ("id-2", VmState.DAMAGED),
    }
    for name in ("web02", "id-1"):
        with pytest.raises(HostError, match=r"id-\d") as refused:
            await host_vms.show(name)
        assert refused.value.code == "vm-record-damaged"
    with pytest.raises(CallerError, match="web02"):
        await host_vms.create(msgspec.structs.replace(SPEC, name="web02"))
    with pytest.raises(CallerError, match="web02"):
        await world.vms.define(msgspec.structs.replace(kept.vm, id="id-3", name="web02"))
    assert (await host_vms.stop("web01", force=True, timeout_s=None)).state is VmState.STOPPED
