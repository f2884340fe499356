"""What performs the effects of a storage move, and what QEMU's events mean to it."""

from collections.abc import Awaitable, Callable
from functools import partial

from kvmhv.agent import mirroring
from kvmhv.agent.runner import State
from kvmhv.agent.vms import Vms
from kvmhv.core import facts, storage_move
from kvmhv.core.effects import (
    CopyDisks,
    Effect,
    HoldWrites,
    MakeImages,
    Redefine,
    ReleaseWrites,
    RemoveImages,
    UndoStorage,
)
from kvmhv.core.storage_state import StorageState, report
from kvmhv.errors import KvmhvError
from kvmhv.model import ErrorBody, MoveReport
from kvmhv.ports import Clock, Hypervisor, QemuEvent

STORAGE = "storage"


class StorageMachine:
    """runner.Machine for disks that change their location."""

    role = STORAGE

    def __init__(self, state: StorageState, hypervisor: Hypervisor, vms: Vms, clock: Clock) -> None:
        self._move_id = state.move_id
        self._vm = state.vm
        self._disks = state.disks
        self._running = state.running
        self._hypervisor = hypervisor
        self._vms = vms
        self._clock = clock
        self.put: Callable[[facts.Fact], None] = lambda fact: None
        """Where the progress goes."""

    def step(self, state: State, fact: facts.Fact) -> tuple[State, list[Effect]]:
        """Decide."""
        assert isinstance(state, StorageState)
        return storage_move.step(state, fact)

    def report(self, state: State, now_ms: float) -> MoveReport:
        """Show."""
        assert isinstance(state, StorageState)
        return report(state, now_ms)

    def performer(self, effect: Effect) -> Callable[[], Awaitable[facts.Fact | None]]:
        """Return what performs an effect."""
        match effect:
            case MakeImages():
                return partial(self._make_images, effect)
            case CopyDisks():
                return partial(self._copy, effect)
            case HoldWrites():
                return partial(self._hold, effect)
            case Redefine():
                return partial(self._redefine, effect)
            case ReleaseWrites():
                return self._release
            case RemoveImages():
                return partial(self._remove_images, effect)
            case UndoStorage():
                return partial(self._undo, effect)
        raise AssertionError(f"{type(effect).__name__} is no effect of a storage move")

    async def hear(self, event: QemuEvent) -> facts.Fact | None:
        """Turn what QEMU said into a fact."""
        if event.name != "GONE":
            return None
        said = event.data.get("reason") or event.data.get("error") or "it ended by itself"
        todo = f"see ended/{self._vm.id}/qemu.log in the host's run_dir"
        error = ErrorBody(code="qemu-gone", message=f"the QEMU of {self._vm.name} is gone: {said}", todo=todo)
        return facts.QemuGone(at_ms=event.at_ms, error=error)

    # --- effects

    async def _make_images(self, effect: MakeImages) -> facts.Fact:
        disks = self._vms.disks
        if not self._running:  # no host starts it meanwhile
            await disks.claim(self._vm, take_over=False)
        await disks.make_images(self._move_id, effect.vm, effect.disks)
        await disks.claim(effect.vm, take_over=False)
        if not self._running:
            await self._hypervisor.start_idle(self._vm, self._vms.disk_paths(self._vm))
        return facts.ImagesMade(at_ms=self._clock.monotonic_ms())

    async def _copy(self, effect: CopyDisks) -> facts.Fact:
        places = self._vms.disk_paths(effect.vm)
        await self._hypervisor.copy_disks(
            effect.vm, effect.copies, places, effect.bandwidth_bytes_per_s, effect.timeout_s
        )
        return await mirroring.until_ready(self._hypervisor, self._clock, self._vm, self.put)

    async def _hold(self, effect: HoldWrites) -> facts.Fact:
        told_ms = self._clock.monotonic_ms()
        await self._hypervisor.hold_writes(self._vm.id, self._disks, effect.timeout_s)
        return facts.WritesHeld(at_ms=self._clock.monotonic_ms(), told_ms=told_ms)

    async def _redefine(self, effect: Redefine) -> facts.Fact:
        self._vms.disks.redefine(effect.vm)
        return facts.Redefined(at_ms=self._clock.monotonic_ms())

    async def _release(self) -> facts.Fact:
        stayed = await self._hypervisor.release_writes(self._vm.id)
        return facts.WritesReleased(at_ms=self._clock.monotonic_ms(), stayed=stayed)

    async def _remove_images(self, effect: RemoveImages) -> facts.Fact:
        warnings: tuple[str, ...] = ()
        await self._end_idle()
        for layers in effect.layers:
            try:
                await self._vms.disks.remove_layers(self._vm.name, layers)
            except KvmhvError as error:
                warnings = (*warnings, f"an image that is not used any more is left: {error.message}")
        self._vms.disks.keep(self._move_id)
        await self._let_go()
        return facts.ImagesRemoved(at_ms=self._clock.monotonic_ms(), warnings=warnings)

    async def _undo(self, effect: UndoStorage) -> facts.Fact:
        warnings: tuple[str, ...] = ()
        self._vms.disks.redefine(effect.vm)
        await self._hypervisor.undo_copies(self._vm.id, effect.timeout_s)
        await self._end_idle()
        try:
            await self._vms.disks.undo(self._move_id)
        except KvmhvError as error:
            warnings = (f"a new image is left, the agent's next start tries to delete it: {error.message}",)
        await self._let_go()
        return facts.Undone(at_ms=self._clock.monotonic_ms(), warnings=warnings)

    async def _end_idle(self) -> None:
        if not self._running:
            await self._hypervisor.kill(self._vm.id)

    async def _let_go(self) -> None:
        if not self._running:
            await self._vms.disks.let_go(self._vms.vm(self._vm.name))
