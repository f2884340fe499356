"""Where a lab lives on the machine, what it is meant to be, and who may change it.

/run/kvmhv-lab/NAME/state.json      the lab; HOST/ is the host's /run/kvmhv, with agent.sock in it
/var/lib/kvmhv-lab/NAME/HOST/       upper and work (the overlay), data (the host's /var/lib/kvmhv)
/var/cache/kvmhv-lab/trees/         the cached Debian trees
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from kvmhv.errors import CallerError, HostError
from kvmhv.lab.plan import LabPlan, are_names, check_lab_name

RUN_DIR = Path("/run/kvmhv-lab")
DATA_DIR = Path("/var/lib/kvmhv-lab")
CACHE_DIR = Path("/var/cache/kvmhv-lab")
NETNS_DIR = Path("/run/netns")
LOCK_TIMEOUT_S = 120.0


class LabState(msgspec.Struct, frozen=True):
    """What `lab up` wrote down before it made anything; `complete` is set at its end.

    `boot_id` is the machine's: a state of an earlier boot describes nothing that still runs.
    """

    plan: LabPlan
    trees: dict[str, str]
    boot_id: str
    complete: bool = False


def default_lab() -> str:
    """Return the lab that commands mean when none is named: KVMHV_LAB, or `lab`."""
    return os.environ.get("KVMHV_LAB") or "lab"


def machine_boot_id() -> str:
    """Return the id of the machine's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def run_dir(lab: str, host: str | None = None) -> Path:
    """Return the directory of a lab's, or of one host's, runtime files."""
    return RUN_DIR / lab / host if host else RUN_DIR / lab


def data_dir(lab: str, host: str | None = None) -> Path:
    """Return the directory of a lab's, or of one host's, disk contents."""
    return DATA_DIR / lab / host if host else DATA_DIR / lab


def boot_log(lab: str, host: str) -> Path:
    """Return the file with what a host said while it booted."""
    return run_dir(lab) / f"{host}.boot.log"


def socket_of(lab: str, host: str) -> Path | None:
    """Return the UNIX socket of the agent on a lab's host, None where the lab or its host is not there.

    The path is the answer also while no agent listens on it.
    """
    directory = RUN_DIR / lab / host
    return directory / "agent.sock" if are_names(lab, host) and directory.is_dir() else None


def read_state(lab: str) -> LabState | None:
    """Return the lab's state, None when there is none that can be read (a half-made lab is no lab)."""
    try:
        return msgspec.json.decode((run_dir(lab) / "state.json").read_bytes(), type=LabState)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_state(state: LabState) -> None:
    """Keep the state, whole or not at all."""
    directory = run_dir(state.plan.name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = directory / "state.json.new"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=1))
    temporary.rename(directory / "state.json")


def load(lab: str) -> LabState:
    """Return the state of a lab that is up; CallerError `lab-down` otherwise."""
    check_lab_name(lab)
    state = read_state(lab)
    if state is None or not state.complete or state.boot_id != machine_boot_id():
        raise CallerError("lab-down", f"lab {lab!r} is not up", "start it with: kvmhv lab up")
    return state


_held: set[int] = set()


@contextmanager
def lock(path: Path, what: str, timeout_s: float = LOCK_TIMEOUT_S, *, keep: bool = False) -> Iterator[None]:
    """Hold `path` alone. It is removed afterwards unless `keep`. The kernel frees it when its holder dies.

    HostError `lab-busy` when another process holds it for longer than `timeout_s`.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    descriptor = -1
    while descriptor < 0:
        candidate = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if _locked(candidate) and _is_still(path, candidate):
            descriptor = candidate
            continue
        os.close(candidate)
        if time.monotonic() > deadline:
            todo = f"wait for it, or look for it with: fuser -v {path}"
            raise HostError("lab-busy", f"{what}: another command has been at it for {timeout_s:.0f} s", todo)
        time.sleep(0.05)
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)
        if not keep:
            path.unlink(missing_ok=True)
        os.close(descriptor)


def held_locks() -> tuple[int, ...]:
    """Return what a program is given that must have ended before a lock is free, whatever becomes of this process."""
    return tuple(_held)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_still(path: Path, descriptor: int) -> bool:
    """Return whether the locked file is the one that others would find: its last holder may have removed it."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_ino == os.fstat(descriptor).st_ino


@contextmanager
def lab_lock(lab: str) -> Iterator[None]:
    """Hold a lab alone, for whoever makes or ends it or one of its hosts."""
    check_lab_name(lab)
    with lock(RUN_DIR / f".{lab}.lock", f"lab {lab!r}"):
        yield


def remove_files(lab: str) -> None:
    """Remove all files of a lab; its hosts must be gone. The empty directories above stay for other labs."""
    for directory in (data_dir(lab), run_dir(lab)):
        if directory.exists():
            shutil.rmtree(directory)


def known_labs() -> list[str]:
    """Return the names of all labs with files on this machine, up or half-made."""
    names = {entry.name for root in (RUN_DIR, DATA_DIR) if root.is_dir() for entry in root.iterdir() if entry.is_dir()}
    return sorted(names)
