"""QEMU processes: started detached, found again after the agent's restart, held by pidfd.

A pidfd names one process for ever, so a signal never hits another that got the same number. QEMU is in a session of its
own with its output in its own log: it outlives the agent.
"""

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from kvmhv.errors import HostError
from kvmhv.kernel_sockets import BYTES_SENT_AT

PIDFD_GETFD = 438
"""The system call's number on every architecture (Linux 5.6); Python has no name for it."""

TCP_NOTSENT_LOWAT = 25
"""Linux' number of the option; Python has no name for it."""
TCP_INFO_BYTES = 256

_libc = ctypes.CDLL(None, use_errno=True)

IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)
"""Python ignores them and a child would inherit that."""


class Process:
    """One process, alive or ended; `exit_status` is known only if it was this agent's child (-N: signal N)."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Watch the process from the running event loop; the pidfd belongs to this object from now on."""
        self.pid = pid
        self.exit_status: int | None = None
        self._gone = asyncio.Event()
        self._pidfd = pidfd
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(pidfd, self._ended)

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return self._gone.is_set()

    async def wait_gone(self, timeout_s: float | None) -> bool:
        """Wait for the end; False when the time is over first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._gone.wait()
        except TimeoutError:
            return False
        return True

    def send(self, number: signal.Signals) -> None:
        """Send a signal; no error if the process has ended."""
        if not self.gone:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def cut(self, ip: str, ports: tuple[int, ...]) -> int:
        """Shut the process's TCP connections to these ports of a host down, from outside; returns how many there were.

        QEMU does a TLS handshake with a blocking socket in its main loop: a peer that says nothing then holds QMP and
        the guest, and QMP's own `yank` does not know that connection yet. No error for what cannot be looked into.
        """
        return self._each_connection(ip, ports, lambda connection: connection.shutdown(socket.SHUT_RDWR))

    def limit_unsent(self, ip: str, ports: tuple[int, ...], unsent_max_bytes: int | None) -> int:
        """Let the process's connections to these ports of a host take only so much more than is under way.

        None leaves it to the kernel. The window may still grow as the network wants it. Returns how many connections
        there were.
        """

        def limit(connection: socket.socket) -> None:
            connection.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, unsent_max_bytes or 0)

        return self._each_connection(ip, ports, limit)

    def sent_bytes(self, ip: str, ports: tuple[int, ...]) -> dict[int, int]:
        """Return what each of the process's connections to these ports of a host has sent, by its local port.

        TCP's own count (TCP_INFO), so with TLS and repeats.
        """
        found: dict[int, int] = {}

        def look(connection: socket.socket) -> None:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_BYTES)
            sent = info[BYTES_SENT_AT : BYTES_SENT_AT + 8]
            found[connection.getsockname()[1]] = int.from_bytes(sent, sys.byteorder)

        self._each_connection(ip, ports, look)
        return found

    def _each_connection(self, ip: str, ports: tuple[int, ...], act: Callable[[socket.socket], None]) -> int:
        found = 0
        for number in _descriptors(self.pid):
            with contextlib.suppress(OSError), self._borrow(number) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in {socket.AF_INET, socket.AF_INET6}:
                    peer = connection.getpeername()
                    if peer[1] in ports and ipaddress.ip_address(peer[0]) == ipaddress.ip_address(ip):
                        act(connection)
                        found += 1
        return found

    def release(self) -> None:
        """Stop to watch the process, which goes on."""
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _borrow(self, number: int) -> socket.socket:
        """Return a socket of the process; raises OSError."""
        if self._pidfd < 0:
            raise ProcessLookupError
        own = _libc.syscall(PIDFD_GETFD, self._pidfd, number, 0)
        if own < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return socket.socket(fileno=own)

    def _ended(self) -> None:
        with contextlib.suppress(ChildProcessError):
            reaped, status = os.waitpid(self.pid, os.WNOHANG)
            if reaped:
                self.exit_status = os.waitstatus_to_exitcode(status)
        self.release()
        self._gone.set()


def start(argv: list[str], log: Path) -> Process:
    """Start a program detached, its output appended to `log`. Raises HostError `qemu-missing` or `qemu-start`."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    try:
        pid = os.posix_spawn(
            argv[0],
            argv,
            {**os.environ, "LC_ALL": "C"},
            file_actions=actions,
            setsid=True,
            setsigmask=[],
            setsigdef=IGNORED_BY_PYTHON,
        )
    except (FileNotFoundError, PermissionError) as error:
        raise HostError(
            "qemu-missing", f"cannot run {argv[0]}: {error.strerror}", "install QEMU or set qemu_binary in agent.toml"
        ) from error
    except OSError as error:
        raise HostError("qemu-start", f"cannot start {argv[0]}: {error}", "see the host's limits") from error
    return Process(pid, os.pidfd_open(pid))


def find(marks: tuple[str, ...]) -> Process | None:
    """Return the live process of this PID namespace whose arguments contain every mark, None if there is none."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or not _has_marks(entry, marks):
            continue
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(int(entry.name))
            # Asked again now that the number cannot be given to another process any more.
            if _has_marks(entry, marks):
                return Process(int(entry.name), pidfd)
            os.close(pidfd)
    return None


def arguments(pid: int) -> list[str]:
    """Return a process's arguments; empty when it is gone or a zombie."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def has_open(pid: int, file: Path) -> bool:
    """Whether a process has this very file open."""
    try:
        wanted = file.stat()
    except OSError:
        return False
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(entry.stat(), wanted):
                    return True
    return False


def resident_bytes(pid: int) -> int:
    """Return the process's resident memory, 0 when it is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0


def guest_memory_bytes(pid: int, memory_bytes: int) -> int:
    """Return how much of the guest's memory was ever touched: what the first pass of a move has to send.

    The guest's memory is the one mapping of exactly its size. Without it (huge pages, a process that is gone): what is
    resident of the whole process, at most the guest's memory.
    """
    found = 0
    try:
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            first, _, rest = line.partition(" ")
            if "-" in first:
                low, _, high = first.partition("-")
                wanted = int(high, 16) - int(low, 16) == memory_bytes
            elif first == "Rss:" and wanted:
                found = max(found, int(rest.split()[0]) * 1024)
    except (OSError, ValueError, IndexError):
        found = 0
    return found or min(memory_bytes, resident_bytes(pid))


def _descriptors(pid: int) -> list[int]:
    """Return the numbers of the process's sockets."""
    found = []
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if str(entry.readlink()).startswith("socket:"):
                    found.append(int(entry.name))
    return found


def _has_marks(entry: Path, marks: tuple[str, ...]) -> bool:
    try:
        found = set(os.fsdecode((entry / "cmdline").read_bytes()).split("\0"))
        # A host in a PID namespace below this one has the same paths and maybe the same VM; it is not ours.
        return found.issuperset(marks) and (entry / "ns/pid").readlink() == Path("/proc/self/ns/pid").readlink()
    except OSError:
        return False
