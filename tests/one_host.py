"""One host in memory: doubles of the ports for the tests of its VMs, over the real database."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from kvmhv.agent.bases import Bases
from kvmhv.agent.images import Images
from kvmhv.agent.vms import Vms
from kvmhv.config import Config, from_data
from kvmhv.drivers.database import Database
from kvmhv.drivers.storage.contents import Contents
from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.errors import CallerError, HostError
from kvmhv.model import (
    GIB,
    MIB,
    Accel,
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

    async def cont(self, vm_id: str) -> float:
        self._faults.call("cont")
        self.running[vm_id] = "running"
        return 0.0

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
            reason = "the guest switched itself off" if guest else "QEMU was ended by signal 11"
            self.say(vm_id, "GONE", {"reason": reason, "shutdown": shutdown})

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

    def place(self, layer: Layer) -> Path:
        return self.path(layer)

    async def exists(self, layer: Layer) -> bool:
        return f"{layer.location}/{layer.path}" in self.files

    def has_luns(self, location: str) -> bool:
        return False

    async def create(self, layer: Layer, size_bytes: int, backing: Layer | None) -> None:
        self._new(layer, size_bytes, backing, "create")

    async def copy_in(self, file: Path, layer: Layer) -> None:
        raise AssertionError("moves and VMs do not call it")

    async def describe(self, file: Path) -> tuple[str, int, tuple[Path, ...]]:
        raise AssertionError("moves and VMs do not call it")

    async def used_bytes(self, layer: Layer) -> int:
        return 0

    async def remove(self, layer: Layer) -> None:
        self._faults.call("remove_disk")
        self.files.pop(f"{layer.location}/{layer.path}", None)

    async def chain(self, file: Path, format: DiskFormat | None) -> tuple[ImageFile, ...]:  # noqa: A002
        if file not in self.chains:
            raise CallerError("disk-invalid", f"{file} cannot be a VM's disk", "give an image")
        return self.chains[file]

    async def layer_of(self, file: Path, format: DiskFormat) -> Layer | None:  # noqa: A002
        for location in ("default", "fast"):
            if file.is_relative_to(self._root / location):
                return Layer(location=location, path=str(file.relative_to(self._root / location)), format=format)
        return None

    async def flatten(self, chain: tuple[ImageFile, ...], layer: Layer) -> None:
        self._new(layer, chain[0].size_bytes, None, "copy")

    async def copy_file(self, image: ImageFile, layer: Layer, backing: Layer | None) -> None:
        self._new(layer, image.size_bytes, backing, "copy")

    async def mark(self, layer: Layer) -> str | None:
        found = self.files.get(f"{layer.location}/{layer.path}")
        return None if found is None else str(found)

    async def contents(self, layer: Layer, size_bytes: int, *, pace_bytes_per_s: int = 0) -> Contents:
        return Contents(hashlib.sha256(layer.path.encode()).hexdigest(), size_bytes)

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
        self.bases = Bases(self.records, self.disks, self.images.disk_layers)
        self.vms = Vms(
            self.config, self.records, self.hypervisor, self.disks, self.network, self.images, None, self.bases
        )

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


@asynccontextmanager
async def one_host(directory: Path) -> AsyncIterator[World]:
    made = World(directory)
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
