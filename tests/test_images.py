"""agent/images.py: uploads that arrive whole or not at all, and images that are in use."""

import hashlib
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmhv.agent import images as module
from kvmhv.agent.images import Images
from kvmhv.agent.vm_records import VmRecord, VmRecords
from kvmhv.config import from_data
from kvmhv.drivers.database import Database
from kvmhv.drivers.storage.directory import Directories
from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.errors import CallerError, HostError
from kvmhv.model import MIB, Disk, DiskFormat, Layer, Vm

QCOW2, RAW = DiskFormat.QCOW2, DiskFormat.RAW
MAGIC = b"QFI\xfb"


class PathsOnly(Directories):
    """The real locations, with a describer that knows as much of images as these tests need."""

    async def chain(self, file: Path, format: DiskFormat | None) -> tuple[ImageFile, ...]:  # noqa: A002
        content = file.read_bytes()  # noqa: ASYNC240
        kind = format or (QCOW2 if content.startswith(MAGIC) else RAW)
        if len(content) % 512:
            raise CallerError("disk-invalid", f"{file} cannot be a VM's disk: no sectors", "give an image")
        own = ImageFile(file, kind, len(content))
        return (own, own) if b"backing" in content else (own,)


class Host:
    def __init__(self, directory: Path) -> None:
        config = from_data({"state_dir": str(directory)}, "test")
        self.directory = directory
        self.records = Database(directory / "kvmhv.db", directory / "volatile", 10)
        self.images = Images(config, self.records, PathsOnly(config))

    def files(self) -> list[str]:
        roots = (self.directory / "images", self.directory / "disks")
        return sorted(
            str(path.relative_to(self.directory)) for root in roots for path in root.rglob("*") if path.is_file()
        )

    def use(self, image_file: str) -> None:
        top = Layer(location="default", path="web01/disk0.qcow2", format=QCOW2)
        base = Layer(location="default", path=f"_images/{image_file}", format=QCOW2)
        disk = Disk(name="disk0", size_bytes=MIB, layers=(top, base), pci_slot=8)
        VmRecords(self.records).put(VmRecord(vm=Vm(id="1", name="web01", memory_bytes=MIB, cpus=1, disks=(disk,))))


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


async def chunks(*parts: bytes, fails: BaseException | None = None) -> AsyncIterator[bytes]:
    for part in parts:
        yield part
    if fails is not None:
        raise fails


async def test_kernel_and_initrd(host: Host) -> None:
    await host.images.store("linux", "kernel", chunks(b"ker", b"", b"nel"), append="quiet")
    image = await host.images.store("linux", "initrd", chunks(b"initrd"))
    assert (image.kernel_bytes, image.kernel_sha256, image.append) == (
        6,
        hashlib.sha256(b"kernel").hexdigest(),
        "quiet",
    )
    assert (image.initrd_bytes, image.initrd_sha256) == (6, hashlib.sha256(b"initrd").hexdigest())
    assert host.files() == ["images/linux/initrd", "images/linux/kernel"]
    assert await host.images.list() == (image,)

    kernel = await host.images.place_kernel("linux", host.directory / "vm", "root=/dev/vda")
    assert kernel is not None
    assert (kernel.append, kernel.kernel_sha256, kernel.initrd_bytes) == ("root=/dev/vda", image.kernel_sha256, 6)
    assert (host.directory / "vm/initrd").read_bytes() == b"initrd"
    assert host.images.kernels("initrd", hashlib.sha256(b"initrd").hexdigest()) == (
        host.directory / "images/linux/initrd",
    )
    assert host.images.kernels("kernel", hashlib.sha256(b"initrd").hexdigest()) == ()

    await host.images.remove("linux")
    assert (host.files(), await host.images.list()) == ([], ())


async def test_a_part_is_replaced(host: Host) -> None:
    await host.images.store("linux", "kernel", chunks(b"one"), append="quiet")
    image = await host.images.store("linux", "kernel", chunks(b"three"))
    assert (image.kernel_bytes, image.append) == (5, "quiet")
    assert (host.directory / "images/linux/kernel").read_bytes() == b"three"
    await host.images.store("linux", "disk", chunks(bytes(512)))
    image = await host.images.store("linux", "disk", chunks(MAGIC + bytes(1020)))
    assert (image.disk_format, image.disk_bytes, image.disk_virtual_bytes) == (QCOW2, 1024, 1024)
    assert host.files() == ["disks/_images/linux.qcow2", "images/linux/kernel"]
    assert host.images.disk("linux") == ImageFile(host.directory / "disks/_images/linux.qcow2", QCOW2, 1024)


async def test_a_format_that_is_given_is_believed(host: Host) -> None:
    image = await host.images.store("trap", "disk", chunks(MAGIC + bytes(508)), format=RAW)
    assert image.disk_format is RAW
    assert host.files() == ["disks/_images/trap.raw"]


@pytest.mark.parametrize(
    ("part", "content", "code"),
    [
        ("disk", b"x", "disk-invalid"),
        ("disk", MAGIC + b"backing" + bytes(501), "disk-invalid"),
        ("disk", b"", "image-empty"),
        ("kernel", b"", "image-empty"),
        ("firmware", b"x", "image-part-invalid"),
    ],
)
async def test_a_refused_upload_leaves_what_was_there(host: Host, part: str, content: bytes, code: str) -> None:
    await host.images.store("linux", "kernel", chunks(b"kernel"))
    await host.images.store("linux", "disk", chunks(bytes(512)))
    before = host.files(), await host.images.list()
    with pytest.raises(CallerError) as refused:
        await host.images.store("linux", part, chunks(content))
    assert refused.value.code == code
    assert str(host.directory) not in refused.value.message
    assert (host.files(), await host.images.list()) == before
    with pytest.raises(CallerError):
        await host.images.store("new", part, chunks(content))
    assert (host.files(), await host.images.list()) == before


@pytest.mark.parametrize("part", ["kernel", "disk"])
async def test_a_broken_upload_leaves_nothing(host: Host, part: str) -> None:
    with pytest.raises(ConnectionResetError):
        await host.images.store("linux", part, chunks(bytes(512), fails=ConnectionResetError()))
    assert (host.files(), await host.images.list()) == ([], ())
    assert not (host.directory / "images/linux").exists()


async def test_what_a_killed_agents_upload_left_goes_at_the_next_start(host: Host) -> None:
    await host.images.store("linux", "kernel", chunks(b"kernel"))
    rests = [
        host.directory / "images/linux" / f".initrd.{'0' * 32}",
        host.directory / "images/new" / f".kernel.{'0' * 32}",
        host.directory / "disks/_images" / f".new.raw.{'0' * 32}",
    ]
    for rest in rests:
        rest.parent.mkdir(parents=True, exist_ok=True)
        rest.write_bytes(b"half")
    for _ in range(2):
        await host.images.recover()
    assert host.files() == ["images/linux/kernel"]
    assert not rests[1].parent.exists()


async def test_a_full_disk_is_noticed_before_it_is_full(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(host.directory)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=module.KEEP_FREE_BYTES))
    with pytest.raises(HostError) as failed:
        await host.images.store("linux", "disk", chunks(bytes(512)))
    assert failed.value.code == "location-full"
    assert host.files() == []


async def test_a_kernel_has_a_largest_size(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KERNEL_MAX_BYTES", 5)
    with pytest.raises(CallerError) as refused:
        await host.images.store("linux", "kernel", chunks(b"kernel"))
    assert refused.value.code == "image-too-large"
    assert host.files() == []


async def test_an_image_that_backs_a_vm_stays(host: Host) -> None:
    await host.images.store("debian", "disk", chunks(MAGIC + bytes(508)))
    host.use("debian.qcow2")
    for change in (host.images.remove("debian"), host.images.store("debian", "disk", chunks(bytes(512)))):
        with pytest.raises(CallerError, match="web01") as refused:
            await change
        assert (refused.value.code, refused.value.http_status) == ("image-in-use", 409)
    await host.images.store("debian", "kernel", chunks(b"kernel"))
    assert "disks/_images/debian.qcow2" in host.files()
    VmRecords(host.records).delete("1")
    await host.images.remove("debian")
    assert host.files() == []
    assert list((host.directory / "disks").iterdir()) == []


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 64, "_x", "ü"])
async def test_names(host: Host, name: str) -> None:
    with pytest.raises(CallerError) as refused:
        await host.images.store(name, "kernel", chunks(b"kernel"))
    assert refused.value.code == "name-invalid"
    assert "image" in refused.value.message


async def test_what_is_not_there(host: Host) -> None:
    for call in (host.images.remove("x"), host.images.place_kernel("x", host.directory, None)):
        with pytest.raises(CallerError) as refused:
            await call
        assert (refused.value.code, refused.value.http_status) == ("image-unknown", 404)
    await host.images.store("linux", "kernel", chunks(b"kernel"))
    with pytest.raises(CallerError) as refused:
        host.images.disk("linux")
    assert refused.value.code == "image-part-missing"
    await host.images.store("debian", "disk", chunks(bytes(512)))
    assert await host.images.place_kernel("debian", host.directory / "vm", None) is None
