"""What the machines' effects do to the small world, what QEMU does by itself, and the invariants that hang on them."""

from kvmhv.core import effects as ef
from kvmhv.core import facts
from kvmhv.core.facts import Fact
from kvmhv.core.handover import SourceRight, TargetRight
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.messages import Grant, Refused
from kvmhv.model import ErrorBody, IncomingAddress
from tests.explore.memory import Memory, State
from tests.explore.world import LOST, Host, Qemu, Violation, World, run_guest

ERROR = ErrorBody(code="broken", message="it broke", todo="")
BY_QMP = (
    ef.StopGuest,
    ef.FinishMirrors,
    ef.ContinueSwitchover,
    ef.UndoSource,
    ef.Cont,
    ef.Unexport,
    ef.AwaitPages,
    ef.ResumePages,
    ef.EndLost,
)
ACTIVE = ("active", "pre-switchover", "device")
FOLLOW, HALTED = "postcopy-active", "postcopy-paused"
MUCH_BYTES = 1 << 36
ADDRESS = IncomingAddress(memory_port=49154, disk_port=None)
MISSING = (FOLLOW, HALTED)
"""The target's QEMU lacks pages; the source's cannot let its guest go on."""


def journalled(memory: Memory, host: Host) -> State | None:
    """The newest state in the host's journal."""
    number = host.volatile if host.volatile >= 0 else host.durable
    return memory.states.values[number] if number >= 0 else None


def now(memory: Memory, world: World, index: int, effect: ef.Effect) -> World:
    """Perform an effect that is done at once."""
    host = world.hosts[index]
    match effect:
        case ef.Journal(durable=True):
            return world.at(index, host._replace(durable=host.state, volatile=-1))
        case ef.Journal():
            if host.durable < 0:
                raise Violation("a volatile journal entry without a durable one")
            return world.at(index, host._replace(volatile=host.state))
        case ef.Send(message=message):
            _check_said(memory, host, message)
            if not world.link:
                return world
            other = world.hosts[1 - index]
            inbox = (*other.inbox, memory.messages.number(message))
            return world.at(1 - index, other._replace(inbox=inbox))
        case ef.SetTimer(name=name):
            return world.at(index, host._replace(timers=host.timers | {name}))
        case ef.ClearTimer(name=name):
            return world.at(index, host._replace(timers=host.timers - {name}))
        case ef.NeedOperator():
            return world
        case ef.Finish(report=report):
            ended = list(host.ended)
            ended[world.move] = memory.reports.number(report)
            host = host._replace(
                ended=tuple(ended), durable=-1, volatile=-1, state=-1, doing=(), timers=frozenset(), events=(), inbox=()
            )
            return hang_up(world.at(index, host), index)
    number = memory.effects.number(effect)
    if number in host.doing:
        return world
    return world.at(index, host._replace(doing=(*host.doing, number)))


def may_complete(memory: Memory, host: Host, number: int) -> bool:
    """QEMU takes commands in the order in which they were sent (the runner starts effects in their order)."""
    if not isinstance(memory.effects.values[number], BY_QMP):
        return True
    return number == next(one for one in host.doing if isinstance(memory.effects.values[one], BY_QMP))


def hang_up(world: World, index: int) -> World:
    """A runner that has ended says its last words and closes its connections."""
    other = world.hosts[1 - index]
    if world.link and other.agent and other.state >= 0:
        world = world.at(1 - index, other._replace(inbox=(*other.inbox, LOST)))
    return world._replace(link=False)


def _check_said(memory: Memory, host: Host, message: object) -> None:
    """Journal before act: what was said must be known to the next agent."""
    kept = journalled(memory, host)
    if isinstance(message, Grant) and not (
        isinstance(kept, SourceState) and kept.hold.right in (SourceRight.GRANTED, SourceRight.YIELDED)
    ):
        raise Violation("a grant that is not journalled")
    if isinstance(message, Refused):
        durable = memory.states.values[host.durable] if host.durable >= 0 else None
        if not isinstance(durable, TargetState) or durable.hold.right is not TargetRight.REFUSED:
            raise Violation("a refusal that is not on disk")
        if host.qemu is not None:
            raise Violation("a refusal while the incoming QEMU lives")


def complete(memory: Memory, world: World, index: int, effect: ef.Effect) -> tuple[World, Fact | None]:
    """Do what takes time, and return the fact that answers it."""
    host, other = world.hosts[index], world.hosts[1 - index]
    if isinstance(effect, ef.EndCopy | ef.RemoveCopy | ef.UndoTarget | ef.Adopt):
        return _complete_on_host(world, index, effect)
    qemu = host.qemu
    failed = facts.Failed(at_ms=0, effect=type(effect).__name__, error=ERROR)
    if qemu is None:
        return world, failed
    of_pages = _complete_of_pages(memory, world, index, effect, qemu, failed)
    if of_pages is not None:
        return of_pages
    match effect:
        case ef.Cont():
            _check_cont(memory, host)
            if qemu.status != "running":
                world = run_guest(world, index)
            return world, facts.GuestRuns(at_ms=0, resumed_ms=1)
        case ef.Unexport():
            if other.qemu is not None and other.qemu.mirrors:
                raise Violation("the export is closed while the mirror writes")
            return world.at(index, host._replace(exported=False)), facts.Unexported(at_ms=0)
    return _complete_at_source(memory, world, index, effect, qemu, failed)


def _ended(world: World, index: int) -> tuple[World, Fact | None]:
    """A source's QEMU in post-copy can only be ended."""
    other = world.hosts[1 - index]
    if other.qemu is not None and other.qemu.ran:
        raise Violation("the source takes back what ran")
    ended = world.at(index, world.hosts[index]._replace(qemu=None))._replace(crashed=True)
    return ended, facts.QemuGone(at_ms=0, error=ERROR)


def _complete_of_pages(
    memory: Memory, world: World, index: int, effect: ef.Effect, qemu: Qemu, failed: Fact
) -> tuple[World, Fact | None] | None:
    """What is different in post-copy; None: nothing is."""
    host, other = world.hosts[index], world.hosts[1 - index]
    source_serves = index == world.source and qemu.migration in MISSING
    match effect:
        case ef.Cont() if source_serves:
            return world, failed  # "Migration is not finalized yet"
        case ef.UndoSource() if source_serves:
            return _ended(world, index)
        case ef.AwaitPages():
            if qemu.migration not in MISSING:
                return world, failed
            qemu = qemu._replace(migration=HALTED, awaits=True)
            return world.at(index, host._replace(qemu=qemu)), facts.IncomingReady(at_ms=0, address=ADDRESS)
        case ef.EndLost():
            if qemu.migration == "completed":
                return world, facts.MemorySent(at_ms=0)
            if other.qemu is not None:
                raise Violation("pages are given up that are still to be had")
            return world.at(index, host._replace(qemu=None)), facts.QemuGone(at_ms=0, error=ERROR)
        case ef.ServePages():
            return world, None
        case ef.ResumePages():
            return _resume_pages(memory, world, index, qemu, failed)
    return None


def _resume_pages(memory: Memory, world: World, index: int, qemu: Qemu, failed: Fact) -> tuple[World, Fact | None]:
    """What QEMU said of the old connection means nothing any more when the new one stands: it is older."""
    host, other = world.hosts[index], world.hosts[1 - index]
    if qemu.migration not in MISSING:
        return world, failed
    stopped = memory.facts.number(facts.PagesStopped(at_ms=0))
    if other.qemu is None or not other.qemu.awaits:
        events = (*host.events, stopped) if qemu.migration == FOLLOW else host.events
        return world.at(index, host._replace(qemu=qemu._replace(migration=HALTED), events=events)), failed
    events = tuple(one for one in host.events if one != stopped)
    world = world.at(index, host._replace(qemu=qemu._replace(migration=FOLLOW), events=events))
    there = other.qemu._replace(migration=FOLLOW, awaits=False)
    return world.at(1 - index, other._replace(qemu=there)), facts.PagesResumed(at_ms=0)


def _complete_on_host(world: World, index: int, effect: ef.Effect) -> tuple[World, Fact | None]:
    """What does not need QEMU."""
    host, other = world.hosts[index], world.hosts[1 - index]
    match effect:
        case ef.EndCopy():
            if host.qemu is not None and not (other.qemu and other.qemu.ran) and not world.crashed:
                raise Violation("the source ends its copy before the target ran")
            if host.qemu is not None and other.qemu is not None and other.qemu.migration in MISSING:
                raise Violation("the source ends the QEMU that has the target's pages")
            return world.at(index, host._replace(qemu=None)), facts.CopyEnded(at_ms=0)
        case ef.RemoveCopy():
            if not other.defined:
                raise Violation("the source deletes before the target owns the VM on disk")
            return world.at(index, host._replace(defined=False, disk="")), facts.CopyRemoved(at_ms=0)
        case ef.UndoTarget():
            if host.qemu is not None and host.qemu.ran:
                raise Violation("the target takes back what ran")
            return world.at(index, host._replace(qemu=None, exported=False, disk="")), facts.Undone(at_ms=0)
    return world.at(index, host._replace(defined=True)), facts.Adopted(at_ms=0)


def _complete_at_source(
    memory: Memory, world: World, index: int, effect: ef.Effect, qemu: Qemu, failed: Fact
) -> tuple[World, Fact | None]:
    host, other = world.hosts[index], world.hosts[1 - index]
    match effect:
        case ef.StopGuest():
            late = qemu.status == "finish"  # then QEMU's own event came first
            stopped = qemu._replace(status="paused") if qemu.status == "running" else qemu
            stopped = stopped._replace(follow=effect.post_copy and stopped.migration == "active")
            return world.at(index, host._replace(qemu=stopped)), facts.GuestStopped(at_ms=2 if late else 0, told_ms=0)
        case ef.FinishMirrors():
            if not qemu.mirrors or not other.exported:
                return world, failed
            return world.at(index, host._replace(qemu=qemu._replace(mirrors=False))), facts.MirrorsFinished(at_ms=0)
        case ef.ContinueSwitchover():
            if qemu.migration != "pre-switchover":
                return world, failed
            durable = memory.states.values[host.durable] if host.durable >= 0 else None
            if not isinstance(durable, SourceState) or not durable.hold.announced:
                raise Violation("the switchover comes before it is announced on disk")
            return world.at(index, host._replace(qemu=qemu._replace(migration="device"))), None
        case ef.UndoSource():
            if qemu.migration in ACTIVE:
                world = resume_by_itself(
                    world.at(index, host._replace(qemu=qemu._replace(migration="cancelled"))), index
                )
            host = world.hosts[index]
            assert host.qemu is not None
            host = host._replace(qemu=host.qemu._replace(mirrors=False))
            if host.qemu is not None and host.qemu.status == "running" and other.disk:
                world = world.at(1 - index, world.hosts[1 - index]._replace(disk="stale"))
            return world.at(index, host), facts.Undone(at_ms=0)
    raise AssertionError(f"the world does not know {type(effect).__name__}")


def _check_cont(memory: Memory, host: Host) -> None:
    """Journal before act: the right to run is what the next agent would read."""
    kept = journalled(memory, host)
    if isinstance(kept, TargetState) and kept.hold.right is not TargetRight.OWNS:
        raise Violation("the target runs without a journalled right")
    if isinstance(kept, SourceState):
        if not kept.hold.may_run():
            raise Violation("the source runs without a journalled right")
        if kept.step != "undoing":
            raise Violation("the source runs before it is on disk that the move is taken back")


def resume_by_itself(world: World, index: int) -> World:
    """A QEMU that paused its guest for the switchover lets it run again when the migration fails."""
    qemu = world.hosts[index].qemu
    assert qemu is not None
    return run_guest(world, index) if qemu.status == "finish" else world


def pass_started(number: int, remaining_bytes: int = 0) -> facts.PassStarted:
    """QEMU tells that a pass begins; what remains is below the threshold."""
    return facts.PassStarted(
        at_ms=number,
        number=number,
        sent_bytes=number,
        remaining_bytes=remaining_bytes,
        total_bytes=1,
        dirty_bytes_per_s=0,
    )


def by_itself(world: World) -> list[tuple[str, World, int, Fact]]:
    """What the two QEMUs may do next: (what, world, the host whose agent hears of it, fact)."""
    index = world.source
    source, target = world.hosts[index], world.hosts[1 - index]
    found: list[tuple[str, World, int, Fact]] = []
    here, there = source.qemu, target.qemu
    listening = there is not None and there.status == "inmigrate" and there.migration == ""

    def source_becomes(qemu: Qemu) -> World:
        return world.at(index, source._replace(qemu=qemu))

    def target_becomes(qemu: Qemu) -> World:
        return world.at(1 - index, target._replace(qemu=qemu))

    last = pass_started(2, MUCH_BYTES if world.post_copy else 0)
    if here is not None and here.migration == "active" and here.passes == 1 and here.status == "running" and there:
        found.append(("the last pass begins", source_becomes(here._replace(passes=2)), index, last))
    if here is not None and here.migration == "active" and there is not None:
        status = "finish" if here.status == "running" else here.status
        waiting = source_becomes(here._replace(status=status, migration="pre-switchover"))
        found.append(("QEMU waits before the device state", waiting, index, facts.PreSwitchover(at_ms=1)))
    if here is not None and here.migration == "device" and here.follow:
        follows = source_becomes(here._replace(migration=FOLLOW))
        found.append(("QEMU hands the state on", follows, index, facts.PagesFollow(at_ms=0)))
    elif here is not None and here.migration == "device" and listening:
        if here.mirrors:
            raise Violation("the device state goes over while a mirror writes")
        assert there is not None
        loaded = target_becomes(there._replace(status="paused", migration="completed", fresh=here.fresh))
        found.append(("all is loaded at the target", loaded, 1 - index, facts.MemorySent(at_ms=0)))
    if here is not None and here.migration == "device" and there is not None and there.migration == "completed":
        status = "paused" if here.status == "finish" else here.status
        sent = source_becomes(here._replace(migration="completed", status=status))
        found.append(("all is sent", sent, index, facts.MemorySent(at_ms=0)))
    found += _post_copy(world, listening=listening)
    gone = there is None or there.migration == "failed"
    if here is not None and here.migration in ACTIVE and gone:
        failed = resume_by_itself(source_becomes(here._replace(migration="failed")), index)
        found.append(("the migration fails at the source", failed, index, facts.MemoryFailed(at_ms=0, error=ERROR)))
    if listening and (here is None or here.migration in ("failed", "cancelled")):
        assert there is not None
        failed = target_becomes(there._replace(migration="failed"))
        event: Fact = facts.MemoryFailed(at_ms=0, error=ERROR)
        found.append(("the migration fails at the target", failed, 1 - index, event))
    return found


def _post_copy(world: World, *, listening: bool) -> list[tuple[str, World, int, Fact]]:
    """What the two QEMUs may do while pages follow."""
    index = world.source
    source, target = world.hosts[index], world.hosts[1 - index]
    found: list[tuple[str, World, int, Fact]] = []
    here, there = source.qemu, target.qemu

    def source_becomes(migration: str) -> World:
        assert here is not None
        return world.at(index, source._replace(qemu=here._replace(migration=migration)))

    def target_becomes(qemu: Qemu) -> World:
        return world.at(1 - index, target._replace(qemu=qemu))

    if here is not None and here.migration == FOLLOW:
        if here.mirrors:
            raise Violation("the state is handed on while a mirror writes")
        if listening and there is not None:
            loaded = target_becomes(there._replace(status="paused", migration=FOLLOW, fresh=here.fresh))
            found.append(("all but pages is loaded at the target", loaded, 1 - index, facts.StateLoaded(at_ms=0)))
        elif there is not None and there.migration == FOLLOW:
            whole = target_becomes(there._replace(migration="completed"))
            found.append(("every page is at the target", whole, 1 - index, facts.MemorySent(at_ms=0)))
        elif there is not None and there.migration == "completed":
            found.append(("every page is sent", source_becomes("completed"), index, facts.MemorySent(at_ms=0)))
        else:
            found.append(("the pages halt at the source", source_becomes(HALTED), index, facts.PagesStopped(at_ms=0)))
    if there is not None and there.migration == FOLLOW and (here is None or here.migration == HALTED):
        halted = target_becomes(there._replace(migration=HALTED))
        found.append(("the pages halt at the target", halted, 1 - index, facts.PagesStopped(at_ms=0)))
    return found
