"""agent/vm_disks.py: which files a VM takes, makes, shares and deletes."""

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.errors import CallerError
from kvmhv.model import (
    GIB,
    MIB,
    DiskSpec,
    Layer,
)
from tests.one_host import NOTHING, QCOW2, RAW, SPEC, World, one_host, with_kernel


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with one_host(tmp_path) as host:
        yield host


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
    files = world.vms.kernels.paths(vm)
    assert files is not None
    assert (files[0].read_bytes(), files[1]) == (b"kernel", None)
    await world.vms.remove("web01", keep_disks=False)
    assert world.left() == NOTHING


async def test_a_command_line_without_a_kernel(world: World) -> None:
    with pytest.raises(CallerError) as refused:
        await world.vms.create(msgspec.structs.replace(SPEC, append="quiet"))
    assert refused.value.code == "append-invalid"
    assert world.left() == NOTHING
