"""What a machine can ask for. The runner performs a list of effects in its order; all of them can be repeated.

An effect that takes time answers with a fact when it is done, or with `Failed(effect=<its name>)`. `Cont` is made in
handover.py alone.
"""

from kvmhv.messages import AnyMessage
from kvmhv.model import DiskCopy, ErrorBody, IncomingAddress, Layer, MoveReport, Plan, Struct, Vm


class Effect(Struct, frozen=True, kw_only=True):
    """Base of all effects."""


# --- both sides


class Journal(Effect, frozen=True, kw_only=True):
    """Keep the machine's state as it is after this step, before any later effect of the list is done.

    Durable: on disk. Not durable: on tmpfs, which survives the agent but not the host (no disk write in the blackout).
    """

    durable: bool = True


class Send(Effect, frozen=True, kw_only=True):
    """Say it to the other agent; if there is no connection it is dropped (PeerConnected repeats what matters)."""

    message: AnyMessage


class SetTimer(Effect, frozen=True, kw_only=True):
    """TimerFired(name) after so long, unless the timer is set anew or cleared."""

    name: str
    after_s: float


class ClearTimer(Effect, frozen=True, kw_only=True):
    """Forget a timer."""

    name: str


class Cont(Effect, frozen=True, kw_only=True):
    """Let the guest run on this host. Answered by GuestRuns."""

    vm_id: str
    epoch: int


class Finish(Effect, frozen=True, kw_only=True):
    """The move is over on this side: the report replaces the journal's states, the VM is no longer claimed."""

    report: MoveReport


class NeedOperator(Effect, frozen=True, kw_only=True):
    """Tell the operator: the VM stands still until somebody decides, or until the other side answers."""

    error: ErrorBody


class Look(Effect, frozen=True, kw_only=True):
    """Ask the program that runs the VM on this host where it is. Answered by Looked."""


# --- source


class Steer(Effect, frozen=True, kw_only=True):
    """Let the program that runs the VM move it, disks and memory. Answered by MirrorProgress, PassStarted,
    MemoryProgress, GuestStopped, ..., Handed.
    """

    plan: Plan


class SendFiles(Effect, frozen=True, kw_only=True):
    """Upload the VM's kernel and initrd. Answered by FilesUploaded."""


class MirrorDisks(Effect, frozen=True, kw_only=True):
    """Mirror each disk of the plan. Answered by MirrorProgress, ..., MirrorsReady."""

    plan: Plan
    address: IncomingAddress


class SendMemory(Effect, frozen=True, kw_only=True):
    """Start the memory migration. Answered by PassStarted, MemoryProgress, PreSwitchover, MemorySent, MemoryFailed."""

    plan: Plan
    address: IncomingAddress


class ThrottleGuest(Effect, frozen=True, kw_only=True):
    """Slow the guest's CPUs down, step by step from pass to pass, until the memory is sent. Not answered."""

    max_percent: int


class StopGuest(Effect, frozen=True, kw_only=True):
    """The lever: lift the bandwidth cap and `stop`. Answered by GuestStopped."""

    post_copy: bool = False
    """What remains of the memory goes over after the switchover, not before it."""


class FinishMirrors(Effect, frozen=True, kw_only=True):
    """End the mirrors in sync; the guest is stopped. Answered by MirrorsFinished."""


class ContinueSwitchover(Effect, frozen=True, kw_only=True):
    """`migrate-continue`: the device state goes over."""


class ServePages(Effect, frozen=True, kw_only=True):
    """Post-copy: see the pages go. Answered by MemoryProgress again and again."""


class ResumePages(Effect, frozen=True, kw_only=True):
    """Post-copy: send the rest of the pages over a new connection. Answered by PagesResumed."""

    plan: Plan
    address: IncomingAddress


class UndoSource(Effect, frozen=True, kw_only=True):
    """Cancel memory and mirrors (by force if QMP hangs). Does not run the guest. Answered by Undone.

    A QEMU in post-copy cannot let its guest go on: it is ended.
    """

    timeout_s: float


class EndCopy(Effect, frozen=True, kw_only=True):
    """End the source's QEMU, its taps and its run files. Answered by CopyEnded."""


class RemoveCopy(Effect, frozen=True, kw_only=True):
    """Delete the disks that moved, the kernel files and the VM's record. Answered by CopyRemoved."""

    plan: Plan


# --- target


class Prepare(Effect, frozen=True, kw_only=True):
    """Make disks and taps, start the incoming QEMU, export the disks. Answered by IncomingReady."""

    plan: Plan


class AwaitPages(Effect, frozen=True, kw_only=True):
    """Post-copy: wait for the source on a new address. Answered by IncomingReady."""

    plan: Plan


class EndLost(Effect, frozen=True, kw_only=True):
    """Post-copy, no page comes any more: end QEMU unless it has all. Answered by QemuGone or MemorySent."""


class Unexport(Effect, frozen=True, kw_only=True):
    """End the disk exports. Answered by Unexported."""


class Adopt(Effect, frozen=True, kw_only=True):
    """Define the VM on this host, on disk, and tell the network where it is. Answered by Adopted."""

    vm: Vm


class UndoTarget(Effect, frozen=True, kw_only=True):
    """End the incoming QEMU, delete the disks, taps and files that were made. Answered by Undone."""

    plan: Plan


# --- a storage move


class MakeImages(Effect, frozen=True, kw_only=True):
    """Make the empty images that a storage move fills, and own them. Answered by ImagesMade."""

    vm: Vm
    """As it will be defined."""
    disks: tuple[str, ...]


class CopyDisks(Effect, frozen=True, kw_only=True):
    """Copy disks to their new images while the guest writes. Answered by MirrorProgress, ..., MirrorsReady."""

    vm: Vm
    copies: tuple[DiskCopy, ...]
    bandwidth_bytes_per_s: int
    timeout_s: float


class HoldWrites(Effect, frozen=True, kw_only=True):
    """Let the guest's requests wait, with the old images and the new ones alike and flushed. Answered by WritesHeld."""

    timeout_s: float


class Redefine(Effect, frozen=True, kw_only=True):
    """Let the VM's record name these images, on disk. Answered by Redefined."""

    vm: Vm


class ReleaseWrites(Effect, frozen=True, kw_only=True):
    """Let the guest go on with the new images, and the old ones go. Answered by WritesReleased."""


class RemoveImages(Effect, frozen=True, kw_only=True):
    """Delete images that no record names any more, and give up their ownership. Answered by ImagesRemoved."""

    layers: tuple[tuple[Layer, ...], ...]
    """Each disk's, the top first."""


class UndoStorage(Effect, frozen=True, kw_only=True):
    """End the copies; the guest goes on with the old images, the new ones are deleted. Answered by Undone."""

    vm: Vm
    """As it was: so its record says."""
    timeout_s: float
