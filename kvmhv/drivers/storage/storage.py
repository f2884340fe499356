"""`Storage`: ports.Disks over every location of this host, whatever it is made of.

Locations that are directories (mounts too) are directory.py's; those that QEMU reaches by itself are made and removed
through volumes.py and remote.py. A server that is away must not stop the agent: every look at a share is made in one of
a few threads of its own, with a deadline.
"""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from kvmhv.config import Config
from kvmhv.drivers.storage import contents, remote
from kvmhv.drivers.storage.contents import Contents
from kvmhv.drivers.storage.directory import DEFAULT, Directories, in_a_thread
from kvmhv.drivers.storage.qemu_img import ImageFile, QemuImg
from kvmhv.drivers.storage.volumes import DirectoryVolume, ImageVolume, LunVolume, Volume
from kvmhv.errors import CallerError, HostError
from kvmhv.model import COUNT_MAX, Access, DiskFormat, Layer, Location
from kvmhv.places import DiskPlace

THREADS = 4
"""For each location: when so many looks hang, more are refused at once."""

Result = TypeVar("Result")


class Attached(NamedTuple):
    """A location that was added while the agent ran, as `Storage` uses it."""

    kind: str
    volume: Volume
    shared_id: str | None
    access: Access
    shown: str
    unsafe: tuple[str, ...] = ()


class Storage:
    """Implements ports.Disks and what making disks needs beyond it."""

    def __init__(self, config: Config) -> None:
        self._directories = Directories(config, self._do)
        self._qemu_binary = config.qemu_binary
        self._waits = config.waits
        self._remote = remote.RemoteImages(QemuImg(config.qemu_binary, config.waits))
        self._answer_s = config.waits.share_answer_s
        self._attached: dict[str, Attached] = {}
        self._threads: dict[str, ThreadPoolExecutor] = {}
        self._stuck: dict[str, int] = {}

    # --- the set of locations

    def attach(self, name: str, attached: Attached) -> None:
        """Use a location from now on."""
        self._attached[name] = attached
        if isinstance(attached.volume, DirectoryVolume):
            self._directories.add_root(name, attached.volume.root)

    def detach(self, name: str) -> None:
        """Use it no longer; no error if it was not used."""
        if self._attached.pop(name, None) is not None:
            self._directories.drop_root(name)
        threads = self._threads.pop(name, None)
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)

    def volume(self, name: str) -> Volume | None:
        """Return what a location is made of; None for a plain directory of this host, which nobody else sees."""
        attached = self._attached.get(name)
        return attached.volume if attached is not None and attached.shared_id is not None else None

    async def ask(self, name: str, look: Callable[[], Result]) -> Result:
        """Do something that blocks on a location. Raises HostError `location-silent`, and as remote.failed says.

        A call that is given up may still be done when the storage answers again: `is_quiet` tells.
        """
        if self._stuck.get(name, 0) >= THREADS:
            raise _silent(name)
        threads = self._threads.setdefault(name, ThreadPoolExecutor(THREADS, thread_name_prefix=f"location-{name}"))
        call = threads.submit(look)
        answer = asyncio.wrap_future(call)
        try:
            async with asyncio.timeout(self._answer_s):
                return await asyncio.shield(answer)
        except TimeoutError:
            if not call.cancel():  # it was begun, and hangs
                self._stuck[name] = self._stuck.get(name, 0) + 1
                answer.add_done_callback(lambda done: self._came_back(name, done))
            raise _silent(name) from None
        except OSError as error:
            raise remote.failed(name, "", error) from error

    async def _do(self, name: str, work: Callable[[], Result]) -> Result:
        """Touch files of a directory. Only of `default` it is known that it lies on this host's own disks."""
        return await (in_a_thread if name == DEFAULT else self.ask)(name, work)

    def is_quiet(self, name: str) -> bool:
        """Whether nothing is under way any more that was given up because the location was silent."""
        return not self._stuck.get(name, 0)

    def _came_back(self, name: str, done: "asyncio.Future[Result]") -> None:
        self._stuck[name] -= 1
        if not done.cancelled():
            done.exception()  # nobody waits for it any more

    # --- ports.Disks

    async def locations(self) -> tuple[Location, ...]:
        """Every location with its free space, fresh; `silent` for one that does not answer."""
        plain = {location.name: location for location in await self._directories.locations(but=self._attached)}
        found = await asyncio.gather(*(self._location(name, it) for name, it in self._attached.items()))
        return (*plain.values(), *found)

    async def _location(self, name: str, it: Attached) -> Location:
        silent, free, total = False, 0, 0
        try:
            free, total = (min(size, COUNT_MAX) for size in await self.ask(name, it.volume.space))
        except HostError:
            silent = True
        return Location(
            name=name,
            kind=it.kind,
            path=it.shown,
            free_bytes=free,
            total_bytes=total,
            shared_id=it.shared_id,
            access=it.access,
            unsafe=it.unsafe,
            silent=silent,
        )

    def path(self, layer: Layer) -> Path:
        """Return the file of a layer in a location that is a directory here."""
        return self._directories.path(layer)

    def place(self, layer: Layer) -> DiskPlace:
        """Return where QEMU finds a layer. Raises as path(); touches no share."""
        attached = self._attached.get(layer.location)
        if attached is None:
            return self._directories.path(layer)
        self._directories.check(layer)
        try:
            return attached.volume.place(layer.path)
        except OSError as error:
            raise remote.failed(layer.location, layer.path, error) from error

    async def exists(self, layer: Layer) -> bool:
        """Whether something is there already under a layer's name."""
        volume = self._images(layer)
        if volume is not None:
            return await self.ask(layer.location, lambda: volume.exists(layer.path))
        return await self.ask(layer.location, lambda: os.path.lexists(self.path(layer)))

    async def create(self, layer: Layer, size_bytes: int, backing: Layer | None) -> None:
        """Make an empty image of exactly `size_bytes`; a LUN's image may be smaller than the LUN."""
        volume = self._images(layer)
        if volume is None:
            await self._directories.create(layer, size_bytes, backing)
            return
        await self._reserve(volume, layer, size_bytes, _named_from(layer, backing))

    async def copy_in(self, file: Path, layer: Layer) -> None:
        """Copy (convert) an image file into a layer without backing."""
        await self.flatten(await self.chain(file, None), layer)

    async def describe(self, file: Path) -> tuple[str, int, tuple[Path, ...]]:
        """Return format, virtual size and the chain of backing files by `qemu-img info`."""
        return await self._directories.describe(file)

    async def used_bytes(self, layer: Layer) -> int:
        """Allocated bytes of the image."""
        volume = self._images(layer)
        if volume is not None:
            return await self.ask(layer.location, lambda: volume.used(layer.path))
        return await self._directories.used_bytes(layer)

    async def remove(self, layer: Layer) -> None:
        """Remove the image, and the record beside it; no error if it is gone."""
        attached, volume = self._attached.get(layer.location), self._images(layer)
        if volume is not None:
            await self.ask(layer.location, lambda: volume.remove(layer.path))
            return
        if attached is not None and attached.shared_id is not None:
            record = Path(attached.volume.owner_record(layer.path)).name
            await self.ask(layer.location, lambda: (self.path(layer).parent / record).unlink(missing_ok=True))
        await self._directories.remove(layer)

    # --- what making a VM's disks needs beyond a move

    async def chain(self, file: Path, format: DiskFormat | None) -> tuple[ImageFile, ...]:  # noqa: A002
        """Describe an image and its backing files, top first."""
        return await self._directories.chain(file, format)

    async def layer_of(self, file: Path, format: DiskFormat) -> Layer | None:  # noqa: A002
        """Return the layer that a file is, None if it lies in no location."""
        return await self._directories.layer_of(file, format)

    async def flatten(self, chain: tuple[ImageFile, ...], layer: Layer) -> None:
        """Copy a described image with all its backing files into one new layer."""
        volume = self._images(layer)
        if volume is None:
            await self._directories.flatten(chain, layer)
            return
        await self._reserve(volume, layer, chain[0].size_bytes, None)
        try:
            await self._remote.fill(chain[0], layer, volume.place(layer.path))
        except BaseException:
            await self.remove(layer)
            raise

    async def copy_file(self, image: ImageFile, layer: Layer, backing: Layer | None) -> None:
        """Copy one file of a chain as it is; its header names `backing` then."""
        volume = self._images(layer)
        if volume is None:
            await self._directories.copy_file(image, layer, backing)
            return
        if backing is not None:
            text = f"location {layer.location!r} is no directory here: a chain cannot be copied into it"
            raise CallerError("disk-invalid", text, "flatten the image first: qemu-img convert -O qcow2 FILE NEW")
        await self.flatten((image,), layer)

    async def mark(self, layer: Layer) -> str | None:
        """Return what tells whether the file of a layer has changed; None for one that is none, or seen by others."""
        if layer.location not in self._directories.names or self.volume(layer.location) is not None:
            return None
        return await self._directories.mark(layer)

    async def contents(self, layer: Layer, size_bytes: int, *, pace_bytes_per_s: int = 0) -> Contents:
        """Read an image without backing file that is a file here. Raises as contents.read()."""
        image = ImageFile(self.path(layer), layer.format, size_bytes)
        return await contents.read(self._qemu_binary, image, waits=self._waits, pace_bytes_per_s=pace_bytes_per_s)

    async def lun_size(self, layer: Layer) -> int:
        """Return the virtual size of what is on a LUN. Raises CallerError `disk-spec-invalid` where there are none."""
        volume = self._images(layer)
        if not isinstance(volume, LunVolume):
            text = f"location {layer.location!r} is no iSCSI target"
            raise CallerError("disk-spec-invalid", text, "lun= goes with a location of kind iscsi")
        return await self._remote.size_of(layer, volume.place(layer.path))

    def has_luns(self, location: str) -> bool:
        """Whether a location's images are LUNs."""
        attached = self._attached.get(location)
        return attached is not None and isinstance(attached.volume, LunVolume)

    # ---

    def _images(self, layer: Layer) -> ImageVolume | None:
        """Return the volume of a layer that is no file here."""
        attached = self._attached.get(layer.location)
        if attached is None or isinstance(attached.volume, DirectoryVolume):
            return None
        self._directories.check(layer)
        return attached.volume  # type: ignore[return-value]

    async def _reserve(
        self, volume: ImageVolume, layer: Layer, size_bytes: int, backing: tuple[str, DiskFormat] | None
    ) -> None:
        head = await self._remote.head(layer, size_bytes, backing)
        lun = isinstance(volume, LunVolume)
        length = remote.length_for(layer, size_bytes, lun=lun)
        await self.ask(layer.location, lambda: volume.reserve(layer.path, head, length))
        if lun and head:
            await self._remote.write_head(volume.place(layer.path), head)


def _named_from(layer: Layer, backing: Layer | None) -> tuple[str, DiskFormat] | None:
    """How a qcow2's header names its backing file: relative, so that it is true on every host."""
    if backing is None:
        return None
    return os.path.relpath(backing.path, Path(layer.path).parent), backing.format


def _silent(name: str) -> HostError:
    text = f"location {name!r} does not answer"
    return HostError("location-silent", text, "is its server up, and the network to it? VMs on it wait for it")
