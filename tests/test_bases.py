"""Base images by content: the digest of what a guest reads, when it holds, and what is made with it."""

import asyncio
import contextlib
import os
import subprocess
from pathlib import Path

import msgspec
import pytest

from kvmhv.agent.bases import KIND, Bases
from kvmhv.config import Waits, from_data
from kvmhv.core import plan, savings
from kvmhv.drivers.database import Database
from kvmhv.drivers.storage import contents
from kvmhv.drivers.storage.contents import Contents
from kvmhv.drivers.storage.qemu_img import ImageFile
from kvmhv.drivers.storage.storage import Storage
from kvmhv.errors import HostError
from kvmhv.model import GIB, MIB, Base, Disk, DiskFormat, DiskSent, Layer, MoveRequest, Plan, Rule, Timeouts, Vm
from tests.sim import examples

QCOW2, RAW = DiskFormat.QCOW2, DiskFormat.RAW
SIZE_BYTES = 8 * MIB + 512


def write_raw(file: Path, seed: int = 1) -> None:
    """Data in the first, third and last block, the rest of them zeros; the third is written twice by hand."""
    with file.open("wb") as image:
        image.truncate(SIZE_BYTES)
        for offset, length in ((0, MIB), (2 * MIB + 4096, 100), (SIZE_BYTES - 512, 512)):
            image.seek(offset)
            image.write(bytes([seed]) * length)
        image.seek(5 * MIB)
        image.write(bytes(MIB))


def convert(file: Path, target: Path, *options: str) -> None:
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", *options, file, target], check=True, timeout=30)


async def read(file: Path, kind: DiskFormat, size_bytes: int = SIZE_BYTES) -> Contents:
    return await contents.read("", ImageFile(file, kind, size_bytes), waits=Waits(image_copy_s=20.0))


# --- the digest


async def test_the_digest_is_of_what_a_guest_reads(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.raw")
    convert(tmp_path / "a.raw", tmp_path / "plain.qcow2")
    convert(tmp_path / "a.raw", tmp_path / "packed.qcow2", "-c")
    found = await read(tmp_path / "a.raw", RAW)
    assert found.data_bytes == 2 * MIB + 512
    assert await read(tmp_path / "plain.qcow2", QCOW2) == found
    assert await read(tmp_path / "packed.qcow2", QCOW2) == found


async def test_every_bit_its_place_and_the_size_count(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.raw")
    whole = (tmp_path / "a.raw").read_bytes()
    seen = {(await read(tmp_path / "a.raw", RAW)).sha256}
    others = (
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole[:100] + b"\0" + whole[101:],
        whole[MIB : 2 * MIB] + whole[:MIB] + whole[2 * MIB :],
        whole + bytes(512),
        whole[:-512],
        bytes(SIZE_BYTES),
    )
    for number, other in enumerate(others):
        (tmp_path / f"{number}.raw").write_bytes(other)
        seen.add((await read(tmp_path / f"{number}.raw", RAW, len(other))).sha256)
    assert len(seen) == 1 + len(others)


@pytest.mark.parametrize(
    ("name", "kind", "size_bytes", "says"),
    [
        ("none.raw", RAW, SIZE_BYTES, "No such file"),
        ("a.raw", QCOW2, SIZE_BYTES, "not in qcow2 format"),
        ("a.raw", RAW, GIB, "and should have"),
    ],
)
async def test_what_cannot_be_read_says_why(
    tmp_path: Path, name: str, kind: DiskFormat, size_bytes: int, says: str
) -> None:
    write_raw(tmp_path / "a.raw")
    with pytest.raises(HostError, match=says):
        await read(tmp_path / name, kind, size_bytes)


async def test_a_read_that_is_given_up_leaves_no_process(tmp_path: Path) -> None:
    write_raw(tmp_path / "a.raw")
    image = ImageFile(tmp_path / "a.raw", RAW, SIZE_BYTES)
    with pytest.raises(HostError, match="not read in"):
        await contents.read("", image, waits=Waits(image_copy_s=1.0), pace_bytes_per_s=MIB)
    assert not _processes(b"qemu-nbd", bytes(image.file))


def _processes(*words: bytes) -> list[bytes]:
    """Return the command lines of this machine that have all these words."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(cmdline.read_bytes())
    return [text for text in found if all(word in text for word in words)]


# --- what a host knows


class Host:
    """A host's bases, over real files."""

    def __init__(self, directory: Path) -> None:
        self.root = directory / "disks"
        (self.root / "web01").mkdir(parents=True)
        self.layers: list[tuple[Layer, int]] = []
        self.records = Database(directory / "kvmhv.db", directory / "volatile", 10)
        self.disks = Storage(from_data({"name": "host1", "state_dir": str(directory)}, "test"))
        self.bases = Bases(self.records, self.disks, lambda: self.layers)

    def add(self, name: str, seed: int = 1) -> Layer:
        """Make a raw image that is a base."""
        layer = Layer(location="default", path=name, format=RAW)
        write_raw(self.root / name, seed)
        self.layers.append((layer, SIZE_BYTES))
        return layer

    def known(self) -> list[str]:
        """Return which files have a digest."""
        return [key for key, _ in self.records.all(KIND)]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def over(layer: Layer) -> Vm:
    """A VM whose disk stands on a base."""
    top = Layer(location="default", path="web01/disk0.qcow2", format=QCOW2)
    disk = Disk(name="disk0", size_bytes=SIZE_BYTES, layers=(top, layer), pci_slot=4)
    return msgspec.structs.replace(examples.vm(disks=0), disks=(disk,))


async def sha256_of(host: Host, layer: Layer) -> str:
    found = await host.bases.of(over(layer), lambda file: True)
    return found["disk0"].sha256


async def test_a_digest_holds_as_long_as_the_file_is_the_same(host: Host) -> None:
    layer = host.add("a.raw")
    assert await host.bases.of(over(layer), lambda file: True) == {}
    await host.bases.look()
    base = (await host.bases.of(over(layer), lambda file: True))["disk0"]
    assert base.data_bytes == 2 * MIB + 512
    assert await host.bases.there((base.sha256, "0" * 64)) == (base.sha256,)
    file = host.root / "a.raw"
    before = file.stat()
    with file.open("r+b") as image:
        image.write(b"x")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # the kernel's own time tells all the same
    assert await host.bases.of(over(layer), lambda file: True) == {}
    assert await host.bases.there((base.sha256,)) == ()
    await host.bases.look()
    assert (await sha256_of(host, layer)) != base.sha256


async def test_another_file_under_the_name_is_another_base(host: Host) -> None:
    layer = host.add("a.raw")
    await host.bases.look()
    before = await sha256_of(host, layer)
    write_raw(host.root / "b.raw")
    (host.root / "b.raw").rename(host.root / "a.raw")
    assert await host.bases.there((before,)) == ()
    (host.root / "a.raw").unlink()
    await host.bases.look()
    assert host.known() == []


async def test_a_base_counts_only_if_qemu_has_that_very_file_and_it_lies_below_another(host: Host) -> None:
    layer = host.add("a.raw")
    await host.bases.look()
    assert await host.bases.of(over(layer), lambda file: False) == {}
    alone = over(layer)
    alone = msgspec.structs.replace(alone, disks=(msgspec.structs.replace(alone.disks[0], layers=(layer,)),))
    assert await host.bases.of(alone, lambda file: True) == {}


async def test_one_that_cannot_be_read_keeps_no_other_from_it(host: Host) -> None:
    host.layers.append((Layer(location="default", path="none.raw", format=RAW), SIZE_BYTES))
    host.layers.append((Layer(location="elsewhere", path="x.raw", format=RAW), SIZE_BYTES))
    host.add("a.raw")
    await host.bases.look()
    assert host.known() == ["default/a.raw"]


async def test_a_location_that_does_not_answer_makes_nothing_forgotten(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = host.add("a.raw")
    await host.bases.look()
    wanted = await sha256_of(host, layer)

    async def silent(_: Layer) -> str | None:
        raise HostError("location-silent", "location 'default' does not answer")

    with monkeypatch.context() as away:
        away.setattr(host.disks, "mark", silent)
        await host.bases.look()
        assert await host.bases.there((wanted,)) == ()
    assert await host.bases.there((wanted,)) == (wanted,)


async def test_what_is_new_is_read_soon(host: Host) -> None:
    keeping = asyncio.create_task(host.bases.keep())
    try:
        await asyncio.sleep(0)
        host.add("a.raw")
        host.bases.look_soon()
        for _ in range(1000):
            if host.known():
                break
            await asyncio.sleep(0.02)
        assert host.known() == ["default/a.raw"]
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


@pytest.mark.parametrize("kind", [RAW, QCOW2])
async def test_a_copy_is_made_and_read(host: Host, kind: DiskFormat) -> None:
    layer = host.add("a.raw")
    await host.bases.look()
    wanted = await sha256_of(host, layer)
    made = Layer(location="default", path=f"web01/disk0.base1.{kind.value}", format=kind)
    await host.bases.copy(wanted, made, SIZE_BYTES)
    assert (await read(host.root / made.path, kind)).sha256 == wanted
    assert (host.root / made.path).stat().st_ino != (host.root / "a.raw").stat().st_ino
    assert f"default/{made.path}" in host.known()


async def test_a_copy_that_holds_something_else_is_refused_and_forgotten(host: Host) -> None:
    layer, other = host.add("a.raw"), host.add("b.raw", seed=2)
    await host.bases.look()
    wanted = await sha256_of(host, layer)
    records = dict(host.records.all(KIND))
    lie = {**msgspec.json.decode(records["default/b.raw"]), "sha256": wanted}
    host.records.put(KIND, "default/b.raw", msgspec.json.encode(lie))
    (host.root / "a.raw").unlink()
    made = Layer(location="default", path="web01/disk0.base1.raw", format=RAW)
    with pytest.raises(HostError) as refused:
        await host.bases.copy(wanted, made, SIZE_BYTES)
    assert refused.value.code == "base-differs"
    assert await host.bases.there((wanted,)) == ()
    assert f"default/{other.path}" not in host.known()


async def test_what_is_gone_since_the_plan_is_missing(host: Host) -> None:
    layer = host.add("a.raw")
    await host.bases.look()
    wanted = await sha256_of(host, layer)
    made = Layer(location="default", path="web01/disk0.base1.raw", format=RAW)
    for sha256, size_bytes in (("0" * 64, SIZE_BYTES), (wanted, SIZE_BYTES + 512)):
        with pytest.raises(HostError) as refused:
            await host.bases.copy(sha256, made, size_bytes)
        assert refused.value.code == "base-missing"


async def test_a_damaged_record_is_none(host: Host) -> None:
    layer = host.add("a.raw")
    host.records.put(KIND, "default/a.raw", b"{")
    assert await host.bases.of(over(layer), lambda file: True) == {}
    assert await host.bases.there(("0" * 64,)) == ()


# --- the plan

BASE = Base(sha256="a" * 64, data_bytes=700 * MIB, stored_bytes=300 * MIB)


def planned(*, here: bool = True, there: bool = True, base: Base = BASE, prepare_s: float = 120.0) -> Plan:
    """Return the plan for a disk of which 400 MiB are stored, 300 of them in its base."""
    moving = over(Layer(location="default", path="_images/debian.qcow2", format=QCOW2))
    source = examples.inventory("host1", running=moving)
    assert source.facts_of_vm is not None
    facts = msgspec.structs.replace(
        source.facts_of_vm, disk_used_bytes={"disk0": 400 * MIB}, bases={"disk0": base} if here else {}
    )
    source = msgspec.structs.replace(source, facts_of_vm=facts)
    target = msgspec.structs.replace(examples.inventory("host2", octet=2), bases=(base.sha256,) if there else ())
    request = MoveRequest(vm=moving.name, target="host2", include_storage=True)
    assert savings.bases(source) == ((base.sha256,) if here else ())
    return plan.make(moving, request, Rule(), Timeouts(prepare_s=prepare_s), source, target)


def test_a_base_that_both_know_is_not_sent_and_the_estimate_knows_it() -> None:
    with_it, without = planned(), planned(there=False)
    (copy,) = with_it.disk_copies
    assert copy.base == BASE
    assert copy.travelling_bytes == 100 * MIB
    assert without.estimate_bytes - with_it.estimate_bytes == 300 * MIB
    assert [layer.path for layer in copy.target_layers] == ["web01/disk0.qcow2", "web01/disk0.base1.qcow2"]
    assert without.disk_copies[0].base is None
    assert planned(here=False).disk_copies[0].base is None


def test_a_base_that_takes_too_long_to_copy_is_sent() -> None:
    assert planned(prepare_s=43.0).disk_copies[0].base is None
    assert planned(prepare_s=44.0).disk_copies[0].base == BASE


def test_the_report_tells_the_base_from_zeros() -> None:
    (found,) = savings.of_disks(planned(), (DiskSent(disk="disk0", sent_bytes=90 * MIB),))
    assert (found.base_bytes, found.zero_bytes) == (700 * MIB, 10 * MIB)
