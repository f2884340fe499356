"""Steps that the tests of moves share: two hosts as their operator drives them, a guest that verifies itself, and what
must be gone from both hosts when all is over.

Nothing here waits for luck: what is waited for is a fact (a report, a process, a line on a console), with a deadline
that only a broken machine meets.
"""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from kvmhv.cli.address import Address
from kvmhv.cli.connection import Agent
from kvmhv.lab.guest_images import AS_FAST_AS_IT_CAN, GuestImages, write_boot_guest
from kvmhv.lab.lab import Lab, LabHost

DEADLINE_S = 120.0
MIB = 1 << 20
BEAT = re.compile(r"beat (\d+) passes (\d+) errors (\d+) ms (\d+) dirtied (\d+)\r?\n")
LOOK = r"""
import glob, json, re, sqlite3, subprocess

def said(*command):
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.splitlines()

KEPT = (
    r"/run/kvmhv/(ended.*|vm|agent\.sock|journal|journal/id)|"
    r"/var/lib/kvmhv/(identity.*|agent\.lock|kvmhv\.sqlite.*|disks|vms|images|watch.*)"
)
PLACES = ("/run/kvmhv", "/var/lib/kvmhv", "/tmp", "/dev/shm")
database = sqlite3.connect("file:/var/lib/kvmhv/kvmhv.sqlite?mode=ro", uri=True)
records = database.execute("SELECT kind, key FROM records WHERE kind IN ('vm', 'disks-made', 'image') ORDER BY 1, 2")
moves = database.execute("SELECT 'open move', move, role FROM journal ORDER BY 2, 3")
tcp = [" ".join(line.split()[i] for i in (0, 3, 4)) for line in said("ss", "-Htan")]
unix = [line.split()[4] for line in said("ss", "-Hxl")]
print(json.dumps({
    "processes": said("pgrep", "-a", "qemu|nbd"),
    "TCP": sorted(line for line in tcp if ":6600" not in line and not line.startswith("TIME-WAIT")),
    "sockets": sorted(name for name in unix if "kvmhv" in name and not name.endswith("agent.sock")),
    "files": [name for name in sorted(said("find", *PLACES, "-mindepth", "1")) if not re.fullmatch(KEPT, name)],
    "links": sorted(link["ifname"] for link in json.loads("".join(said("ip", "-j", "link")))),
    "records": [" ".join(row) for row in (*records, *moves)],
}))
"""

Report = dict[str, Any]
Left = dict[str, list[str]]
Look = Callable[[], Any]


class Answer(NamedTuple):
    """What a command of the CLI came to: its exit status, what it printed as JSON, and what it said on stderr."""

    status: int
    json: Any
    said: str


def until(what: str, look: Look, timeout_s: float = DEADLINE_S) -> Any:
    """Return what `look` sees once it is true."""
    deadline = time.monotonic() + timeout_s
    while not (seen := look()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}"
        time.sleep(0.02)
    return seen


def codes_of(findings: list[dict[str, Any]], severity: str = "error") -> set[str]:
    """Return the ids of findings of a severity."""
    return {finding["id"] for finding in findings if finding["severity"] == severity}


class Side:
    """One of the two hosts."""

    def __init__(self, host: LabHost) -> None:
        self.host = host
        self.name = host.name
        self.agent = Agent(Address(host=host.name, socket=host.socket))

    # ---- as its operator

    def run(self, *arguments: str) -> Answer:
        """Run a command of the CLI with --json, whatever comes of it."""
        done = self.host.exec(["kvmhv", *arguments, "--json"], check=False, timeout_s=300)
        text = done.stdout.strip()
        return Answer(done.returncode, json.loads(text) if text else None, done.stderr)

    def kvmhv(self, *arguments: str) -> Any:
        """Run a command that must succeed and return what it printed."""
        answer = self.run(*arguments)
        assert answer.status == 0, f"kvmhv {' '.join(arguments)} on {self.name}: {answer}"
        return answer.json

    def sh(self, script: str) -> str:
        """Run a shell script that must succeed."""
        return self.host.exec(["sh", "-c", script]).stdout

    def show(self, vm: str = "web01") -> Any:
        """Return `vm show`."""
        return self.kvmhv("vm", "show", vm)

    def has(self, vm: str = "web01") -> bool:
        """Whether the host knows a VM of that name."""
        return any(row["name"] == vm for row in self.kvmhv("vm", "list"))

    def move(self, target: "Side", *options: str, vm: str = "web01") -> Answer:
        """Move a VM with its disks and wait for the end."""
        return self.run("vm", "move", vm, "--to", target.name, "--include-storage", *options)

    def begin(self, target: "Side", *options: str, vm: str = "web01") -> str:
        """Begin to move a VM with its disks; returns the move's id."""
        begun = self.kvmhv("vm", "move", vm, "--to", target.name, "--include-storage", "--no-wait", *options)
        return str(begun["id"])

    def wait(self, move_id: str) -> Answer:
        """Wait for the end of a move."""
        return self.run("move", "watch", move_id)

    # ---- at a closer look

    def report(self, move_id: str) -> Report:
        """Return a move's report, straight from the agent."""
        return self.agent.call("GET", f"moves/{move_id}", dict[str, Any])

    def reaches(self, move_id: str, phase: str, has_come_so_far: Callable[[Report], bool] = lambda _: True) -> Report:
        """Wait until a running move is in a phase, and so far in it; it must not end before."""

        def look() -> Report | None:
            report = self.report(move_id)
            assert report["outcome"] == "running", report
            return report if report["phase"] == phase and has_come_so_far(report) else None

        found: Report = until(f"{phase} of move {move_id}", look)
        return found

    def restart_agent(self) -> None:
        """Let the agent read its configuration anew."""
        self.host.agent_stop()
        self.host.agent_start()

    def has_no_move(self) -> bool:
        """Whether every move of this host has ended."""
        return not any(record.startswith("open move") for record in self.left()["records"])

    def file(self, inside: str) -> Path:
        """Return the machine's path of a file on this host."""
        return self.host.path(inside)

    def pids(self) -> list[int]:
        """Return the ids of the QEMUs of VMs, as the host counts them."""
        return [int(pid) for pid in self.sh("pgrep -f '^[^ ]*qemu-system.* -name' || true").split()]

    def console(self, vm: str = "web01") -> str:
        """Return what the guest has said here since it started or arrived."""
        log = Path(self.show(vm)["console"]).with_name("console.log")
        return self.file(str(log)).read_text(errors="replace")

    def console_of_the_departed(self, vm_id: str) -> str:
        """Return what a guest that has moved away had said here."""
        return self.file(f"/run/kvmhv/ended/{vm_id}/console.log").read_text(errors="replace")

    def qmp_event_ms(self, directory: str, event: str) -> float:
        """Return when QEMU said this last, in the clock that all hosts of a lab share."""
        lines = self.file(f"/run/kvmhv/{directory}/qmp.log").read_text().splitlines()
        return [float(line.split()[0]) for line in lines if f'"event":"{event}"' in line][-1]

    def agent_files(self) -> int:
        """Return how many files and sockets the agent has open."""
        pid = self.host.agent_status().pid
        assert pid is not None
        return len(list(self.file(f"/proc/{pid}/fd").iterdir()))

    def left(self) -> Left:
        """Return whatever VMs and moves may leave on a host. Logs that are kept aside for the curious are no rest."""
        left: Left = json.loads(self.host.exec(["python3", "-c", LOOK]).stdout)
        return left

    def settled(self) -> Left:
        """Return what is left once an agent that was just started has asked its QEMU what it can do."""
        deadline = time.monotonic() + 30
        while "kvmhv-probe" in str(now := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return now

    def is_again(self, before: Left) -> None:
        """Assert that the host is as it was; what ends behind a move's end has a moment for it."""
        deadline = time.monotonic() + 20
        while (now := self.left()) != before and time.monotonic() < deadline:
            time.sleep(0.2)
        assert now == before, f"left on {self.name}"

    # ---- as somebody who means harm

    @contextmanager
    def slow_network(self, rate: str, network: str = "migration") -> Iterator[None]:
        """Let this host send no faster than that to a network."""
        self.sh(f"tc qdisc replace dev {network} root tbf rate {rate} burst 64k latency 50ms")
        try:
            yield
        finally:
            self.sh(f"tc qdisc del dev {network} root")

    @contextmanager
    def settings(self, **changed: str) -> Iterator[None]:
        """Change migration settings for a while."""
        before = self.kvmhv("host", "show")["settings"]
        self.kvmhv("host", "set", *(f"migration.{key}={value}" for key, value in changed.items()))
        try:
            yield
        finally:
            texts = {key: before[f"migration.{key}"] for key in changed}
            self.kvmhv("host", "set", *(f"migration.{key}={_as_text(value)}" for key, value in texts.items()))


def _as_text(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value).lower()


class Pair:
    """host1, on which VMs are made, and host2; web01 is the VM."""

    def __init__(self, lab: Lab, images: GuestImages) -> None:
        self.lab = lab
        self.images = images
        self.a = Side(lab.host("host1"))
        self.b = Side(lab.host("host2"))
        self.sides = (self.a, self.b)
        self.vm_id = ""
        self._said = ""

    def create(self, *options: str, vm: str = "web01", memory: str = "32M") -> None:
        """Create a VM on host1 and start it."""
        shown = self.a.kvmhv("vm", "create", vm, "--memory", memory, *options, "--start")
        self.vm_id = shown["vm"]["id"]
        self._said = ""

    def boot(
        self,
        *options: str,
        working_set_bytes: int = 4 * MIB,
        rate_bytes_per_s: int = 1 * MIB,
        vm: str = "web01",
        memory: str = "32M",
        disk: str = "file=/srv/boot.raw,format=raw",
    ) -> None:
        """Create and start the guest that verifies its memory itself, and wait until it works. It boots from `disk`."""
        self.a.sh("mkdir -p /srv")
        template = self.images.boot_template
        self.a.file("/srv/boot.raw").write_bytes(b"")
        write_boot_guest(
            self.a.file("/srv/boot.raw"),
            template,
            working_set_bytes=working_set_bytes,
            rate_bytes_per_s=rate_bytes_per_s,
        )
        self.create("--disk", disk, *options, vm=vm, memory=memory)
        until("the guest's first heartbeat", lambda: "beat" in self.a.console(vm))

    def boot_fast(self, working_set_bytes: int, *options: str) -> None:
        """Start a guest that dirties so much memory as fast as it can."""
        memory = f"{working_set_bytes // MIB + 32}M"
        self.boot(*options, working_set_bytes=working_set_bytes, rate_bytes_per_s=AS_FAST_AS_IT_CAN, memory=memory)

    def moved(self, source: Side, target: Side, *options: str) -> Report:
        """Move web01, which must succeed; what the guest has said at the source is kept."""
        answer = source.move(target, *options)
        assert (answer.status, answer.json["outcome"]) == (0, "done"), answer
        report: Report = answer.json
        self.remember(source)
        assert report["warnings"] == [], report
        seen_ms = source.qmp_event_ms(f"ended/{self.vm_id}", "STOP"), target.qmp_event_ms(f"vm/{self.vm_id}", "RESUME")
        inaccuracy_ms = report["blackout_uncertainty_ms"] + 5
        assert report["blackout_ms"] >= seen_ms[1] - seen_ms[0] - inaccuracy_ms, (seen_ms, report)
        return report

    def remember(self, source: Side) -> None:
        """Keep what the guest said on the side that it has just left, for `works`."""
        self._said += source.console_of_the_departed(self.vm_id)

    def works(self, side: Side, vm: str = "web01") -> list[tuple[int, ...]]:
        """Wait until the guest has verified its whole memory once more on this side, and return all its beats.

        In all that it has said there is one boot, no damage, and no heartbeat is missing.
        """
        here = len(self._beats_of(side.console(vm)))

        def look() -> list[tuple[int, ...]] | None:
            beats = self._beats_of(self._said + side.console(vm))
            fresh = self._beats_of(side.console(vm))[here:]
            return beats if len(fresh) > 2 and fresh[-1][1] > fresh[0][1] + 1 else None

        beats: list[tuple[int, ...]] = until(f"the guest works on {side.name}", look)
        text = self._said + side.console(vm)
        assert text.count("BOOT ") == 1, text[-2000:]
        assert "BAD" not in text, text[-2000:]
        assert [beat[0] for beat in beats] == list(range(1, len(beats) + 1))
        assert {beat[2] for beat in beats} == {0}
        assert all(later[3] > earlier[3] and later[4] >= earlier[4] for earlier, later in pairwise(beats))
        return beats

    @staticmethod
    def _beats_of(text: str) -> list[tuple[int, ...]]:
        return [tuple(map(int, beat.groups())) for beat in BEAT.finditer(text)]

    def clear(self) -> None:
        """Put both hosts back: agents run, cables in, no settings, no VMs, no images."""
        for side in self.sides:
            for network in ("management", "migration"):
                side.host.mend(network)
            side.host.agent_start()
        for side in self.sides:
            until(f"no move on {side.name}", side.has_no_move)
            for vm in side.kvmhv("vm", "list"):
                side.kvmhv("vm", "stop", vm["name"], "--force")
                side.kvmhv("vm", "remove", vm["name"], "--yes")
            for image in side.kvmhv("image", "list"):
                side.kvmhv("image", "remove", image["name"])
            side.sh("rm -rf /srv/*")
