"""kvmhv as its users have it: one command, its agents on both hosts."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

from kvmhv.errors import HostError
from kvmhv.lab.bench.libvirt import children_cpu_s
from kvmhv.lab.bench.machine import Hardware
from kvmhv.lab.lab import Lab, LabHost

NAME = "kvmhv"
MOVE_S = 240.0


def kvmhv(lab: Lab, host: str, *arguments: str, timeout_s: float = MOVE_S, may_fail: bool = False) -> str:
    """Run a command for a host of a lab and return what it printed. HostError `bench-step` unless it `may_fail`."""
    argv = [sys.executable, "-m", "kvmhv", "--host", host, *arguments]
    environment = {**os.environ, "KVMHV_LAB": lab.name}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode and not may_fail:
        raise HostError("bench-step", f"kvmhv {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class KvmhvMove:
    """What a move by kvmhv took, and its own record of it."""

    wall_s: float
    cpu_s: float
    qemu_s: float
    before_s: float
    """From the command to the move's beginning, by the wall clock that both share."""
    after_s: float
    report: dict[str, Any]


class KvmhvGuest:
    """A guest that kvmhv runs and moves."""

    def __init__(self, hardware: Hardware, host: LabHost, files: tuple[str, str]) -> None:
        """Start the guest on `host`; `files` are the kernel and the initrd."""
        self.hardware = hardware
        self.host = host
        image = ["--kernel", files[0], "--initrd", files[1], "--append", hardware.append]
        self._run("image", "import", NAME, *image)
        disk = ["--disk", f"file={hardware.disk},format=qcow2"] if hardware.disk else []
        machine = ["--memory", f"{hardware.memory_mib}M", "--image", NAME, "--switch", "lan", "--mac", hardware.mac]
        self._run("vm", "create", NAME, *machine, *disk)
        self._run("vm", "start", NAME)

    def end(self) -> None:
        """End the guest and forget it."""
        self._run("vm", "stop", NAME, "--force")
        self._run("vm", "remove", NAME)
        for host in self.host.lab.hosts:
            if host.plan.agent:
                self._command(host, "image", "remove", NAME)

    def move(self, target: LabHost, options: tuple[str, ...]) -> KvmhvMove:
        """Move the guest to `target` by one command, which must succeed."""
        storage = ("--include-storage",) if self.hardware.disk else ()
        argv = self._argv(self.host, "vm", "move", NAME, "--to", target.name, *storage, *options, "--json")
        asked_at, started_s, cpu_s = time.time(), time.monotonic(), children_cpu_s()
        done = subprocess.run(
            argv, env=self._environment(), capture_output=True, text=True, timeout=MOVE_S, check=False
        )
        wall_s = time.monotonic() - started_s
        cpu_s = children_cpu_s() - cpu_s
        if done.returncode:
            raise HostError("bench-step", f"kvmhv vm move: {done.stderr.strip() or done.stdout.strip()}")
        report = json.loads(done.stdout)
        times = {one["phase"]: one["seconds"] for one in report["phases"]}
        qemu_s = times.get("storage", 0.0) + times.get("memory", 0.0) + times.get("state", 0.0)
        self.host = target
        before_s, after_s = report["started_at"] - asked_at, asked_at + wall_s - report["ended_at"]
        return KvmhvMove(wall_s, cpu_s, qemu_s, before_s, after_s, report)

    def effects_here(self, move_id: str) -> list[dict[str, Any]]:
        """Return what the host that has the guest now has noted of a move's effects."""
        found: list[dict[str, Any]] = json.loads(self._run("move", "show", move_id, "--json"))["effects"]
        return found

    def _run(self, *arguments: str) -> str:
        done = self._command(self.host, *arguments)
        if done.returncode:
            raise HostError("bench-step", f"kvmhv {' '.join(arguments)}: {done.stderr.strip()}")
        return done.stdout

    def _command(self, host: LabHost, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = self._argv(host, *arguments)
        return subprocess.run(argv, env=self._environment(), capture_output=True, text=True, timeout=60, check=False)

    def _argv(self, host: LabHost, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "kvmhv", "--host", host.name, *arguments]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "KVMHV_LAB": self.host.lab.name}
