"""QEMU driven by hand: the least that a person could write who knows QMP, and nothing of kvmhv's.

One blocking socket to each QEMU, JSON by lines. `RawGuest.move` starts the target's QEMU, moves the guest, lets it run
there and ends the source's QEMU; the time that it returns is from its first to its last action, without the start of
any interpreter. Taps, disk images and the TLS key's directory are there before the clock runs.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvmhv.errors import HostError
from kvmhv.lab.bench import effects
from kvmhv.lab.bench.machine import CPU_RAW, DIRECTORY, MACHINE, Hardware
from kvmhv.lab.bench.meters import qemus
from kvmhv.lab.lab import LabHost

DEADLINE_S = 180.0
MEMORY_PORT, DISK_PORT = 49300, 49301
THRESHOLD_BYTES = 1 << 20
MAX_PASSES = 10
UNLIMITED_BYTES_PER_S = 1 << 40
Event = dict[str, Any]


class Qmp:
    """One QMP connection that blocks."""

    def __init__(self, path: str, deadline_s: float) -> None:
        """Connect as soon as QEMU listens. Raises HostError `bench-step`."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                sock.connect(path)
                break
            except OSError:
                if time.monotonic() > deadline_s:
                    raise HostError("bench-step", f"QEMU does not listen at {path}") from None
                time.sleep(0.005)
        self.take(sock)

    def take(self, sock: socket.socket) -> None:
        """Greet a QEMU that has just taken the connection."""
        self.sock = sock
        self.events: deque[Event] = deque()
        self._rest = b""
        self._answers: deque[dict[str, Any]] = deque()
        self._read_until(lambda: bool(self._answers))
        self._answers.popleft()  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return its answer. Raises HostError `bench-step` with QEMU's words."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.sock.sendall(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        self._read_until(lambda: bool(self._answers))
        answer = self._answers.popleft()
        if "error" in answer:
            raise HostError("bench-step", f"QEMU refused {command}: {answer['error']['desc']}")
        return answer["return"]

    def feed(self) -> None:
        """Read what is there; blocks if nothing is."""
        data = self.sock.recv(65536)
        if not data:
            raise HostError("bench-step", "QEMU ended the QMP connection")
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.strip():
                said = json.loads(line)
                (self.events if "event" in said else self._answers).append(said)

    def _read_until(self, done: Callable[[], bool]) -> None:
        while not done():
            self.feed()


def next_event(connections: tuple[Qmp, ...], deadline_s: float) -> tuple[Qmp, Event]:
    """Return the next event of any of them. Raises HostError `bench-step` when none comes in time."""
    while True:
        for qmp in connections:
            if qmp.events:
                return qmp, qmp.events.popleft()
        left_s = deadline_s - time.monotonic()
        ready = select.select([qmp.sock for qmp in connections], [], [], max(0.0, left_s))[0]
        if not ready:
            raise HostError("bench-step", "QEMU said nothing until the deadline")
        for qmp in connections:
            if qmp.sock in ready:
                qmp.feed()


@dataclass(frozen=True)
class RawMove:
    """What a move by hand took."""

    wall_s: float
    qemu_s: float
    target_start_s: float
    steps: dict[str, float]
    """Seconds by what was done, in its order."""


class RawGuest:
    """A guest that is moved by hand."""

    def __init__(self, hardware: Hardware, host: LabHost) -> None:
        """Start the guest on `host`."""
        self.hardware = hardware
        self.host = host
        self._launch(host, incoming=False)
        self.qmp = Qmp(self._socket(host), time.monotonic() + DEADLINE_S)
        self.process = self._process(host)

    def end(self) -> None:
        """End the guest, also a copy that a move left behind."""
        for pid in qemus(self.host.lab.hosts, "raw"):
            os.kill(pid, signal.SIGKILL)
        os.close(self.process)

    def _process(self, host: LabHost) -> int:
        """Return a pidfd of the guest's QEMU on a host."""
        return os.pidfd_open(qemus((host,), "raw")[0])

    def _forget(self, host: LabHost) -> None:
        """End what a failed move started."""
        for pid in qemus((host,), "raw"):
            os.kill(pid, signal.SIGKILL)

    def _socket(self, host: LabHost) -> str:
        return str(host.path(f"{DIRECTORY}/raw.sock"))

    def _launch(self, host: LabHost, *, incoming: bool) -> None:
        """Start QEMU in the background: it is there, and listens, when this returns."""
        hardware = self.hardware
        net = f"virtio-net-pci,netdev=n0,mac={hardware.mac},bus=pcie.0,addr=0x2,romfile="
        argv = [
            "qemu-system-x86_64", "-no-user-config", "-nodefaults", "-name", "guest=raw", "-display", "none",
            "-machine", f"{MACHINE},accel=tcg,usb=off,vmport=off,smm=off", "-cpu", CPU_RAW, "-smp", "1",
            "-m", f"{hardware.memory_mib}M", "-qmp", f"unix:{DIRECTORY}/raw.sock,server=on,wait=off",
            "-serial", f"file:{DIRECTORY}/raw.console", "-kernel", f"{DIRECTORY}/vmlinuz",
            "-initrd", f"{DIRECTORY}/initrd", "-append", hardware.append,
            "-netdev", f"tap,id=n0,ifname={hardware.tap},script=no,downscript=no", "-device", net,
            "-device", "virtio-balloon-pci,free-page-reporting=on,bus=pcie.0,addr=0x1d",
            "-object", "rng-random,id=rng0,filename=/dev/urandom",
            "-device", "virtio-rng-pci,rng=rng0,bus=pcie.0,addr=0x1e,romfile=",
        ]  # fmt: skip
        if hardware.disk is not None:
            file = {"driver": "file", "filename": hardware.disk, "cache": {"direct": True}, "aio": "threads"}
            node = {"driver": "qcow2", "node-name": "disk0", "file": file, "cache": {"direct": True}}
            argv += ["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=disk0,bus=pcie.0,addr=0x1"]
        if incoming:
            argv += ["-incoming", "defer", "-S"]
        done = subprocess.run(host.argv([*argv, "-daemonize"]), capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise HostError("bench-step", f"QEMU does not start: {done.stderr.strip()}")

    def move(self, target: LabHost, ip: str, *, tls: bool, own_rule: bool) -> RawMove:
        """Move the guest to `target`, whose address on the migration network is `ip`."""
        deadline_s = time.monotonic() + DEADLINE_S
        started_s = time.monotonic()
        self._launch(target, incoming=True)
        try:
            there = Qmp(self._socket(target), deadline_s)
            launched_s = time.monotonic()
            self._prepare(there, tls=tls, ip=ip)
            begun_s = time.monotonic()
            if self.hardware.disk is not None:
                self._mirror(ip, tls=tls, deadline_s=deadline_s)
            copied_s = time.monotonic()
            self._moments_s: dict[str, float] = {}
            self._set(tls=tls, own_rule=own_rule)
            self.qmp.execute("migrate", uri=f"tcp:{ip}:{MEMORY_PORT}")
            self._see_through(there, own_rule=own_rule, deadline_s=deadline_s)
        except BaseException:
            self._forget(target)
            raise
        moved_s = time.monotonic()
        with contextlib.suppress(HostError, OSError):
            self.qmp.execute("quit")
        if not select.select([self.process], [], [], DEADLINE_S)[0]:
            raise HostError("bench-step", "the source's QEMU does not end")
        ended_s = time.monotonic()
        os.close(self.process)
        there.events.clear()
        if tls:
            there.execute("object-del", id="tls0")
        self.process, self.qmp, self.host = self._process(target), there, target
        steps = {
            effects.TARGET_QEMU: begun_s - started_s, effects.DISKS: copied_s - begun_s,
            **self._memory_steps(copied_s, moved_s), effects.SOURCE_QEMU: ended_s - moved_s,
        }  # fmt: skip
        return RawMove(ended_s - started_s, moved_s - begun_s, launched_s - started_s, steps)

    def _memory_steps(self, begun_s: float, moved_s: float) -> dict[str, float]:
        """Return the seconds of memory and state, by the passes that QEMU told of and the guest's stop."""
        stopped_s = self._moments_s.get("stopped", moved_s)
        first_s = min(self._moments_s.get("pass 1", stopped_s), stopped_s)
        second_s = min(self._moments_s.get("pass 2", stopped_s), stopped_s)
        return {
            effects.BEFOREHAND: first_s - begun_s, effects.FIRST: second_s - first_s,
            effects.FURTHER: stopped_s - second_s, effects.SWITCHOVER: moved_s - stopped_s,
        }  # fmt: skip

    def _prepare(self, there: Qmp, *, tls: bool, ip: str) -> None:
        wanted = [{"capability": name, "state": True} for name in ("events", "return-path", "pause-before-switchover")]
        there.execute("migrate-set-capabilities", capabilities=wanted)
        if tls:
            there.execute("object-add", qom_type="tls-creds-psk", id="tls0", dir=f"{DIRECTORY}/keys", endpoint="server")
            there.execute("migrate-set-parameters", tls_creds="tls0", tls_hostname="")
        if self.hardware.disk is not None:
            where = {"type": "inet", "data": {"host": ip, "port": str(DISK_PORT)}}
            there.execute("nbd-server-start", addr=where, **({"tls_creds": "tls0"} if tls else {}))
            there.execute("block-export-add", type="nbd", id="e0", node_name="disk0", name="disk0", writable=True)
        there.execute("migrate-incoming", uri=f"tcp:{ip}:{MEMORY_PORT}")

    def _set(self, *, tls: bool, own_rule: bool) -> None:
        paused = own_rule or self.hardware.disk is not None
        states = {"events": True, "return-path": True, "pause-before-switchover": paused}
        wanted = [{"capability": name, "state": state} for name, state in states.items()]
        self.qmp.execute("migrate-set-capabilities", capabilities=wanted)
        if tls and self.hardware.disk is None:
            self._take_key()
        self.qmp.execute(
            "migrate-set-parameters",
            max_bandwidth=UNLIMITED_BYTES_PER_S,
            downtime_limit=1 if own_rule else 300,
            tls_creds="tls0" if tls else "",
            tls_hostname="",
        )

    def _take_key(self) -> None:
        self.qmp.execute(
            "object-add", qom_type="tls-creds-psk", id="tls0", dir=f"{DIRECTORY}/keys", endpoint="client",
            username="kvmhv",
        )  # fmt: skip

    def _mirror(self, ip: str, *, tls: bool, deadline_s: float) -> None:
        """Copy the disk until source and target are in sync."""
        if tls:
            self._take_key()
        where = {"type": "inet", "host": ip, "port": str(DISK_PORT)}
        node = {"driver": "nbd", "node_name": "tgt0", "server": where, "export": "disk0"}
        self.qmp.execute("blockdev-add", **node, **({"tls_creds": "tls0"} if tls else {}))
        self.qmp.execute(
            "blockdev-mirror", job_id="m0", device="disk0", target="tgt0", sync="full", copy_mode="write-blocking"
        )
        while next_event((self.qmp,), deadline_s)[1]["event"] != "BLOCK_JOB_READY":
            pass

    def _see_through(self, there: Qmp, *, own_rule: bool, deadline_s: float) -> None:
        """Follow the passes, stop the guest by the rule, and let it run at the target."""
        sent = loaded = stopped = False
        while not (sent and loaded):
            qmp, event = next_event((self.qmp, there), deadline_s)
            status = event.get("data", {}).get("status") if event["event"] == "MIGRATION" else None
            if status == "failed":
                raise HostError("bench-step", f"QEMU's migration failed: {qmp.execute('query-migrate')}")
            if qmp is there:
                loaded = loaded or status == "completed"
            elif event["event"] == "MIGRATION_PASS" and not stopped:
                self._moments_s[f"pass {event['data']['pass']}"] = time.monotonic()
                stopped = own_rule and self._stopped_at(event["data"]["pass"])
            elif event["event"] == "STOP":
                self._moments_s.setdefault("stopped", time.monotonic())
            elif status == "pre-switchover":
                self._end_mirror(there, deadline_s)
                self.qmp.execute("migrate-continue", state="pre-switchover")
            sent = sent or (qmp is self.qmp and status == "completed")
        there.execute("cont")

    def _stopped_at(self, number: int) -> bool:
        """Stop the guest if the rule says so at the start of this pass."""
        if number < 2:
            return False
        remaining = self.qmp.execute("query-migrate").get("ram", {}).get("remaining", 0)
        if remaining > THRESHOLD_BYTES and number <= MAX_PASSES:
            return False
        self._moments_s["stopped"] = time.monotonic()
        self.qmp.execute("stop")
        return True

    def _end_mirror(self, there: Qmp, deadline_s: float) -> None:
        if self.hardware.disk is None:
            return
        self.qmp.execute("block-job-cancel", device="m0")
        kept: list[Event] = []
        while (event := next_event((self.qmp,), deadline_s)[1])["event"] != "BLOCK_JOB_COMPLETED":
            kept.append(event)
        self.qmp.events.extendleft(reversed(kept))
        self.qmp.execute("blockdev-del", node_name="tgt0")
        # Ends the export, too, which cannot be deleted before the end of the source's connection is seen.
        there.execute("nbd-server-stop")
