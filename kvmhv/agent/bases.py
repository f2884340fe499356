"""Base images that are here already: which contents the lowest layers of this host's disks and its images have.

A move does not send a base that the target has, whatever it is called there: check and plan ask for it by its digest
(drivers/storage/contents.py). A digest is made in the background, slowly, once for each file, and holds as long as the
file is the same (size, times of change, inode). On both sides it is this host's own: what another host says of its
files proves nothing of those here, and a base is read once more when it was copied for a VM that arrives.

Only bases on this host's own disks count, and of a VM that leaves only one that its QEMU has open under that very name.
"""

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Protocol

import msgspec
import structlog
from msgspec import Meta

from kvmhv.drivers.storage.contents import Contents
from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.errors import HostError, KvmhvError
from kvmhv.model import Base, Bytes, Layer, Sha256, Struct, Vm
from kvmhv.ports import Records

log = structlog.get_logger(__name__)

KIND = "base"
PACE_BYTES_PER_S = 64 * 1024**2
"""Beside running guests: a host's disks and one of its cores hardly notice it."""
SETTLED_S = 0.1
"""Longer than a tick of a file system's clock: what is written later shows in the file's times."""
AGAIN_S = 3600.0

Layers = Callable[[], Iterable[tuple[Layer, int]]]


class LocalImages(Protocol):
    """Images on this host's own disks; implemented by drivers/storage."""

    async def mark(self, layer: Layer) -> str | None:
        """Return what tells whether the file of a layer has changed; None for one that is none, or seen by others."""
        ...

    async def contents(self, layer: Layer, size_bytes: int, *, pace_bytes_per_s: int = 0) -> Contents:
        """Read an image without backing file. Raises HostError."""
        ...

    async def copy_file(self, image: ImageFile, layer: Layer, backing: Layer | None) -> None:
        """Copy one file of a chain as it is."""
        ...

    async def flatten(self, chain: tuple[ImageFile, ...], layer: Layer) -> None:
        """Copy an image into a new layer, in the layer's format."""
        ...

    async def used_bytes(self, layer: Layer) -> int:
        """Allocated bytes of the image file."""
        ...

    def path(self, layer: Layer) -> Path:
        """Return the file of a layer."""
        ...


class Known(Struct, frozen=True, kw_only=True):
    """What was found in a file, as long as it is as it was."""

    layer: Layer
    size_bytes: Annotated[int, Meta(ge=0)]
    mark: str
    sha256: Sha256
    data_bytes: Bytes
    stored_bytes: Bytes


class Bases:
    """What this host knows of its bases."""

    def __init__(self, records: Records, disks: LocalImages, layers: Layers) -> None:
        """`layers`: every base of this host with its virtual size."""
        self._records = records
        self._disks = disks
        self._layers = layers
        self._changed = asyncio.Event()

    def look_soon(self) -> None:
        """A VM or an image is new here, or gone."""
        self._changed.set()

    async def keep(self) -> None:
        """Read what is new, one base at a time, until cancelled."""
        while True:
            self._changed.clear()
            await self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN_S):
                    await self._changed.wait()

    async def look(self) -> None:
        """Read every base that was not read as it is now, and forget files that are gone or have changed."""
        for known in self._all():
            with contextlib.suppress(KvmhvError):  # one whose location does not answer is kept
                if await self._disks.mark(known.layer) != known.mark:
                    self._records.delete(KIND, _key(known.layer))
        for layer, size_bytes in {_key(it[0]): it for it in self._layers()}.values():
            try:
                if self._records.get(KIND, _key(layer)) is None:
                    await self._read(layer, size_bytes, PACE_BYTES_PER_S)
            except KvmhvError as error:
                log.info("a base was not read", layer=_key(layer), error=str(error))

    # --- source

    async def of(self, vm: Vm, has_open: Callable[[Path], bool]) -> dict[str, Base]:
        """Return the known bases of a VM by disk; `has_open`: whether its QEMU has this very file open."""
        found = {}
        for disk in vm.disks:
            layer = disk.layers[-1]
            known = self._known(layer) if len(disk.layers) > 1 else None
            if known is not None and await self._is_same(known) and has_open(self._disks.path(layer)):
                found[disk.name] = Base(
                    sha256=known.sha256, data_bytes=known.data_bytes, stored_bytes=known.stored_bytes
                )
        return found

    # --- target

    async def there(self, wanted: Iterable[Sha256]) -> tuple[Sha256, ...]:
        """Return which of these contents there is here."""
        return tuple([sha256 for sha256 in dict.fromkeys(wanted) if await self._find(sha256) is not None])

    async def copy(self, sha256: Sha256, layer: Layer, size_bytes: int) -> None:
        """Make a new layer with these contents out of what is here, and read it to be sure of it.

        Raises HostError `base-missing`, `base-differs`, and as Disks.copy_file; then the layer may be there.
        """
        known = await self._find(sha256)
        if known is None or known.size_bytes != size_bytes:
            text = f"the base of {layer.path} was here when the move was planned, and is not any more"
            raise HostError("base-missing", text, "try the move again: the base will be sent")
        image = ImageFile(self._disks.path(known.layer), known.layer.format, known.size_bytes)
        if known.layer.format is layer.format:
            await self._disks.copy_file(image, layer, None)
        else:
            await self._disks.flatten((image,), layer)
        made = await self._read(layer, size_bytes, 0)
        if made.sha256 != sha256:
            for wrong in (known.layer, layer):
                self._records.delete(KIND, _key(wrong))
            text = f"{_key(known.layer)} does not hold what it held when it was read last, and its times do not tell"
            raise HostError("base-differs", text, "check that image and its disk; try the move again: the base is sent")

    # ---

    async def _read(self, layer: Layer, size_bytes: int, pace_bytes_per_s: int) -> Known:
        mark = await self._disks.mark(layer)
        if mark is None:
            raise HostError("storage", f"{_key(layer)} is no file on this host's own disks")
        await asyncio.sleep(SETTLED_S)
        found = await self._disks.contents(layer, size_bytes, pace_bytes_per_s=pace_bytes_per_s)
        if await self._disks.mark(layer) != mark:
            raise HostError("storage", f"{_key(layer)} was changed while it was read")
        known = Known(
            layer=layer,
            size_bytes=size_bytes,
            mark=mark,
            sha256=found.sha256,
            data_bytes=found.data_bytes,
            stored_bytes=await self._disks.used_bytes(layer),
        )
        self._records.put(KIND, _key(layer), msgspec.json.encode(known))
        return known

    async def _find(self, sha256: Sha256) -> Known | None:
        for known in self._all():
            if known.sha256 == sha256 and await self._is_same(known):
                return known
        return None

    async def _is_same(self, known: Known) -> bool:
        with contextlib.suppress(KvmhvError):
            return await self._disks.mark(known.layer) == known.mark
        return False

    def _known(self, layer: Layer) -> Known | None:
        value = self._records.get(KIND, _key(layer))
        return None if value is None else _decoded(value)

    def _all(self) -> list[Known]:
        return [known for _, value in self._records.all(KIND) if (known := _decoded(value)) is not None]


def _decoded(value: bytes) -> Known | None:
    """A record that cannot be read is none: the file is read again."""
    try:
        return msgspec.json.decode(value, type=Known)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _key(layer: Layer) -> str:
    return f"{layer.location}/{layer.path}"
