"""Imported images: a kernel with its initrd, or a disk, or both, from which VMs are created.

Kernels lie in state_dir/images/NAME, disks in the location `default` (so that they can be backing files of VMs there).
An upload replaces the old file by a rename, when it is whole, checked and on disk; a broken one leaves nothing.
"""

import asyncio
import hashlib
import os
import shutil
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Protocol

import msgspec

from kvmhv.agent import kernel_files
from kvmhv.agent.vm_records import VmRecords
from kvmhv.config import Config
from kvmhv.core.vm_spec import APPEND_MAX, check_name
from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.errors import CallerError, HostError
from kvmhv.model import DirectKernel, DiskFormat, Image, Layer
from kvmhv.ports import Disks, Records

KIND = "image"
PARTS = ("kernel", "initrd", "disk")
DIRECTORY = "_images"
"""In the location; no VM's directory can have this name."""
KERNEL_MAX_BYTES = 1024**3
KEEP_FREE_BYTES = 64 * 1024**2
CHECK_EVERY_BYTES = 16 * 1024**2


class DescribesChains(Disks, Protocol):
    """Disks that can also describe an image in a given format; implemented by drivers/storage."""

    async def chain(self, file: Path, format: DiskFormat | None) -> tuple[ImageFile, ...]:  # noqa: A002
        """Describe an image and its backing files, top first. Raises CallerError `disk-invalid`, `disk-in-use`."""
        ...


class Images:
    """The images of this host."""

    def __init__(
        self, config: Config, records: Records, disks: DescribesChains, on_disk: Callable[[], None] = lambda: None
    ) -> None:
        """`on_disk` is called when a disk has come or gone."""
        self._on_disk = on_disk
        self._directory = config.state_path / "images"
        self._records = records
        self._vms = VmRecords(records)
        self._disks = disks

    def get(self, name: str) -> Image:
        """Return an image. Raises CallerError `image-unknown`."""
        value = self._records.get(KIND, name)
        if value is None:
            raise CallerError(
                "image-unknown",
                f"there is no image {name[:64]!r} on this host",
                "see `kvmhv image list`",
                http_status=404,
            )
        return msgspec.json.decode(value, type=Image)

    async def list(self) -> tuple[Image, ...]:
        """Every image, by name."""
        return tuple(msgspec.json.decode(value, type=Image) for _, value in self._records.all(KIND))

    async def store(
        self,
        name: str,
        part: str,
        chunks: AsyncIterator[bytes],
        *,
        append: str | None = None,
        format: DiskFormat | None = None,  # noqa: A002
    ) -> Image:
        """Take one part of an image from an upload; a part that is there already is replaced.

        `append`: the kernel's command line. `format`: the disk's; probed if None. A disk that comes with a backing
        file is refused. Raises CallerError `name-invalid`, `image-part-invalid`, `disk-invalid`, `image-in-use`;
        HostError `location-full`. Then the image is as it was.
        """
        check_name(name, "image")
        if part not in PARTS:
            raise CallerError("image-part-invalid", f"an image has no {part[:40]!r}", f"its parts: {', '.join(PARTS)}")
        if append is not None and (len(append) > APPEND_MAX or not (append.isascii() and append.isprintable())):
            raise CallerError("append-invalid", "the kernel's command line is not usable", "give printable ASCII")
        if part == "disk":
            self._refuse_used(name)
        file = self._disk_file(name, DiskFormat.RAW) if part == "disk" else self._directory / name / part
        fresh = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        try:
            size_bytes, sha256 = await _receive(fresh, chunks, None if part == "disk" else KERNEL_MAX_BYTES)
            image = await self._with_part(name, part, fresh, size_bytes, sha256, format)
            if append is not None:
                image = msgspec.structs.replace(image, append=append)
            if part == "disk":
                self._refuse_used(name)  # a VM may have been created meanwhile
                assert image.disk_format is not None
                file = self._disk_file(name, image.disk_format)
            await asyncio.to_thread(_put_in_place, fresh, file)
            self._records.put(KIND, name, msgspec.json.encode(image))
            if part == "disk":
                await self._remove_disk_files(name, but=image.disk_format)
                self._on_disk()
        except ConnectionError:  # the uploader's, not ours
            raise
        except OSError as error:
            raise kernel_files.unwritable(file, error) from error
        finally:
            fresh.unlink(missing_ok=True)
            _remove_if_empty(fresh.parent)
        return image

    async def remove(self, name: str) -> None:
        """Delete an image. Raises CallerError `image-unknown`; `image-in-use` while a VM has it as a backing file."""
        self.get(name)
        self._refuse_used(name)
        self._records.delete(KIND, name)
        await self._remove_disk_files(name)
        await asyncio.to_thread(shutil.rmtree, self._directory / name, ignore_errors=True)
        self._on_disk()

    def disk_layers(self) -> tuple[tuple[Layer, int], ...]:
        """Return the disk of each image that has one, with its virtual size."""
        images = (msgspec.json.decode(value, type=Image) for _, value in self._records.all(KIND))
        return tuple(
            (self._layer(image.name, image.disk_format), image.disk_virtual_bytes)
            for image in images
            if image.disk_format is not None and image.disk_virtual_bytes is not None
        )

    def disk(self, name: str) -> ImageFile:
        """Return the file of an image's disk. Raises CallerError `image-unknown`, `image-part-missing`."""
        image = self.get(name)
        if image.disk_format is None or image.disk_virtual_bytes is None:
            raise CallerError(
                "image-part-missing", f"image {name} has no disk", f"`kvmhv image import {name} --disk FILE`"
            )
        return ImageFile(self._disk_file(name, image.disk_format), image.disk_format, image.disk_virtual_bytes)

    def kernels(self, name: str, sha256: str) -> tuple[Path, ...]:
        """Return the `kernel` or `initrd` of each image that has it with this content."""
        images = (msgspec.json.decode(value, type=Image) for _, value in self._records.all(KIND))
        digests = ((image.name, {"kernel": image.kernel_sha256, "initrd": image.initrd_sha256}) for image in images)
        return tuple(self._directory / image / name for image, digest in digests if digest[name] == sha256)

    async def place_kernel(self, name: str, directory: Path, append: str | None) -> DirectKernel | None:
        """Put an image's kernel and initrd into a VM's directory; None if it has no kernel."""
        image = self.get(name)
        if image.kernel_sha256 is None:
            return None
        parts = self._directory / name
        try:
            kernel_bytes, kernel_sha256 = await asyncio.to_thread(
                kernel_files.place, parts / "kernel", directory / "kernel"
            )
            initrd_bytes, initrd_sha256 = 0, None
            if image.initrd_sha256 is not None:
                initrd_bytes, initrd_sha256 = await asyncio.to_thread(
                    kernel_files.place, parts / "initrd", directory / "initrd"
                )
        except OSError as error:
            raise HostError("storage", f"image {name}: {error}", "import the image again") from error
        return DirectKernel(
            append=image.append if append is None else append,
            kernel_sha256=kernel_sha256,
            kernel_bytes=kernel_bytes,
            initrd_sha256=initrd_sha256,
            initrd_bytes=initrd_bytes,
        )

    async def recover(self) -> None:
        """After the agent's start: remove what uploads left that its end cut short."""
        for directory in (self._disk_file("x", DiskFormat.RAW).parent, *self._directory.glob("*")):
            for rest in directory.glob(".*.????????????????????????????????"):
                rest.unlink(missing_ok=True)
            _remove_if_empty(directory)

    # ---

    def _layer(self, name: str, kind: DiskFormat) -> Layer:
        return Layer(location="default", path=f"{DIRECTORY}/{name}.{kind.value}", format=kind)

    def _disk_file(self, name: str, kind: DiskFormat) -> Path:
        return self._disks.path(self._layer(name, kind))

    async def _remove_disk_files(self, name: str, but: DiskFormat | None = None) -> None:
        for kind in DiskFormat:
            if kind is not but:
                await self._disks.remove(self._layer(name, kind))

    def _refuse_used(self, name: str) -> None:
        paths = {self._layer(name, kind).path for kind in DiskFormat}
        for record in self._vms.all():
            for disk in record.vm.disks:
                if any(layer.location == "default" and layer.path in paths for layer in disk.layers):
                    raise CallerError(
                        "image-in-use",
                        f"{disk.name} of VM {record.vm.name} has image {name} as its backing file",
                        "remove that VM first, or import under another name",
                        http_status=409,
                    )

    async def _with_part(
        self, name: str, part: str, fresh: Path, size_bytes: int, sha256: str, kind: DiskFormat | None
    ) -> Image:
        value = self._records.get(KIND, name)
        image = Image(name=name) if value is None else msgspec.json.decode(value, type=Image)
        if part == "kernel":
            return msgspec.structs.replace(image, kernel_bytes=size_bytes, kernel_sha256=sha256)
        if part == "initrd":
            return msgspec.structs.replace(image, initrd_bytes=size_bytes, initrd_sha256=sha256)
        try:
            chain = await self._disks.chain(fresh, kind)
        except CallerError as error:
            raise CallerError(error.code, error.message.replace(str(fresh), "the upload"), error.todo) from error
        if len(chain) > 1:
            raise CallerError(
                "disk-invalid", "the image needs a backing file", "flatten it: `qemu-img convert -O qcow2 FILE NEW`"
            )
        return msgspec.structs.replace(
            image, disk_bytes=size_bytes, disk_virtual_bytes=chain[0].size_bytes, disk_format=chain[0].format
        )


async def _receive(file: Path, chunks: AsyncIterator[bytes], limit_bytes: int | None) -> tuple[int, str]:
    """Write an upload to a new file, on disk when it returns; size and sha256."""
    digest = hashlib.sha256()
    size_bytes = checked_bytes = 0
    await asyncio.to_thread(file.parent.mkdir, parents=True, exist_ok=True, mode=0o700)
    descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        async for chunk in chunks:
            if size_bytes >= checked_bytes:
                _check_space(file.parent)
                checked_bytes = size_bytes + CHECK_EVERY_BYTES
            await asyncio.to_thread(kernel_files.write_all, descriptor, chunk)
            digest.update(chunk)
            size_bytes += len(chunk)
            if limit_bytes is not None and size_bytes > limit_bytes:
                raise CallerError("image-too-large", f"more than {limit_bytes} bytes", "is it the right file?")
        await asyncio.to_thread(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    if size_bytes == 0:
        raise CallerError("image-empty", "the upload has no bytes", "is it the right file?")
    return size_bytes, digest.hexdigest()


def _check_space(directory: Path) -> None:
    free = shutil.disk_usage(directory).free
    if free < KEEP_FREE_BYTES + CHECK_EVERY_BYTES:
        raise HostError("location-full", f"{directory} has {free} bytes free", "make room on the host")


def _put_in_place(fresh: Path, file: Path) -> None:
    fresh.replace(file)
    kernel_files.sync_directory(file.parent)


def _remove_if_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:  # not empty, or never made
        return
