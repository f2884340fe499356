"""The parameters in the boot-sector guest's disk and the name under which built images are kept. Pure."""

import os
import struct
from pathlib import Path

import pytest

from kvmhv.errors import CallerError
from kvmhv.lab.guest_images import AS_FAST_AS_IT_CAN, SOURCES, boot_guest, content_hash, remove_old, write_boot_guest

TEMPLATE = bytes(0x180) + b"KVMHVBG1" + struct.pack("<5I", 1, 2, 3, 4, 5) + b"rest of the disk".ljust(1024)


def test_parameters_go_to_their_places_and_nothing_else_changes() -> None:
    parameters = {"working_set_bytes": 1 << 20, "rate_bytes_per_s": 5, "guest_id": 0xDEADBEEF, "beat_ms": 50}
    image = boot_guest(TEMPLATE, **parameters, write_ms=70)
    assert struct.unpack_from("<5I", image, 0x188) == (1 << 20, 5, 0xDEADBEEF, 50, 70)
    assert image[:0x188] + image[0x19C:] == TEMPLATE[:0x188] + TEMPLATE[0x19C:]


def test_the_places_are_those_of_the_source() -> None:
    source = (SOURCES / "boot" / "boot.S").read_text()
    after = source.split(".org    0x180", 1)[1]
    assert after.index('"KVMHVBG1"') < after.index("/* 0x188 working set") < after.index("/* 0x18c rate")
    assert after.index("/* 0x18c rate") < after.index("/* 0x190 id") < after.index("/* 0x194 milliseconds")
    assert after.index("/* 0x194 milliseconds") < after.index("/* 0x198 milliseconds")


@pytest.mark.parametrize(
    "wrong",
    [
        {"working_set_bytes": 4095},
        {"working_set_bytes": 1 << 32},
        {"rate_bytes_per_s": -1},
        {"rate_bytes_per_s": AS_FAST_AS_IT_CAN + 1},
        {"guest_id": 1 << 32},
        {"beat_ms": 0},
        {"write_ms": 60_001},
    ],
)
def test_parameters_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(CallerError, match=next(iter(wrong))):
        boot_guest(TEMPLATE, **{"working_set_bytes": 4096, "rate_bytes_per_s": 0, **wrong})


@pytest.mark.parametrize("template", [b"", bytes(1 << 20), TEMPLATE[:0x187]])
def test_another_disk_is_refused(template: bytes) -> None:
    with pytest.raises(CallerError, match="not a boot-sector guest"):
        boot_guest(template, working_set_bytes=4096, rate_bytes_per_s=0)


def test_writing_a_disk_leaves_the_template(tmp_path: Path) -> None:
    (tmp_path / "template").write_bytes(TEMPLATE)
    write_boot_guest(tmp_path / "disk", tmp_path / "template", working_set_bytes=4096, rate_bytes_per_s=0)
    assert (tmp_path / "template").read_bytes() == TEMPLATE
    assert struct.unpack_from("<4I", (tmp_path / "disk").read_bytes(), 0x188) == (4096, 0, 0, 100)
    assert struct.unpack_from("<I", (tmp_path / "disk").read_bytes(), 0x198) == (0,)


def test_images_are_kept_under_everything_that_they_are_made_of(tmp_path: Path) -> None:
    def changed(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return content_hash(tmp_path)

    first = changed("a/source", "x")
    assert content_hash(tmp_path) == first
    assert content_hash(tmp_path, "bookworm") != first
    assert changed("a/README.md", "words") == first
    names = {first, changed("a/source", "y"), changed("b", "x")}
    (tmp_path / "b").chmod(0o755)
    names.add(content_hash(tmp_path))
    assert len(names) == 4


def test_only_the_newest_images_are_kept(tmp_path: Path) -> None:
    for age, name in enumerate("abcdef"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest").touch()
        (tmp_path / f"{name}.log").touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "failed.log").touch()
    remove_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*"abcd", *(f"{name}.log" for name in "abcd")])
