"""drivers/database.py: what survives, which of two states is the newest, and files that cannot be read."""

import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmhv.drivers.database import SCHEMA_VERSION, Database
from kvmhv.errors import HostError

Open = Callable[[], Database]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    """Opens the one database of the test again, as the next agent does."""
    opened: list[Database] = []

    def again() -> Database:
        if opened:
            opened[-1].close()
        opened.append(Database(tmp_path / "state/kvmhv.db", tmp_path / "volatile", 10))
        return opened[-1]

    yield again
    for database in opened:
        database.close()


def test_records(reopen: Open) -> None:
    database = reopen()
    assert database.get("vm", "1") is None
    database.put("vm", "2", b"two")
    database.put("vm", "1", b"one")
    database.put("image", "1", b"other")
    database.put("vm", "2", b"deux")
    database = reopen()
    assert database.all("vm") == (("1", b"one"), ("2", b"deux"))
    assert database.get("image", "1") == b"other"
    for _ in range(2):
        database.delete("vm", "1")
    assert reopen().all("vm") == (("2", b"deux"),)


def test_only_root_reads_it(reopen: Open, tmp_path: Path) -> None:
    reopen().put("token", "1", b"secret")
    assert (tmp_path / "state/kvmhv.db").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "volatile").stat().st_mode & 0o777 == 0o700


def test_the_newest_state_wins_wherever_it_is(reopen: Open) -> None:
    database = reopen()
    database.write("m1", "source", b"1", durable=True)
    assert reopen().load() == (("m1", "source", b"1"),)
    database = reopen()
    database.write("m1", "source", b"2", durable=False)
    assert reopen().load() == (("m1", "source", b"2"),)
    database = reopen()
    database.write("m1", "source", b"3", durable=True)
    assert reopen().load() == (("m1", "source", b"3"),)
    database = reopen()
    for state in (b"4", b"5"):
        database.write("m1", "source", state, durable=False)
    assert reopen().load() == (("m1", "source", b"5"),)


def test_roles_and_moves_are_apart(reopen: Open) -> None:
    database = reopen()
    for move in ("m1", "m2"):
        for role in ("source", "target"):
            database.write(move, role, f"{move}-{role}".encode(), durable=True)
    database.write("m1", "target", b"newer", durable=False)
    assert set(database.load()) == {
        ("m1", "source", b"m1-source"), ("m1", "target", b"newer"),
        ("m2", "source", b"m2-source"), ("m2", "target", b"m2-target"),
    }  # fmt: skip


def test_after_a_reboot_the_durable_state_counts(reopen: Open, tmp_path: Path) -> None:
    database = reopen()
    database.write("m1", "target", b"durable", durable=True)
    database.write("m1", "target", b"volatile", durable=False)
    for file in (tmp_path / "volatile").iterdir():
        file.unlink()
    assert reopen().load() == (("m1", "target", b"durable"),)


@pytest.mark.parametrize("content", [b"", b"\x00", b"not msgpack at all", b"\x92\x01"])
def test_a_volatile_file_that_cannot_be_read_is_ignored(reopen: Open, tmp_path: Path, content: bytes) -> None:
    database = reopen()
    database.write("m1", "source", b"durable", durable=True)
    database.write("m1", "source", b"volatile", durable=False)
    (file,) = (tmp_path / "volatile").iterdir()
    file.write_bytes(content)
    database = reopen()
    assert database.load() == (("m1", "source", b"durable"),)
    database.write("m1", "source", b"next", durable=False)
    assert reopen().load() == (("m1", "source", b"next"),)


def test_a_write_that_was_cut_short_leaves_the_state_before_it(reopen: Open, tmp_path: Path) -> None:
    database = reopen()
    database.write("m1", "source", b"durable", durable=True)
    database.write("m1", "source", b"volatile", durable=False)
    (tmp_path / "volatile/m1.new").write_bytes(b"half a st")
    assert reopen().load() == (("m1", "source", b"volatile"),)


def test_an_ended_move_leaves_its_report_only(reopen: Open, tmp_path: Path) -> None:
    database = reopen()
    database.write("m1", "source", b"state", durable=True)
    database.write("m1", "source", b"newer", durable=False)
    for _ in range(2):
        database.end("m1", "source", b"report")
    database = reopen()
    assert database.load() == ()
    assert database.reports() == (b"report",)
    assert list((tmp_path / "volatile").iterdir()) == []


def test_the_newest_reports_are_kept(reopen: Open) -> None:
    database = reopen()
    for number in range(25):
        database.end(f"m{number}", "source", str(number).encode())
    assert reopen().reports() == tuple(str(number).encode() for number in range(15, 25))


def test_a_newer_schema_is_refused(reopen: Open, tmp_path: Path) -> None:
    reopen().close()
    with sqlite3.connect(tmp_path / "state/kvmhv.db") as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(HostError) as refused:
        reopen()
    assert refused.value.code == "database-newer"


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "kvmhv.db").write_bytes(b"certainly not SQLite" * 100)
    with pytest.raises(HostError) as failed:
        Database(tmp_path / "kvmhv.db", tmp_path / "volatile", 10)
    assert failed.value.code == "database"


def test_an_error_of_the_disk_is_a_host_error(reopen: Open) -> None:
    database = reopen()
    database.close()
    for call in (lambda: database.put("vm", "1", b""), lambda: database.end("m", "source", b""), database.load):
        with pytest.raises(HostError) as failed:
            call()
        assert failed.value.code == "database"
