"""The directory of one VM's QEMU under `run_dir`: sockets, logs, keys. It is on tmpfs, so a reboot ends it.

    run_dir/vm/<id>/   qmp.sock  console.sock  qemu.log  console.log  qmp.log  incoming  cont-sent  peer.json  keys/
    run_dir/ended/<id>/  the logs of a QEMU that was ended, for the curious; the newest ENDED_KEPT only

`incoming` marks a QEMU that was started for a move in, `cont-sent` that it was then told to run; `peer.json` is there
while a move goes out; `held` and `new-tops.json` belong to a storage move.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec

from kvmhv.errors import HostError

Kind = TypeVar("Kind")

SOCKET_PATH_MAX_BYTES = 107
"""Linux: `sun_path` has 108 bytes with its final zero (unix(7))."""

UUID_CHARACTERS = 36
LONGEST_SOCKET = "console.sock"
LOG_NAMES = ("qemu.log", "console.log", "qmp.log", "qmp.log.1")
LOG_TAIL_BYTES = 2048
CONSOLE_LOG_MAX_BYTES = 4 * 1024 * 1024
ENDED_KEPT = 20


@dataclass(frozen=True)
class VmDir:
    """Paths of one VM's QEMU."""

    run_path: Path
    vm_id: str

    @property
    def path(self) -> Path:
        """The directory itself."""
        return self.run_path / "vm" / self.vm_id

    @property
    def qmp_socket(self) -> Path:
        """QMP; one client at a time, which is the agent."""
        return self.path / "qmp.sock"

    @property
    def console_socket(self) -> Path:
        """The serial console."""
        return self.path / "console.sock"

    @property
    def console_log(self) -> Path:
        """What the guest printed on its serial console."""
        return self.path / "console.log"

    @property
    def qemu_log(self) -> Path:
        """QEMU's own output."""
        return self.path / "qemu.log"

    @property
    def qmp_log(self) -> Path:
        """Every QMP command, answer and event."""
        return self.path / "qmp.log"

    @property
    def keys(self) -> Path:
        """The move's key, readable by root only, removed as soon as it is not needed any more."""
        return self.path / "keys"

    @property
    def incoming_mark(self) -> Path:
        """Exists when this QEMU was started for a move in."""
        return self.path / "incoming"

    @property
    def cont_mark(self) -> Path:
        """Exists when an incoming QEMU may have run: written before `cont` is sent."""
        return self.path / "cont-sent"

    @property
    def held_mark(self) -> Path:
        """Exists while a storage move has the guest stopped, on a QEMU that cannot hold its requests back alone."""
        return self.path / "held"

    @property
    def new_tops(self) -> Path:
        """The node names of the new images of the last storage move, by disk."""
        return self.path / "new-tops.json"

    @property
    def peer(self) -> Path:
        """Address and ports of the target of a move that goes on."""
        return self.path / "peer.json"

    def make(self, *, incoming: bool) -> None:
        """Make the directory afresh. Raises HostError `run-dir`."""
        try:
            shutil.rmtree(self.path, ignore_errors=True)
            self.path.mkdir(parents=True, mode=0o700)
            if incoming:
                self.incoming_mark.touch()
        except OSError as error:
            raise HostError(
                "run-dir", f"cannot make {self.path}: {error}", "check the agent's run_dir and its owner"
            ) from error

    def log_tail(self) -> str:
        """Return the end of QEMU's own output, empty if there is none."""
        return read_tail(self.qemu_log, LOG_TAIL_BYTES).strip()

    def trim_console_log(self) -> None:
        """Keep the console's log bounded: QEMU appends, so the file can be emptied under it; its end stays in `.1`."""
        with contextlib.suppress(OSError):
            if self.console_log.stat().st_size > CONSOLE_LOG_MAX_BYTES:
                tail = read_tail(self.console_log, CONSOLE_LOG_MAX_BYTES // 4)
                self.console_log.with_suffix(".log.1").write_text(tail)
                os.truncate(self.console_log, 0)

    def remove_keys(self) -> None:
        """Remove the move's key; no error if there is none."""
        shutil.rmtree(self.keys, ignore_errors=True)

    def remove(self) -> None:
        """Remove the directory, its logs kept aside; no error if there is none. To die here loses no log."""
        if not self.path.is_dir():
            return
        ended = self.run_path / "ended" / self.vm_id
        with contextlib.suppress(OSError):
            for path in self.path.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name not in LOG_NAMES:
                    path.unlink()
            os.utime(self.path)
            shutil.rmtree(ended, ignore_errors=True)
            ended.parent.mkdir(exist_ok=True, mode=0o700)
            self.path.rename(ended)
            kept = sorted(ended.parent.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in kept[:-ENDED_KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.path, ignore_errors=True)


def read_tail(path: Path, limit_bytes: int) -> str:
    """Return the last bytes of a text file, empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - limit_bytes))
            return file.read(limit_bytes).decode(errors="replace")
    except OSError:
        return ""


def keep_json(path: Path, value: object) -> None:
    """Write a small file whole or not at all. Raises HostError `run-dir`."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.write_bytes(msgspec.json.encode(value))
        fresh.replace(path)
    except OSError as error:
        raise HostError("run-dir", f"cannot write {path}: {error}", "check the agent's run_dir") from error


def read_json(path: Path, kind: type[Kind]) -> Kind | None:
    """Read it; None if it is not there or cannot be read: it only speeds up what is done without it too."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def check_run_path(run_path: Path) -> None:
    """Raise HostError `run-dir-long` if a socket's path in it would be longer than Linux allows."""
    longest = run_path / "vm" / ("0" * UUID_CHARACTERS) / LONGEST_SOCKET
    over = len(os.fsencode(longest)) - SOCKET_PATH_MAX_BYTES
    if over > 0:
        raise HostError(
            "run-dir-long",
            f"run_dir {run_path} is {over} bytes too long: paths of UNIX sockets have at most {SOCKET_PATH_MAX_BYTES}",
            "set a shorter run_dir in agent.toml",
        )


def vm_ids(run_path: Path) -> tuple[str, ...]:
    """Return the ids of the VMs that have a directory."""
    try:
        return tuple(sorted(path.name for path in (run_path / "vm").iterdir() if path.is_dir()))
    except FileNotFoundError:
        return ()
