"""Locations that are directories of this host. A layer is `location/path`; no path leaves its location.

Files are made under their final name with O_EXCL, so that nothing is ever overwritten, and are removed again when
filling them fails.
"""

import asyncio
import contextlib
import errno
import os
import shutil
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from kvmhv.config import Config
from kvmhv.drivers.storage.qemu_img import SECTOR_BYTES, ImageFile, QemuImg, copy_bytes
from kvmhv.errors import CallerError, HostError
from kvmhv.model import DiskFormat, Layer, Location

DEFAULT = "default"
PATH_BYTES_MAX = 1024
NAME_BYTES_MAX = 255
KEEP_FREE_BYTES = 64 * 1024**2
"""A copy is refused if it would leave less than this."""

Result = TypeVar("Result")


class Do(Protocol):
    """Does what blocks on a location, away from the event loop."""

    async def __call__(self, location: str, work: Callable[[], Result], /) -> Result:
        """Return what the work returns."""
        ...


async def in_a_thread(_location: str, work: Callable[[], Result]) -> Result:
    """Do it in a thread, without a deadline: for file systems of this host."""
    return await asyncio.to_thread(work)


class Directories:
    """Implements ports.Disks over the locations of the configuration."""

    def __init__(self, config: Config, do: Do = in_a_thread) -> None:
        """`do`: how files are touched, for the server of a mount may be away."""
        self._do = do
        named = {DEFAULT: str(config.state_path / "disks"), **config.locations}
        self._roots = {name: Path(path) for name, path in named.items()}
        self._copy_s = config.waits.image_copy_s
        self._qemu_img = QemuImg(config.qemu_binary, config.waits)

    def add_root(self, name: str, root: Path) -> None:
        """Have a location more: a directory, or a share that is mounted there."""
        self._roots[name] = root

    @property
    def names(self) -> Collection[str]:
        """The locations that there are."""
        return self._roots.keys()

    def drop_root(self, name: str) -> None:
        """Have it no longer; no error if it was not there."""
        self._roots.pop(name, None)

    # --- ports.Disks

    async def locations(self, but: Collection[str] = ()) -> tuple[Location, ...]:
        """Every location with its free space, fresh; 0 bytes for one whose directory is missing or cannot be read."""
        roots = {name: root for name, root in self._roots.items() if name not in but}
        return tuple([await self._described(name, root) for name, root in roots.items()])

    async def _described(self, name: str, root: Path) -> Location:
        try:
            return await self._do(name, partial(describe_location, name, root))
        except HostError:
            return Location(name=name, path=str(root), silent=True)

    def path(self, layer: Layer) -> Path:
        """Return the file of a layer.

        Raises CallerError `location-unknown`, or `path-invalid` if it would leave the location.
        """
        root = self._roots.get(layer.location)
        if root is None:
            raise CallerError(
                "location-unknown",
                f"this host has no location {layer.location!r}",
                f"it has: {', '.join(self._roots)}",
                http_status=404,
            )
        self.check(layer)
        file = root / layer.path
        try:
            inside = file.resolve().is_relative_to(root.resolve())
        except (OSError, RuntimeError) as error:
            raise _path_invalid(layer, str(error)) from error
        if not inside:
            raise _path_invalid(layer, "a symbolic link leads out of the location")
        return file

    @staticmethod
    def check(layer: Layer) -> None:
        """Raise CallerError `path-invalid` for what is no plain relative path; looks at no file."""
        if (
            not layer.path.isprintable()
            or len(os.fsencode(layer.path)) > PATH_BYTES_MAX
            or any(part in ("", ".", "..") or len(os.fsencode(part)) > NAME_BYTES_MAX for part in layer.path.split("/"))
        ):
            raise _path_invalid(layer, "it is no plain relative path")

    async def create(self, layer: Layer, size_bytes: int, backing: Layer | None) -> None:
        """Make an empty image of exactly `size_bytes` (raw: sparse); nothing is left if that fails.

        Raises HostError `file-exists` (the file is untouched), CallerError `size-invalid`.
        """
        if size_bytes <= 0 or size_bytes % SECTOR_BYTES:
            raise CallerError(
                "size-invalid", f"a disk of {size_bytes} bytes is not possible", "give a multiple of 512 bytes"
            )
        async with self._fresh_file(layer) as file:
            if layer.format == DiskFormat.RAW:
                if backing is not None:
                    raise CallerError("disk-invalid", "a raw image has no backing file", "use format=qcow2")
                await self._do(layer.location, partial(_stretch, file, size_bytes))
                return
            await self._qemu_img.create_qcow2(file, size_bytes, self._named_from(layer, backing))
            (made,) = (await self._qemu_img.chain(file, layer.format, in_use=False))[:1]
            if made.size_bytes != size_bytes:
                raise HostError(
                    "qemu-img", f"qemu-img made {made.size_bytes} bytes instead of {size_bytes}", "report this"
                )

    async def copy_in(self, file: Path, layer: Layer) -> None:
        """Copy (convert) an image with all its backing files into one new layer without backing.

        Raises HostError `file-exists` or `location-full`, CallerError `disk-invalid`; then nothing is left.
        """
        chain = await self._qemu_img.chain(file, None, in_use=False)
        await self.flatten(chain, layer)

    async def describe(self, file: Path) -> tuple[str, int, tuple[Path, ...]]:
        """Return format, virtual size and the chain of backing files (top first, itself included) by `qemu-img info`.

        Raises CallerError `disk-invalid` for a file that is no image of a known format.
        """
        chain = await self._qemu_img.chain(file, None, in_use=True)
        return chain[0].format.value, chain[0].size_bytes, tuple(image.file for image in chain)

    async def used_bytes(self, layer: Layer) -> int:
        """Allocated bytes of the image file. Raises HostError `disk-missing`."""

        def used() -> int:
            try:
                return self.path(layer).stat().st_blocks * 512
            except OSError as error:
                raise _missing(layer, error) from error

        return await self._do(layer.location, used)

    async def mark(self, layer: Layer) -> str | None:
        """Return what changes when somebody writes to the file of a layer or puts another there; None without one."""

        def look() -> str | None:
            try:
                found = self.path(layer).stat()
            except OSError:
                return None
            # The last one is the kernel's own: nobody can set it.
            return f"{found.st_ino} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"

        return await self._do(layer.location, look)

    async def remove(self, layer: Layer) -> None:
        """Remove the file and its directory if that is empty then; no error if it is gone."""

        def remove() -> None:
            file = self.path(layer)
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise _storage_failed(file, error) from error
            self._remove_empty(file.parent, self._roots[layer.location])

        await self._do(layer.location, remove)

    # --- what making a VM's disks needs beyond a move

    async def chain(self, file: Path, format: DiskFormat | None) -> tuple[ImageFile, ...]:  # noqa: A002
        """Describe an image and its backing files, top first; the format is probed only if it is not given.

        Raises CallerError `disk-invalid`; `disk-in-use` if a QEMU writes to it.
        """
        return await self._qemu_img.chain(file, format, in_use=False)

    async def layer_of(self, file: Path, format: DiskFormat) -> Layer | None:  # noqa: A002
        """Return the layer that a file is, None if it lies in no location, or in one that does not answer."""
        real = await asyncio.to_thread(file.resolve)
        for name, root in self._roots.items():
            with contextlib.suppress(HostError):
                real_root = await self._do(name, root.resolve)
                if real.is_relative_to(real_root):
                    return Layer(location=name, path=str(real.relative_to(real_root)), format=format)
        return None

    async def flatten(self, chain: tuple[ImageFile, ...], layer: Layer) -> None:
        """Copy a described image with all its backing files into one new layer. Raises as copy_in."""
        async with self._fresh_file(layer) as file:
            await self._check_space(chain, layer)
            await self._qemu_img.convert(chain[0], file, layer.format)

    async def copy_file(self, image: ImageFile, layer: Layer, backing: Layer | None) -> None:
        """Copy one file of a chain as it is; its header names `backing` then. Raises as copy_in."""
        async with self._fresh_file(layer) as file:
            await self._check_space((image,), layer)
            await copy_bytes(image.file, file, self._copy_s)
            named = self._named_from(layer, backing)
            if named is not None:
                await self._qemu_img.rename_backing(file, *named)

    # ---

    @asynccontextmanager
    async def _fresh_file(self, layer: Layer) -> AsyncIterator[Path]:
        """Reserve the layer's name; whatever fails inside, or cancels it, leaves neither file nor directory."""
        reserving = asyncio.create_task(self._do(layer.location, partial(self._reserve, layer)))
        try:
            yield await asyncio.shield(reserving)
        except BaseException:
            await asyncio.shield(self._give_back(layer, reserving))
            raise

    async def _give_back(self, layer: Layer, reserving: asyncio.Task[Path]) -> None:
        """Remove what was reserved, also for one who was cancelled before he heard of it."""
        await asyncio.wait({reserving})
        if reserving.exception() is None:
            await self._do(layer.location, partial(self._drop, layer, reserving.result()))

    def _reserve(self, layer: Layer) -> Path:
        file = self.path(layer)
        root = self._roots[layer.location]
        if layer.location != DEFAULT and not root.is_dir():  # perhaps a file system that is not mounted
            raise HostError(
                "location-missing", f"location {layer.location!r}: there is no {root}", "mount or make the directory"
            )
        try:
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY, 0o600))
        except FileExistsError as error:
            raise HostError(
                "file-exists",
                f"{layer.location}/{layer.path} exists already on this host ({file})",
                "remove or rename that file, or choose another location",
            ) from error
        except OSError as error:
            self._remove_empty(file.parent, root)
            raise _storage_failed(file, error) from error
        return file

    def _drop(self, layer: Layer, file: Path) -> None:
        file.unlink(missing_ok=True)
        self._remove_empty(file.parent, self._roots[layer.location])

    async def _check_space(self, images: tuple[ImageFile, ...], layer: Layer) -> None:
        def look() -> tuple[int, int]:
            needed = sum(image.file.stat().st_blocks * 512 for image in images)
            return needed, describe_location(layer.location, self._roots[layer.location]).free_bytes

        needed, free = await self._do(layer.location, look)
        if needed + KEEP_FREE_BYTES > free:
            raise HostError(
                "location-full",
                f"location {layer.location!r} has {free} bytes free, the copy needs {needed}",
                "make room, or choose another location",
            )

    def _named_from(self, layer: Layer, backing: Layer | None) -> tuple[str, DiskFormat] | None:
        """How a file's header names its backing file: relative, so that it is true on every host."""
        if backing is None:
            return None
        roots = (self._roots[it.location] for it in (backing, layer))
        named, own = (root / it.path for root, it in zip(roots, (backing, layer), strict=True))
        return os.path.relpath(named, own.parent), backing.format

    @staticmethod
    def _remove_empty(directory: Path, root: Path) -> None:
        while directory != root and directory.is_relative_to(root):
            try:
                directory.rmdir()
            except OSError:  # not empty, or gone
                return
            directory = directory.parent


def describe_location(name: str, root: Path) -> Location:
    """Describe a location; `default`, whose directory is made at its first use, has its parent's space until then."""
    there = root
    try:
        if name == DEFAULT:
            there = next((directory for directory in (root, *root.parents) if directory.exists()), root)
        space = shutil.disk_usage(there)
    except OSError:
        return Location(name=name, path=str(root))
    return Location(name=name, path=str(root), free_bytes=space.free, total_bytes=space.total)


def _stretch(file: Path, size_bytes: int) -> None:
    try:
        os.truncate(file, size_bytes)
    except OSError as error:
        raise _storage_failed(file, error) from error


def _path_invalid(layer: Layer, why: str) -> CallerError:
    return CallerError(
        "path-invalid", f"{layer.path[:100]!r} is no path in location {layer.location!r}: {why}", "give a relative path"
    )


def _missing(layer: Layer, error: OSError) -> HostError:
    return HostError(
        "disk-missing", f"{layer.location}/{layer.path}: {error.strerror}", "bring the file back, or remove the VM"
    )


def _storage_failed(file: Path, error: OSError) -> HostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostError("location-full", f"{file}: {error.strerror}", "make room, or choose another location")
    return HostError("storage", f"{file}: {error.strerror}", "check the location's directory and its file system")
