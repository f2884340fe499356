"""Real QEMUs as tests/qemu_contract.py asks for them, over drivers/qemu, on this machine."""

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from kvmhv.drivers.qemu.qmp import QmpRefused
from kvmhv.errors import HostError, KvmhvError
from kvmhv.lab.guest_images import write_boot_guest
from kvmhv.model import MIB, IncomingAddress, Vm
from tests.qemu_contract import COMPLETED, FAILED, FOLLOW, HALTED, PASS, PRE_SWITCHOVER, SOURCE, TARGET
from tests.real.qemu_pair import DISK_BYTES, WAIT_S, Pair, Side, pair, qemu_img

SLOW_BYTES_PER_S = 16 * MIB
SILENCE_S = 1.0
PAGES_BYTES_PER_S = MIB // 4
"""So slow that not all have gone over when a scenario does something else, however busy this machine is."""
MIGRATION = {
    "postcopy-active": FOLLOW,
    "postcopy-paused": HALTED,
    "pre-switchover": PRE_SWITCHOVER,
    "completed": COMPLETED,
    "failed": FAILED,
    "cancelled": FAILED,
}


class RealPair:
    """One VM, the source's QEMU with its guest, the target's that waits for it."""

    def __init__(self, made: Pair, address: IncomingAddress) -> None:
        self._pair = made
        self._vm: Vm = made.vm
        self._address = address
        rule = msgspec.structs.replace(made.plan.rule, bandwidth_bytes_per_s=SLOW_BYTES_PER_S)
        self._plan = msgspec.structs.replace(made.plan, rule=rule)
        self._frozen: int | None = None
        self._going_on: asyncio.Task[bool] | None = None

    def _side(self, side: str) -> Side:
        return self._pair.source if side == SOURCE else self._pair.target

    async def mirror(self) -> bool:
        plan = msgspec.structs.replace(self._plan, rule=self._pair.plan.rule)
        await self._pair.source.qemu.mirror(self._vm, plan, self._address, self._pair.psk_hex)
        async with asyncio.timeout(WAIT_S):
            while True:
                (disk,) = await self._pair.source.qemu.mirror_stats(self._vm.id)
                if disk.ready or disk.error:
                    return disk.ready
                await asyncio.sleep(0.02)

    async def fill_target_disk(self) -> None:
        self._fill(self._pair.target.disks / "filler")

    @staticmethod
    def _fill(path: Path) -> None:
        with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(MIB))

    async def migrate(self) -> None:
        await self._pair.source.qemu.migrate(self._vm, self._plan, self._address, self._pair.psk_hex)
        await self._pair.source.heard("a second pass", lambda event: event.data.get("pass") == 2)

    async def converge(self) -> None:
        limits = {"max-bandwidth": 1 << 40, "downtime-limit": 20_000}
        await self._pair.source.query(self._vm, "migrate-set-parameters", **limits)

    async def stop(self, *, post_copy: bool = False) -> None:
        if post_copy:
            await self._send_pages(PAGES_BYTES_PER_S)
        await self._pair.source.qemu.stop_guest(self._vm.id, post_copy=post_copy)

    async def _send_pages(self, bytes_per_s: int) -> None:
        await self._pair.source.query(self._vm, "migrate-set-parameters", **{"max-postcopy-bandwidth": bytes_per_s})

    async def break_pages(self) -> None:
        self._pair.source.events.clear()
        self._pair.source.qemu._instances[self._vm.id].cut()

    async def reconnect(self) -> bool:
        try:
            address = await self._pair.target.qemu.await_pages(self._vm.id, self._plan)
            await self._pair.source.qemu.resume_pages(self._vm.id, self._plan, address)
        except KvmhvError:
            return False
        return True

    async def end_lost(self) -> bool:
        return await self._pair.target.qemu.end_lost(self._vm.id)

    async def finish_mirrors(self) -> bool:
        try:
            await self._pair.source.qemu.finish_mirrors(self._vm.id)
            await self._pair.target.qemu.unexport(self._vm.id)
        except HostError:
            return False
        return True

    async def go_on(self) -> bool:
        """QMP may hang in it: it goes on beside the scenario."""
        self._going_on = asyncio.create_task(self._continue())
        await asyncio.wait({self._going_on}, timeout=0.2)
        return not self._going_on.done() or self._going_on.result()

    async def _continue(self) -> bool:
        try:
            await self._pair.source.qemu.continue_switchover(self._vm.id)
        except KvmhvError:
            return False
        return True

    async def undo(self) -> str:
        return await self._pair.source.qemu.undo_source(self._vm.id, 20.0)

    async def cont(self, side: str) -> bool:
        try:
            await self._side(side).qemu.cont(self._vm.id)
        except QmpRefused:
            return False
        return True

    async def kill(self, side: str) -> None:
        os.kill(await self._pid(side), signal.SIGKILL)

    async def _pid(self, side: str) -> int:
        pid = (await self._side(side).qemu.state(self._vm.id)).pid
        assert pid is not None
        return pid

    async def cut(self) -> None:
        """A target that is frozen takes nothing and says nothing: its connections look like ones that are cut."""
        self._frozen = await self._pid(TARGET)
        os.kill(self._frozen, signal.SIGSTOP)

    async def mend(self) -> None:
        assert self._frozen is not None
        os.kill(self._frozen, signal.SIGCONT)

    async def runs(self, side: str) -> bool:
        state = await self._side(side).qemu.state(self._vm.id)
        return state.status == "running"

    async def migration(self, side: str) -> str:
        return (await self._side(side).qemu.state(self._vm.id)).migration

    async def heard(self, side: str, event: str) -> None:
        where = self._side(side)
        if event == COMPLETED and FOLLOW in self.events(SOURCE):
            await self._send_pages(0)  # as fast as they can
        async with asyncio.timeout(WAIT_S):
            while event not in self.events(side):
                where.changed.clear()
                await where.changed.wait()

    async def silence(self) -> None:
        await asyncio.sleep(SILENCE_S)

    def events(self, side: str) -> list[str]:
        found = []
        for event in self._side(side).events:
            if event.name == "MIGRATION":
                found.append(MIGRATION.get(str(event.data["status"]), ""))
            else:
                found.append({"MIGRATION_PASS": PASS}.get(event.name, event.name))
        return found

    async def end(self) -> None:
        """Wait for what still goes on."""
        if self._going_on is not None:
            await self._going_on


@asynccontextmanager
async def real_pair(
    binary: Path, template: Path, *, room_bytes: int = 0, post_copy: bool = False
) -> AsyncIterator[RealPair]:
    """A pair whose guest dirties its memory faster than it travels; `room_bytes`: so small is the target's disk."""
    async with pair(binary, binary, "raw") as made:
        if post_copy:
            made.plan = msgspec.structs.replace(made.plan, capabilities=("postcopy-ram",))
        target_disks = made.target.disks
        if room_bytes:
            _run("mount", "-t", "tmpfs", "-o", f"size={room_bytes}", "contract", target_disks)
        try:
            disk = made.source.paths(made.vm)["disk0"][0]
            write_boot_guest(disk, template, working_set_bytes=16 * MIB, rate_bytes_per_s=64 * MIB)
            with disk.open("r+b") as file:
                file.truncate(DISK_BYTES)
            qemu_img("create", "-f", "raw", made.target.paths(made.vm)["disk0"][0], DISK_BYTES)
            await made.source.qemu.start(made.vm, made.source.paths(made.vm), {})
            paths = made.target.paths(made.vm)
            address = await made.target.qemu.start_incoming(made.vm, paths, {}, made.plan, made.psk_hex, ("disk0",))
            await made.beats(made.source, more=2)
            both = RealPair(made, address)
            yield both
            await both.end()
        finally:
            await made.target.qemu.kill(made.vm.id)
            if room_bytes:
                _run("umount", target_disks)


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, timeout=10)
