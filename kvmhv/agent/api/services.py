"""What the API needs of the rest of the agent: a Protocol for each, and one record that holds them all."""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from kvmhv.agent.api.host_view import HostView, RunningMoves
from kvmhv.agent.api.other_hosts import OtherHosts
from kvmhv.agent.api.trusting import Trusting
from kvmhv.agent.events import Events
from kvmhv.agent.metrics import Metrics
from kvmhv.agent.settings import Settings
from kvmhv.agent.web.sessions import Sessions
from kvmhv.config import Config
from kvmhv.core.resolve import Choice, RunAt
from kvmhv.drivers.auth.tokens import Tokens
from kvmhv.model import (
    Asked,
    DiskFormat,
    Finding,
    Image,
    IoStall,
    LocationReport,
    LocationSpec,
    MoveReport,
    MoveRequest,
    Plan,
    Problem,
    StorageMoveRequest,
    Struct,
    Vm,
    VmDetails,
    VmSpec,
    VmSummary,
)
from kvmhv.ports import PeerConnection


class CheckReport(Struct, frozen=True, kw_only=True):
    """`vm check` and `vm move --dry-run`: every finding at once, and the plan if nothing forbids the move."""

    findings: tuple[Finding, ...]
    plan: Plan | None = None
    refused: bool = False
    """A limit or a setting of one of the hosts stands among the findings: it is not the VM that does not fit."""


class Vms(Protocol):
    """The VMs of this host. Raises CallerError `vm-unknown` (404), `vm-exists` (409), ... as its methods say."""

    async def create(self, spec: VmSpec) -> VmDetails:
        """Define a VM and make its disks."""
        ...

    async def start(self, name: str, *, take_over: bool = False) -> VmDetails:
        """Start it; no error if it runs."""
        ...

    async def stop(self, name: str, *, force: bool, timeout_s: float | None) -> VmDetails:
        """Stop it by ACPI, then (or at once) by force."""
        ...

    async def remove(self, name: str, *, keep_disks: bool) -> None:
        """Forget it and remove its disks."""
        ...

    async def list(self) -> tuple[VmSummary, ...]:
        """Return all VMs by name."""
        ...

    async def show(self, name: str) -> VmDetails:
        """Return one VM."""
        ...

    async def console_socket(self, name: str) -> Path:
        """Return the UNIX socket of the running VM's serial console."""
        ...


class VmSettings(Protocol):
    """What of a VM can be changed."""

    async def set_probe(self, name: str, text: str | None) -> Vm:
        """Set what the source asks the guest while it moves; None: nothing."""
        ...

    async def set_free_page_reporting(self, name: str, on: bool) -> Vm:
        """Set whether a stopped VM's guest is to report what it frees."""
        ...


class Images(Protocol):
    """The imported images of this host."""

    async def store(
        self,
        name: str,
        part: str,
        chunks: AsyncIterator[bytes],
        *,
        append: str | None,
        format: DiskFormat | None,  # noqa: A002 - the word of the CLI and of the API
    ) -> Image:
        """Keep an uploaded part (`kernel`, `initrd` or `disk`); a part that is there is replaced."""
        ...

    async def list(self) -> tuple[Image, ...]:
        """Return all images by name."""
        ...

    async def remove(self, name: str) -> None:
        """Remove an image with all its parts."""
        ...


class Locations(Protocol):
    """The locations of this host: places for disks."""

    async def add(self, spec: LocationSpec, secret: str | None) -> LocationReport:
        """Keep a location that works."""
        ...

    async def list(self) -> tuple[LocationReport, ...]:
        """Return every location by name."""
        ...

    async def show(self, name: str) -> LocationReport:
        """Return one location."""
        ...

    async def check(self, name: str) -> LocationReport:
        """Write to, read and clear a location; problems are in the answer."""
        ...

    async def remove(self, name: str) -> None:
        """Use and know a location no longer."""
        ...


class Moves(Protocol):
    """The moves of this host, out and in."""

    async def check(self, request: MoveRequest) -> CheckReport:
        """Check a move and plan it; changes nothing."""
        ...

    async def start(self, request: MoveRequest, asked: Asked) -> MoveReport:
        """Begin a move; returns when it is admitted."""
        ...

    async def list(self) -> tuple[MoveReport | msgspec.Raw, ...]:
        """Return the moves that run and the ended ones that are kept (as JSON), the newest last."""
        ...

    async def show(self, move_id: str) -> MoveReport:
        """Return one move, by its id or an unambiguous prefix. Raises CallerError `move-unknown`, `move-ambiguous`."""
        ...

    async def cancel(self, move_id: str, asked: Asked) -> MoveReport:
        """Ask a move (id or prefix) to end; returns how it ended."""
        ...

    async def choices(self, move_id: str) -> tuple[Choice, ...]:
        """Return what an operator can decide about a move that stands still on this host."""
        ...

    async def resolve(self, move_id: str, run_at: RunAt, asked: Asked) -> MoveReport:
        """Take the operator's word for that of the side that is silent."""
        ...

    def watch(self, move_id: str) -> AsyncIterator[MoveReport]:
        """Yield the report now and after each change; ends after the report of the end."""
        ...

    async def serve_peer(self, connection: PeerConnection) -> None:
        """Serve another agent's connection for one move; returns when it ends."""
        ...

    async def receive_file(self, peer_name: str, move_id: str, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Keep a file that belongs to the VM of an incoming move of that peer."""
        ...

    async def take_file(self, peer_name: str, move_id: str, name: str) -> bool:
        """Take such a file from what this host has; False if it has none like it."""
        ...


class QueuedMoves(Protocol):
    """Moves that wait for a slot."""

    def reports(self) -> tuple[MoveReport, ...]:
        """Return them, in their order."""
        ...

    def lengths(self) -> dict[str, int]:
        """Return how many wait for what."""
        ...


class StorageMoves(Protocol):
    """Disks that change their location on this host."""

    async def start(self, request: StorageMoveRequest, asked: Asked) -> MoveReport:
        """Begin to move disks; returns when it is admitted."""
        ...


class VmStates(Protocol):
    """What the VMs do, known without asking their QEMUs."""

    def summaries(self) -> tuple[VmSummary, ...]:
        """Return every VM by name."""
        ...

    def running_since(self) -> Mapping[str, float]:
        """Return since when (UNIX time) each VM's guest is known to run here, by the VM's id."""
        ...


class IoWatch(Protocol):
    """Disks that answer nothing while their guests wait."""

    def of(self, vm_id: str) -> tuple[IoStall, ...]:
        """Return those of a VM."""
        ...

    def all(self) -> tuple[tuple[Vm, IoStall], ...]:
        """Return every one, with its VM."""
        ...


class Doctor(Protocol):
    """What on this host would keep VMs from running or moving."""

    async def problems(self) -> tuple[Problem, ...]:
        """Look, and return every problem at once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Services:
    """Everything that a route may use."""

    config: Config
    settings: Settings
    host: HostView
    trusting: Trusting
    tokens: Tokens
    sessions: Sessions
    other_hosts: OtherHosts
    metrics: Metrics
    vms: Vms
    vm_settings: VmSettings
    images: Images
    locations: Locations
    vm_states: VmStates
    io_watch: IoWatch
    events: Events
    moves: Moves
    storage_moves: StorageMoves
    running_moves: RunningMoves
    queued_moves: QueuedMoves
    recent_moves: RunningMoves
    """The last ones that ended, the newest first."""
    doctor: Doctor
    open_consoles: set[Path] = field(default_factory=set)
    """QEMU serves one reader of a serial console at a time; a second one would hang without a word."""
