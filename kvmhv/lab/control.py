"""Talks to a host's PID 1 and starts programs on hosts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvmhv.errors import HostError
from kvmhv.lab import processes
from kvmhv.lab.plan import namespace
from kvmhv.lab.state import DATA_DIR, boot_log

REQUEST_TIMEOUT_S = 15.0
READY_TIMEOUT_S = 30.0
_GRACE_S = 1.0
_LINE_LIMIT_BYTES = 4096


class AgentStatus(msgspec.Struct, frozen=True):
    """How PID 1 sees the agent: whether it should run, its id inside the host, how often it was started."""

    wanted: bool
    pid: int | None
    starts: int
    gave_up: bool


class _Answer(msgspec.Struct, frozen=True):
    agent: AgentStatus


def init_pid(lab: str, host: str) -> int:
    """Return the machine's id of a host's PID 1; HostError `lab-host-off` when the host does not run."""
    pid = processes.init_of(namespace(lab, host))
    if pid is None:
        todo = "boot it again, or: kvmhv lab down && kvmhv lab up"
        raise HostError("lab-host-off", f"host {host!r} of lab {lab!r} does not run", todo, host=host)
    return pid


def _ask(pid: int, request: str) -> AgentStatus:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(REQUEST_TIMEOUT_S)
        connection.connect(f"/proc/{pid}/root/run/lab/init.sock")
        connection.sendall(msgspec.json.encode({"do": request}) + b"\n")
        with connection.makefile("rb") as answers:
            return msgspec.json.decode(answers.readline(_LINE_LIMIT_BYTES), type=_Answer).agent


def ask(lab: str, host: str, request: str) -> AgentStatus:
    """Send `status`, `agent-start`, `agent-stop` or `agent-kill` to a host's PID 1.

    HostError `lab-host-off` when the host does not run, `lab-host-silent` when it gives no answer in 15 s.
    """
    pid = init_pid(lab, host)
    try:
        return _ask(pid, request)
    except (OSError, msgspec.DecodeError) as error:
        todo = f"is it frozen? What it said: {boot_log(lab, host)}"
        raise HostError("lab-host-silent", f"PID 1 of {host!r} does not answer: {error}", todo, host=host) from error


def wait_ready(lab: str, host: str) -> None:
    """Wait until a host that was just started answers; HostError `lab-boot` with what it said when it does not."""
    started = time.monotonic()
    while True:
        pid = processes.init_of(namespace(lab, host))
        if pid is not None and _answers(pid):
            return
        waited_s = time.monotonic() - started
        gone = waited_s > _GRACE_S and not processes.in_namespace(namespace(lab, host))
        if gone or waited_s > READY_TIMEOUT_S:
            said = tail(boot_log(lab, host)) or "it said nothing"
            todo = f"a lab needs root, a kernel with overlayfs and namespaces, and {DATA_DIR} on ext4, xfs or btrfs"
            raise HostError("lab-boot", f"host {host!r} did not come up: {said}", todo, host=host)
        time.sleep(0.02)


def _answers(pid: int) -> bool:
    try:
        _ask(pid, "status")
    except (OSError, msgspec.DecodeError):
        return False
    return True


def tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a file, nothing when it is not there."""
    try:
        text = path.read_text(errors="replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.strip().splitlines()[-lines:])


def enter_argv(lab: str, host: str, argv: Sequence[str]) -> list[str]:
    """Return the command line that runs `argv` on a host.

    The program dies with the `nsenter` that this starts: entering a PID namespace forks, and killing the parent alone
    would leave the program behind. HostError `lab-host-off` or `lab-host-frozen` when the host cannot run anything.
    """
    pid = init_pid(lab, host)
    if processes.is_frozen(pid):
        raise HostError("lab-host-frozen", f"host {host!r} of lab {lab!r} is frozen", "thaw it first", host=host)
    kinds = ("--mount", "--uts", "--ipc", "--net", "--pid", "--root")
    terminal = f"TERM={os.environ.get('TERM', 'dumb')}"
    environment = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME=/root", "LANG=C.UTF-8", terminal)
    inside = ("/usr/bin/env", "-i", "--chdir=/root", *environment, "/usr/bin/setpriv", "--pdeathsig", "KILL", "--")
    return ["nsenter", f"--target={pid}", *kinds, *inside, *argv]
