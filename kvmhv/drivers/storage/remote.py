"""Images that are no files of this host: made through QEMU's own drivers, with qemu-img, and the volume's client."""

import errno
import tempfile
from pathlib import Path

from kvmhv.drivers.storage.qemu_img import ImageFile, Node, QemuImg
from kvmhv.errors import CallerError, HostError
from kvmhv.model import DiskFormat, Layer
from kvmhv.places import DiskPlace, Lun, NfsImage

CHAP_OBJECT = "chap0"
QCOW2_SPARE_BYTES = 4 * 1024**2
"""A LUN for a qcow2 has to hold its tables beside the guest's bytes."""


def node_of(place: DiskPlace) -> tuple[Node, str | None]:
    """Return a place as qemu-img opens it, and the object that it needs for that."""
    match place:
        case NfsImage():
            return {**place.options(), "cache": {"direct": True}}, None
        case Lun():
            return {**place.options(CHAP_OBJECT), "cache": {"direct": True}}, place.secret_object(CHAP_OBJECT)
    return {"driver": "file", "filename": str(place)}, None


class RemoteImages:
    """Makes images on a volume; blocking calls of the volume are made by `in_thread` of storage.py."""

    def __init__(self, qemu_img: QemuImg) -> None:
        self._qemu_img = qemu_img

    async def head(self, layer: Layer, size_bytes: int, backing: tuple[str, DiskFormat] | None) -> bytes:
        """Return the bytes that an empty image begins with: none for raw, a qcow2's header and first tables."""
        if layer.format is DiskFormat.RAW:
            return b""
        with tempfile.TemporaryDirectory() as directory:
            file = Path(directory) / "head.qcow2"
            file.touch()
            await self._qemu_img.create_qcow2(file, size_bytes, backing)
            return file.read_bytes()

    async def write_head(self, place: DiskPlace, head: bytes) -> None:
        """Write the beginning of an image to a LUN."""
        with tempfile.NamedTemporaryFile() as file:
            file.write(head)
            file.flush()
            await self._qemu_img.convert_into(
                ImageFile(Path(file.name), DiskFormat.RAW, len(head)), DiskFormat.RAW, *node_of(place)
            )

    async def fill(self, source: ImageFile, layer: Layer, place: DiskPlace) -> None:
        """Copy an image with all its backing files into an image that is there already."""
        await self._qemu_img.convert_into(source, layer.format, *node_of(place))

    async def size_of(self, layer: Layer, place: DiskPlace) -> int:
        """Return the virtual size of an image that is there."""
        return await self._qemu_img.size_of(layer.format, *node_of(place))


def length_for(layer: Layer, size_bytes: int, *, lun: bool) -> int:
    """Return how long the storage of an image has to be: all of it for raw, or for a LUN; a qcow2 file grows."""
    if layer.format is DiskFormat.RAW:
        return size_bytes
    return size_bytes + size_bytes // 4096 + QCOW2_SPARE_BYTES if lun else 0


def failed(location: str, path: str, error: OSError) -> HostError | CallerError:
    """Return the error of a volume's OSError."""
    place, said = f"{location}/{path}" if path else f"location {location}", error.strerror or str(error)
    if isinstance(error, FileExistsError):
        todo = "remove or rename it, or choose another location"
        return HostError("file-exists", f"{place} exists already", todo)
    if isinstance(error, FileNotFoundError):
        return HostError("disk-missing", f"{place}: {said}", "bring the file back, or remove the VM")
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return HostError("location-full", f"{place}: {said}", "make room, or choose another location")
    if error.errno == errno.EBUSY:
        todo = "try again; if a host died in just that moment, --take-over breaks its lock"
        return HostError("ownership-locked", f"{place}: {said}", todo)
    if error.errno == errno.EINVAL:
        return CallerError("path-invalid", f"{place}: {said}", "give another")
    if error.errno == errno.EROFS or isinstance(error, PermissionError):
        return HostError("location-read-only", f"{place}: {said}", "let the server allow this host to write")
    todo = "check that the server is up, and the location's server, share, user and password"
    return HostError("location-unreachable", f"{place}: {said}", todo)
