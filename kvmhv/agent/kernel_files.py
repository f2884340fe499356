"""The kernel and the initrd of a VM: as they were announced and on disk, or not there at all.

They are never written to, so a file that this host has already is linked, not copied.
"""

import asyncio
import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator
from io import FileIO
from pathlib import Path
from typing import Protocol

from kvmhv.agent.vm_records import VmRecords
from kvmhv.errors import CallerError, HostError
from kvmhv.model import Vm

WRITE_BYTES = 1024 * 1024
CANDIDATES = 4
"""So many files are read to find one that is as announced; more would take longer than to send it."""


class Images(Protocol):
    """What this module needs of the host's images. Implemented by agent/images."""

    def kernels(self, name: str, sha256: str) -> tuple[Path, ...]:
        """Return the `kernel` or `initrd` of each image that has it with this content."""
        ...


class KernelFiles:
    """The files of all VMs of this host: `kernel` and `initrd` in a directory for each."""

    def __init__(self, state_path: Path, vms: VmRecords, images: Images) -> None:
        self._directory = state_path / "vms"
        self._vms = vms
        self._images = images

    def directory(self, vm_id: str) -> Path:
        """Where the files lie that belong to the VM."""
        return self._directory / vm_id

    def paths(self, vm: Vm) -> tuple[Path, Path | None] | None:
        """Return the paths of a VM's kernel and initrd, None if it boots from a disk; arriving files go there too."""
        if vm.kernel is None:
            return None
        directory = self.directory(vm.id)
        return directory / "kernel", directory / "initrd" if vm.kernel.initrd_sha256 else None

    async def remove(self, vm_id: str) -> None:
        """Remove the VM's files; no error if there are none. Raises HostError `storage`."""
        directory = self.directory(vm_id)
        try:
            await asyncio.to_thread(shutil.rmtree, directory)
        except FileNotFoundError:
            return
        except OSError as error:
            raise HostError("storage", f"{directory}: {error}", "remove it by hand, then try again") from error

    async def keep(self, vm: Vm, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Keep the VM's `kernel` or `initrd` as it arrives.

        Raises CallerError `file-not-wanted`, `file-damaged`; HostError `location-full`, `storage`.
        """
        wanted, file = _announced(vm, name), self.directory(vm.id) / name
        try:
            arrived = await _receive(file, chunks, wanted[1])
        except ConnectionError:
            raise
        except OSError as error:
            raise unwritable(file, error) from error
        if arrived != wanted:
            raise CallerError("file-damaged", f"{name} did not arrive as it was announced", "move the VM again")

    async def take(self, vm: Vm, name: str) -> bool:
        """Put a file of an image or of another VM that is as announced into the VM's directory; False if none is.

        Raises CallerError `file-not-wanted`.
        """
        wanted = _announced(vm, name)
        for candidate in self._like(vm, name, wanted)[:CANDIDATES]:
            try:
                size_bytes, sha256 = await asyncio.to_thread(place, candidate, self.directory(vm.id) / name)
            except OSError:
                continue
            if (sha256, size_bytes) == wanted:
                return True
        return False

    def _like(self, vm: Vm, name: str, wanted: tuple[str, int]) -> tuple[Path, ...]:
        """Return the files whose content should be this."""
        others = (record.vm for record in self._vms.all() if record.vm.id != vm.id)
        alike = (other.id for other in others if _of(other).get(name) == wanted)
        return (*self._images.kernels(name, wanted[0]), *(self.directory(vm_id) / name for vm_id in alike))


def _of(vm: Vm) -> dict[str, tuple[str, int]]:
    """Return digest and size of each of the VM's files, by name."""
    kernel, found = vm.kernel, {}
    if kernel is not None:
        found["kernel"] = (kernel.kernel_sha256, kernel.kernel_bytes)
        if kernel.initrd_sha256 is not None:
            found["initrd"] = (kernel.initrd_sha256, kernel.initrd_bytes)
    return found


def _announced(vm: Vm, name: str) -> tuple[str, int]:
    """Return digest and size of the VM's `kernel` or `initrd`. Raises CallerError `file-not-wanted`."""
    found = _of(vm).get(name)
    if found is None:
        raise CallerError("file-not-wanted", f"{vm.name} has no file {name[:40]!r}", "", http_status=409)
    return found


def place(source: Path, file: Path) -> tuple[int, str]:
    """Put `source` at `file` too, on disk; return size and sha256 of what is there. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.unlink(missing_ok=True)
    try:
        os.link(source, file)
    except OSError:  # another file system, or too many links
        shutil.copyfile(source, file)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        os.fsync(stream.fileno())
        sync_directory(file.parent)
        return stream.tell(), digest


def unwritable(file: Path, error: OSError) -> HostError:
    """Return the error of a file of the agent's own that cannot be written."""
    code = "location-full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "storage"
    return HostError(code, f"{file}: {error.strerror}", "check the file system")


def write_all(descriptor: int, data: bytes) -> None:
    """Write all of it. Raises OSError."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk. Raises OSError."""
    opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


async def _receive(file: Path, chunks: AsyncIterator[bytes], most_bytes: int) -> tuple[str, int]:
    """Write what comes to a new file, on disk; return digest and size, a larger one as soon as it is too large."""
    opened = await asyncio.to_thread(_fresh, file)
    digest, size_bytes, waiting = hashlib.sha256(), 0, bytearray()

    def write(data: bytes) -> None:
        digest.update(data)
        write_all(opened.fileno(), data)

    with opened:
        async for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > most_bytes:
                break
            waiting += chunk
            if len(waiting) >= WRITE_BYTES:
                await asyncio.to_thread(write, bytes(waiting))
                waiting.clear()
        await asyncio.to_thread(write, bytes(waiting))
        await asyncio.to_thread(os.fsync, opened.fileno())
        await asyncio.to_thread(sync_directory, file.parent)
    return digest.hexdigest(), size_bytes


def _fresh(file: Path) -> FileIO:
    """Open a new file: one that is there may be another VM's too."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.unlink(missing_ok=True)
    return FileIO(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb")
