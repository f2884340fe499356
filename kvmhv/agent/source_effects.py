"""What performs the source's effects, and what QEMU's events mean to the source."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable
from functools import partial

import structlog

from kvmhv.agent import mirroring
from kvmhv.agent.answer_gap import AnswerGap
from kvmhv.agent.mirroring import POLL_S
from kvmhv.agent.runner import State
from kvmhv.agent.vms import Vms
from kvmhv.core import facts, source
from kvmhv.core.effects import (
    Cont,
    ContinueSwitchover,
    Effect,
    EndCopy,
    FinishMirrors,
    MirrorDisks,
    RemoveCopy,
    ResumePages,
    SendFiles,
    SendMemory,
    ServePages,
    StopGuest,
    ThrottleGuest,
    UndoSource,
)
from kvmhv.core.source_state import SourceState, report
from kvmhv.errors import KvmhvError
from kvmhv.model import ErrorBody, IncomingAddress, MoveReport, Plan, Vm
from kvmhv.ports import Clock, Flows, FlowWatch, Hypervisor, MemoryStats, MigrationWays, Peer, QemuEvent

log = structlog.get_logger(__name__)


class SourceMachine:
    """runner.Machine for the side that gives the VM away."""

    role = "source"

    def __init__(
        self,
        state: SourceState,
        hypervisor: Hypervisor,
        vms: Vms,
        peer: Peer,
        clock: Clock,
        flows: Flows,
        gap: AnswerGap,
        ways: MigrationWays,
    ) -> None:
        self._move_id = state.move_id
        self._vm = state.vm
        self._target = state.target
        self._psk_hex = state.psk_hex
        self._files_s = state.timeouts.prepare_s
        self._hypervisor = hypervisor
        self._vms = vms
        self._peer = peer
        self._clock = clock
        self._ways = ways
        self.put: Callable[[facts.Fact], None] = lambda fact: None
        """Where facts go that come while an effect is under way (progress)."""
        self._flows = flows
        self._carried: FlowWatch | None = None
        self._gap = gap
        gap.on_answer = self._answered
        gap.on_silence = self._silent
        self._polling = False
        self._served = False
        """Post-copy: what QEMU has sent in all is known when it is done."""
        self._stopped_ms: float | None = None
        """Since when the guest stands still, as QEMU says: it may have switched over by itself, before it was told."""

    def step(self, state: State, fact: facts.Fact) -> tuple[State, list[Effect]]:
        """Decide."""
        assert isinstance(state, SourceState)
        return source.step(state, fact)

    def report(self, state: State, now_ms: float) -> MoveReport:
        """Show."""
        assert isinstance(state, SourceState)
        return report(state, now_ms)

    def performer(self, effect: Effect) -> Callable[[], Awaitable[facts.Fact | None]]:
        """Return what performs an effect."""
        match effect:
            case SendFiles():
                return self._send_files
            case MirrorDisks():
                return partial(self._mirror_disks, effect)
            case SendMemory():
                return partial(self._send_memory, effect)
            case ThrottleGuest(max_percent=max_percent):
                return partial(self._throttle_guest, max_percent)
            case StopGuest(post_copy=post_copy):
                return partial(self._stop_guest, post_copy)
            case FinishMirrors():
                return self._finish_mirrors
            case ContinueSwitchover():
                return self._continue_switchover
            case Cont():
                return self._cont
            case UndoSource(timeout_s=timeout_s):
                return partial(self._undo, timeout_s)
            case EndCopy():
                return self._end_copy
            case RemoveCopy():
                return partial(self._remove_copy, effect)
        return self._performer_of_pages(effect)

    def _performer_of_pages(self, effect: Effect) -> Callable[[], Awaitable[facts.Fact | None]]:
        match effect:
            case ServePages():
                return self._serve_pages
            case ResumePages(plan=plan, address=address):
                return partial(self._resume_pages, plan, address)
        raise AssertionError(f"{type(effect).__name__} is no effect of a source")

    # --- effects

    async def _send_files(self) -> facts.Fact:
        files = self._vms.kernels.paths(self._vm)
        assert files is not None, "files were asked for that the VM does not have"
        named = {name: file for name, file in zip(("kernel", "initrd"), files, strict=True) if file is not None}
        await self._peer.send_files(self._target, self._move_id, named, self._files_s)
        return facts.FilesUploaded(at_ms=self._clock.monotonic_ms())

    async def _mirror_disks(self, effect: MirrorDisks) -> facts.Fact:
        await self._count(effect.plan, effect.address)
        await self._open_ways(effect.plan)
        await self._hypervisor.mirror(self._vm, effect.plan, effect.address, self._psk_hex)
        return await mirroring.until_ready(self._hypervisor, self._clock, self._vm, self.put)

    async def _send_memory(self, effect: SendMemory) -> None:
        await self._count(effect.plan, effect.address)
        self._gap.prepare()
        self._polling = True
        await self._open_ways(effect.plan)
        await self._hypervisor.migrate(self._vm, effect.plan, effect.address, self._psk_hex)
        while self._polling:
            await asyncio.sleep(POLL_S)
            if not self._polling:
                return
            self._progressed(await self._hypervisor.memory_stats(self._vm.id))

    def _progressed(self, stats: MemoryStats) -> None:
        self.put(
            facts.MemoryProgress(
                at_ms=self._clock.monotonic_ms(),
                sent_bytes=stats.transferred_bytes,
                remaining_bytes=stats.remaining_bytes,
                total_bytes=stats.total_bytes,
                dirty_bytes_per_s=stats.dirty_bytes_per_s,
                sampled_dirty_bytes_per_s=stats.sampled_dirty_bytes_per_s,
                zero_bytes=stats.zero_bytes,
                pages_bytes=stats.pages_bytes,
                pages_requests=stats.pages_requests,
            )
        )

    async def _serve_pages(self) -> facts.Fact | None:
        """Until QEMU has sent the last page, or is gone, which its own event says."""
        self._served = True
        while True:
            try:
                stats = await self._hypervisor.memory_stats(self._vm.id)
            except KvmhvError:
                return None
            self._progressed(stats)
            if stats.status == "completed":  # a new agent may not have heard it
                return facts.MemorySent(at_ms=self._clock.monotonic_ms())
            await asyncio.sleep(POLL_S)

    async def _resume_pages(self, plan: Plan, address: IncomingAddress) -> facts.Fact:
        await self._hypervisor.resume_pages(self._vm.id, plan, address)
        return facts.PagesResumed(at_ms=self._clock.monotonic_ms())

    async def _open_ways(self, plan: Plan) -> None:
        if plan.more_networks:
            await self._ways.open(self._move_id, ())

    async def _throttle_guest(self, max_percent: int) -> None:
        await self._hypervisor.throttle(self._vm.id, max_percent)

    async def _stop_guest(self, post_copy: bool) -> facts.Fact:
        self._polling = False  # nothing else talks to QEMU in the blackout
        told_ms = self._clock.monotonic_ms()
        await self._hypervisor.stop_guest(self._vm.id, post_copy=post_copy)
        told_ms = min(told_ms, self._stopped_ms or math.inf)
        return facts.GuestStopped(at_ms=self._clock.monotonic_ms(), told_ms=told_ms)

    async def _finish_mirrors(self) -> facts.Fact:
        self._polling = False
        await self._hypervisor.finish_mirrors(self._vm.id)
        return facts.MirrorsFinished(at_ms=self._clock.monotonic_ms())

    async def _continue_switchover(self) -> None:
        await self._hypervisor.continue_switchover(self._vm.id)

    async def _cont(self) -> facts.Fact:
        resumed_ms = await self._hypervisor.cont(self._vm.id)
        return facts.GuestRuns(at_ms=self._clock.monotonic_ms(), resumed_ms=resumed_ms)

    async def _undo(self, timeout_s: float) -> facts.Fact:
        self._polling = False
        await self._hypervisor.undo_source(self._vm.id, timeout_s)
        return facts.Undone(at_ms=self._clock.monotonic_ms(), wire_bytes=await self._counted())

    async def _end_copy(self) -> facts.Fact:
        if self._served:
            with contextlib.suppress(KvmhvError):
                self._progressed(await self._hypervisor.memory_stats(self._vm.id))
        await self._hypervisor.kill(self._vm.id)
        await self._vms.drop_taps(self._vm)
        return facts.CopyEnded(at_ms=self._clock.monotonic_ms())

    async def _remove_copy(self, effect: RemoveCopy) -> facts.Fact:
        warnings: tuple[str, ...] = ()
        try:
            await self._vms.remove_disks(self._vm, tuple(copy.disk for copy in effect.plan.disk_copies))
        except KvmhvError as error:  # the record goes all the same: nothing here may start the VM a second time
            warnings = (f"a disk that has moved is left here: {error.message}",)
        await self._vms.forget(self._vm.id)
        carried = await self._counted()
        return facts.CopyRemoved(at_ms=self._clock.monotonic_ms(), warnings=warnings, wire_bytes=carried)

    # --- what is seen beside it

    async def _count(self, plan: Plan, address: IncomingAddress) -> None:
        """Begin to count what QEMU's connections carry; if that cannot be done the move goes on without the figure.

        Over several networks it is not: the further ways end at ports that only the kernels know.
        """
        if self._carried is None and not plan.more_networks:
            ports = (address.memory_port,) if address.disk_port is None else (address.memory_port, address.disk_port)
            try:
                self._carried = await self._flows.watch(plan.target_address, ports)
            except KvmhvError as error:
                log.warning("what goes over the wire will not be counted", move=self._move_id, error=str(error))

    async def _counted(self) -> int | None:
        """Return what the connections carried; they have ended, or are about to."""
        if self._carried is None:
            return None
        return await self._carried.carried_bytes()

    def close(self) -> None:
        """End the looks that are open; may be repeated."""
        if self._carried is not None:
            self._carried.close()

    def _answered(self, answered_ms: float) -> None:
        self.put(facts.Answered(at_ms=self._clock.monotonic_ms(), answered_ms=answered_ms))

    def _silent(self, probe: str) -> None:
        self.put(facts.ProbeSilent(at_ms=self._clock.monotonic_ms(), probe=probe))

    # --- events

    async def hear(self, event: QemuEvent) -> facts.Fact | None:
        """Turn what QEMU said into a fact."""
        if event.name == "MIGRATION_PASS":  # those after the guest's stop decide nothing, and QEMU is busy
            return await self._pass_started(event) if self._polling else None
        if event.name == "MIGRATION":
            return await self._migration_status(event)
        if event.name == "STOP":
            self._stopped_ms = event.at_ms
            self._gap.stopped()
        if event.name == "RESUME":
            self._stopped_ms = None
            self._gap.resumed()
        if event.name == "GONE":
            return facts.QemuGone(at_ms=event.at_ms, error=_gone(self._vm, event))
        return None

    async def _pass_started(self, event: QemuEvent) -> facts.Fact:
        stats = await self._hypervisor.memory_stats(self._vm.id)
        number = event.data.get("pass")
        return facts.PassStarted(
            at_ms=event.at_ms,
            number=number if isinstance(number, int) else stats.dirty_sync_count,
            sent_bytes=stats.transferred_bytes,
            remaining_bytes=stats.remaining_bytes,
            total_bytes=stats.total_bytes,
            dirty_bytes_per_s=stats.dirty_bytes_per_s,
            zero_bytes=stats.zero_bytes,
            throttle_percent=stats.throttle_percent,
        )

    async def _migration_status(self, event: QemuEvent) -> facts.Fact | None:
        match event.data.get("status"):
            case "pre-switchover":
                return facts.PreSwitchover(at_ms=event.at_ms, stopped_ms=self._stopped_ms)
            case "postcopy-active":
                return facts.PagesFollow(at_ms=event.at_ms)
            case "postcopy-paused":
                return facts.PagesStopped(at_ms=event.at_ms)
            case "completed":
                return facts.MemorySent(at_ms=event.at_ms)
            case "failed" | "cancelled":
                stats = await self._hypervisor.memory_stats(self._vm.id)
                return facts.MemoryFailed(at_ms=event.at_ms, error=self._failure(stats))
        return None

    def _failure(self, stats: MemoryStats) -> ErrorBody:
        said = stats.error or f"the migration is {stats.status}"
        return ErrorBody(
            code="memory-failed",
            message=f"QEMU could not send the memory of {self._vm.name} to {self._target}: {said}",
            todo=f"see the agent's log on {self._target}",
        )


def _gone(vm: Vm, event: QemuEvent) -> ErrorBody:
    said = event.data.get("reason") or event.data.get("error") or "it ended by itself"
    todo = f"see ended/{vm.id}/qemu.log in the run_dir of the source"
    return ErrorBody(code="qemu-gone", message=f"the QEMU of {vm.name} is gone: {said}", todo=todo)
