"""The simulated QEMUs as tests/qemu_contract.py asks for them."""

from collections.abc import Callable
from functools import partial

from tests.qemu_contract import SOURCE, TARGET
from tests.sim import pages
from tests.sim.kernel import Kernel
from tests.sim.machine import MIB, Image, Machine, Qemu, Truth

LONG_MS = 60_000.0
SILENCE_MS = 3_000.0
NEVER_CONVERGES_BYTES_PER_S = 1e9


class SimulatedPair:
    """Two hosts, one QEMU each."""

    def __init__(self, seed: int) -> None:
        self.kernel = Kernel(seed)
        truth = Truth(owner=SOURCE)
        self._said: dict[str, list[str]] = {SOURCE: [], TARGET: []}
        self._cut = False
        self._sides = {name: Machine(name, self.kernel, truth) for name in (SOURCE, TARGET)}
        for name, machine in self._sides.items():
            machine.other = self._sides[TARGET if name == SOURCE else SOURCE]
            machine.network_up = lambda: not self._cut
            machine.event = lambda qemu, event, data: self._said[qemu.host.name].append(event)
        here, there = self._sides[SOURCE], self._sides[TARGET]
        here.image, there.image = Image(0, 0, lock=SOURCE), Image(-1, -1)
        here.qemu = Qemu(here, "running", ran=True, dirty_bytes_per_s=NEVER_CONVERGES_BYTES_PER_S)
        there.qemu = Qemu(there, "inmigrate", fresh=False, exported=True)

    async def mirror(self) -> bool:
        done: list[str] = []
        self._sides[SOURCE].begin_mirrors(lambda what, tenths: done.append(what))
        self._until("the mirrors are ready or failed", lambda: bool({"ready", "failed"} & set(done)))
        return done[-1] == "ready"

    async def fill_target_disk(self) -> None:
        self._sides[TARGET].disk_broken = True

    async def migrate(self) -> None:
        self._sides[SOURCE].migrate(64 * MIB, 400e6)
        self._until("a second pass", lambda: self._said[SOURCE].count("PASS") >= 2)

    async def converge(self) -> None:
        self._qemu(SOURCE).dirty_bytes_per_s = 0.0

    async def stop(self, *, post_copy: bool = False) -> None:
        self._sides[SOURCE].stop(post_copy=post_copy)

    async def break_pages(self) -> None:
        pages.halt(self._qemu(SOURCE))

    async def reconnect(self) -> bool:
        return pages.wait_anew(self._qemu(TARGET)) and pages.resume(self._sides[SOURCE], self._qemu(SOURCE))

    async def end_lost(self) -> bool:
        if self._qemu(TARGET).migration == "completed":
            return True
        self._sides[TARGET].kill_qemu()
        return False

    async def finish_mirrors(self) -> bool:
        return self._sides[SOURCE].finish_mirrors()

    async def go_on(self) -> bool:
        return self._sides[SOURCE].continue_switchover()

    async def undo(self) -> str:
        self._sides[SOURCE].undo()
        qemu = self._sides[SOURCE].qemu
        return qemu.migration if qemu is not None else "gone"

    async def cont(self, side: str) -> bool:
        if side == SOURCE and self._qemu(SOURCE).migration in pages.MISSING:
            return False
        self._sides[side].run()
        return True

    async def kill(self, side: str) -> None:
        self._sides[side].kill_qemu()

    async def cut(self) -> None:
        self._cut = True

    async def mend(self) -> None:
        self._cut = False

    async def runs(self, side: str) -> bool:
        return self._qemu(side).status == "running"

    async def migration(self, side: str) -> str:
        return self._qemu(side).migration

    async def heard(self, side: str, event: str) -> None:
        self._until(f"{side} says {event}", partial(self._has_said, side, event))

    async def silence(self) -> None:
        until_ms = self.kernel.now_ms + SILENCE_MS
        while self.kernel.step(until_ms):
            pass
        self.kernel.now_ms = until_ms

    def events(self, side: str) -> list[str]:
        return list(self._said[side])

    def _has_said(self, side: str, event: str) -> bool:
        return event in self._said[side]

    def _qemu(self, side: str) -> Qemu:
        qemu = self._sides[side].qemu
        assert qemu is not None
        return qemu

    def _until(self, what: str, is_so: Callable[[], bool]) -> None:
        until_ms = self.kernel.now_ms + LONG_MS
        while not is_so():
            assert self.kernel.step(until_ms), f"not within {LONG_MS / 1000} s: {what}; {self._said}"
