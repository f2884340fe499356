"""SQLite (WAL, synchronous=FULL) for what must survive a reboot, files on tmpfs for what must survive the agent only.

Calls block for the time of one fsync; they are short on purpose and made from the event loop, because a move may not go
on before its journal entry is on disk.
"""

import contextlib
import hashlib
import secrets
import sqlite3
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from kvmhv.errors import HostError

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
ID = "id"
JOURNAL = (str, str, int, object)
SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE records (kind TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY (kind, key)) STRICT;
CREATE TABLE journal (move TEXT NOT NULL, role TEXT NOT NULL, sequence INTEGER NOT NULL, state BLOB NOT NULL,
                      PRIMARY KEY (move, role)) STRICT;
CREATE TABLE moves (move TEXT NOT NULL, role TEXT NOT NULL, number INTEGER PRIMARY KEY AUTOINCREMENT,
                    report BLOB NOT NULL, UNIQUE (move, role)) STRICT;
"""


BROKEN = (sqlite3.Error, UnicodeDecodeError)
"""What SQLite raises; its error about a damaged schema quotes that, and need not be text then."""
SEAL = b"kvmhv1"
"""Begins what a journal keeps: then its digest, then the state itself."""
DIGEST_BYTES = 16
MAPS = (*(bytes([first]) for first in range(0x80, 0x90)), b"\xde", b"\xdf")
"""What msgpack begins a record with: an entry of an older kvmhv has no seal and begins so."""


class _Volatile(msgspec.Struct):
    sequence: Annotated[int, Meta(ge=0)]
    state: bytes


class Database:
    """Implements ports.Records and ports.Journal. One agent has it open at a time."""

    def __init__(self, path: Path, volatile_dir: Path, moves_kept: int) -> None:
        """Open or make the database. Raises HostError `database` or `database-newer`."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            volatile_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise _unusable(error) from error
        self._volatile_dir = volatile_dir
        self._moves_kept = moves_kept
        try:
            self._sqlite = sqlite3.connect(path, isolation_level=None, timeout=5)
            self._sqlite.execute("PRAGMA journal_mode=WAL")
            self._sqlite.execute("PRAGMA synchronous=FULL")
            version = self._sqlite.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                self._sqlite.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
            path.chmod(0o600)
        except (*BROKEN, OSError) as error:
            self._close_quietly()
            raise HostError("database", f"{path}: {error}", "check the disk and the file's owner") from error
        if version > SCHEMA_VERSION:
            self._sqlite.close()
            raise HostError(
                "database-newer", f"{path} was written by a newer kvmhv", "install that version again, or a newer one"
            )

    @property
    def volatile_id(self) -> str:
        """Names this volatile journal: another one when it was lost, and after a reboot even if it lies on a disk."""
        file = self._volatile_dir / ID
        try:
            if not file.exists():
                file.write_text(secrets.token_hex(16))
            return f"{file.read_text(errors='replace')}@{BOOT_ID.read_text().strip()}"
        except OSError as error:
            raise _unusable(error) from error

    def close(self) -> None:
        """Close the file."""
        self._sqlite.close()

    # --- ports.Records

    def put(self, kind: str, key: str, value: bytes) -> None:
        """Keep a record; on disk when it returns."""
        self._execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?)", kind, key, value)

    def get(self, kind: str, key: str) -> bytes | None:
        """Return a record, None if there is none."""
        rows = self._read((bytes,), "SELECT value FROM records WHERE kind = ? AND key = ?", kind, key)
        return rows[0][0] if rows else None

    def all(self, kind: str) -> tuple[tuple[str, bytes], ...]:
        """Return every (key, value) of a kind, by key."""
        return tuple(self._read((str, bytes), "SELECT key, value FROM records WHERE kind = ? ORDER BY key", kind))

    def delete(self, kind: str, key: str) -> None:
        """Forget a record; no error if there is none."""
        self._execute("DELETE FROM records WHERE kind = ? AND key = ?", kind, key)

    # --- ports.Journal

    def write(self, move_id: str, role: str, state: bytes, *, durable: bool) -> None:
        """Keep a machine's newest state; durable: on disk when it returns, else on tmpfs."""
        sequence = self._sequence(move_id, role) + 1
        if durable:
            row = (move_id, role, sequence, _seal(state))
            self._execute("INSERT OR REPLACE INTO journal VALUES (?, ?, ?, ?)", *row)
            return
        file = self._volatile_file(move_id, role)
        fresh = file.with_suffix(".new")
        try:
            fresh.write_bytes(_seal(msgspec.msgpack.encode(_Volatile(sequence, state))))
            fresh.replace(file)
        except OSError as error:
            raise _unusable(error) from error

    def load(self) -> tuple[tuple[str, str, bytes], ...]:
        """Return (move id, role, newest state) of every move that has not been ended here.

        A volatile entry that is damaged may have said anything: the whole volatile journal counts as lost then, and
        gets another name, so that nobody takes its silence for proof. Raises HostError `journal-damaged` for a durable
        entry that is: then nobody can tell what this host may do with the move's VM.
        """
        found = []
        for move_id, role, sequence, sealed in self._read(JOURNAL, "SELECT move, role, sequence, state FROM journal"):
            newest = _unseal(sealed)
            if newest is None:
                raise HostError(
                    "journal-damaged",
                    f"the journal's entry of the move {move_id} ({role}) is damaged",
                    "kvmhv's docs/errors.md says what can be done; VMs run on meanwhile",
                )
            try:
                volatile = self._read_volatile(move_id, role)
            except ValueError:
                self._forget_volatile()
                volatile = None
            if volatile is not None and volatile.sequence > sequence:
                newest = volatile.state
            found.append((move_id, role, newest))
        return tuple(found)

    def end(self, move_id: str, role: str, report: bytes) -> None:
        """Replace a move's states by its final report; the oldest reports beyond `moves_kept` are forgotten."""
        try:
            with self._sqlite:
                self._sqlite.execute("BEGIN")
                self._sqlite.execute("DELETE FROM journal WHERE move = ? AND role = ?", (move_id, role))
                self._sqlite.execute(
                    "INSERT OR REPLACE INTO moves (move, role, report) VALUES (?, ?, ?)", (move_id, role, report)
                )
                self._sqlite.execute(
                    "DELETE FROM moves WHERE number <= (SELECT max(number) FROM moves) - ?", (self._moves_kept,)
                )
        except BROKEN as error:
            raise _failed(error) from error
        with contextlib.suppress(OSError):  # without its row nobody reads it any more
            self._volatile_file(move_id, role).unlink(missing_ok=True)

    def reports(self) -> tuple[bytes, ...]:
        """Return the reports of ended moves, the newest last."""
        return tuple(row[0] for row in self._read((bytes,), "SELECT report FROM moves ORDER BY number"))

    # ---

    def _execute(self, statement: str, *values: str | bytes | int) -> list[Any]:
        try:
            return self._sqlite.execute(statement, values).fetchall()
        except BROKEN as error:
            raise _failed(error) from error

    def _read(self, kinds: tuple[type, ...], statement: str, *values: str) -> list[Any]:
        """Read rows of these types: SQLite keeps to them when it writes, and does not look when it reads."""
        rows = self._execute(statement, *values)
        if not all(isinstance(value, kind) for row in rows for value, kind in zip(row, kinds, strict=True)):
            raise HostError("database", "the agent's database is damaged", "put state_dir back from a backup")
        return rows

    def _sequence(self, move_id: str, role: str) -> int:
        rows = self._read((int,), "SELECT sequence FROM journal WHERE move = ? AND role = ?", move_id, role)
        try:
            volatile = self._read_volatile(move_id, role)
        except ValueError:
            volatile = None
        return max(rows[0][0] if rows else 0, volatile.sequence if volatile else 0)

    def _volatile_file(self, move_id: str, role: str) -> Path:
        return self._volatile_dir / f"{move_id}.{role}"

    def _read_volatile(self, move_id: str, role: str) -> _Volatile | None:
        """Return the entry, None if there is none. Raises ValueError for a damaged one."""
        try:
            content = _unseal(self._volatile_file(move_id, role).read_bytes())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ValueError(str(error)) from error
        if content is None:
            raise ValueError("damaged")
        return msgspec.msgpack.decode(content, type=_Volatile)  # MsgspecError is a ValueError

    def _forget_volatile(self) -> None:
        """Give the volatile journal another name: what was noted under the old one is not to be relied on."""
        try:
            (self._volatile_dir / ID).unlink(missing_ok=True)
        except OSError as error:
            raise _unusable(error) from error

    def _close_quietly(self) -> None:
        with contextlib.suppress(AttributeError, sqlite3.Error):
            self._sqlite.close()


def _seal(state: bytes) -> bytes:
    return SEAL + hashlib.blake2b(state, digest_size=DIGEST_BYTES).digest() + state


def _unseal(content: object) -> bytes | None:
    """Return what was sealed, None if it is damaged; what an older kvmhv kept has no seal and is as it is."""
    if not isinstance(content, bytes):
        return None
    if not content.startswith(SEAL):
        return content if content[:1] in MAPS else None
    state = content[len(SEAL) + DIGEST_BYTES :]
    return state if _seal(state) == content else None


def _unusable(error: OSError) -> HostError:
    return HostError("database", f"the agent's journal: {error}", "check state_dir and run_dir: space, owner, mount")


def _failed(error: Exception) -> HostError:
    return HostError("database", f"the agent's database: {error}", "check the disk of the agent's state directory")
