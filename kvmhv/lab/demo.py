"""The demo's scenario: a VM that works hard moves between two hosts and back, watched from a third.

It uses the product as its users do: by the command line. What the guest's users would notice is measured by the watcher
on the client host, and at the end every acknowledged write is looked up in the disk image.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvmhv.errors import HostError
from kvmhv.lab.guest_images import GuestImages, ensure_guest_images
from kvmhv.lab.lab import Lab, LabHost
from kvmhv.lab.steps import Progress
from kvmhv.lab.storage_host import DISK_LUNS, StorageHost

VM = "web01"
IMAGE = "linux"
LOCATION = "server"
GUEST_HOST_NUMBER = 50
ACK_PORT, BEAT_PORT = 7000, 7001
READY_TIMEOUT_S = 120.0
WATCH_DIR = "/var/lib/kvmhv/watch"
PYTHON = ("env", "PYTHONPATH=/opt/kvmhv/src", "/opt/kvmhv/venv/bin/python")
SETTLE_S = 2.0
"""The guest's users watch so long before the first and after the last move."""


@dataclass(frozen=True)
class Work:
    """What the guest does all the time."""

    memory: str = "256M"
    disk: str = "64M"
    dirty: str = "20M"
    dirty_set: str = "64M"
    rate: str = "400mbit"


@dataclass(frozen=True)
class MoveSeen:
    """A move as kvmhv reports it, and as the client saw it."""

    report: dict[str, Any]
    window: dict[str, Any]


@dataclass
class DemoReport:
    """What came of it."""

    moves: list[MoveSeen] = field(default_factory=list)
    watch: dict[str, Any] = field(default_factory=dict)
    disk: dict[str, Any] | None = None
    leftovers: list[str] = field(default_factory=list)

    def problems(self) -> list[str]:
        """Return what a user of the guest would complain about; empty when all is as promised."""
        found = [
            f"move {number} ended as {move.report['outcome']}: {move.report['reason']}"
            for number, move in enumerate(self.moves, 1)
            if move.report["outcome"] != "done"
        ]
        if self.watch.get("echo_broken"):
            found.append(f"the TCP connection broke: {self.watch['echo_broken']['reason']}")
        if len(self.watch.get("boot_ids", ())) != 1:
            found.append("the guest was booted anew")
        if self.disk is not None and not self.disk["ok"]:
            found.append(f"acknowledged writes are missing: {self.disk['problems'][:3]}")
        return found + [f"left behind: {one}" for one in self.leftovers]


class Watch:
    """The watcher on the client host, spoken to over its standard input."""

    def __init__(self, client: LabHost, guest_ip: str) -> None:
        client.exec(["mkdir", "-p", WATCH_DIR])
        options = ["--ack", str(ACK_PORT), "--beat", str(BEAT_PORT), "--echo", f"{guest_ip}:7", "--ping", guest_ip]
        argv = [*PYTHON, "-m", "kvmhv.lab.watch", *options, "--out", f"{WATCH_DIR}/watch.json"]
        self._process = client.popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.acks = f"{WATCH_DIR}/watch.json.acks"

    def wait(self, word: str) -> None:
        """Wait until it says `word`. HostError `demo-watch` when it ends before."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.decode().strip() == word:
                return
        raise HostError(
            "demo-watch", f"the watcher on the client ended before it was {word}", "see the guest's console"
        )

    def mark(self, name: str) -> None:
        """Begin a new window of the report."""
        self._say(f"mark {name}")
        self.wait(f"marked {name}")

    def snapshot(self) -> dict[str, Any]:
        """Return the report so far."""
        self._say("snapshot")
        assert self._process.stdout is not None
        result: dict[str, Any] = json.loads(self._process.stdout.readline())
        return result

    def end(self) -> None:
        """End the watcher."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _say(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()


class Demo:
    """One run. `command` runs the CLI with arguments on the terminal, `progress` says what happens."""

    def __init__(
        self, name: str, work: Work, progress: Progress, rounds: int = 1, storage: tuple[str, str] | None = None
    ) -> None:
        """`storage`: the kind of server (`smb`, `nfs`, `iscsi`) and the format of the disk that lies on it.

        Without one the disk lies on the hosts and moves too.
        """
        self._storage = storage
        self._name = name
        self._work = work
        self._progress = progress
        self._rounds = rounds
        self._environment = {**os.environ, "KVMHV_LAB": name}

    def run(self) -> DemoReport:
        """Bring the lab up, run the scenario, take the lab down whatever happens; raises KvmhvError."""
        report = DemoReport()
        images = ensure_guest_images(self._progress)
        with self._lab() as lab:
            self._scenario(lab, images, report)
        report.leftovers = lab.leftovers()
        return report

    @contextmanager
    def _lab(self) -> Iterator[Lab]:
        with_server = self._storage is not None
        lab = Lab.up(self._name, rate=self._work.rate, storage=with_server, progress=self._progress)
        try:
            yield lab
        finally:
            lab.down()

    def _scenario(self, lab: Lab, images: GuestImages, report: DemoReport) -> None:
        client = lab.host("client")
        client_ip = client.plan.addresses["lan"]
        guest_ip = f"{client_ip.rsplit('.', 1)[0]}.{GUEST_HOST_NUMBER}"
        watch = Watch(client, guest_ip)
        try:
            watch.wait("listening")
            if self._storage is not None:
                for host in ("host1", "host2"):
                    self._kvmhv("--host", host, *StorageHost(lab).add_command(LOCATION, self._storage[0]))
            self._start_vm(images, client_ip, guest_ip)
            started = time.monotonic()
            watch.wait("ready")
            self._progress(f"{VM} works since {time.monotonic() - started:.1f} s: disk, memory, TCP, pings")
            time.sleep(SETTLE_S)
            for number in range(2 * self._rounds):
                source, target = ("host1", "host2") if number % 2 == 0 else ("host2", "host1")
                watch.mark(f"move{number + 1}")
                result = self._move(source, target)
                time.sleep(SETTLE_S)
                window = next(one for one in watch.snapshot()["windows"] if one["name"] == f"move{number + 1}")
                report.moves.append(MoveSeen(report=result, window=window))
                if result["outcome"] != "done":
                    break
            report.watch = watch.snapshot()
            where = report.moves[-1].report
            last_host = where["target"] if where["outcome"] == "done" else where["source"]
            self._progress(f"stopping {VM} and looking up every acknowledged write in its disk")
            self._kvmhv("--host", last_host, "vm", "stop", VM, "--force")
            report.disk = self._look_up(lab, last_host, client.path(watch.acks))
        finally:
            watch.end()

    def _start_vm(self, images: GuestImages, client_ip: str, guest_ip: str) -> None:
        work = self._work
        append = (
            f"{images.cmdline} kvmhv.ip={guest_ip}/24 kvmhv.dirty={work.dirty} kvmhv.dirty_set={work.dirty_set} "
            f"kvmhv.disk=/dev/vda kvmhv.ack={client_ip}:{ACK_PORT} kvmhv.beat={client_ip}:{BEAT_PORT}@5ms"
        )
        files = ["--kernel", str(images.vmlinuz), "--initrd", str(images.initrd)]
        self._kvmhv("--host", "host1", "image", "import", IMAGE, *files, "--append", append)
        devices = ["--disk", self._disk(), "--switch", "lan"]
        self._kvmhv("--host", "host1", "vm", "create", VM, "--memory", work.memory, "--image", IMAGE, *devices)
        self._kvmhv("--host", "host1", "vm", "start", VM)

    def _disk(self) -> str:
        if self._storage is None:
            return f"size={self._work.disk}"
        kind, disk_format = self._storage
        lun = f",lun={DISK_LUNS[0]}" if kind == "iscsi" else ""
        return f"size={self._work.disk},location={LOCATION},format={disk_format}{lun}"

    def _move(self, source: str, target: str) -> dict[str, Any]:
        where = "with its disk" if self._storage is None else f"; its disk stays on the {self._storage[0]} server"
        self._progress(f"moving {VM} from {source} to {target} {where}")
        options = ["--include-storage"] if self._storage is None else []
        argv = self._argv("--host", source, "vm", "move", VM, "--to", target, *options)
        subprocess.run(argv, env=self._environment, check=False)
        moves = json.loads(self._kvmhv("--host", source, "--json", "move", "list"))
        newest: dict[str, Any] = moves[-1]
        return newest

    def _look_up(self, lab: Lab, last_host: str, acks: Path) -> dict[str, Any]:
        """Let the oracle look every acknowledged write up: on the host that has the disk, or in the server's copy."""
        inside, host, disk_format = "/var/lib/kvmhv/demo.acks", lab.host(last_host), "qcow2"
        shutil.copy(acks, host.path(inside))
        image = f"/var/lib/kvmhv/disks/{VM}/disk0.qcow2"
        if self._storage is not None:
            kind, disk_format = self._storage
            image = "/var/lib/kvmhv/demo.img"
            own = f"iscsi/disk{DISK_LUNS[0]}.img" if kind == "iscsi" else f"{kind}/{VM}/disk0.{disk_format}"
            shutil.copy(StorageHost(lab).path(own), host.path(image))
        argv = [*PYTHON, "-m", "kvmhv.lab.oracle", "--acks", inside, "--image", image, "--format", disk_format]
        found: dict[str, Any] = json.loads(host.exec(argv, check=False).stdout)
        return found

    def _argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "kvmhv", *arguments]

    def _kvmhv(self, *arguments: str) -> str:
        """Run a command of the CLI and return what it printed. HostError `demo-step` with what it said if it fails."""
        done = subprocess.run(
            self._argv(*arguments), env=self._environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            text = f"`kvmhv {' '.join(arguments)}` ended with status {done.returncode}: {done.stderr.strip()}"
            raise HostError("demo-step", text, "try it by hand: kvmhv lab up, then this command")
        return done.stdout
