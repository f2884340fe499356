"""What two agents say to each other about one move. The wire (kvmhv/wire) encodes it; the core decides what is said.

Source to target: Enquire, Offer, FilesSent, MirrorsEnded, Grant, PagesHalted, PagesEnd, Look, Abort, Finished.
Target to source: Answer, FilesWanted, Ready, Running, PagesFrom, PagesDone, Seen, Owned, Refused, Unknown.

Every message can be repeated: a connection that broke is made again and each side repeats what the other may lack.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from kvmhv.model import (
    DEVICES_MAX,
    ClockMs,
    Epoch,
    ErrorBody,
    IncomingAddress,
    Inventory,
    MoveReport,
    MoveRequest,
    Plan,
    Sha256,
    Struct,
    Vm,
    Whereabouts,
)

Attempt = Annotated[int, Meta(ge=0, lt=2**31)]


class Message(Struct, frozen=True, kw_only=True, tag_field="type", tag=True):
    """Base of all messages."""


class Nonce(Struct, frozen=True, kw_only=True):
    """A record that the source has just written at a location: the target is to read it there."""

    location: str
    name: str


class Proof(Struct, frozen=True, kw_only=True):
    """What the target read at a location, and the record that it wrote there for the source to read."""

    location: str
    read: str = ""
    """Content of the source's nonce, hex."""
    name: str = ""
    digest: str = ""
    """SHA-256 of the content of its own nonce."""
    identities: dict[str, str] = msgspec.field(default_factory=dict)
    """LUNs: what each of the VM's calls itself, by its path."""
    error: str = ""


class Enquire(Message, frozen=True, kw_only=True):
    """Could this VM come to you? Allocates nothing at the target."""

    vm: Vm
    request: MoveRequest
    nonces: tuple[Nonce, ...] = ()
    bases: Annotated[tuple[Sha256, ...], Meta(max_length=DEVICES_MAX)] = ()
    """Contents of its disks' lowest layers: does the target have them?"""


class Answer(Message, frozen=True, kw_only=True):
    """The target's inventory, with its refusal if its settings say no."""

    inventory: Inventory
    proofs: tuple[Proof, ...] = ()


class Offer(Message, frozen=True, kw_only=True):
    """Make ready for this plan. `psk_hex` is the key of this move's memory and disk channels."""

    epoch: Epoch
    plan: Plan
    psk_hex: Annotated[str, Meta(pattern=r"^([0-9a-f]{2}){1,128}$(?!\n)")]


class FilesWanted(Message, frozen=True, kw_only=True):
    """The target has journalled the offer and takes the VM's kernel files now."""


class FilesSent(Message, frozen=True, kw_only=True):
    """The kernel files have arrived (the uploads were answered)."""


class Ready(Message, frozen=True, kw_only=True):
    """The target's QEMU listens. From here on the target has journalled that it accepts this epoch."""

    epoch: Epoch
    address: IncomingAddress


class MirrorsEnded(Message, frozen=True, kw_only=True):
    """The disks are in sync and nobody writes to the exports any more."""

    epoch: Epoch
    held: bool = False
    """The guest was stopped by the source's agent, not by QEMU: only that agent can let it go on."""


class Grant(Message, frozen=True, kw_only=True):
    """The target may run the VM. Irrevocable: the source runs it again only on proof that the target refused."""

    epoch: Epoch
    sent: bool = True
    """False: the source has lost its copy before it heard that all was sent; the target knows what it has."""
    ran: bool = False
    """The target has said before that it runs it: proof for a target whose host rebooted and which cannot tell."""


class Running(Message, frozen=True, kw_only=True):
    """The VM runs at the target. `resumed_ms` is the target's monotonic clock at RESUME."""

    epoch: Epoch
    resumed_ms: ClockMs
    uncertainty_ms: ClockMs = 0.0
    """Filled in by the receiver, which turns `resumed_ms` into its own clock."""
    loaded_before_ms: ClockMs | None = None
    """How long before RESUME the target had loaded everything."""
    granted_before_ms: ClockMs | None = None
    """How long before RESUME the grant had arrived."""


class PagesHalted(Message, frozen=True, kw_only=True):
    """Post-copy: the source's QEMU has lost its connection. Answered by PagesFrom."""

    epoch: Epoch
    attempt: Attempt
    """Counted up: of each attempt the target waits on one address."""


class PagesFrom(Message, frozen=True, kw_only=True):
    """Post-copy: the target's QEMU waits there for the pages that it lacks."""

    epoch: Epoch
    attempt: Attempt
    address: IncomingAddress


class PagesEnd(Message, frozen=True, kw_only=True):
    """Post-copy: the source's QEMU is gone, no page will come any more. Answered by PagesDone."""

    epoch: Epoch


class PagesDone(Message, frozen=True, kw_only=True):
    """Post-copy: the target lacks no page any more, or (with an error) the guest is lost there, and stopped."""

    epoch: Epoch
    error: ErrorBody | None = None


class Owned(Message, frozen=True, kw_only=True):
    """The target has it on disk that the VM is its own: the source may delete what it has.

    Said again when the guest's first frame has been seen.
    """

    epoch: Epoch
    first_frame_after_ms: ClockMs | None = None
    """From RESUME to the guest's first frame on the target's switch; None: not seen yet, or nobody looks."""
    ended: bool = False
    """The target's move has ended: no page is missing, or (with `lost`) what the guest had in memory is lost."""
    lost: ErrorBody | None = None


class Refused(Message, frozen=True, kw_only=True):
    """The target will never run this epoch: journalled, its incoming QEMU ended, before this was said."""

    epoch: Epoch
    error: ErrorBody


class Abort(Message, frozen=True, kw_only=True):
    """The source takes the move back. Answered by Refused, or by Running if it is too late."""

    epoch: Epoch
    error: ErrorBody


class Finished(Message, frozen=True, kw_only=True):
    """The source has removed its copy; the whole report, for the target's records."""

    epoch: Epoch
    report: MoveReport


class Unknown(Message, frozen=True, kw_only=True):
    """The target cannot tell whether it ran this epoch (QEMU is gone, the host rebooted in the blackout)."""

    epoch: Epoch
    error: ErrorBody


class Look(Message, frozen=True, kw_only=True):
    """Where is this VM, as far as the program that runs it on your side knows? Answered by Seen."""

    epoch: int


class EndArrival(Message, frozen=True, kw_only=True):
    """The program here moves nothing any more: end what still waits on your side for the VM to arrive."""

    epoch: int


class Seen(Message, frozen=True, kw_only=True):
    """What the target's program says of the VM now."""

    epoch: int
    there: Whereabouts


ToTarget = (
    Enquire | Offer | FilesSent | MirrorsEnded | Grant | PagesHalted | PagesEnd | Look | EndArrival | Abort | Finished
)
ToSource = Answer | FilesWanted | Ready | Running | PagesFrom | PagesDone | Seen | Owned | Refused | Unknown
AnyMessage = ToTarget | ToSource
