"""Files that were damaged, cut off, written by another version, or are none: read, or refused with a known code."""

import asyncio
import contextlib
import json
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhv.agent.past_moves import read as read_reports
from kvmhv.config import Waits
from kvmhv.core import ownership
from kvmhv.core.ownership import Owner
from kvmhv.core.source_state import SourceState, report
from kvmhv.drivers.database import SEAL, Database
from kvmhv.drivers.storage import qemu_img
from kvmhv.errors import CallerError, HostError
from kvmhv.model import DiskFormat
from tests.fuzz import garble
from tests.sim import examples

STATE = msgspec.msgpack.encode(examples.source_state(examples.vm()))
GRANTED = msgspec.msgpack.encode(msgspec.structs.replace(examples.source_state(examples.vm()), step="granted"))
DOCUMENTED = {"database", "database-newer", "journal-damaged"}


def _kept(directory: Path) -> Path:
    """A journal with an open move: on disk as it began, volatile as it was granted."""
    database = Database(directory / "kvmhv.db", directory / "volatile", 10)
    database.put("vm", "1", b"{}")
    database.write("move-1", "source", STATE, durable=True)
    database.write("move-1", "source", GRANTED, durable=False)
    database.end("move-0", "source", b"{}")
    assert database.volatile_id
    database.close()
    return directory


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _kept(tmp_path_factory.mktemp("kept"))


def _opened(directory: Path) -> tuple[str, tuple[tuple[str, str, bytes], ...]]:
    """What the next agent reads: the volatile journal's name after it, and the open moves."""
    database = Database(directory / "kvmhv.db", directory / "volatile", 10)
    try:
        found = database.load()
        database.all("vm")
        list(read_reports(database.reports()))
        return database.volatile_id, found
    finally:
        database.close()


@given(st.data())
@settings(max_examples=80 if settings.default.max_examples < 1000 else 1500)
def test_a_damaged_volatile_journal_is_never_taken_for_silence(kept: Path, data: st.DataObject) -> None:
    """Whatever became of the entry: it is read as it was, or the volatile journal has another name from then on."""
    with tempfile.TemporaryDirectory() as name:
        directory = shutil.copytree(kept, Path(name) / "state")
        before, intact = _opened(directory)
        assert intact[0][2] == GRANTED
        entry = directory / "volatile" / "move-1.source"
        act = data.draw(st.sampled_from(("spoil", "spoil", "spoil", "remove", "directory")))
        if act == "spoil":
            entry.write_bytes(data.draw(garble.spoilt(entry.read_bytes())))
        else:
            entry.unlink()
            if act == "directory":
                entry.mkdir()
        after, found = _opened(directory)
        if found[0][2] != GRANTED:
            assert found[0][2] == STATE
            assert after != before or act == "remove"


@given(st.data())
@settings(max_examples=80 if settings.default.max_examples < 1000 else 1500)
def test_a_damaged_database_is_read_as_it_was_or_refused(kept: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = shutil.copytree(kept, Path(name) / "state")
        shutil.rmtree(directory / "volatile")
        file = directory / "kvmhv.db"
        file.write_bytes(data.draw(garble.spoilt(file.read_bytes())))
        try:
            _, found = _opened(directory)
        except HostError as error:
            assert error.code in DOCUMENTED
        else:
            assert all(state == STATE for _, _, state in found)


@pytest.mark.parametrize("what", ["kvmhv.db", "volatile", "volatile/id"])
@pytest.mark.parametrize("other", ["directory", "file", "bytes"])
def test_something_else_in_its_place(tmp_path: Path, what: str, other: str) -> None:
    place = _kept(tmp_path) / what
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    if other == "directory":
        place.mkdir()
    else:
        place.write_bytes(b"" if other == "file" else b"\xff\x00\xfe" * 100)
    try:
        _opened(tmp_path)
    except HostError as error:
        assert error.code in DOCUMENTED


def test_a_schema_that_is_no_text(tmp_path: Path) -> None:
    file = _kept(tmp_path) / "kvmhv.db"
    damaged = file.read_bytes().replace(b"tablerecords", b"table\xd4ecords").replace(b"CREATE TABLE", b"CREATE TABLF")
    file.write_bytes(damaged)
    with pytest.raises(HostError) as caught:
        _opened(tmp_path)
    assert caught.value.code == "database"


def test_rows_of_an_older_and_a_newer_run(tmp_path: Path) -> None:
    _kept(tmp_path)
    with sqlite3.connect(tmp_path / "kvmhv.db") as sqlite:
        sqlite.execute("UPDATE journal SET state = ?, sequence = 99", (STATE,))
    assert _opened(tmp_path)[1][0][2] == STATE, "an older kvmhv kept it without a seal"
    with sqlite3.connect(tmp_path / "kvmhv.db") as sqlite:
        sqlite.execute("UPDATE journal SET state = ?", (SEAL + b"\0" * 16 + STATE,))
    with pytest.raises(HostError, match="damaged"):
        _opened(tmp_path)
    with sqlite3.connect(tmp_path / "kvmhv.db") as sqlite:
        sqlite.execute("PRAGMA user_version = 99")
    with pytest.raises(HostError) as caught:
        _opened(tmp_path)
    assert caught.value.code == "database-newer"
    sqlite.close()


@given(st.one_of(garble.spoilt(STATE), garble.garbled(msgspec.msgpack.decode(STATE)).map(msgspec.json.encode)))
def test_a_state_is_read_or_refused(content: bytes) -> None:
    for decode in (msgspec.msgpack.decode, msgspec.json.decode):
        with contextlib.suppress(ValueError, RecursionError):
            decode(content, type=SourceState)


@given(
    st.lists(
        garble.frames(json.loads(msgspec.json.encode(report(examples.source_state(examples.vm()), 0)))), max_size=3
    )
)
def test_a_damaged_report_hides_no_other(reports: list[bytes]) -> None:
    good = msgspec.json.encode(report(examples.source_state(examples.vm()), 0))
    assert [one.id for one in read_reports((*reports, good))][-1] == "move-1"


# --- what stands beside the disks ---------------------------------------------------------------------------------

OWNER = Owner(vm_id="1", vm="web01", host="host1", host_id="h", boot_id="b", epoch=3)


@given(garble.frames(json.loads(ownership.encode(OWNER))))
def test_an_ownership_record_is_read_or_none(content: bytes) -> None:
    found = ownership.decode(content)
    assert found is None or ownership.decode(ownership.encode(found)) == found


INFO = {
    "format": "qcow2",
    "virtual-size": 1 << 30,
    "backing-filename": "base.qcow2",
    "full-backing-filename": "/nowhere/base.qcow2",
    "backing-filename-format": "qcow2",
    "format-specific": {"type": "qcow2", "data": {"compat": "1.1", "corrupt": False, "data-file": "x"}},
    "children": [],
}


@given(garble.frames(INFO))
@settings(max_examples=60 if settings.default.max_examples < 1000 else 2000)
def test_what_qemu_img_says_is_read_or_refused(output: bytes) -> None:
    async def said(*_: Any) -> bytes:
        return output

    with tempfile.NamedTemporaryFile() as image, mock.patch.object(qemu_img.QemuImg, "_run", said):
        tool = qemu_img.QemuImg("", Waits())
        for question in (
            lambda: tool.chain(Path(image.name), DiskFormat.QCOW2, in_use=False),
            lambda: tool.size_of(DiskFormat.QCOW2, {"driver": "file"}, None),
        ):
            try:
                asyncio.run(question())  # type: ignore[no-untyped-call]
            except (CallerError, HostError) as error:
                assert error.code in {"disk-invalid", "qemu-img", "storage", "disk-in-use"}
