"""drivers/storage/directory.py where no qemu-img is needed: paths that stay inside, raw images, removal."""

import errno
from pathlib import Path

import pytest

from kvmhv.config import from_data
from kvmhv.drivers.storage.directory import Directories
from kvmhv.errors import CallerError, HostError
from kvmhv.model import MIB, DiskFormat, Layer

RAW = DiskFormat.RAW


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / "state/disks"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def disks(root: Path, tmp_path: Path) -> Directories:
    (tmp_path / "fast").mkdir()
    locations = {"fast": str(tmp_path / "fast"), "gone": str(tmp_path / "gone")}
    return Directories(from_data({"state_dir": str(root.parent), "locations": locations}, "test"))


def raw(path: str, location: str = "default") -> Layer:
    return Layer(location=location, path=path, format=RAW)


def names(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


@pytest.mark.parametrize("path", ["web01/disk0.raw", "a", "web01/..hidden", "a b", "web01/ümlaut"])
def test_paths_inside(disks: Directories, root: Path, path: str) -> None:
    assert disks.path(raw(path)) == root / path


@pytest.mark.parametrize(
    "path",
    [
        "", ".", "..", "/etc/passwd", "../x", "web01/../../x", "web01/..", "web01//x", "web01/", "./x", "x\0y", "x\ny",
        "a" * 256, "a/" * 600 + "a", "ü" * 128,
    ],
)  # fmt: skip
def test_paths_that_leave_or_cannot_be(disks: Directories, path: str) -> None:
    with pytest.raises(CallerError) as refused:
        disks.path(raw(path))
    assert refused.value.code == "path-invalid"


def test_symlinks(disks: Directories, root: Path, tmp_path: Path) -> None:
    (root / "out").symlink_to(tmp_path)
    (root / "out.raw").symlink_to("/etc/passwd")
    (root / "loop").symlink_to("loop")
    (root / "real").mkdir()
    (root / "in").symlink_to("real")
    for path in ("out/x", "out.raw"):
        with pytest.raises(CallerError) as refused:
            disks.path(raw(path))
        assert refused.value.code == "path-invalid"
    assert disks.path(raw("in/x")) == root / "in/x"


def test_unknown_location(disks: Directories) -> None:
    with pytest.raises(CallerError, match="no location 'nfs'") as refused:
        disks.path(raw("x", "nfs"))
    assert (refused.value.code, refused.value.http_status) == ("location-unknown", 404)


async def test_the_layer_of_a_file(disks: Directories, root: Path, tmp_path: Path) -> None:
    assert await disks.layer_of(root / "web01/../web01/d.raw", RAW) == raw("web01/d.raw")
    assert await disks.layer_of(tmp_path / "fast/d.raw", RAW) == raw("d.raw", "fast")
    assert await disks.layer_of(tmp_path / "d.raw", RAW) is None
    (tmp_path / "way-in").symlink_to(root)
    assert await disks.layer_of(tmp_path / "way-in/d.raw", RAW) == raw("d.raw")


async def test_raw_is_made_sparse_and_exact_and_removed_with_its_directories(disks: Directories, root: Path) -> None:
    await disks.create(raw("web01/disk0.raw"), 3 * MIB + 512, None)
    await disks.create(raw("web01/disk1.raw"), 512, None)
    file = root / "web01/disk0.raw"
    assert (file.stat().st_size, file.stat().st_mode & 0o777) == (3 * MIB + 512, 0o600)
    assert await disks.used_bytes(raw("web01/disk0.raw")) == 0
    await disks.remove(raw("web01/disk0.raw"))
    await disks.remove(raw("web01/disk0.raw"))
    assert names(root / "web01") == ["disk1.raw"]
    await disks.remove(raw("web01/disk1.raw"))
    assert names(root) == []
    with pytest.raises(HostError) as missing:
        await disks.used_bytes(raw("web01/disk0.raw"))
    assert missing.value.code == "disk-missing"


@pytest.mark.parametrize("size_bytes", [0, -512, 511, 513])
async def test_sizes_that_are_no_sectors(disks: Directories, root: Path, size_bytes: int) -> None:
    with pytest.raises(CallerError) as refused:
        await disks.create(raw("web01/disk0.raw"), size_bytes, None)
    assert refused.value.code == "size-invalid"
    assert names(root) == []


async def test_what_is_there_is_not_overwritten(disks: Directories, root: Path) -> None:
    (root / "web01").mkdir()
    (root / "web01/disk0.raw").write_text("precious")
    (root / "web01/disk1.raw").symlink_to("nowhere")
    for path in ("web01/disk0.raw", "web01/disk1.raw"):
        with pytest.raises(HostError) as refused:
            await disks.create(raw(path), MIB, None)
        assert refused.value.code == "file-exists"
    assert (root / "web01/disk0.raw").read_text() == "precious"
    assert not (root / "web01/nowhere").exists()


async def test_a_failed_create_leaves_no_directory(disks: Directories, root: Path) -> None:
    with pytest.raises(CallerError) as refused:
        await disks.create(raw("web01/deep/disk0.raw"), MIB, raw("base.raw"))
    assert refused.value.code == "disk-invalid"
    (root / "file").touch()
    with pytest.raises(HostError) as failed:
        await disks.create(raw("file/disk0.raw"), MIB, None)
    assert failed.value.code == "file-exists"
    assert names(root) == ["file"]


async def test_only_the_default_location_is_made(disks: Directories, root: Path, tmp_path: Path) -> None:
    """Another one whose directory is missing may be a file system that is not mounted."""
    with pytest.raises(HostError) as failed:
        await disks.create(raw("web01/disk0.raw", "gone"), MIB, None)
    assert failed.value.code == "location-missing"
    assert not (tmp_path / "gone").exists()
    root.rmdir()  # noqa: ASYNC240
    await disks.create(raw("web01/disk0.raw"), MIB, None)


async def test_locations_say_their_space(disks: Directories, root: Path) -> None:
    default, fast, gone = await disks.locations()
    assert (default.name, default.path, default.kind) == ("default", str(root), "dir")
    assert 0 < default.free_bytes <= default.total_bytes
    assert fast.total_bytes == default.total_bytes
    assert (gone.name, gone.free_bytes, gone.total_bytes) == ("gone", 0, 0)
    root.rmdir()  # noqa: ASYNC240
    assert (await disks.locations())[0].total_bytes == default.total_bytes


async def test_a_location_whose_disk_fails_is_described_all_the_same(
    disks: Directories, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(path: Path, *_: object, **__: object) -> bool:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "exists", failing)
    default = next(location for location in await disks.locations() if location.name == "default")
    assert (default.path, default.free_bytes, default.total_bytes) == (str(root), 0, 0)
