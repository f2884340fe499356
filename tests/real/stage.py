"""The stage on which the matrix of faults is played: one VM for each phase of a move, all of them held there at once.

A fault that hits a host or an agent then hits every phase in one blow; a fault of one VM's QEMU or connection is
dealt to each VM. Where a move is held is exact (held_agent.py): nothing here is placed by waiting for a time.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvmhv.drivers.qemu.process import PIDFD_GETFD
from kvmhv.errors import CallerError, KvmhvError
from kvmhv.lab import oracle, processes
from kvmhv.lab.guest_images import GuestImages, write_boot_guest
from kvmhv.lab.lab import Lab
from kvmhv.lab.state import data_dir, run_dir
from tests.real.moving import MIB, Report, Side, until
from tests.real.witness import Witness

HOLD = "run/hold"
SLOT_BYTES = 4096
LEAVE_S = 90.0
DISKS = {"vdb": ("disk1", "raw"), "vdc": ("disk2", "qcow2")}
SLOW = {"bandwidth_bytes_per_s": 4 * MIB, "max_passes": 2}
"""With a guest that dirties more than that in a second, a move has exactly two passes, whoever is quick."""

PHASES = {
    "setup": "target.fact-IncomingReady",
    "storage": "source.fact-MirrorsReady",
    "early passes": "source.fact-PassStarted",
    "last pass": "source.fact-GuestStopped",
    "pre-switchover": "source.before-ContinueSwitchover",
    "device state": "source.before-ContinueSwitchover",
    "sent": "source.fact-MemorySent",
    "granted": "source.before-Send-Grant",
    "before run": "target.before-Cont",
    "runs": "target.fact-GuestRuns",
    "cleanup": "source.before-EndCopy",
}
"""Where a move stands, and the place that holds it there. `device state`: the target's QEMU is stopped as well, so that
the source's has sent all and waits for it. `sent`: both QEMUs have completed, nothing is granted. `granted`: the source
has noted the grant and not said it. `before run`: the target has noted that it is about to run the guest. `runs`: it
does, and has told nobody."""

FUTEX = 202
"""The number of the system call in which a thread waits for a lock or for another thread's end."""
STANDS_S = 0.2

IN_DEVICE_STATE = "source.after-ContinueSwitchover"


@dataclass
class Player:
    """A VM that is on its way in a phase."""

    phase: str
    name: str
    id: str = ""
    move: str = ""
    boots: int = 1
    in_device_state: bool = False

    @property
    def hold(self) -> str:
        """The place at which it is held."""
        return f"{IN_DEVICE_STATE if self.in_device_state else PHASES[self.phase]}.{self.name}"


class Stage:
    """Two hosts with held agents, and the players on them."""

    def __init__(self, lab: Lab, images: GuestImages, phases: Iterable[str]) -> None:
        self.lab = lab
        self.a, self.b = Side(lab.host("host1")), Side(lab.host("host2"))
        self.sides = (self.a, self.b)
        self.witness = Witness(lab, (self.a.name, self.b.name))
        self.players = [Player(phase, phase.replace(" ", "-")) for phase in phases]
        self._images = images

    # ---- agents, as their operator's scripts see them

    @staticmethod
    def call(side: Side, method: str, path: str, body: object = None) -> Any:
        """Ask an agent."""
        return side.agent.call(method, path, object, body=body, timeout_s=60)

    def report(self, side: Side, player: Player) -> Report | None:
        """Return how a host sees a move; None: it does not know it, or its agent does not answer."""
        if side.host.state != "running" or not side.host.socket.exists():
            return None
        try:
            return side.agent.call("GET", f"moves/{player.move}", dict[str, Any], timeout_s=2)
        except (KvmhvError, OSError):
            return None

    def state(self, side: Side, player: Player) -> str:
        """Return the state of a VM on a host, `absent` if the host does not know it."""
        try:
            return str(self.call(side, "GET", f"vms/{player.name}")["state"])
        except CallerError as error:
            assert error.code == "vm-unknown", error
            return "absent"

    # ---- processes, as the machine sees them

    def qemu(self, side: Side, player: Player) -> int | None:
        """Return the machine's id of a VM's QEMU on a host."""
        for pid in processes.in_namespace(side.host.namespace):
            words = _arguments(pid)
            if player.id in words and "-uuid" in words:
                return pid
        return None

    def agent(self, side: Side) -> int:
        """Return the machine's id of a host's agent."""
        (found,) = (p for p in processes.in_namespace(side.host.namespace) if "/opt/held_agent.py" in _arguments(p))
        return found

    def qmp_log(self, side: Side, player: Player) -> Path:
        """Return the file of what a VM's QEMU on a host has been told and has said."""
        return run_dir(self.lab.name, side.name) / "vm" / player.id / "qmp.log"

    def signal(self, side: Side, player: Player, number: signal.Signals) -> None:
        """Send a signal to a VM's QEMU on a host, if it is there."""
        pid = self.qemu(side, player)
        if pid is not None:
            os.kill(pid, number)

    def break_connections(self, player: Player, which: int, source: Side | None = None) -> int:
        """Break the memory (0) or the disk (1) connections of a move, as seen from its source; returns how many."""
        source = source or self.a
        file = run_dir(self.lab.name, source.name) / "vm" / player.id / "peer.json"
        pid = self.qemu(source, player)
        if pid is None or not file.exists():
            return 0
        return break_tcp(pid, json.loads(file.read_text())["ports"][which])

    # ---- the play

    def enter(self, write_ms: int = 60) -> None:
        """Make and start every player on host1; each writes to its disks so often."""
        self.a.sh(f"mkdir -p /srv && head -c {2 * MIB + SLOT_BYTES} /dev/zero > /srv/data.raw")
        for number, player in enumerate(self.players):
            file = self.a.file(f"/srv/{player.name}.raw")
            file.touch()
            write_boot_guest(
                file,
                self._images.boot_template,
                working_set_bytes=2 * MIB,
                rate_bytes_per_s=6 * MIB,
                guest_id=number + 1,
                write_ms=write_ms,
            )
            disks = [
                {"file": f"/srv/{player.name}.raw", "format": "raw"},
                {"file": "/srv/data.raw", "format": "raw"},
                {"size_bytes": 2 * MIB},
            ]
            spec = {"name": player.name, "memory_bytes": 32 * MIB, "disks": disks}
            player.id = self.call(self.a, "POST", "vms", spec)["vm"]["id"]
            self.call(self.a, "POST", f"vms/{player.name}/start")
        for player in self.players:
            until(f"{player.name} writes", lambda p=player: len(self.witness.acks(p.id, "vdc")) > 3)

    def begin(self, player: Player, source: Side, target: Side, *, slow: bool = True) -> None:
        """Begin a player's move."""
        body: dict[str, object] = {"vm": player.name, "target": target.name, "include_storage": True}
        if slow:
            body |= SLOW
        player.move = self.call(source, "POST", f"vms/{player.name}/move", body)["id"]

    def set_out(self) -> None:
        """Begin every move, and wait until each is held in its phase."""
        for player in self.players:
            self._place(player, "at").touch()
            self.begin(player, self.a, self.b)
        for player in self.players:
            until(f"{player.name} is held", self._place(player, "held").exists, 60)
        for player in self.players:
            if player.phase == "device state":
                self.signal(self.b, player, signal.SIGSTOP)
                before = self._place(player, "held")
                player.in_device_state = True
                self._place(player, "at").touch()
                before.unlink()
                until(f"{player.name} is held", self._place(player, "held").exists)
                log = self.qmp_log(self.a, player)
                until("the device state", lambda log=log: '"status":"device"' in log.read_text())
                until("all is sent", lambda p=player: _waits_for_the_last_word(self.qemu(self.a, p)))

    def release(self, *sides: Side) -> None:
        """Let go of every move that is still held, or of those that one side holds."""
        for player in self.players:
            if not sides or self._side_of(player) in sides:
                self._release(player)

    def go_on(self) -> None:
        """Let go of every move, and of the QEMU that was stopped to hold one; in a frozen host it stays stopped."""
        self.release()
        for player in self.players:
            if player.phase == "device state" and self.b.host.state == "running":
                self.signal(self.b, player, signal.SIGCONT)

    def outcomes(self, player: Player, sides: tuple[Side, ...] = ()) -> tuple[str, ...]:
        """Return how each host calls the outcome of a move now; `unknown` while its agent does not say."""
        seen = [self.report(side, player) for side in sides or self.sides]
        return tuple("unknown" if report is None else str(report["outcome"]) for report in seen)

    def undecided(self, side: Side) -> list[Player]:
        """Return the players whose move one agent says to be running."""
        reports = ((player, self.report(side, player)) for player in self.players)
        return [player for player, report in reports if report is not None and report["outcome"] == "running"]

    def runs(self, side: Side, player: Player) -> bool:
        """Whether a guest is heard on a host again: two beats more."""
        before = self.witness.beats(player.id, side.name)
        deadline = time.monotonic() + 10
        while self.witness.beats(player.id, side.name) < before + 2:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.03)
        return True

    def resolve(self, side: Side, player: Player, run_at: str = "source") -> str:
        """Decide as the operator; if the copy at the source is gone, what shall run there starts from its disks.

        Returns the choice that was made.
        """
        choices = {choice["run_at"] for choice in self.call(side, "GET", f"moves/{player.move}/choices")}
        chosen = run_at if run_at in choices else "restart"
        self.call(side, "POST", f"moves/{player.move}/resolve", {"run_at": chosen})
        return chosen

    # ---- what is looked at

    def verify_disks(self, side: Side, player: Player) -> None:
        """Assert that a stopped VM's disks hold all that its guest had acknowledged."""
        assert self.qemu(side, player) is None
        directory = side.file(f"/var/lib/kvmhv/disks/{player.name}")
        for disk, (name, image_format) in DISKS.items():
            acks = self.witness.acks(player.id, disk)
            report = oracle.verify_image(acks, directory / f"{name}.{image_format}", image_format)
            assert report.ok and report.acked > 3, (player, disk, report)

    def copies(self, player: Player) -> list[str]:
        """Return the hosts on which there is a QEMU of a VM."""
        return [side.name for side in self.sides if self.qemu(side, player) is not None]

    # ---- the end

    def leave(self) -> None:
        """Mend what is broken still, and take everything away.

        What a move holds on to is taken by force, so that the next play finds its hosts empty; that fails this one.
        """
        for side in self.sides:
            if side.host.state == "off":
                side.host.boot()
            side.host.thaw()
            for network in ("management", "migration"):
                side.host.mend(network)
        for side in self.sides:
            for name in ("at", "held"):
                for file in self._hold(side, name).iterdir():
                    file.unlink()
        latest_s = time.monotonic() + LEAVE_S
        try:
            for player in self.players:
                left_s = max(1.0, latest_s - time.monotonic())
                until(f"{player.name} can go", lambda p=player: self._is_removed(p), left_s)
        except (AssertionError, KvmhvError):
            for side in self.sides:
                self._wipe(side)
            raise
        finally:
            self.a.sh("rm -rf /srv/*")

    def _is_removed(self, player: Player) -> bool:
        for side in self.sides:
            report = self.report(side, player) if player.move else None
            if report is not None and report["outcome"] == "running":
                return False
            try:
                if report is not None and report["outcome"] == "needs-operator":
                    self.resolve(side, player)
                if self.state(side, player) != "absent":
                    self.call(side, "POST", f"vms/{player.name}/stop", {"force": True})
                    self.call(side, "DELETE", f"vms/{player.name}")
            except KvmhvError:
                return False  # a move still has it, or was resolved meanwhile
        return True

    def _wipe(self, side: Side) -> None:
        """Let a host forget its VMs and moves; it keeps its name and its trust."""
        if side.host.state != "off":
            side.host.kill()
        state = data_dir(self.lab.name, side.name) / "data"
        with contextlib.closing(sqlite3.connect(state / "kvmhv.sqlite", isolation_level=None)) as database:
            database.execute("DELETE FROM journal")
            database.execute("DELETE FROM records WHERE kind IN ('vm', 'disks-made')")
        for directory in ("disks", "vms"):
            shutil.rmtree(state / directory, ignore_errors=True)
        side.host.boot()

    # ---

    def _hold(self, side: Side, name: str) -> Path:
        return self.lab_path(side, f"{HOLD}/{name}")

    def lab_path(self, side: Side, inside: str) -> Path:
        """Return the machine's path of a file on a running host."""
        return side.host.path(inside)

    def _side_of(self, player: Player) -> Side:
        return self.b if player.hold.startswith("target") else self.a

    def _place(self, player: Player, name: str) -> Path:
        return self._hold(self._side_of(player), name) / player.hold

    def _release(self, player: Player) -> None:
        if self._side_of(player).host.state != "off":
            for name in ("at", "held"):
                self._place(player, name).unlink(missing_ok=True)


def _arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _waits_for_the_last_word(pid: int | None) -> bool:
    """Whether QEMU's migration thread has sent all: it joins the thread that reads the target's last answer.

    Before that it sends, or takes the big lock, and stands nowhere for so long.
    """
    (thread,) = (one for one in Path(f"/proc/{pid}/task").iterdir() if (one / "comm").read_text() == "mig/src/main\n")
    before = _standing(thread)
    time.sleep(STANDS_S)
    return before is not None and _standing(thread) == before


def _standing(thread: Path) -> str | None:
    """Return what a thread that waits in a lock stands at, and how often it has waited yet."""
    call = (thread / "syscall").read_text()
    waits = next(line for line in (thread / "status").read_text().splitlines() if line.startswith("voluntary_ctxt"))
    return call + waits if call.startswith(f"{FUTEX} ") else None


def break_tcp(pid: int, port: int) -> int:
    """Shut down a process's TCP connections to a port, from outside; returns how many there were."""
    found = 0
    libc = ctypes.CDLL(None, use_errno=True)
    pidfd = os.pidfd_open(pid)
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not str(entry.readlink()).startswith("socket:"):
                continue
            with socket.socket(fileno=libc.syscall(PIDFD_GETFD, pidfd, int(entry.name), 0)) as one:
                if one.family == socket.AF_INET and _peer_port(one) == port:
                    one.shutdown(socket.SHUT_RDWR)
                    found += 1
    finally:
        os.close(pidfd)
    return found


def _peer_port(one: socket.socket) -> int:
    try:
        return int(one.getpeername()[1])
    except OSError:
        return 0
