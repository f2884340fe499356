"""A host with one VM whose disk changes its location, as pure data: for the exploration of all that may die when.

Everything that happens is a move from one `World` to the next. Effects are done in their order, those that take time in
small parts, and between any two parts agent, QEMU or host may die.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from kvmhv.core import facts, storage_move
from kvmhv.core.effects import (
    ClearTimer,
    CopyDisks,
    Effect,
    Finish,
    HoldWrites,
    Journal,
    MakeImages,
    Redefine,
    ReleaseWrites,
    RemoveImages,
    SetTimer,
    UndoStorage,
)
from kvmhv.core.source_state import STEP_TIMER
from kvmhv.core.storage_state import StorageState
from kvmhv.model import Disk, DiskCopy, DiskFormat, ErrorBody, Layer, Timeouts, Vm

OLD, NEW = "old", "new"
WRITES = 3
NOTHING = -1
"""What an image holds that was not copied yet."""
ERROR = ErrorBody(code="broken", message="it is broken", todo="mend it")

PARTS: dict[type, tuple[str, ...]] = {
    MakeImages: ("make",),
    CopyDisks: ("copy", "copied"),
    HoldWrites: ("hold",),
    Redefine: ("record",),
    ReleaseWrites: ("release", "close"),
    RemoveImages: ("remove",),
    UndoStorage: ("record", "cancel", "remove-new"),
}


def _vm(location: str) -> Vm:
    layer = Layer(location=location, path="web01/disk0.raw", format=DiskFormat.RAW)
    disk = Disk(name="disk0", size_bytes=512, layers=(layer,), pci_slot=8)
    return Vm(id="1", name="web01", memory_bytes=1, cpus=1, disks=(disk,))


def begun(*, running: bool = True) -> StorageState:
    """A storage move that was admitted."""
    old, new = _vm(OLD), _vm(NEW)
    copy = DiskCopy(
        disk="disk0",
        size_bytes=512,
        used_bytes=512,
        source_layers=old.disks[0].layers,
        target_layers=new.disks[0].layers,
    )
    return StorageState(
        move_id="m",
        host="host1",
        vm=old,
        target_vm=new,
        copies=(copy,),
        running=running,
        bandwidth_bytes_per_s=0,
        timeouts=Timeouts(),
        started_wall_s=0.0,
        volatile_id="v",
    )


class Broken(AssertionError):
    """A promise is broken."""


@dataclass(frozen=True)
class World:
    """The host at one moment."""

    state: StorageState | None
    """The agent's; None while there is no agent."""
    effects: tuple[Effect, ...] = ()
    tasks: tuple[tuple[Effect, int], ...] = ()
    """Effects under way, and how many of their parts are done."""
    news: tuple[facts.Fact, ...] = ()
    """Facts that wait to be handled."""
    journal: StorageState | None = None
    ended: bool = False
    record: str = OLD
    images: frozenset[str] = frozenset({OLD})
    held: tuple[int, int] = (0, NOTHING)
    """The newest write that is in the old image, and in the new one."""
    acknowledged: int = 0
    qemu: bool = True
    top: str = OLD
    job: str = ""
    """`copying`, `ready`, `pending`."""
    timer: bool = False
    faults: int = 0

    def check(self) -> None:
        """Raise Broken unless the record names an image that is there and has every acknowledged write."""
        if self.record not in self.images:
            raise Broken(f"the record names {self.record}, which is deleted")
        if self.held[self.record == NEW] != self.acknowledged:
            raise Broken(f"the record names {self.record}, which lacks a write")
        if self.qemu and self.top not in self.images:
            raise Broken(f"QEMU writes to {self.top}, which is deleted")
        given_up = self.state is not None and self.state.warnings
        if self.ended and self.images != {self.record} and not given_up:
            raise Broken(f"images {sorted(self.images)} are left")
        if self.ended and self.qemu and (self.top != self.record or (self.job and not given_up)):
            raise Broken(f"in the end QEMU has {self.top}, job {self.job!r}, and the record names {self.record}")
        if self.ended and self.qemu and self.job == "pending":
            raise Broken(f"in the end QEMU has {self.top}, job {self.job!r}, and the record names {self.record}")


def start() -> World:
    """Return the world in which a storage move has just been asked for."""
    return World(state=begun(), news=(facts.Started(at_ms=0.0),))


def nexts(world: World) -> Iterator[tuple[str, World]]:
    """Yield all that can happen now."""
    if world.ended:
        return
    if world.qemu and world.job != "pending" and world.acknowledged < WRITES:
        yield "the guest writes", _written(world)
    if world.state is None:
        yield "an agent starts", _restarted(world)
    elif world.effects:
        yield f"{type(world.effects[0]).__name__} begins", _performed(world)
    else:
        if world.news:
            yield f"{type(world.news[0]).__name__} is heard", _stepped(world, world.news[0], world.news[1:])
        for place, (effect, done) in enumerate(world.tasks):
            yield f"{type(effect).__name__}: {PARTS[type(effect)][done]}", _worked(world, place)
        if world.timer and not world.news and not world.tasks:
            yield "it is tried again", _fired(world)
    if world.faults:
        yield from _faults(replace(world, faults=world.faults - 1))


def _faults(world: World) -> Iterator[tuple[str, World]]:
    if world.state is not None:
        yield "the agent dies", _without_agent(world)
        if not world.effects:
            yield "cancelled", _stepped(world, facts.CancelRequested(at_ms=0.0, caller="me"), world.news)
            if world.timer:
                yield "it takes too long", _fired(world)
            for place, (effect, _) in enumerate(world.tasks):
                if not isinstance(effect, RemoveImages):
                    yield f"{type(effect).__name__} fails", _failed(world, place)
    if world.qemu:
        gone = replace(world, qemu=False, job="")
        if world.state is not None:
            gone = replace(gone, news=(*gone.news, facts.QemuGone(at_ms=0.0, error=ERROR)))
        yield "QEMU dies", gone
        yield "the host dies", replace(_without_agent(world), qemu=False, job="")


def _fired(world: World) -> World:
    return _stepped(replace(world, timer=False), facts.TimerFired(at_ms=0.0, name=STEP_TIMER), world.news)


def _without_agent(world: World) -> World:
    return replace(world, state=None, effects=(), tasks=(), news=(), timer=False)


def _written(world: World) -> World:
    number = world.acknowledged + 1
    old, new = world.held
    held = (number, new) if world.top == OLD else (old, number)
    return replace(world, acknowledged=number, held=held)


def _restarted(world: World) -> World:
    if world.journal is None:
        return replace(world, ended=True)  # it was never journalled: nothing was made
    found = facts.Restarted(at_ms=0.0, process=world.qemu, status="", migration="", rebooted=False)
    state, effects = storage_move.recover(world.journal, found)
    return replace(world, state=state, effects=tuple(effects))


def _stepped(world: World, fact: facts.Fact, rest: tuple[facts.Fact, ...]) -> World:
    assert world.state is not None
    state, effects = storage_move.step(world.state, fact)
    return replace(world, state=state, effects=tuple(effects), news=rest)


def _performed(world: World) -> World:
    effect, world = world.effects[0], replace(world, effects=world.effects[1:])
    match effect:
        case Journal():
            assert world.state is not None
            kept = msgspec.msgpack.decode(msgspec.msgpack.encode(world.state), type=StorageState)
            return replace(world, journal=kept)
        case SetTimer(name=name):
            return replace(world, timer=world.timer or name == STEP_TIMER)
        case ClearTimer(name=name):
            return replace(world, timer=world.timer and name != STEP_TIMER)
        case Finish():
            return replace(world, ended=True)
        case UndoStorage():  # the runner ends what is under way first
            return replace(world, tasks=((effect, 0),))
    return replace(world, tasks=(*world.tasks, (effect, 0))) if type(effect) in PARTS else world


def _failed(world: World, place: int) -> World:
    name = type(world.tasks[place][0]).__name__
    tasks = (*world.tasks[:place], *world.tasks[place + 1 :])
    return replace(world, tasks=tasks, news=(*world.news, facts.Failed(at_ms=0.0, effect=name, error=ERROR)))


def _worked(world: World, place: int) -> World:
    effect, done = world.tasks[place]
    parts = PARTS[type(effect)]
    if not world.qemu and parts[done] in ("copy", "copied", "hold", "release", "close"):
        return _failed(world, place)
    world = _part(world, effect, parts[done])
    before, after = world.tasks[:place], world.tasks[place + 1 :]
    if done + 1 < len(parts):
        return replace(world, tasks=(*before, (effect, done + 1), *after))
    answers: dict[type, facts.Fact] = {
        MakeImages: facts.ImagesMade(at_ms=0.0),
        CopyDisks: facts.MirrorsReady(at_ms=0.0, copied_bytes=1),
        HoldWrites: facts.WritesHeld(at_ms=0.0, told_ms=0.0),
        Redefine: facts.Redefined(at_ms=0.0),
        ReleaseWrites: facts.WritesReleased(at_ms=0.0),
        RemoveImages: facts.ImagesRemoved(at_ms=0.0),
        UndoStorage: facts.Undone(at_ms=0.0),
    }
    return replace(world, tasks=(*before, *after), news=(*world.news, answers[type(effect)]))


def _part(world: World, effect: Effect, part: str) -> World:
    match part:
        case "make":
            return replace(world, images=world.images | {NEW}, held=(world.held[0], NOTHING))
        case "copy":
            return replace(world, job="copying")
        case "copied":
            return replace(world, job="ready")
        case "hold":
            return replace(world, job="pending", held=(world.held[0], world.held[0]))
        case "release" if world.job == "pending":
            return replace(world, job="", top=NEW)
        case "cancel":
            return replace(world, job="")
        case "record":
            assert isinstance(effect, Redefine | UndoStorage)
            return replace(world, record=effect.vm.disks[0].layers[0].location)
        case "remove":
            assert isinstance(effect, RemoveImages)
            going = {layers[0].location for layers in effect.layers} - {world.record}
            return replace(world, images=world.images - going)
        case "remove-new":
            return replace(world, images=world.images - ({NEW} - {world.record}))
    return world
