"""The kernel and the initrd of a VM, as they arrive and as they are found: whole, or not at all."""

import errno
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from kvmhv.agent import kernel_files
from kvmhv.agent.kernel_files import KernelFiles
from kvmhv.agent.vm_records import VmRecord, VmRecords
from kvmhv.drivers.database import Database
from kvmhv.errors import CallerError, HostError
from kvmhv.model import DirectKernel, Vm

KERNEL, INITRD = b"kernel" * 300_000, b"initrd"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def with_kernel(name: str) -> Vm:
    kernel = DirectKernel(
        kernel_sha256=digest(KERNEL), kernel_bytes=len(KERNEL), initrd_sha256=digest(INITRD), initrd_bytes=len(INITRD)
    )
    return Vm(id=f"id-{name}", name=name, memory_bytes=1 << 28, cpus=1, kernel=kernel)


class Host:
    """The files of a host with an image, whose kernel is `image`, and with another VM."""

    def __init__(self, directory: Path) -> None:
        self.image = directory / "image"
        self.vms = VmRecords(Database(directory / "kvmhv.db", directory / "volatile", 10))
        self.files = KernelFiles(directory, self.vms, self)

    def kernels(self, name: str, sha256: str) -> tuple[Path, ...]:
        return (self.image,) if (name, sha256) == ("kernel", digest(KERNEL)) else ()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def vm() -> Vm:
    return with_kernel("web01")


async def pieces(content: bytes, size_bytes: int = 100_000) -> AsyncIterator[bytes]:
    for at in range(0, len(content), size_bytes):
        yield content[at : at + size_bytes]


async def test_what_arrives_as_announced_is_kept_until_it_is_removed(host: Host, vm: Vm) -> None:
    await host.files.keep(vm, "kernel", pieces(KERNEL))
    await host.files.keep(vm, "initrd", pieces(INITRD))
    kernel, initrd = host.files.paths(vm) or (None, None)
    assert kernel is not None and kernel.read_bytes() == KERNEL
    assert initrd is not None and initrd.read_bytes() == INITRD
    await host.files.remove(vm.id)
    await host.files.remove(vm.id)
    assert not host.files.directory(vm.id).exists()


@pytest.mark.parametrize("content", [KERNEL[:-1], KERNEL + b"x", KERNEL[:-1] + b"x", b""])
async def test_anything_else_is_refused(host: Host, vm: Vm, content: bytes) -> None:
    with pytest.raises(CallerError) as refused:
        await host.files.keep(vm, "kernel", pieces(content))
    assert refused.value.code == "file-damaged"


@pytest.mark.parametrize("name", ["disk", "../kernel", ""])
async def test_a_file_that_the_vm_does_not_have_is_not_wanted(host: Host, vm: Vm, name: str) -> None:
    without = msgspec.structs.replace(vm, kernel=None)
    for call in (
        host.files.keep(vm, name, pieces(KERNEL)),
        host.files.take(vm, name),
        host.files.keep(without, "kernel", pieces(KERNEL)),
    ):
        with pytest.raises(CallerError) as refused:
            await call
        assert refused.value.code == "file-not-wanted"
    assert not host.files.directory(vm.id).exists()


async def test_a_full_disk_is_told(host: Host, vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(kernel_files, "write_all", full)
    with pytest.raises(HostError) as told:
        await host.files.keep(vm, "kernel", pieces(KERNEL))
    assert told.value.code == "location-full"


async def test_an_images_file_is_taken_if_it_is_what_it_should_be(host: Host, vm: Vm) -> None:
    assert not await host.files.take(vm, "kernel")
    host.image.write_bytes(KERNEL[:-1] + b"x")
    assert not await host.files.take(vm, "kernel")
    host.image.unlink()
    host.image.write_bytes(KERNEL)
    assert await host.files.take(vm, "kernel")
    assert (host.files.directory(vm.id) / "kernel").samefile(host.image)
    assert not await host.files.take(vm, "initrd")


async def test_another_vms_file_is_taken(host: Host, vm: Vm) -> None:
    other = with_kernel("web02")
    await host.files.keep(other, "initrd", pieces(INITRD))
    assert not await host.files.take(vm, "initrd")  # nobody knows of it yet
    host.vms.put(VmRecord(vm=other))
    host.vms.put(VmRecord(vm=msgspec.structs.replace(with_kernel("disk"), kernel=None)))
    assert await host.files.take(vm, "initrd")
    await host.files.remove(other.id)
    assert (host.files.directory(vm.id) / "initrd").read_bytes() == INITRD


async def test_where_nothing_can_be_linked_it_is_copied(host: Host, vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    def elsewhere(source: Path, file: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", elsewhere)
    host.image.write_bytes(KERNEL)
    assert await host.files.take(vm, "kernel")
    taken = host.files.directory(vm.id) / "kernel"
    assert taken.read_bytes() == KERNEL and not taken.samefile(host.image)


async def test_a_file_that_arrives_leaves_the_one_alone_that_was_linked_there(host: Host, vm: Vm) -> None:
    host.image.write_bytes(b"an older kernel")
    kernel_files.place(host.image, host.files.directory(vm.id) / "kernel")
    await host.files.keep(vm, "kernel", pieces(KERNEL))
    assert host.image.read_bytes() == b"an older kernel"
    assert (host.files.directory(vm.id) / "kernel").read_bytes() == KERNEL
