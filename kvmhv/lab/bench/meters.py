"""What a move costs, seen from outside: the guest's heartbeats and answers, bytes on the wire, CPU time, memory."""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmhv.errors import HostError
from kvmhv.lab import processes
from kvmhv.lab.lab import LabHost

PYTHON = ("env", "PYTHONPATH=/opt/kvmhv/src", "/opt/kvmhv/venv/bin/python")
ASK_GUEST = (
    "import socket,sys; c=socket.create_connection((sys.argv[1],8),5); sys.stdout.write(c.makefile().readline())"
)
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
POLL_S = 0.25
PING_EVERY_MS = 10
BACK_S = 20.0
QEMU = "qemu-system"


class Onlooker:
    """A watcher on the client: one guest's heartbeats, stamped by its kernel as they arrive, and answers to pings."""

    def __init__(self, client: LabHost, port: int, guest_ip: str) -> None:
        """Listen. HostError `bench-step` when the watcher ends."""
        out = f"/var/lib/kvmhv/bench-{port}.json"
        argv = [*PYTHON, "-m", "kvmhv.lab.watch", "--beat", str(port), "--out", out]
        argv += ["--ping", guest_ip, "--ping-every-ms", str(PING_EVERY_MS)]
        self._process = client.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._wait("listening")

    def wait_ready(self) -> None:
        """Wait for the guest's first heartbeat, and its first answer."""
        self._wait("ready")

    def look_away(self) -> None:
        """Leave the guest alone: it stands still."""
        self._say("pings off")

    def look_again(self) -> None:
        """Ping the guest again and wait until it is seen: that it stood still is no gap. HostError `bench-step`."""
        self.mark("back")
        self._say("pings on")
        deadline_s = time.monotonic() + BACK_S
        while not all(self.window()[what]["received"] for what in ("beats", "pings")):
            if time.monotonic() > deadline_s:
                raise HostError("bench-step", f"the guest does not answer {BACK_S:.0f} s after it was let go on")
            time.sleep(0.1)

    def mark(self, name: str) -> None:
        """Begin a new window."""
        self._say(f"mark {name}")
        self._wait(f"marked {name}")

    def window(self) -> dict[str, Any]:
        """Return what was seen since the mark: `beats` and `pings`."""
        self._say("snapshot")
        seen: dict[str, Any] = json.loads(self._line())["windows"][-1]
        return seen

    def end(self) -> None:
        """End the watcher."""
        self._process.kill()
        self._process.wait()

    def _wait(self, word: str) -> None:
        while self._line().strip() != word:
            pass

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise HostError("bench-step", "the watcher on the client ended", "see the guest's console")
        return line.decode()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()


def health(client: LabHost, guest_ip: str) -> dict[str, Any]:
    """Ask the guest how it is: it verifies its memory and what it reads back from its disks."""
    done = client.exec(["python3", "-c", ASK_GUEST, guest_ip], timeout_s=20.0)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def damage(told: dict[str, Any], boot_id: str | None) -> str | None:
    """Return what is wrong with a guest, by what it tells of itself."""
    if boot_id is not None and told["boot_id"] != boot_id:
        return "the guest was booted anew"
    if told["memory_errors"]:
        return f"{told['memory_errors']} pages of its memory are damaged"
    if any(disk["mismatches"] or disk["errors"] for disk in told["disks"]):
        return f"its disks: {told['disks']}"
    return None


def qemus(hosts: Iterable[LabHost], guest: str) -> list[int]:
    """Return the machine's ids of a guest's QEMU processes."""
    marks = (f"guest={guest}", f"guest={guest},")
    found = []
    for host in hosts:
        for pid in processes.in_namespace(host.namespace):
            words = _cmdline(pid)
            if words and QEMU in words[0] and any(word.startswith(marks) for word in words):
                found.append(pid)
    return found


def resident_bytes(pid: int) -> int:
    """Return a process's resident memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def agent_pid(host: LabHost) -> int:
    """Return the machine's id of a host's agent."""
    for pid in processes.in_namespace(host.namespace):
        words = _cmdline(pid)
        if "kvmhv" in words and "agent" in words:
            return pid
    raise HostError("bench-step", f"no agent runs on {host.name}")


def _cmdline(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def _cpu_s(pid: int) -> float | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) * TICK_S


@dataclass
class _Seen:
    first_s: float
    last_s: float


@dataclass
class Meter:
    """CPU time and bytes between `begin` and `end` on the two hosts; a thread looks at the processes now and then.

    `networks`: whose bytes are counted.
    `moved` names the QEMU whose CPU time counts; every other QEMU stands still meanwhile. What a process used after the
    last look at it is lost: at most POLL_S of it.
    """

    hosts: tuple[LabHost, LabHost]
    moved: str
    networks: tuple[str, ...] = ("migration",)
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _qemu: set[int] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _sent_bytes: int = 0

    def begin(self) -> None:
        """Begin to measure."""
        self._sent_bytes = self._wire_bytes()
        self._look(new_from_zero=False)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self) -> tuple[int, float, float]:
        """Return bytes on the wire, CPU seconds of everything but QEMU, and of QEMU."""
        self._stop.set()
        assert self._thread is not None
        self._thread.join()
        self._look(new_from_zero=True)
        used = {pid: seen.last_s - seen.first_s for pid, seen in self._seen.items()}
        qemu_s = sum(seconds for pid, seconds in used.items() if pid in self._qemu)
        return self._wire_bytes() - self._sent_bytes, sum(used.values()) - qemu_s, qemu_s

    def _watch(self) -> None:
        while not self._stop.wait(POLL_S):
            self._look(new_from_zero=True)

    def _look(self, *, new_from_zero: bool) -> None:
        for host in self.hosts:
            for pid in processes.in_namespace(host.namespace):
                now_s = _cpu_s(pid)
                if now_s is None:
                    continue
                if pid not in self._seen:
                    self._seen[pid] = _Seen(0.0 if new_from_zero else now_s, now_s)
                    words = _cmdline(pid)
                    if words and QEMU in words[0]:
                        self._qemu.add(pid)
                self._seen[pid].last_s = now_s

    def _wire_bytes(self) -> int:
        places = [(host, network) for host in self.hosts for network in self.networks]
        paths = [host.path(f"/sys/class/net/{network}/statistics/tx_bytes") for host, network in places]
        return sum(int(path.read_text()) for path in paths)
