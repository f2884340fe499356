"""agent/vms.py over doubles of the ports: states, one operation at a time, and nothing left when a step fails."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from kvmhv.agent.images import Images
from kvmhv.agent.vms import Vms
from kvmhv.config import Config, from_data
from kvmhv.drivers.database import Database
from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.errors import CallerError, HostError, KvmhvError, Refused
from kvmhv.model import (
    GIB,
    MIB,
    Accel,
    Disk,
    DiskFormat,
    DiskSpec,
    Layer,
    Location,
    QemuInfo,
    Vm,
    VmDetails,
    VmSpec,
    VmState,
)
from kvmhv.ports import EventSink, QemuEvent, RunState

QCOW2, RAW = DiskFormat.QCOW2, DiskFormat.RAW
SPEC = VmSpec(name="web01", memory_bytes=256 * MIB, disks=(DiskSpec(size_bytes=GIB),), switches=("lan",))


class Faults:
    """Calls that fail, by name; the first calls of a name may be let through."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: dict[str, int] = {}

    def call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            if self.failing[name] == 0:
                raise HostError("broken", f"{name} does not work")
            self.failing[name] -= 1


class MemoryHypervisor:
    """Processes as a dict; the guest obeys the power button if it is told to."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.running: dict[str, str] = {}
        self.obeys = True
        self.waits = asyncio.Event()
        self.gone = asyncio.Event()
        self._sinks: list[EventSink] = []

    async def probe(self) -> QemuInfo:
        self._faults.call("probe")
        return QemuInfo(
            binary="qemu", version=(10, 0, 0), accel=Accel.TCG, machines=("pc-q35-7.2",), cpu_models={"qemu64": ()},
            capabilities=(), parameters=(),
        )  # fmt: skip

    async def start(
        self,
        vm: Vm,
        disk_paths: dict[str, tuple[Path, ...]],
        taps: dict[str, str],
        kernel_paths: tuple[Path, Path | None] | None = None,
    ) -> None:
        self._faults.call("start")
        assert (kernel_paths is None) == (vm.kernel is None)
        assert set(disk_paths) == {disk.name for disk in vm.disks}
        assert set(taps) == {nic.name for nic in vm.nics}
        self.running[vm.id] = "running"
        self._faults.call("started")

    async def power_button(self, vm_id: str) -> None:
        self._faults.call("power_button")
        if self.obeys:
            self.end(vm_id, guest=True)

    async def kill(self, vm_id: str) -> None:
        self._faults.call("kill")
        if vm_id in self.running:
            self.end(vm_id)

    async def wait_gone(self, vm_id: str, timeout_s: float) -> bool:
        self._faults.call("wait_gone")
        self.waits.set()
        if vm_id in self.running and timeout_s == 1000.0:  # the test that ends it meanwhile
            await self.gone.wait()
        return vm_id not in self.running

    async def state(self, vm_id: str) -> RunState:
        status = self.running.get(vm_id)
        if status is None:
            return RunState(process=False)
        return RunState(process=True, status=status, pid=7, accel=Accel.TCG, qemu_version="10.0.0")

    async def known(self) -> tuple[str, ...]:
        return tuple(self.running)

    def on_event(self, sink: EventSink) -> None:
        self._sinks.append(sink)

    def console_socket(self, vm_id: str) -> Path:
        return Path("/run/kvmhv/vms") / vm_id / "console.sock"

    def end(self, vm_id: str, *, guest: bool = False, told: bool = True) -> None:
        """A process ends; `guest`: the guest switched itself off; `told`: an agent is there to hear of it."""
        del self.running[vm_id]
        self.gone.set()
        shutdown = {"guest": True, "reason": "guest-shutdown"} if guest else None
        if told:
            self.say(vm_id, "GONE", {"exit_status": 0 if guest else -11, "shutdown": shutdown, "log": ""})

    def say(self, vm_id: str, name: str, data: dict[str, object]) -> None:
        for sink in self._sinks:
            sink(QemuEvent(vm_id=vm_id, name=name, data=data, at_ms=0.0))


class MemoryNetwork:
    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self.made: dict[str, str] = {}

    async def switches(self) -> tuple[str, ...]:
        return ("lan", "dmz")

    async def add_tap(self, tap: str, switch: str) -> None:
        assert len(tap) <= 15 and tap.startswith("kv")
        self._faults.call("add_tap")
        self.made[tap] = switch

    async def remove_tap(self, tap: str) -> None:
        self._faults.call("remove_tap")
        self.made.pop(tap, None)

    async def taps(self) -> tuple[str, ...]:
        return tuple(self.made)


class MemoryDisks:
    """Locations as a dict of files; `outside` are the host's other files, each with its chain."""

    def __init__(self, faults: Faults, root: Path) -> None:
        self._faults = faults
        self._root = root
        self.files: dict[str, tuple[int, str | None]] = {}
        self.chains: dict[Path, tuple[ImageFile, ...]] = {}

    async def locations(self) -> tuple[Location, ...]:
        return (Location(name="default"), Location(name="fast"))

    def path(self, layer: Layer) -> Path:
        return self._root / layer.location / layer.path

    async def create(self, layer: Layer, size_bytes: int, backing: Layer | None) -> None:
        self._new(layer, size_bytes, backing, "create")

    async def copy_in(self, file: Path, layer: Layer) -> None:
        raise NotImplementedError

    async def describe(self, file: Path) -> tuple[str, int, tuple[Path, ...]]:
        raise NotImplementedError

    async def used_bytes(self, layer: Layer) -> int:
        return 0

    async def remove(self, layer: Layer) -> None:
        self._faults.call("remove_disk")
        self.files.pop(f"{layer.location}/{layer.path}", None)

    async def chain(self, file: Path, format: DiskFormat | None) -> tuple[ImageFile, ...]:  # noqa: A002
        if file not in self.chains:
            raise CallerError("disk-invalid", f"{file} cannot be a VM's disk", "give an image")
        return self.chains[file]

    def layer_of(self, file: Path, format: DiskFormat) -> Layer | None:  # noqa: A002
        for location in ("default", "fast"):
            if file.is_relative_to(self._root / location):
                return Layer(location=location, path=str(file.relative_to(self._root / location)), format=format)
        return None

    async def flatten(self, chain: tuple[ImageFile, ...], layer: Layer) -> None:
        self._new(layer, chain[0].size_bytes, None, "copy")

    async def copy_file(self, image: ImageFile, layer: Layer, backing: Layer | None) -> None:
        self._new(layer, image.size_bytes, backing, "copy")

    def _new(self, layer: Layer, size_bytes: int, backing: Layer | None, call: str) -> None:
        key = f"{layer.location}/{layer.path}"
        if key in self.files:
            raise HostError("file-exists", f"{key} exists", "remove it")
        self._faults.call(call)
        self.files[key] = (size_bytes, f"{backing.location}/{backing.path}" if backing else None)


class World:
    """One host: what outlives its agent, and its agent, which can be killed and started again."""

    def __init__(self, directory: Path) -> None:
        self.config: Config = from_data({"name": "host1", "state_dir": str(directory / "state")}, "test")
        self.faults = Faults()
        self.records = Database(directory / "kvmhv.db", directory / "volatile", 10)
        self.hypervisor = MemoryHypervisor(self.faults)
        self.network = MemoryNetwork(self.faults)
        self.disks = MemoryDisks(self.faults, directory / "locations")
        self.agent()

    def agent(self) -> None:
        """Start an agent; the one before it is gone, and hears nothing any more."""
        self.hypervisor._sinks.clear()
        self.images = Images(self.config, self.records, self.disks)
        self.vms = Vms(self.config, self.records, self.hypervisor, self.disks, self.network, self.images)

    async def settled(self) -> None:
        """Let the agent's background tasks end."""
        while tasks := list(self.vms._ends._tasks):
            await asyncio.gather(*tasks)

    def left(self) -> dict[str, object]:
        """Whatever lies on this host, but for the imported images."""
        kinds = ("vm", "disks-made")
        vms = self.config.state_path / "vms"
        return {
            "processes": list(self.hypervisor.running),
            "taps": sorted(self.network.made),
            "files": sorted(self.disks.files),
            "records": [key for kind in kinds for key, _ in self.records.all(kind)],
            "kernels": [path.name for path in vms.iterdir()] if vms.exists() else [],
        }

    async def state(self, name: str = "web01") -> VmState:
        return (await self.vms.show(name)).state


NOTHING: dict[str, object] = {"processes": [], "taps": [], "files": [], "records": [], "kernels": []}


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    yield made
    await made.vms.close()
    made.records.close()


async def running(world: World, spec: VmSpec = SPEC) -> VmDetails:
    await world.vms.create(spec)
    return await world.vms.start(spec.name)


async def with_kernel(world: World) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"kernel"

    await world.images.store("linux", "kernel", chunks(), append="console=ttyS0")


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
    with pytest.raises(CallerError, match="io-error") as refused:
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
    assert (shown.state, shown.exit_reason) == (VmState.CRASHED, "its QEMU was ended by signal 11")
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


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        (
            {"exit_status": 1, "shutdown": None, "log": "first\nqemu: out of luck\n"},
            "ended with status 1: qemu: out of luck",
        ),
        ({"exit_status": -9, "shutdown": {"guest": False, "reason": "host-signal"}}, "was ended by signal 9"),
        ({"exit_status": None, "shutdown": None, "log": ""}, "ended by itself"),
        ({}, "ended by itself"),
    ],
)
async def test_the_reason_of_a_crash(world: World, gone: dict[str, object], reason: str) -> None:
    details = await running(world)
    del world.hypervisor.running[details.vm.id]
    world.hypervisor.say(details.vm.id, "GONE", gone)
    await world.settled()
    shown = await world.vms.show("web01")
    assert (shown.state, shown.exit_reason) == (VmState.CRASHED, f"its QEMU {reason}")


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


# --- disks


async def test_disks_from_files_inside_and_outside_of_locations(world: World) -> None:
    root = world.disks.path(Layer(location="fast", path="x", format=RAW)).parent
    base, mid, top = root / "base.raw", Path("/srv/mid.qcow2"), Path("/srv/top.qcow2")
    world.disks.chains[top] = (ImageFile(top, QCOW2, GIB), ImageFile(mid, QCOW2, GIB), ImageFile(base, RAW, GIB))
    world.disks.chains[root / "own.qcow2"] = (ImageFile(root / "own.qcow2", QCOW2, GIB), ImageFile(base, RAW, GIB))
    spec = msgspec.structs.replace(
        SPEC, disks=(DiskSpec(file=str(top)), DiskSpec(file=str(root / "own.qcow2")), DiskSpec(backing=str(top)))
    )
    vm = (await world.vms.create(spec)).vm
    assert [[f"{layer.location}/{layer.path}" for layer in disk.layers] for disk in vm.disks] == [
        ["default/web01/disk0.qcow2", "default/web01/disk0.base1.qcow2", "fast/base.raw"],
        ["fast/own.qcow2", "fast/base.raw"],
        ["default/web01/disk2.qcow2", "default/web01/disk2.base1.qcow2", "default/web01/disk2.base2.qcow2",
         "fast/base.raw"],
    ]  # fmt: skip
    assert world.disks.files["default/web01/disk0.qcow2"] == (GIB, "default/web01/disk0.base1.qcow2")
    assert world.disks.files["default/web01/disk0.base1.qcow2"] == (GIB, "fast/base.raw")

    for taken in (root / "own.qcow2", base):  # one is written by web01, the other backs it
        world.disks.chains[taken] = (ImageFile(taken, QCOW2, GIB),)
        with pytest.raises(CallerError) as refused:
            await world.vms.create(msgspec.structs.replace(SPEC, name="web02", disks=(DiskSpec(file=str(taken)),)))
        assert refused.value.code == "disk-in-use"
    shared = msgspec.structs.replace(SPEC, name="web02", disks=(DiskSpec(backing=str(base)),))
    await world.vms.create(shared)

    world.disks.files |= {"fast/own.qcow2": (GIB, None), "fast/base.raw": (GIB, None)}
    await world.vms.remove("web01", keep_disks=False)
    assert sorted(world.disks.files) == ["default/web02/disk0.qcow2", "fast/base.raw"]


@pytest.mark.parametrize(
    ("disk", "code"),
    [
        (DiskSpec(file="relative.qcow2"), "disk-invalid"),
        (DiskSpec(file="/srv/absent"), "disk-invalid"),
        (DiskSpec(file="/srv/guest-disk"), "disk-format-needed"),
        (DiskSpec(backing="nobody"), "image-unknown"),
        (DiskSpec(image="linux"), "image-part-missing"),
        (DiskSpec(backing="/srv/guest-disk.qcow2", size_bytes=MIB), "size-invalid"),
    ],
)
async def test_disks_that_cannot_be(world: World, disk: DiskSpec, code: str) -> None:
    await with_kernel(world)
    for name in ("/srv/guest-disk", "/srv/guest-disk.qcow2"):
        chain = (ImageFile(Path(name), QCOW2, GIB), ImageFile(Path("/etc/secret"), RAW, GIB))
        world.disks.chains[Path(name)] = chain
    with pytest.raises(CallerError) as refused:
        await world.vms.create(msgspec.structs.replace(SPEC, disks=(DiskSpec(size_bytes=GIB), disk)))
    assert refused.value.code == code
    assert world.left() == NOTHING


async def test_keep_disks(world: World) -> None:
    await world.vms.create(SPEC)
    await world.vms.remove("web01", keep_disks=True)
    assert world.left() == {**NOTHING, "files": ["default/web01/disk0.qcow2"]}


async def test_the_kernel_belongs_to_the_vm(world: World) -> None:
    await with_kernel(world)
    vm = (await world.vms.create(msgspec.structs.replace(SPEC, image="linux"))).vm
    assert vm.kernel is not None
    assert (vm.kernel.append, vm.kernel.kernel_bytes, vm.kernel.initrd_sha256) == ("console=ttyS0", 6, None)
    await world.images.remove("linux")
    files = world.vms.kernel_files(vm)
    assert files is not None
    assert (files[0].read_bytes(), files[1]) == (b"kernel", None)
    await world.vms.remove("web01", keep_disks=False)
    assert world.left() == NOTHING


async def test_a_command_line_without_a_kernel(world: World) -> None:
    with pytest.raises(CallerError) as refused:
        await world.vms.create(msgspec.structs.replace(SPEC, append="quiet"))
    assert refused.value.code == "append-invalid"
    assert world.left() == NOTHING


# --- what moves need


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
    assert (shown.state, shown.exit_reason, shown.move) == (VmState.CRASHED, "its QEMU was ended by signal 11", None)
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
    for _ in range(2):
        await world.vms.make_disks(vm, {"disk0"})
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
    await world.vms.make_disks(vm, {"disk0"})
    world.agent()
    await world.vms.recover()
    assert "default/web01/disk0.qcow2" in world.disks.files  # the move's recovery decides
    for _ in range(2):
        await world.vms.remove_disks(vm)
        await world.vms.forget(vm.id)
    assert world.left() == {**NOTHING, "files": ["fast/shared.qcow2"]}


async def test_an_arrival_over_another_ones_file_leaves_that_file(world: World) -> None:
    vm = arriving()
    world.disks.files["default/web01/disk0.qcow2"] = (5, None)
    for _ in range(2):
        with pytest.raises(HostError) as failed:
            await world.vms.make_disks(vm, {"disk0"})
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
    assert names == world.vms.tap_names(details.vm)
    world.faults.failing["add_tap"] = 1
    with pytest.raises(KvmhvError):
        await world.vms.ensure_taps(details.vm)
    assert sorted(world.network.made) == sorted(names.values())
    for _ in range(2):
        await world.vms.drop_taps(details.vm)
    assert world.network.made == {}
