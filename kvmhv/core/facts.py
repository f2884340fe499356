"""What can happen to a move. A machine learns of the world by these alone.

`at_ms` is the host's monotonic clock when the fact was noticed: the core has no clock of its own.
"""

from typing import TypeVar

from kvmhv.messages import AnyMessage
from kvmhv.model import DiskSent, ErrorBody, IncomingAddress, Struct, Whereabouts


class Fact(Struct, frozen=True, kw_only=True, tag_field="fact", tag=True):
    """Base of all facts."""

    at_ms: float


# --- both sides


class Received(Fact, frozen=True, kw_only=True):
    """The other agent said something."""

    message: AnyMessage


MessageType = TypeVar("MessageType")


def message_of(fact: Fact, kind: type[MessageType]) -> MessageType:
    """Return the message that a Received of this kind carries."""
    assert isinstance(fact, Received)
    assert isinstance(fact.message, kind)
    return fact.message


class PeerConnected(Fact, frozen=True, kw_only=True):
    """A connection to the other agent stands (again)."""


class PeerLost(Fact, frozen=True, kw_only=True):
    """No connection to the other agent; the runner tries again by itself."""

    error: ErrorBody


class TimerFired(Fact, frozen=True, kw_only=True):
    """A timer that the machine set, and neither replaced nor cleared, is over."""

    name: str


class Failed(Fact, frozen=True, kw_only=True):
    """An effect could not be done. What it promised to leave behind after a failure holds."""

    effect: str
    error: ErrorBody


class QemuGone(Fact, frozen=True, kw_only=True):
    """The VM's QEMU process on this host has ended."""

    error: ErrorBody


class MemorySent(Fact, frozen=True, kw_only=True):
    """QEMU on this side says `completed`: source, all is sent and acknowledged; target, all is loaded."""


class MemoryFailed(Fact, frozen=True, kw_only=True):
    """QEMU on this side says `failed` or `cancelled`."""

    error: ErrorBody


class PagesFollow(Fact, frozen=True, kw_only=True):
    """Source: QEMU says `postcopy-active`: it hands the state on, and cannot let the guest go on any more."""


class StateLoaded(Fact, frozen=True, kw_only=True):
    """Target: all but pages is loaded in `postcopy-active`: the guest can run, and waits for what it lacks."""


class PagesResumed(Fact, frozen=True, kw_only=True):
    """Source: the pages go over a new connection. What QEMU said of the old one was said before."""


class PagesStopped(Fact, frozen=True, kw_only=True):
    """QEMU on this side says `postcopy-paused`: the connection broke, no page goes over."""


class GuestRuns(Fact, frozen=True, kw_only=True):
    """The Cont was done: QEMU's RESUME arrived at `resumed_ms`."""

    resumed_ms: float


class Undone(Fact, frozen=True, kw_only=True):
    """All that this side made for the move is taken back."""

    warnings: tuple[str, ...] = ()
    wire_bytes: int | None = None
    """Source: what QEMU's connections carried, if that was counted."""


class Looked(Fact, frozen=True, kw_only=True):
    """What the program that runs the VM says of it on this host."""

    found: Whereabouts


# --- source


class Handed(Fact, frozen=True, kw_only=True):
    """The program's own move has ended, well or not; that alone proves nothing of where the VM is."""

    error: ErrorBody | None = None


class Started(Fact, frozen=True, kw_only=True):
    """The move begins."""


class CancelRequested(Fact, frozen=True, kw_only=True):
    """Somebody asked to cancel."""

    caller: str


class FilesUploaded(Fact, frozen=True, kw_only=True):
    """SendFiles is done."""


class MirrorProgress(Fact, frozen=True, kw_only=True):
    """Bytes of all disks so far."""

    copied_bytes: int
    total_bytes: int


class MirrorsReady(Fact, frozen=True, kw_only=True):
    """Every disk is copied, and each write goes to both sides."""

    copied_bytes: int
    sent: tuple[DiskSent, ...] = ()
    """To another host: what went over the wire until now."""


class MirrorsFinished(Fact, frozen=True, kw_only=True):
    """Every mirror has ended in sync."""


class MemoryProgress(Fact, frozen=True, kw_only=True):
    """query-migrate between two passes."""

    sent_bytes: int
    remaining_bytes: int
    total_bytes: int
    dirty_bytes_per_s: float
    sampled_dirty_bytes_per_s: float | None = None
    """By a sample of pages taken beside the first pass."""
    zero_bytes: int | None = None
    """Pages of nothing but zeros, of which a mark was sent; None: not told."""
    pages_bytes: int = 0
    """Post-copy: sent since the guest runs at the target."""
    pages_requests: int = 0
    """Post-copy: pages that it asked for before their turn."""


class HeldBack(Fact, frozen=True, kw_only=True):
    """The move sends little for a moment, because another one over the same network is about to stop its guest."""


class PassStarted(Fact, frozen=True, kw_only=True):
    """QEMU's MIGRATION_PASS: pass `number` begins (1 is the full copy), so number - 1 passes are complete.

    `remaining_bytes` is the fresh dirty set, `sent_bytes` all that went over the wire so far.
    """

    number: int
    sent_bytes: int
    remaining_bytes: int
    total_bytes: int
    dirty_bytes_per_s: float
    zero_bytes: int | None = None
    throttle_percent: int = 0
    """How far QEMU slows the guest's CPUs down."""


class GuestStopped(Fact, frozen=True, kw_only=True):
    """The guest stands still at the source. `told_ms`: when it was told to stop: the blackout begins."""

    told_ms: float


class PreSwitchover(Fact, frozen=True, kw_only=True):
    """QEMU holds before the device state; the guest is stopped. `stopped_ms`: since when, if QEMU said so."""

    stopped_ms: float | None = None


class CopyEnded(Fact, frozen=True, kw_only=True):
    """The source's QEMU is gone."""


class CopyRemoved(Fact, frozen=True, kw_only=True):
    """The source's disks (when they moved), files and record of the VM are gone."""

    warnings: tuple[str, ...] = ()
    wire_bytes: int | None = None
    """What QEMU's connections carried, if that was counted."""


class Answered(Fact, frozen=True, kw_only=True):
    """The guest has answered its probe: to a question that was asked when it stood still."""

    answered_ms: float


class ProbeSilent(Fact, frozen=True, kw_only=True):
    """The guest does not answer its probe although it runs here: the gap to its first answer will not be known."""

    probe: str


# --- target


class Offered(Fact, frozen=True, kw_only=True):
    """An offer that admission has let in."""


class IncomingReady(Fact, frozen=True, kw_only=True):
    """Disks made and exported, QEMU listens."""

    address: IncomingAddress


class Unexported(Fact, frozen=True, kw_only=True):
    """The disks are no longer exported."""


class Adopted(Fact, frozen=True, kw_only=True):
    """The VM is defined here, on disk."""


class FirstFrame(Fact, frozen=True, kw_only=True):
    """The switch saw the guest's first frame, so long after RESUME."""

    after_resume_ms: float


# --- a storage move


class ImagesMade(Fact, frozen=True, kw_only=True):
    """The new images are there, empty, and owned."""


class WritesHeld(Fact, frozen=True, kw_only=True):
    """The guest's disk requests wait since `told_ms` at the earliest; old and new images hold the same, flushed."""

    told_ms: float


class Redefined(Fact, frozen=True, kw_only=True):
    """The VM's record says so, on disk."""


class WritesReleased(Fact, frozen=True, kw_only=True):
    """The guest's disk requests go on, to the new images but for the disks in `stayed`, which QEMU did not change."""

    stayed: tuple[str, ...] = ()


class ImagesRemoved(Fact, frozen=True, kw_only=True):
    """What was to be deleted is gone, or told in `warnings`."""

    warnings: tuple[str, ...] = ()


# --- after a restart of the agent


class Restarted(Fact, frozen=True, kw_only=True):
    """What the new agent found of the VM's QEMU on this host."""

    process: bool
    """There is a QEMU process of this VM."""
    status: str
    """Its RunState (`running`, `paused`, `inmigrate`, `postmigrate`, ...); empty without a process."""
    migration: str
    """Its migration's status (`active`, `completed`, ...)."""
    rebooted: bool
    """The volatile journal is not the one in which the move began: the host was rebooted, every process is lost."""
    ever_ran: bool = False
    """The guest runs or may have run in this process: for one that was started to take a move in, `cont` was sent."""
