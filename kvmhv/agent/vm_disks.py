"""Makes and removes a VM's disks, all or nothing: a ledger says which files were made for a VM that is not defined yet.

A layer is the VM's own if it is the top of a disk or lies in the VM's directory (core/vm_spec.py, belongs_to_vm); only
those are deleted with the VM. Backing files elsewhere may be shared and stay.
"""

from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from kvmhv.agent.bases import Bases
from kvmhv.agent.images import Images
from kvmhv.agent.owners import Owners
from kvmhv.agent.vm_records import VmRecords
from kvmhv.core.vm_spec import belongs_to_vm, check_disk_size, layer_path
from kvmhv.drivers.storage.qemu_img import CHAIN_MAX, ImageFile
from kvmhv.errors import CallerError, KvmhvError
from kvmhv.model import Base, Disk, DiskFormat, DiskSpec, Epoch, Layer, Struct, Vm, VmSpec
from kvmhv.places import DiskPlace
from kvmhv.ports import Disks, Records

log = structlog.get_logger(__name__)

KIND = "disks-made"
DEFAULT_LOCATION = "default"
OF_OTHERS = ("file-exists", "disk-owned", "owner-unreadable")
"""What the making of an image says when something of somebody else's is there."""

NO_BASES: Mapping[str, Base] = {}

Making = Callable[[], Awaitable[None]]


class ImageDisks(Disks, Protocol):
    """What making disks from image files needs beyond a move; implemented by drivers/storage."""

    async def chain(self, file: Path, format: DiskFormat | None) -> tuple[ImageFile, ...]:  # noqa: A002
        """Describe an image and its backing files, top first. Raises CallerError `disk-invalid`, `disk-in-use`."""
        ...

    async def layer_of(self, file: Path, format: DiskFormat) -> Layer | None:  # noqa: A002
        """Return the layer that a file is, None if it lies in no location."""
        ...

    async def flatten(self, chain: tuple[ImageFile, ...], layer: Layer) -> None:
        """Copy an image with its backing files into one new layer."""
        ...

    async def copy_file(self, image: ImageFile, layer: Layer, backing: Layer | None) -> None:
        """Copy one file of a chain as it is, onto `backing`."""
        ...

    def has_luns(self, location: str) -> bool:
        """Whether a location's images are LUNs."""
        ...

    async def lun_size(self, layer: Layer) -> int:
        """Return the virtual size of what is on a LUN."""
        ...


class Ledger(Struct, frozen=True, kw_only=True):
    """Files that were made for a VM that is not defined here yet."""

    layers: tuple[Layer, ...] = ()
    arriving: bool = False
    """Made for a move, whose recovery decides; else for a create, which an agent's end undoes."""
    complete: bool = False


class VmDisks:
    """The disks of this host's VMs."""

    def __init__(
        self, records: Records, disks: ImageDisks, images: Images, owners: Owners | None, bases: Bases
    ) -> None:
        """`owners`: keeps who runs VMs whose disks other hosts see; None where no disk is such a one."""
        self._bases = bases
        self._owners = owners
        self._records = records
        self._vms = VmRecords(records)
        self._disks = disks
        self._images = images

    def places(self, vm: Vm) -> dict[str, tuple[DiskPlace, ...]]:
        """Where each disk's layers are, top first. Raises CallerError `location-unknown` or `path-invalid`."""
        return {disk.name: tuple(self._disks.place(layer) for layer in disk.layers) for disk in vm.disks}

    async def make_from_spec(self, vm_id: str, spec: VmSpec) -> tuple[tuple[int, tuple[Layer, ...]], ...]:
        """Make every disk of a checked spec; returns size and layers of each. After a failure call undo()."""
        self._write(vm_id, Ledger())
        made = []
        for index, disk in enumerate(spec.disks):
            made.append(await self._make_disk(vm_id, spec.name, f"disk{index}", disk))
        return tuple(made)

    async def make_empty(self, vm: Vm, names: Collection[str] | None, bases: Mapping[str, Base] = NO_BASES) -> None:
        """Make every layer of these disks (None: of all) of a VM that will arrive: empty, of its exact size.

        `bases`: disks whose lowest layer is copied from what is here. All or nothing, and only once. Raises what
        Disks.create raises, above all HostError `file-exists`, and what Bases.copy raises.
        """
        ledger = self._read(vm.id)
        if ledger is None or not ledger.complete:
            await self.make_images(vm.id, vm, names, bases)

    async def make_images(
        self, key: str, vm: Vm, names: Collection[str] | None, bases: Mapping[str, Base] = NO_BASES
    ) -> None:
        """Make every layer of these disks; `key` names what was made, for undo() and keep().

        All or nothing. Raises as make_empty().
        """
        await self.undo(key)
        self._write(key, Ledger(arriving=True))
        try:
            for disk in _named(vm, names):
                backing: Layer | None = None
                for layer in reversed(disk.layers):
                    size_bytes = layer.size_bytes or disk.size_bytes
                    making = partial(self._disks.create, layer, size_bytes, backing)
                    if backing is None and disk.name in bases:
                        making = partial(self._bases.copy, bases[disk.name].sha256, layer, size_bytes)
                    elif self._disks.has_luns(layer.location):
                        making = partial(self._take_lun, layer, vm.id, vm.name, vm.epoch, making)
                    await self._make(key, layer, making)
                    backing = layer
        except BaseException:
            await self.undo(key)
            raise
        ledger = self._read(key) or Ledger()
        self._write(key, msgspec.structs.replace(ledger, complete=True))

    async def remove(self, vm: Vm, names: Collection[str] | None) -> None:
        """Delete the own layers of these disks (None: of all) of a defined VM, else what was made for its arrival.

        No error for what is gone.
        """
        if self._vms.get(vm.id) is None:
            await self.undo(vm.id)
            return
        others = {
            (layer.location, layer.path)
            for record in self._vms.all()
            if record.vm.id != vm.id
            for disk in record.vm.disks
            for layer in disk.layers
        }
        for disk in _named(vm, names):
            for depth, layer in enumerate(disk.layers):
                if belongs_to_vm(vm.name, depth, layer) and (layer.location, layer.path) not in others:
                    await self._disks.remove(layer)
        self._bases.look_soon()

    def redefine(self, vm: Vm) -> None:
        """Let a VM's record say where its disks are now, on disk when it returns. Raises CallerError `vm-unknown`."""
        record = self._vms.get(vm.id) or self._vms.named(vm.name)
        if record.vm != vm:
            self._vms.put(msgspec.structs.replace(record, vm=vm))

    async def remove_layers(self, vm_name: str, layers: Collection[Layer]) -> None:
        """Delete the layers of one disk, the top first, that were a VM's own and are of no VM now."""
        used = {(it.location, it.path) for record in self._vms.all() for disk in record.vm.disks for it in disk.layers}
        for depth, layer in enumerate(layers):
            if belongs_to_vm(vm_name, depth, layer) and (layer.location, layer.path) not in used:
                await self._disks.remove(layer)

    async def undo(self, vm_id: str) -> None:
        """Delete what was made for a VM that is not defined here; no error if there is nothing.

        If the storage does not let it go, the agent's next start tries again, and so does the VM's next arrival.
        """
        ledger = self._read(vm_id)
        if ledger is None:
            return
        try:
            for layer in reversed(ledger.layers):
                await self._disks.remove(layer)
        except KvmhvError:
            self._write(vm_id, msgspec.structs.replace(ledger, arriving=False, complete=False))
            raise
        self._records.delete(KIND, vm_id)

    def keep(self, vm_id: str) -> None:
        """The VM is defined now: its files are its own."""
        self._records.delete(KIND, vm_id)
        self._bases.look_soon()

    async def recover(self) -> tuple[str, ...]:
        """Undo the creates, and end the undoings, that an agent's end cut short; returns the ids of those VMs.

        A storage that does not let its files go must not keep the agent from starting: the next start tries again.
        """
        undone = []
        for vm_id, value in self._records.all(KIND):
            if self._vms.get(vm_id) is not None:
                self.keep(vm_id)
            elif not msgspec.json.decode(value, type=Ledger).arriving:
                try:
                    await self.undo(vm_id)
                except KvmhvError as error:
                    log.warning("half-made disks are left", vm=vm_id, error=str(error))
                else:
                    undone.append(vm_id)
        return tuple(undone)

    # --- disks that other hosts see

    async def claim(self, vm: Vm, *, take_over: bool) -> None:
        """Own them before the VM is started. Raises as Owners.claim."""
        if self._owners is not None:
            await self._owners.claim(vm, take_over=take_over)

    async def claim_to_remove(self, vm: Vm) -> None:
        """Own them before they are deleted. Raises as Owners.claim_to_remove."""
        if self._owners is not None:
            await self._owners.claim_to_remove(vm)

    async def let_go(self, vm: Vm) -> None:
        """The VM was stopped: any host may start it."""
        if self._owners is not None:
            await self._owners.let_go(vm)

    async def expect(self, vm: Vm, source: str, arriving: Collection[str]) -> None:
        """See the source's record beside the disks that stay where they are. Raises HostError `not-shared`."""
        if self._owners is not None:
            await self._owners.expect(vm, source, {disk.name for disk in vm.disks} - set(arriving))

    def settle_owner(self, vm: Vm) -> None:
        """Whoever has the VM defined, as it was moved, says beside its disks that it owns them."""
        record = self._vms.get(vm.id)
        if record is not None and self._owners is not None:
            self._owners.settle_soon(record.vm, lambda: self._defined(record.vm))

    def _defined(self, vm: Vm) -> bool:
        record = self._vms.get(vm.id)
        return record is not None and record.vm.epoch == vm.epoch and record.should_run

    # ---

    async def _make_disk(self, vm_id: str, vm_name: str, name: str, spec: DiskSpec) -> tuple[int, tuple[Layer, ...]]:
        location = spec.location or DEFAULT_LOCATION
        kind = spec.format or DiskFormat.QCOW2
        if spec.lun is not None or self._disks.has_luns(location):
            return await self._make_on_lun(vm_id, vm_name, name, spec, location)
        if spec.file is not None:
            chain = await self._described(spec.file, spec.format)
            check_disk_size(name, chain[0].size_bytes)
            return chain[0].size_bytes, await self._place(vm_id, vm_name, name, chain, location, 0)
        if spec.image is not None:
            image = self._images.disk(spec.image)
            kind = spec.format or image.format
            top = Layer(location=location, path=layer_path(vm_name, name, 0, kind), format=kind)
            await self._make(vm_id, top, partial(self._disks.flatten, (image,), top))
            return image.size_bytes, (top,)
        top = Layer(location=location, path=layer_path(vm_name, name, 0, kind), format=kind)
        if spec.backing is None:
            size_bytes = spec.size_bytes or 0
            await self._make(vm_id, top, partial(self._disks.create, top, size_bytes, None))
            return size_bytes, (top,)
        below = await self._backing(spec.backing)
        size_bytes = spec.size_bytes or below[0].size_bytes
        check_disk_size(name, size_bytes)
        if size_bytes < below[0].size_bytes:
            raise CallerError(
                "size-invalid", f"{name}: its backing file has {below[0].size_bytes} bytes", "give at least that size"
            )
        layers = await self._place(vm_id, vm_name, name, below, location, 1)
        await self._make(vm_id, top, partial(self._disks.create, top, size_bytes, layers[0]))
        return size_bytes, (top, *layers)

    async def _make_on_lun(
        self, vm_id: str, vm_name: str, name: str, spec: DiskSpec, location: str
    ) -> tuple[int, tuple[Layer, ...]]:
        """Take a LUN as it is, or write an empty image or a copy onto it: only if nobody owns it."""
        if spec.lun is None or not self._disks.has_luns(location):
            text = f"{name}: lun= and a location of kind iscsi go together"
            raise CallerError("disk-spec-invalid", text, f"e.g. --disk location={location},lun=2")
        if spec.file is not None or spec.backing is not None:
            raise CallerError("disk-spec-invalid", f"{name}: file= and backing= cannot be on a LUN", "use image=")
        image = None if spec.image is None else self._images.disk(spec.image)
        kind = spec.format or (image.format if image is not None else DiskFormat.RAW)
        top = Layer(location=location, path=str(spec.lun), format=kind)
        self._refuse_shared(top, written=True)
        if await self._disks.exists(top):
            text = f"LUN {spec.lun} of {location} belongs to a VM"
            raise CallerError("disk-in-use", text, "take another LUN", http_status=409)
        making: Making | None = None
        if image is not None:
            making = partial(self._disks.flatten, (image,), top)
        elif spec.size_bytes is not None:
            making = partial(self._disks.create, top, spec.size_bytes, None)
        await self._make(vm_id, top, partial(self._take_lun, top, vm_id, vm_name, 0, making))
        # A raw LUN is as large as it is: the same on every host.
        size_bytes = await self._disks.lun_size(top)
        check_disk_size(name, size_bytes)
        return size_bytes, (top,)

    async def _backing(self, backing: str) -> tuple[ImageFile, ...]:
        """A path has a slash in it; anything else is the name of an image."""
        if "/" not in backing:
            return (self._images.disk(backing),)
        return await self._described(backing, None)

    async def _described(self, file: str, kind: DiskFormat | None) -> tuple[ImageFile, ...]:
        path = Path(file)
        if not path.is_absolute():
            raise CallerError("disk-invalid", f"{file!r} is a relative path", "give the absolute path on the host")
        chain = await self._disks.chain(path, kind)
        if kind is None and len(chain) > 1 and path.suffix != ".qcow2":
            # A guest can write a qcow2 header into its raw disk, naming any file of the host as its backing file.
            raise CallerError(
                "disk-format-needed",
                f"{file} looks like a qcow2 with a backing file, but its name does not say so",
                "say format=qcow2 if you trust its header, format=raw if a guest has written it",
            )
        if len(chain) >= CHAIN_MAX:
            raise CallerError("disk-invalid", f"{file} has {len(chain)} layers", "commit or flatten it first")
        return chain

    async def _place(
        self, vm_id: str, vm_name: str, name: str, chain: tuple[ImageFile, ...], location: str, depth: int
    ) -> tuple[Layer, ...]:
        """Bring a chain into locations, from its bottom: what lies in one stays, what lies above a copy is copied."""
        placed: list[Layer] = []
        copied = False
        for index in range(len(chain) - 1, -1, -1):
            image = chain[index]
            inside = None if copied else await self._disks.layer_of(image.file, image.format)
            if inside is not None:
                self._refuse_shared(inside, written=depth + index == 0)
                placed.append(msgspec.structs.replace(inside, size_bytes=image.size_bytes))
                continue
            copied = True
            path = layer_path(vm_name, name, depth + index, image.format)
            layer = Layer(location=location, path=path, format=image.format, size_bytes=image.size_bytes)
            below = placed[-1] if placed else None
            await self._make(vm_id, layer, partial(self._disks.copy_file, image, layer, below))
            placed.append(layer)
        return tuple(reversed(placed))

    def _refuse_shared(self, layer: Layer, *, written: bool) -> None:
        """No file is written by two VMs, or written by one and the backing file of another."""
        for record in self._vms.all():
            for disk in record.vm.disks:
                for depth, other in enumerate(disk.layers):
                    same = (other.location, other.path) == (layer.location, layer.path)
                    if same and (written or depth == 0):
                        raise CallerError(
                            "disk-in-use",
                            f"{layer.location}/{layer.path} belongs to {disk.name} of VM {record.vm.name}",
                            "copy the file, or use backing=",
                            http_status=409,
                        )

    async def _take_lun(self, layer: Layer, vm_id: str, vm_name: str, epoch: Epoch, making: Making | None) -> None:
        """Own a LUN, then make what is to stand on it (None: it stays as it is)."""
        if self._owners is not None:
            await self._owners.take(layer, vm_id, vm_name, epoch)
        if making is not None:
            await making()

    async def _make(self, vm_id: str, layer: Layer, making: Making) -> None:
        """Make one file, written down before it is there: an agent that dies here can still undo it."""
        before = self._read(vm_id) or Ledger()
        if not await self._disks.exists(layer):
            self._write(vm_id, msgspec.structs.replace(before, layers=(*before.layers, layer)))
        try:
            await making()
        except KvmhvError as error:
            if error.code in OF_OTHERS:
                self._write(vm_id, before)  # it is somebody else's
            raise

    def _read(self, vm_id: str) -> Ledger | None:
        value = self._records.get(KIND, vm_id)
        return None if value is None else msgspec.json.decode(value, type=Ledger)

    def _write(self, vm_id: str, ledger: Ledger) -> None:
        self._records.put(KIND, vm_id, msgspec.json.encode(ledger))


def _named(vm: Vm, names: Collection[str] | None) -> Iterator[Disk]:
    return (disk for disk in vm.disks if names is None or disk.name in names)
