"""Records beside images in a directory: swapped against what was read, one host at a time."""

import asyncio
import threading
from pathlib import Path

import pytest

from kvmhv.config import Waits, from_data
from kvmhv.drivers.storage.storage import THREADS, Storage
from kvmhv.drivers.storage.volumes import DirectoryVolume, LunVolume
from kvmhv.errors import HostError
from kvmhv.places import Lun


@pytest.fixture
def volume(tmp_path: Path) -> DirectoryVolume:
    return DirectoryVolume(tmp_path, Waits())


def test_a_record_is_changed_only_if_it_is_as_it_was_read(volume: DirectoryVolume) -> None:
    name = volume.owner_record("disk0.raw")
    assert volume.read_record(name) is None
    assert volume.swap_record(name, None, b"a")
    assert not volume.swap_record(name, None, b"b")
    assert not volume.swap_record(name, b"x", b"b")
    assert volume.read_record(name) == b"a"
    assert volume.swap_record(name, b"a", b"b")
    assert volume.swap_record(name, b"b", None)
    assert volume.read_record(name) is None
    assert list(volume.root.iterdir()) == []


def test_many_at_once_lose_no_change(volume: DirectoryVolume) -> None:
    assert volume.swap_record("count", None, b"0")

    def add() -> None:
        done = 0
        while done < 10:
            old = volume.read_record("count") or b""
            done += volume.swap_record("count", old, b"%d" % (int(old) + 1))

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert volume.read_record("count") == b"40"


def test_a_lock_that_nobody_lets_go_is_named(tmp_path: Path) -> None:
    volume = DirectoryVolume(tmp_path, Waits(share_lock_s=0.01))
    (volume.root / "record.lock").touch()
    with pytest.raises(OSError, match=r"record\.lock"):
        volume.swap_record("record", None, b"a")
    assert volume.read_record("record") is None


@pytest.mark.parametrize("path", ["", "x", "1", "-1", "99999", "2/3", "\u0662"])
def test_a_lun_for_a_disk_is_a_number_and_not_the_records_lun(path: str) -> None:
    volume = LunVolume(Lun(portal="p:3260", target="iqn", lun=1, initiator="iqn"), "", lambda _record: True, Waits())
    with pytest.raises(OSError, match="no number"):
        volume.place(path)
    assert volume.place("2") == Lun(portal="p:3260", target="iqn", lun=2, initiator="iqn")


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(from_data({"state_dir": str(tmp_path)}, "test"))


async def test_more_looks_at_once_than_threads_wait_for_their_turn(storage: Storage) -> None:
    looks = (storage.ask("share", lambda number=number: number) for number in range(4 * THREADS))
    assert await asyncio.gather(*looks) == list(range(4 * THREADS))


async def test_a_share_that_hangs_is_told_of_in_time_and_then_at_once(tmp_path: Path) -> None:
    storage = Storage(from_data({"state_dir": str(tmp_path), "waits": {"share_answer_s": 0.2}}, "test"))
    back = threading.Event()
    for _ in range(THREADS):
        with pytest.raises(HostError) as silent:
            await storage.ask("share", back.wait)
        assert silent.value.code == "location-silent"
    assert not storage.is_quiet("share")
    with pytest.raises(HostError):  # at once: all its threads hang
        await asyncio.wait_for(storage.ask("share", lambda: 1), 0.1)
    assert await storage.ask("other", lambda: 1) == 1
    back.set()
    async with asyncio.timeout(10):
        while not storage.is_quiet("share"):  # noqa: ASYNC110 - there is nothing to be told by
            await asyncio.sleep(0.001)
    assert await storage.ask("share", lambda: 1) == 1
