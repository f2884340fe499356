"""What the effects that take time do in the simulated world, and what QEMU's events mean (agent/*_effects.py)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kvmhv.core import effects as ef
from kvmhv.core import facts
from kvmhv.core.facts import Fact
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState, TargetStep
from kvmhv.model import ErrorBody, IncomingAddress
from tests.sim import pages
from tests.sim.machine import Broken, Image, Qemu

if TYPE_CHECKING:
    from tests.sim.agent import Runner

ERROR = ErrorBody(code="broken", message="it broke", todo="")
BANDWIDTH_BYTES_PER_S = 400e6
EVENT_MS = 0.2
HANG_POLL_MS = 1000.0
HANG_POLLS = 20

QUEUED = (
    ef.MirrorDisks,
    ef.SendMemory,
    ef.StopGuest,
    ef.FinishMirrors,
    ef.ContinueSwitchover,
    ef.UndoSource,
    ef.Unexport,
    ef.Cont,
    ef.AwaitPages,
    ef.ResumePages,
    ef.EndLost,
)
"""By QMP: one after the other."""

DELAYS_MS: dict[type[ef.Effect], tuple[float, float]] = {
    ef.StopGuest: (1, 6),
    ef.FinishMirrors: (2, 30),
    ef.ContinueSwitchover: (0.2, 2),
    ef.Cont: (0.5, 5),
    ef.Prepare: (100, 3000),
    ef.SendFiles: (10, 500),
    ef.UndoTarget: (10, 500),
    ef.EndCopy: (10, 300),
    ef.RemoveCopy: (5, 500),
}


def perform(runner: "Runner", effect: ef.Effect) -> None:
    """Begin an effect that takes time."""
    kernel = runner.agent.world.kernel
    delay_ms = kernel.some_ms(*DELAYS_MS.get(type(effect), (1, 20)))
    if not isinstance(effect, QUEUED):
        kernel.after(delay_ms, lambda: _act(runner, effect))
        return
    queue = runner.agent.world.queues.setdefault(id(runner), [])
    queue.append(effect)
    if len(queue) == 1:
        kernel.after(delay_ms, lambda: _next(runner, queue, 0))


def _next(runner: "Runner", queue: list[ef.Effect], polls: int) -> None:
    """Do the first of the queue; a QEMU that hangs answers nothing until its command's deadline, but for a yank."""
    agent = runner.agent
    if not agent.alive:
        return
    effect = queue[0]
    qemu = agent.machine.qemu
    if qemu is not None and qemu.hangs and not isinstance(effect, ef.UndoSource) and polls < HANG_POLLS:
        agent.world.kernel.after(HANG_POLL_MS, lambda: _next(runner, queue, polls + 1))
        return
    _act(runner, effect, hangs=bool(qemu and qemu.hangs and not isinstance(effect, ef.UndoSource)))
    queue.pop(0)
    if queue:
        delay_ms = agent.world.kernel.some_ms(*DELAYS_MS.get(type(queue[0]), (1, 20)))
        agent.world.kernel.after(delay_ms, lambda: _next(runner, queue, 0))


def _act(runner: "Runner", effect: ef.Effect, *, hangs: bool = False) -> None:
    agent = runner.agent
    if not agent.alive or not runner.open:
        return
    with agent.guarded():
        agent.boundary(f"before {type(effect).__name__}")
        fact: Fact | None
        if hangs or agent.world.fails(agent, effect):
            fact = _failed(runner, effect)
        else:
            fact = ACTS[type(effect)](runner, effect)
        agent.boundary(f"after {type(effect).__name__}")
        if fact is not None:
            runner.put(fact)


def _failed(runner: "Runner", effect: ef.Effect) -> Fact:
    if isinstance(effect, ef.UndoTarget):  # all but what the storage does not let go
        _undo_target(runner, effect, images=False)
    return facts.Failed(at_ms=runner.agent.machine.clock_ms, effect=type(effect).__name__, error=ERROR)


# --- source


def _source(runner: "Runner") -> SourceState:
    assert isinstance(runner.state, SourceState)
    return runner.state


def _send_files(runner: "Runner", effect: ef.Effect) -> Fact:
    there = runner.agent.world.agents[runner.agent.machine.other.name]
    state = None
    if there is not None and runner.agent.world.network_up():
        taking = there.runners.get((runner.state.move_id, "target"))
        state = taking.state if taking else None
    if not isinstance(state, TargetState) or state.step is not TargetStep.RECEIVING:
        return _failed(runner, effect)
    runner.agent.machine.other.kernel_files = True
    return facts.FilesUploaded(at_ms=runner.agent.machine.clock_ms)


def _mirror_disks(runner: "Runner", effect: ef.Effect) -> Fact | None:
    agent = runner.agent
    if agent.machine.qemu is None or not agent.world.network_up():
        return _failed(runner, effect)

    def progress(what: str, tenths: int) -> None:
        at_ms = agent.machine.clock_ms
        fact: Fact
        if what == "failed":
            fact = _failed(runner, effect)
        elif what == "ready":
            fact = facts.MirrorsReady(at_ms=at_ms, copied_bytes=tenths)
        else:
            fact = facts.MirrorProgress(at_ms=at_ms, copied_bytes=tenths, total_bytes=10)
        with agent.guarded():
            runner.put(fact)

    agent.world.kernel.after(1, lambda: agent.machine.begin_mirrors(progress) if agent.machine.qemu else None)
    return None


def _send_memory(runner: "Runner", effect: ef.Effect) -> Fact | None:
    machine = runner.agent.machine
    if machine.qemu is None or not runner.agent.world.network_up() or machine.other.qemu is None:
        return _failed(runner, effect)
    machine.migrate(runner.state.vm.memory_bytes, BANDWIDTH_BYTES_PER_S)
    return None


def _stop_guest(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is None:
        return _failed(runner, effect)
    assert isinstance(effect, ef.StopGuest)
    machine.stop(post_copy=effect.post_copy)
    return facts.GuestStopped(at_ms=machine.clock_ms, told_ms=machine.clock_ms - 3)


def _finish_mirrors(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is None or not runner.agent.world.network_up() or not machine.finish_mirrors():
        return _failed(runner, effect)
    return facts.MirrorsFinished(at_ms=machine.clock_ms)


def _continue(runner: "Runner", effect: ef.Effect) -> Fact | None:
    machine = runner.agent.machine
    if machine.qemu is None or not machine.continue_switchover():
        return _failed(runner, effect)
    return None


def _undo_source(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is None:
        return _failed(runner, effect)
    machine.undo()
    return facts.Undone(at_ms=machine.clock_ms)


def _serve_pages(runner: "Runner", effect: ef.Effect) -> Fact | None:
    machine = runner.agent.machine
    whole = machine.qemu is not None and machine.qemu.migration == "completed"
    return facts.MemorySent(at_ms=machine.clock_ms) if whole else None


def _end_copy(runner: "Runner", effect: ef.Effect) -> Fact:
    machine, truth = runner.agent.machine, runner.agent.world.truth
    if machine.qemu is not None and truth.owner == machine.name and not truth.stopped_by_fault:
        raise Broken("the source ends its copy before the target ran")
    here, there = machine.qemu, machine.other.qemu
    if here is not None and here.alive and there is not None and there.migration in pages.MISSING:
        raise Broken("the source ends the QEMU that has the target's pages")
    machine.kill_qemu()
    machine.taps = False
    return facts.CopyEnded(at_ms=machine.clock_ms)


def _remove_copy(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.other.defined is None:
        raise Broken("the source deletes before the target owns the VM on disk")
    machine.image = None  # deleted, or no longer this host's to use
    machine.kernel_files = False
    machine.defined = None
    return facts.CopyRemoved(at_ms=machine.clock_ms)


# --- target


def _prepare(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    machine.end_undoing()
    if machine.qemu is not None or machine.image is not None:
        raise Broken(f"{machine.name} is not clean: {machine.qemu} {machine.image}")
    if machine.disk_broken:
        return _failed(runner, effect)
    here = machine.other.image
    machine.image = here if here is not None and here.shared else Image(writes=-1, flushed=-1)
    machine.taps = True
    machine.qemu = Qemu(machine, "inmigrate", fresh=False, exported=not machine.image.shared)
    return facts.IncomingReady(at_ms=machine.clock_ms, address=IncomingAddress(memory_port=49152, disk_port=49153))


def _unexport(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is None:
        return _failed(runner, effect)
    here = machine.other.qemu
    if here is not None and here.mirrors:
        raise Broken("the export is closed while the mirror writes")
    machine.qemu.exported = False
    return facts.Unexported(at_ms=machine.clock_ms)


def _adopt(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    assert isinstance(effect, ef.Adopt)
    machine.defined = effect.vm.epoch
    return facts.Adopted(at_ms=machine.clock_ms)


def _undo_target(runner: "Runner", effect: ef.Effect, *, images: bool = True) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is not None and machine.qemu.ran:
        raise Broken("the target takes back what ran")
    if machine.defined is not None:
        raise Broken("the target takes back what it owns")
    machine.kill_qemu()
    machine.taps = machine.kernel_files = False
    machine.half_undone = machine.image is not None
    if images:
        machine.end_undoing()
    return facts.Undone(at_ms=machine.clock_ms)


def _await_pages(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is None or not pages.wait_anew(machine.qemu):
        return _failed(runner, effect)
    return facts.IncomingReady(at_ms=machine.clock_ms, address=IncomingAddress(memory_port=49154, disk_port=None))


def _resume_pages(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is None or not pages.resume(machine, machine.qemu):
        return _failed(runner, effect)
    return facts.PagesResumed(at_ms=machine.clock_ms)


def _end_lost(runner: "Runner", effect: ef.Effect) -> Fact | None:
    machine = runner.agent.machine
    if machine.qemu is not None and machine.qemu.migration == "completed":
        return facts.MemorySent(at_ms=machine.clock_ms)
    if machine.other.qemu is not None:
        raise Broken("pages are given up that are still to be had")
    machine.kill_qemu()
    return None


# --- both


def _cont(runner: "Runner", effect: ef.Effect) -> Fact:
    machine = runner.agent.machine
    if machine.qemu is not None and isinstance(runner.state, SourceState) and machine.qemu.migration in pages.MISSING:
        return _failed(runner, effect)
    if machine.qemu is None or not machine.can_lock():
        return _failed(runner, effect)
    machine.run()
    return facts.GuestRuns(at_ms=machine.clock_ms, resumed_ms=machine.clock_ms)


ACTS: dict[type[ef.Effect], Callable[["Runner", ef.Effect], Fact | None]] = {
    ef.SendFiles: _send_files,
    ef.MirrorDisks: _mirror_disks,
    ef.SendMemory: _send_memory,
    ef.ThrottleGuest: lambda runner, effect: None,
    ef.StopGuest: _stop_guest,
    ef.ServePages: _serve_pages,
    ef.ResumePages: _resume_pages,
    ef.AwaitPages: _await_pages,
    ef.EndLost: _end_lost,
    ef.FinishMirrors: _finish_mirrors,
    ef.ContinueSwitchover: _continue,
    ef.UndoSource: _undo_source,
    ef.EndCopy: _end_copy,
    ef.RemoveCopy: _remove_copy,
    ef.Prepare: _prepare,
    ef.Unexport: _unexport,
    ef.Adopt: _adopt,
    ef.UndoTarget: _undo_target,
    ef.Cont: _cont,
}


def hear(runner: "Runner", name: str, data: dict[str, int]) -> Fact | None:
    """Turn what QEMU said into a fact."""
    at_ms = runner.agent.machine.clock_ms
    match name:
        case "PASS":
            return facts.PassStarted(
                at_ms=at_ms,
                number=data["number"],
                sent_bytes=data["sent"],
                remaining_bytes=data["remaining"],
                total_bytes=runner.state.vm.memory_bytes,
                dirty_bytes_per_s=0.0,
            )
        case "PRE-SWITCHOVER":
            return facts.PreSwitchover(at_ms=at_ms)
        case "COMPLETED":
            return facts.MemorySent(at_ms=at_ms)
        case "FAILED":
            return facts.MemoryFailed(at_ms=at_ms, error=ERROR)
        case "FOLLOW" if isinstance(runner.state, SourceState):
            return facts.PagesFollow(at_ms=at_ms)
        case "FOLLOW":
            return facts.StateLoaded(at_ms=at_ms)
        case "HALTED":
            return facts.PagesStopped(at_ms=at_ms)
        case "STOP":
            return None
    return facts.QemuGone(at_ms=at_ms, error=ERROR)
