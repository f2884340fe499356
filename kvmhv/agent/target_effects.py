"""What performs the target's effects, and what QEMU's events mean to the target."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial

from kvmhv.agent.network_gap import NetworkGap
from kvmhv.agent.runner import State
from kvmhv.agent.vms import Vms
from kvmhv.core import facts, target
from kvmhv.core.effects import Adopt, AwaitPages, Cont, Effect, EndLost, Prepare, UndoTarget, Unexport
from kvmhv.core.target import TargetState
from kvmhv.model import ErrorBody, MoveReport, Plan
from kvmhv.ports import Clock, Hypervisor, MigrationWays, QemuEvent


class TargetMachine:
    """runner.Machine for the side that takes the VM."""

    role = "target"

    def __init__(
        self,
        state: TargetState,
        hypervisor: Hypervisor,
        vms: Vms,
        clock: Clock,
        gap: NetworkGap,
        ways: MigrationWays,
    ) -> None:
        self._vm = state.vm
        self._source = state.source
        self._psk_hex = state.psk_hex
        self._hypervisor = hypervisor
        self._vms = vms
        self._clock = clock
        self._gap = gap
        self._ways = ways
        self._move_id = state.move_id

    def step(self, state: State, fact: facts.Fact) -> tuple[State, list[Effect]]:
        """Decide."""
        assert isinstance(state, TargetState)
        return target.step(state, fact)

    def report(self, state: State, now_ms: float) -> MoveReport:
        """Show."""
        assert isinstance(state, TargetState)
        return target.report(state)

    def performer(self, effect: Effect) -> Callable[[], Awaitable[facts.Fact | None]]:
        """Return what performs an effect."""
        match effect:
            case Prepare():
                return partial(self._prepare, effect)
            case Unexport():
                return self._unexport
            case Cont():
                return self._cont
            case AwaitPages(plan=plan):
                return partial(self._await_pages, plan)
            case EndLost():
                return self._end_lost
            case Adopt():
                return self._adopt
            case UndoTarget():
                return partial(self._undo, effect)
        raise AssertionError(f"{type(effect).__name__} is no effect of a target")

    # --- effects

    async def _prepare(self, effect: Prepare) -> facts.Fact:
        arriving = tuple(copy.disk for copy in effect.plan.disk_copies)
        await self._vms.disks.expect(self._vm, self._source, arriving)
        bases = {copy.disk: copy.base for copy in effect.plan.disk_copies if copy.base is not None}
        await self._vms.disks.make_empty(self._vm, arriving, bases)
        taps = await self._vms.ensure_taps(self._vm)
        await self._gap.open(taps)
        if effect.plan.more_networks:
            await self._ways.open(self._move_id, tuple(there for _, there in effect.plan.more_networks))
        address = await self._hypervisor.start_incoming(
            self._vm,
            self._vms.disk_paths(self._vm),
            taps,
            effect.plan,
            self._psk_hex,
            arriving,
            self._vms.kernels.paths(self._vm),
        )
        return facts.IncomingReady(at_ms=self._clock.monotonic_ms(), address=address)

    async def _unexport(self) -> facts.Fact:
        await self._hypervisor.unexport(self._vm.id)
        return facts.Unexported(at_ms=self._clock.monotonic_ms())

    async def _cont(self) -> facts.Fact:
        resumed_ms = await self._hypervisor.cont(self._vm.id)
        self._gap.resumed(resumed_ms)
        return facts.GuestRuns(at_ms=self._clock.monotonic_ms(), resumed_ms=resumed_ms)

    async def _await_pages(self, plan: Plan) -> facts.Fact:
        address = await self._hypervisor.await_pages(self._vm.id, plan)
        return facts.IncomingReady(at_ms=self._clock.monotonic_ms(), address=address)

    async def _end_lost(self) -> facts.Fact | None:
        whole = await self._hypervisor.end_lost(self._vm.id)
        return facts.MemorySent(at_ms=self._clock.monotonic_ms()) if whole else None

    async def _adopt(self) -> facts.Fact:
        await self._vms.define(self._vm)
        return facts.Adopted(at_ms=self._clock.monotonic_ms())

    async def _undo(self, effect: UndoTarget) -> facts.Fact:
        await self._hypervisor.kill(self._vm.id)
        async with AsyncExitStack() as rest:  # from the last to the first, each whatever becomes of the others
            rest.push_async_callback(self._vms.forget, self._vm.id)
            copied = tuple(copy.disk for copy in effect.plan.disk_copies)
            rest.push_async_callback(self._vms.remove_disks, self._vm, copied)
            rest.push_async_callback(self._vms.drop_taps, self._vm)
        return facts.Undone(at_ms=self._clock.monotonic_ms())

    # --- events

    async def hear(self, event: QemuEvent) -> facts.Fact | None:
        """Turn what QEMU said into a fact."""
        if event.name == "MIGRATION":
            match event.data.get("status"):
                case "postcopy-active":
                    return facts.StateLoaded(at_ms=event.at_ms)
                case "completed":
                    return facts.MemorySent(at_ms=event.at_ms)
                case "failed":
                    stats = await self._hypervisor.memory_stats(self._vm.id)
                    said = stats.error or "the migration failed"
                    text = f"QEMU could not take the memory of {self._vm.name}: {said}"
                    error = ErrorBody(code="memory-failed", message=text, todo="see the agent's log")
                    return facts.MemoryFailed(at_ms=event.at_ms, error=error)
        if event.name == "GONE":
            why = event.data.get("reason") or event.data.get("error") or "it ended by itself"
            text = f"the incoming QEMU of {self._vm.name} is gone: {why}"
            return facts.QemuGone(
                at_ms=event.at_ms,
                error=ErrorBody(
                    code="qemu-gone",
                    message=text,
                    todo=f"see ended/{self._vm.id}/qemu.log in the run_dir of the target",
                ),
            )
        return None
