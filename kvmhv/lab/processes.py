"""Finds, kills and freezes the processes of a host: all that live in its network namespace.

The kernel's own list is the truth, not a file of ours: what a killed `lab up` left behind is found too.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from kvmhv.errors import HostError
from kvmhv.lab.state import NETNS_DIR

KILL_TIMEOUT_S = 20.0
FREEZE_TIMEOUT_S = 10.0
_PROC = Path("/proc")
_PAUSE_S = 0.01


def in_namespace(name: str) -> list[int]:
    """Return the ids of the processes in the named network namespace, none when there is no such namespace.

    Zombies are in no namespace any more, so they are not listed.
    """
    try:
        wanted = (NETNS_DIR / name).stat()
        own = (_PROC / "self/ns/net").stat()
    except FileNotFoundError:
        return []
    if os.path.samestat(wanted, own) or wanted.st_dev != own.st_dev:
        return []  # a plain file that an earlier boot of the machine left there, or (never to be killed) ourselves
    return [pid for pid in _all_pids() if _namespace_inode(pid) == wanted.st_ino]


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir(_PROC) if entry.name.isdigit()]


def _namespace_inode(pid: int) -> int | None:
    try:
        return (_PROC / str(pid) / "ns/net").stat().st_ino
    except OSError:
        return None


def init_of(name: str) -> int | None:
    """Return the machine's id of the process that is PID 1 of the host in this namespace, None when it has none."""
    for pid in in_namespace(name):
        numbers = _status_field(pid, "NSpid").split()
        if len(numbers) == 2 and numbers[1] == "1":
            return pid
    return None


def is_frozen(pid: int) -> bool:
    """Return whether a process is stopped by a signal."""
    return _status_field(pid, "State").startswith("T")


def _status_field(pid: int, field: str) -> str:
    try:
        status = (_PROC / str(pid) / "status").read_text()
    except OSError:
        return ""
    for line in status.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""


def kill_all(name: str) -> None:
    """Kill everything in a namespace and wait until it is gone, first of all PID 1, which takes its host along.

    HostError `lab-kill` when something does not die in 20 s.
    """
    deadline = time.monotonic() + KILL_TIMEOUT_S
    init = init_of(name)
    if init is not None:
        _signal(init, signal.SIGKILL)
    while pids := in_namespace(name):
        if time.monotonic() > deadline:
            raise HostError("lab-kill", f"processes {pids} of {name} do not die", "look at them with: ps -fp PID")
        for pid in pids:
            _signal(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)


def freeze_all(name: str) -> None:
    """Stop every process in a namespace, again and again until one look finds none that still runs.

    HostError `lab-freeze` when processes are still being started after 10 s.
    """
    deadline = time.monotonic() + FREEZE_TIMEOUT_S
    while running := [pid for pid in in_namespace(name) if not is_frozen(pid)]:
        if time.monotonic() > deadline:
            thaw_all(name)
            raise HostError("lab-freeze", f"processes {running} of {name} do not stop; the host was thawed")
        for pid in running:
            _signal(pid, signal.SIGSTOP)
        time.sleep(_PAUSE_S)


def thaw_all(name: str) -> None:
    """Let every process in a namespace go on."""
    for pid in in_namespace(name):
        _signal(pid, signal.SIGCONT)


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return  # it died between the look and the signal
