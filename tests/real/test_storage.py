"""drivers/storage with a real qemu-img (the lab tree's, where the machine has none) on real files."""

import asyncio
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvmhv.config import Config, Waits, from_data
from kvmhv.drivers.storage.directory import Directories
from kvmhv.errors import CallerError, HostError
from kvmhv.lab import tree
from kvmhv.model import MIB, DiskFormat, Layer

pytestmark = pytest.mark.real

QCOW2, RAW = DiskFormat.QCOW2, DiskFormat.RAW


@pytest.fixture(scope="session", params=["tree", "machine"])
def tools(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with qemu-img and qemu-io: those of the lab's tree, and the machine's own if it has them."""
    directory = tmp_path_factory.mktemp("bin")
    if request.param == "machine":
        for name in ("qemu-img", "qemu-io"):
            found = shutil.which(name)
            assert found is not None, f"this machine has no {name}: script/setup --dev installs it"
            (directory / name).symlink_to(found)
        return directory
    root = tree.ensure_trees(["trixie"], print)["trixie"]
    libraries = f"{root}/usr/lib/x86_64-linux-gnu"
    for name in ("qemu-img", "qemu-io"):
        script = directory / name
        script.write_text(
            f'#!/bin/sh\nexec {libraries}/ld-linux-x86-64.so.2 --library-path {libraries} {root}/usr/bin/{name} "$@"\n'
        )
        script.chmod(0o755)
    return directory


@pytest.fixture
def config(tmp_path: Path, tools: Path) -> Config:
    (tmp_path / "state/disks").mkdir(parents=True)
    (tmp_path / "fast").mkdir()
    return from_data(
        {
            "name": "host1",
            "state_dir": str(tmp_path / "state"),
            "locations": {"fast": str(tmp_path / "fast")},
            "qemu_binary": str(tools / "qemu-system-x86_64"),
        },
        "test",
    )


@pytest.fixture
def disks(config: Config) -> Directories:
    return Directories(config)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    directory = tmp_path / "outside"
    directory.mkdir()
    return directory


@pytest.fixture
def img(tools: Path) -> "Tool":
    return Tool(tools / "qemu-img")


@pytest.fixture
def io(tools: Path) -> "Tool":
    return Tool(tools / "qemu-io")


class Tool:
    def __init__(self, binary: Path) -> None:
        self._binary = binary

    def __call__(self, *arguments: object) -> str:
        command = [str(self._binary), *(str(argument) for argument in arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def layer(path: str, kind: DiskFormat = QCOW2, location: str = "default") -> Layer:
    return Layer(location=location, path=path, format=kind)


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


@pytest.mark.parametrize("size_bytes", [512, 1 * MIB, 3 * MIB + 512, 4 * 1024**4])
@pytest.mark.parametrize("kind", [QCOW2, RAW])
async def test_create_makes_the_exact_size_sparse(
    disks: Directories, img: Tool, kind: DiskFormat, size_bytes: int
) -> None:
    made = layer("web01/disk0", kind)
    await disks.create(made, size_bytes, None)
    info = json.loads(img("info", "--output=json", "-f", kind, disks.path(made)))
    assert info["virtual-size"] == size_bytes
    assert await disks.used_bytes(made) < 2 * MIB
    assert disks.path(made).stat().st_mode & 0o777 == 0o600


async def test_create_on_backing_names_it_relatively(disks: Directories, img: Tool) -> None:
    base, top = layer("_images/base.raw", RAW), layer("web01/disk0.qcow2")
    await disks.create(base, 1 * MIB, None)
    await disks.create(top, 2 * MIB, base)
    info = json.loads(img("info", "--output=json", "-f", "qcow2", disks.path(top)))
    assert (info["backing-filename"], info["backing-filename-format"]) == ("../_images/base.raw", "raw")
    described_format, size_bytes, chain = await disks.describe(disks.path(top))
    assert (described_format, size_bytes) == ("qcow2", 2 * MIB)
    assert [file.resolve() for file in chain] == [disks.path(top), disks.path(base)]


async def test_an_existing_file_is_never_touched(disks: Directories, config: Config) -> None:
    wanted = layer("web01/disk0.qcow2")
    file = disks.path(wanted)
    file.parent.mkdir()
    file.write_bytes(b"precious")
    with pytest.raises(HostError) as failed:
        await disks.create(wanted, 1 * MIB, None)
    assert failed.value.code == "file-exists"
    with pytest.raises(HostError):
        await disks.copy_in(_raw(file.with_name("in.raw")), wanted)
    assert file.read_bytes() == b"precious"


async def test_without_qemu_img_a_create_says_so_and_leaves_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    nowhere = Directories(from_data({"state_dir": config.state_dir, "qemu_binary": "/nowhere/qemu"}, "test"))
    with pytest.raises(HostError) as failed:
        await nowhere.create(layer("web01/a/disk0.qcow2"), 1 * MIB, None)
    assert failed.value.code == "qemu-img-missing"
    assert files(config.state_path / "disks") == []


async def test_a_cancelled_copy_leaves_nothing(config: Config, tools: Path, outside: Path) -> None:
    """qemu-img writes all of it, and is then as slow as it takes."""
    real, slow, written = tools / "qemu-img", outside / "bin/qemu-img", outside / "written"
    slow.parent.mkdir()
    slow.write_text(
        f'#!/bin/sh\n[ "$1" = convert ] || exec {real} "$@"\n{real} "$@" && : >{written} && exec sleep 600\n'
    )
    slow.chmod(0o755)
    slow_disks = Directories(msgspec.structs.replace(config, qemu_binary=str(slow.with_name("qemu-system-x86_64"))))
    copying = asyncio.create_task(slow_disks.copy_in(_raw(outside / "a.raw"), layer("web01/disk0.qcow2")))
    async with asyncio.timeout(30):
        while not written.exists():  # noqa: ASYNC110 - another program makes it
            await asyncio.sleep(0.01)
    assert files(config.state_path / "disks") != []
    copying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert files(config.state_path / "disks") == []


async def test_who_is_cancelled_before_he_hears_that_the_file_is_made_leaves_nothing(
    disks: Directories, config: Config, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, heard = threading.Event(), threading.Event()
    reserve = disks._reserve

    def slowly(wanted: Layer) -> Path:
        file = reserve(wanted)
        made.set()
        heard.wait(30)
        return file

    monkeypatch.setattr(disks, "_reserve", slowly)
    copying = asyncio.create_task(disks.copy_in(_raw(outside / "a.raw"), layer("web01/disk0.qcow2")))
    assert await asyncio.to_thread(made.wait, 30)
    assert files(config.state_path / "disks") != []
    copying.cancel()
    heard.set()
    with pytest.raises(asyncio.CancelledError):
        await copying
    assert files(config.state_path / "disks") == []


async def test_copy_in_flattens_and_converts(disks: Directories, img: Tool, io: Tool, outside: Path) -> None:
    img("create", "-q", "-f", "qcow2", outside / "base.qcow2", "4M")
    io("-f", "qcow2", "-c", "write -P 1 0 64k", "-c", "write -P 2 1M 64k", outside / "base.qcow2")
    img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", outside / "top.qcow2")
    io("-f", "qcow2", "-c", "write -P 3 0 64k", "-c", "write -z 1M 64k", outside / "top.qcow2")
    for kind in DiskFormat:
        target = layer(f"web01/disk.{kind}", kind)
        await disks.copy_in(outside / "top.qcow2", target)
        img("compare", "-q", "-f", "qcow2", "-F", kind, outside / "top.qcow2", disks.path(target))
        assert len((await disks.describe(disks.path(target)))[2]) == 1


async def test_copy_file_keeps_the_chain(disks: Directories, img: Tool, io: Tool, outside: Path) -> None:
    img("create", "-q", "-f", "raw", outside / "base.raw", "2M")
    io("-f", "raw", "-c", "write -P 1 0 64k", outside / "base.raw")
    img("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", outside / "top.qcow2")
    io("-f", "qcow2", "-c", "write -P 3 64k 64k", outside / "top.qcow2")
    top, base = await disks.chain(outside / "top.qcow2", QCOW2)
    new_base, new_top = layer("web01/disk0.base1.raw", RAW), layer("web01/disk0.qcow2")
    await disks.copy_file(base, new_base, None)
    await disks.copy_file(top, new_top, new_base)
    img("compare", "-q", outside / "top.qcow2", disks.path(new_top))
    (outside / "base.raw").unlink()
    found = await disks.chain(disks.path(new_top), QCOW2)
    assert [image.file.resolve() for image in found] == [disks.path(new_top), disks.path(new_base)]
    assert [image.format for image in found] == [QCOW2, RAW]


async def test_a_raw_disk_with_a_qcow2_header_inside_is_raw(disks: Directories, img: Tool, outside: Path) -> None:
    """A guest can write such a header; with the format given it is not believed."""
    img("create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", outside / "trap.raw", "1M")
    with (outside / "trap.raw").open("r+b") as file:
        file.truncate(1 * MIB)
    (image,) = await disks.chain(outside / "trap.raw", RAW)
    assert (image.format, image.size_bytes) == (RAW, 1 * MIB)


async def test_a_running_qemu_holds_its_disk(disks: Directories, img: Tool, tools: Path, outside: Path) -> None:
    file = outside / "held.qcow2"
    img("create", "-q", "-f", "qcow2", file, "1M")
    with subprocess.Popen(  # noqa: ASYNC220 - ends with the test
        [tools / "qemu-io", "-f", "qcow2", file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        holder.stdin.write("length\n")
        holder.stdin.flush()
        assert "1 MiB" in holder.stdout.readline()
        with pytest.raises(CallerError) as refused:
            await disks.chain(file, QCOW2)
        assert refused.value.code == "disk-in-use"
        assert (await disks.describe(file))[1] == 1 * MIB
        holder.stdin.write("quit\n")
        holder.stdin.close()


def _raw(file: Path) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(os.urandom(1 * MIB))
    return file


@pytest.fixture
def broken(img: Tool, outside: Path) -> Iterator[dict[str, Path]]:
    """Files that are no disk, each by what is wrong with it."""
    (outside / "directory").mkdir()
    os.mkfifo(outside / "fifo")
    (outside / "text").write_text("this is no disk\n")
    (outside / "empty").touch()
    (outside / "loop").symlink_to(outside / "loop")
    img("create", "-q", "-f", "vmdk", outside / "vmdk", "1M")
    img("create", "-q", "-f", "qcow2", "-u", "-b", "missing.qcow2", "-F", "qcow2", outside / "chain-missing", "1M")
    img("create", "-q", "-f", "qcow2", "-u", "-b", "chain-loop", "-F", "qcow2", outside / "chain-loop", "1M")
    img("create", "-q", "-f", "qcow2", "-u", "-b", "nbd://127.0.0.1/x", "-F", "raw", outside / "chain-nbd", "1M")
    hidden = 'json:{"driver":"file","filename":"/etc/passwd"}'
    img("create", "-q", "-f", "qcow2", "-u", "-b", hidden, "-F", "raw", outside / "chain-json", "1M")
    img("create", "-q", "-f", "qcow2", "-o", f"data_file={outside}/data", outside / "data-file", "1M")
    (outside / "header-only").write_bytes((outside / "chain-missing").read_bytes()[:60])
    img("create", "-q", "-f", "raw", outside / "long0", "1M")
    for number in range(1, 34):
        kind = "raw" if number == 1 else "qcow2"
        img("create", "-q", "-f", "qcow2", "-u", "-b", f"long{number - 1}", "-F", kind, outside / f"long{number}", "1M")
    yield {path.name: path for path in outside.iterdir()}


BROKEN = {
    "directory": "directory",
    "fifo": "device, socket or pipe",
    "text": "no whole number of 512-byte sectors",
    "empty": "0 bytes",
    "loop": "symbolic|symlink|loop",
    "absent": "no such file",
    "vmdk": "format is vmdk",
    "chain-missing": "no such file",
    "chain-loop": "loop",
    "chain-nbd": "not a plain file",
    "chain-json": "not a plain file",
    "data-file": "further file",
    "long33": "more than 32 layers",
}


@pytest.mark.timeout(Waits().image_look_s * 4)
async def test_what_is_no_disk_is_refused_with_the_reason(
    disks: Directories, config: Config, broken: dict[str, Path], outside: Path
) -> None:
    for name, reason in BROKEN.items():
        with pytest.raises(CallerError, match=f"(?i){reason}") as refused:
            await disks.chain(outside / name, None)
        assert refused.value.code == "disk-invalid", name
        with pytest.raises(CallerError):
            await disks.copy_in(outside / name, layer("web01/disk0.qcow2"))
    with pytest.raises(CallerError):
        await disks.chain(outside / "header-only", QCOW2)
    assert len(await disks.chain(outside / "long31", None)) == 32
    assert files(config.state_path / "disks") == []
