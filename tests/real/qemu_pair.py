"""Two drivers on one machine and the steps of a move between them, for tests that need real QEMU and no agent."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kvmhv.config import Config, Limits
from kvmhv.drivers.qemu import Qemu
from kvmhv.lab.guest_images import write_boot_guest
from kvmhv.model import (
    MIB,
    Disk,
    DiskCopy,
    DiskFormat,
    Layer,
    Mode,
    Plan,
    Rule,
    Timeouts,
    Vm,
)
from kvmhv.ports import QemuEvent

DISK_BYTES = 64 * MIB
WAIT_S = 60.0
POLL_S = 0.05
ADDRESS = "127.0.0.1"
STAGES = ("incoming", "mirroring", "ready", "migrating", "passing", "stopped", "paused", "finished", "completed")

Act = Callable[[], Awaitable[None]]


class Clock:
    """ports.Clock."""

    def monotonic_ms(self) -> float:
        return time.monotonic() * 1000

    def wall_s(self) -> float:
        return time.time()


class Side:
    """One host's driver with the disks of its VM."""

    def __init__(self, name: str, binary: Path, root: Path, ports: tuple[int, int]) -> None:
        self.name = name
        self.run = root / name
        self.disks = root / f"{name}-disks"
        self.disks.mkdir(parents=True)
        self.run.mkdir()
        limits = Limits(qmp_timeout_s=4.0)
        self.config = Config(
            name=name,
            run_dir=str(self.run),
            qemu_binary=str(binary),
            accel="tcg",
            limits=limits,
            migration_ports=ports,
        )
        self.events: list[QemuEvent] = []
        self.changed = asyncio.Event()
        self.qemu = self.new_driver()

    def new_driver(self) -> Qemu:
        """A driver as an agent makes it when it starts."""
        self.qemu = Qemu(self.config, Clock())
        self.qemu.on_event(self._hear)
        return self.qemu

    def _hear(self, event: QemuEvent) -> None:
        self.events.append(event)
        self.changed.set()

    async def heard(self, what: str, matches: Callable[[QemuEvent], bool], start: int = 0) -> QemuEvent:
        """Wait for an event."""
        async with asyncio.timeout(WAIT_S):
            while True:
                for event in self.events[start:]:
                    if matches(event):
                        return event
                    ended = event.name == "GONE" or event.data.get("status") == "failed"
                    assert not ended, f"{self.name} waits for {what}: {event.data}"
                self.changed.clear()
                await self.changed.wait()

    def paths(self, vm: Vm) -> dict[str, tuple[Path, ...]]:
        return {disk.name: tuple(self.disks / layer.path for layer in disk.layers) for disk in vm.disks}

    def console(self, vm: Vm) -> str:
        for directory in ("vm", "ended"):
            with contextlib.suppress(OSError):
                return (self.run / directory / vm.id / "console.log").read_text(errors="replace")
        return ""

    def left(self) -> list[str]:
        """What is left of VMs in run_dir, logs aside."""
        return [str(path) for path in (self.run / "vm").glob("*")]

    async def query(self, vm: Vm, command: str, **arguments: object) -> Any:
        """Ask the VM's QEMU."""
        return await self.qemu._instances[vm.id].qmp.execute(command, arguments)


async def eventually(what: str, is_so: Callable[[], bool]) -> None:
    """Look again and again, for what no event tells."""
    for _ in range(int(WAIT_S / POLL_S)):
        if is_so():
            return
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"not within {WAIT_S} s: {what}")


def make_vm(*formats: str) -> Vm:
    """A VM with one disk of these layers, the top first."""
    layers = tuple(
        Layer(location="default", path=f"disk0-{index}.{name}", format=DiskFormat(name))
        for index, name in enumerate(formats)
    )
    disk = Disk(name="disk0", size_bytes=DISK_BYTES, layers=layers, pci_slot=4)
    return Vm(id=str(uuid.uuid4()), name="web01", memory_bytes=64 * MIB, cpus=1, disks=(disk,))


def plan_for(vm: Vm, **rule: int) -> Plan:
    (disk,) = vm.disks
    copy = DiskCopy(
        disk=disk.name,
        size_bytes=disk.size_bytes,
        used_bytes=MIB,
        source_layers=disk.layers,
        target_layers=disk.layers,
    )
    return Plan(
        mode=Mode.SHARED_NOTHING,
        rule=Rule(**rule),
        source_address=ADDRESS,
        target_address=ADDRESS,
        capabilities=(),
        disk_copies=(copy,),
        target_vm=vm,
        estimate_seconds=None,
        estimate_bytes=0,
        timeouts=Timeouts(),
    )


def qemu_img(*arguments: object) -> str:
    done = subprocess.run(["qemu-img", *map(str, arguments)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Pair:
    """A VM at one side, and how it gets to the other."""

    def __init__(self, vm: Vm, source: Side, target: Side) -> None:
        self.vm, self.source, self.target = vm, source, target
        self.plan = plan_for(vm, max_passes=10, threshold_bytes=8 * MIB)
        self.psk_hex = os.urandom(32).hex()

    def turn(self) -> None:
        """Now the other way."""
        self.source, self.target = self.target, self.source

    def fill_source(self, template: Path, data_bytes: int = 4 * MIB) -> None:
        """Make the boot guest's disk: the guest and noise in the lowest layer, noise of its own in each above it."""
        paths = self.source.paths(self.vm)["disk0"]
        formats = [layer.format for layer in self.vm.disks[0].layers]
        raw = self.source.disks / "boot.raw"
        write_boot_guest(raw, template, working_set_bytes=8 * MIB, rate_bytes_per_s=2 * MIB)
        with raw.open("r+b") as file:
            file.truncate(DISK_BYTES)
            file.seek(16 * MIB)
            file.write(os.urandom(data_bytes))
        qemu_img("convert", "-O", formats[-1], raw, paths[-1])
        raw.unlink()
        for index in reversed(range(len(paths) - 1)):
            qemu_img("create", "-f", formats[index], "-b", paths[index + 1], "-F", formats[index + 1], paths[index])
            # Not aligned to clusters: the rest of each comes from the layer below.
            self._scribble(paths[index], formats[index], 18 * MIB + index * MIB + 4096)

    @staticmethod
    def _scribble(path: Path, image_format: str, offset: int) -> None:
        write = f"write -P 0x5a {offset} 100k"
        subprocess.run(["qemu-io", "-f", image_format, "-c", write, path], check=True, capture_output=True, timeout=60)

    def make_target(self) -> None:
        """Make the empty layers at the target."""
        paths = self.target.paths(self.vm)["disk0"]
        layers = self.vm.disks[0].layers
        for index in reversed(range(len(paths))):
            paths[index].unlink(missing_ok=True)
            backing = ("-b", paths[index + 1], "-F", layers[index + 1].format.value) if index + 1 < len(paths) else ()
            qemu_img("create", "-f", layers[index].format.value, *backing, paths[index], DISK_BYTES)

    async def start(self) -> None:
        await self.source.qemu.start(self.vm, self.source.paths(self.vm), {})
        await self.beats(self.source, more=3)

    async def beats(self, side: Side, more: int = 2) -> None:
        """Wait until the guest has said `more` heartbeats more."""
        before = side.console(self.vm).count("beat ")
        await eventually("the guest beats", lambda: side.console(self.vm).count("beat ") >= before + more)

    async def move(self, at: dict[str, Act] | None = None) -> float:
        """Move the VM as an agent would, with `at[stage]` done at that stage; returns the blackout in ms."""
        acts = at or {}

        async def stage(name: str) -> None:
            assert name in STAGES
            if name in acts:
                await acts[name]()

        source, target, vm = self.source, self.target, self.vm
        self.make_target()
        first, first_target = len(source.events), len(target.events)
        address = await target.qemu.start_incoming(vm, target.paths(vm), {}, self.plan, self.psk_hex, ("disk0",))
        await stage("incoming")
        await source.qemu.mirror(vm, self.plan, address, self.psk_hex)
        await stage("mirroring")
        await self._mirrored()
        await stage("ready")
        await source.qemu.migrate(vm, self.plan, address, self.psk_hex)
        await stage("migrating")
        await source.heard("a second pass", lambda event: event.data.get("pass") == 2, first)
        await stage("passing")
        told_ms = Clock().monotonic_ms()
        await source.qemu.stop_guest(vm.id)
        await stage("stopped")
        await source.heard("pre-switchover", _migration("pre-switchover"), first)
        await stage("paused")
        await source.qemu.finish_mirrors(vm.id)
        await target.qemu.unexport(vm.id)
        await stage("finished")
        await source.qemu.continue_switchover(vm.id)
        await source.heard("the end", _migration("completed"), first)
        await target.heard("the end", _migration("completed"), first_target)
        await stage("completed")
        return await target.qemu.cont(vm.id) - told_ms

    async def _mirrored(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while True:
                (disk,) = await self.source.qemu.mirror_stats(self.vm.id)
                assert not disk.error, disk.error
                if disk.ready:
                    return
                await asyncio.sleep(0.02)

    async def end(self) -> None:
        """End whatever runs and see that nothing is left."""
        for side in (self.source, self.target):
            await side.qemu.kill(self.vm.id)
            await side.qemu.close()
            assert side.left() == []


def _migration(status: str) -> Callable[[QemuEvent], bool]:
    return lambda event: event.name == "MIGRATION" and event.data["status"] == status


@asynccontextmanager
async def pair(source: Path, target: Path, *formats: str) -> AsyncIterator[Pair]:
    """A pair with these QEMU binaries and a disk of these layers."""
    # Paths of sockets are short; tests run beside each other, so each has ports of its own.
    root = Path(tempfile.mkdtemp(prefix="kvq-", dir="/tmp"))
    first = 20_000 + os.getpid() % 1000 * 20
    made = Pair(
        make_vm(*formats),
        Side("a", source, root, (first, first + 9)),
        Side("b", target, root, (first + 10, first + 19)),
    )
    try:
        yield made
    finally:
        await made.end()
        shutil.rmtree(root)
