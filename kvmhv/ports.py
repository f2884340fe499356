"""What the program needs of the outside: one Protocol for each outside thing.

The agent is written against these; `drivers/` implements them, and the simulation implements them in memory. Every
method raises KvmhvError subclasses only (HostError unless said otherwise), ends within its own deadline, and can be
repeated: doing it twice leaves what doing it once leaves.
"""

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path
from typing import Protocol

from kvmhv.model import (
    Accel,
    DiskCopy,
    DiskIo,
    IncomingAddress,
    Layer,
    Location,
    Plan,
    Probe,
    Problem,
    QemuInfo,
    RuntimeInfo,
    Struct,
    TrustedHost,
    Vm,
    VmFacts,
    VmSummary,
    Whereabouts,
)
from kvmhv.places import DiskPlace

# --- the hypervisor -----------------------------------------------------------------------------------------------


class RunState(Struct, frozen=True, kw_only=True):
    """What a VM's QEMU process says of itself (`query-status`, `query-migrate`); `process` False: it is gone."""

    process: bool
    status: str = ""
    """QEMU's RunState: running, paused, inmigrate, postmigrate, finish-migrate, shutdown, io-error, ..."""
    migration: str = ""
    """Status of query-migrate: empty, setup, active, pre-switchover, device, completed, failed, cancelled, ..."""
    ever_ran: bool = False
    """The guest runs or may have run in this process. False only if it is incoming and `cont` was never sent to it."""
    accel: Accel | None = None
    qemu_version: str = ""
    pid: int | None = None
    answers: bool = True
    """False: the process is there, and QMP does not answer."""


class QemuEvent(Struct, frozen=True, kw_only=True):
    """Something that QEMU said by itself. `at_ms` is the agent's monotonic clock when it arrived."""

    vm_id: str
    name: str
    data: dict[str, object]
    at_ms: float


class MemoryStats(Struct, frozen=True, kw_only=True):
    """query-migrate, in one flat record. All zero before the first pass."""

    status: str
    transferred_bytes: int = 0
    remaining_bytes: int = 0
    total_bytes: int = 0
    dirty_bytes_per_s: float = 0.0
    throughput_bytes_per_s: float = 0.0
    dirty_sync_count: int = 0
    throttle_percent: int = 0
    zero_bytes: int | None = None
    """Pages of nothing but zeros, of which a mark was sent; None: not told."""
    pages_bytes: int = 0
    """Post-copy: sent since the guest runs at the target."""
    pages_requests: int = 0
    """Post-copy: pages that it asked for before their turn."""
    error: str = ""
    sampled_dirty_bytes_per_s: float | None = None
    """By a sample of pages that was taken beside the first pass; None until there is one."""


class MirrorStats(Struct, frozen=True, kw_only=True):
    """A disk's copy: bytes done and to do, and whether writes go to both sides now."""

    disk: str
    copied_bytes: int
    total_bytes: int
    ready: bool
    error: str = ""
    sent_bytes: int | None = None
    """To another host: what went over the wire for it; None if that cannot be told."""


EventSink = Callable[[QemuEvent], None]


class Hypervisor(Protocol):
    """QEMU processes of this host, each known by its VM's id. Implemented by drivers/qemu."""

    async def probe(self) -> QemuInfo:
        """Ask the binary what it can do (cached per binary). Raises HostError `qemu-missing`."""
        ...

    def accel_reason(self) -> str:
        """Why KVM or TCG was chosen by the probe, in words."""
        ...

    # a VM's life
    async def start(
        self,
        vm: Vm,
        disk_paths: dict[str, tuple[DiskPlace, ...]],
        taps: dict[str, str],
        kernel_paths: tuple[Path, Path | None] | None = None,
    ) -> None:
        """Start the VM running. `disk_paths`: places of each disk's layers, top first; `taps`: each nic's tap.

        `kernel_paths`: kernel and initrd of a VM with direct kernel boot. Raises HostError `qemu-start` with QEMU's own
        words; then no process is left.
        """
        ...

    async def start_idle(self, vm: Vm, disk_paths: dict[str, tuple[DiskPlace, ...]]) -> None:
        """Start a QEMU with the disks of a stopped VM, whose guest never runs: a storage move copies with it."""
        ...

    async def power_button(self, vm_id: str) -> None:
        """Press the ACPI power button (`system_powerdown`)."""
        ...

    async def kill(self, vm_id: str) -> None:
        """End the process (`quit`, then SIGKILL), wait until it is gone and remove its directory; no error if it is.

        Its logs are kept aside. Raises HostError `qemu-unkillable` when it hangs in the kernel.
        """
        ...

    async def wait_gone(self, vm_id: str, timeout_s: float) -> bool:
        """Wait for the process to end by itself; False when it has not in time."""
        ...

    async def state(self, vm_id: str) -> RunState:
        """Return what the process says now; never raises for a process that hangs or is gone."""
        ...

    async def known(self) -> tuple[str, ...]:
        """Ids of the VMs that have a live process on this host, also ones that an earlier agent started."""
        ...

    async def cont(self, vm_id: str) -> float:
        """Let the guest run; returns the agent's monotonic ms at which QEMU's RESUME arrived. No error if it runs."""
        ...

    async def disk_io(self, vm: Vm) -> dict[str, DiskIo]:
        """Look how far the guest's requests to each disk are; also while its storage is away. Raises HostError."""
        ...

    def on_event(self, sink: EventSink) -> None:
        """Every event of every VM's QEMU goes to `sink`, also the pseudo event GONE when a process ends.

        GONE's data: `reason` (a line for people), `exit_status` (None when not known: the process was another agent's
        child), `shutdown` (the data of QEMU's SHUTDOWN event, None if there was none: it crashed or was killed), `log`
        (QEMU's last words).
        """
        ...

    def console_socket(self, vm_id: str) -> Path:
        """UNIX socket of the VM's serial console."""
        ...

    def has_open(self, vm_id: str, file: Path) -> bool:
        """Whether the VM's process has this very file open: its name may have gone over to another one."""
        ...

    async def facts(self, vm: Vm, *, dirty_rate: bool, pages: bool) -> VmFacts:
        """Read what the check of a move needs from the running QEMU.

        `dirty_rate`: wait until it is sampled. Else the sample only begins, and memory_stats() has it when it is there.
        `pages`: see how far some of its pages shrink.
        """
        ...

    # target of a move
    async def start_incoming(
        self,
        vm: Vm,
        disk_paths: dict[str, tuple[DiskPlace, ...]],
        taps: dict[str, str],
        plan: Plan,
        psk_hex: str,
        export_disks: tuple[str, ...],
        kernel_paths: tuple[Path, Path | None] | None = None,
    ) -> IncomingAddress:
        """Start QEMU with `-incoming defer -S`, listening on plan.target_address under TLS-PSK; export disks by NBD.

        Both ports are of the configuration's `migration_ports`. After a failure no process is left. A layer of a disk
        that travels must exist here with the source layer's own virtual size.
        """
        ...

    async def unexport(self, vm_id: str) -> None:
        """End the NBD exports and their server."""
        ...

    # source of a move
    async def mirror(self, vm: Vm, plan: Plan, address: IncomingAddress, psk_hex: str) -> None:
        """Begin to copy every disk of the plan: backing layers as they are, the top mirrored (write-blocking).

        Returns when the first jobs run; what fails later is in `mirror_stats`. Raises HostError `mirror-failed`.
        """
        ...

    async def mirror_stats(self, vm_id: str) -> tuple[MirrorStats, ...]:
        """Progress of each disk over all its layers; what ended with an error has it in `error`.

        `ready` is the top's: from then on writes go to both sides.
        """
        ...

    async def finish_mirrors(self, vm_id: str) -> None:
        """End ready mirrors in sync, without pivot. The guest is stopped. Raises HostError `mirror-failed`."""
        ...

    async def migrate(self, vm: Vm, plan: Plan, address: IncomingAddress, psk_hex: str) -> None:
        """Begin the memory migration with the plan's capabilities (events, return-path, pause-before-switchover)."""
        ...

    async def memory_stats(self, vm_id: str) -> MemoryStats:
        """Return query-migrate; status `lost` when QMP does not answer in time."""
        ...

    async def hold(self, vm_id: str, bytes_per_s: int | None) -> bool:
        """Send memory no faster than this; None: as fast as the plan allows again. False: it has no effect now.

        It has none before the migration has begun and after the guest was told to stop. Raises HostError.
        """
        ...

    async def throttle(self, vm_id: str, max_percent: int) -> None:
        """Let QEMU slow the guest's CPUs down, so far at most, more with each pass, until the migration ends."""
        ...

    async def stop_guest(self, vm_id: str, *, post_copy: bool = False) -> None:
        """Lift the bandwidth cap, then `stop`: the lever at the end of the last pass.

        `post_copy`: the switchover is next; what remains of the memory follows it.
        """
        ...

    async def await_pages(self, vm_id: str, plan: Plan) -> IncomingAddress:
        """Post-copy, target: wait for the source on a new address. Raises HostError `qemu-error`."""
        ...

    async def resume_pages(self, vm_id: str, plan: Plan, address: IncomingAddress) -> None:
        """Post-copy, source: send the rest of the pages there. Raises HostError `migrate-failed`; may be repeated."""
        ...

    async def end_lost(self, vm_id: str) -> bool:
        """Post-copy, target: end a QEMU whose pages will not come; True if it has all, then it goes on."""
        ...

    async def continue_switchover(self, vm_id: str) -> None:
        """`migrate-continue` out of pre-switchover."""
        ...

    async def undo_source(self, vm_id: str, timeout_s: float) -> str:
        """Cancel memory and mirrors, remove what the move added; does not `cont`. Also when QMP hangs (OOB `yank`).

        Returns the migration's final status: `completed` means that it was too late to cancel it, `gone` that there is
        no process any more: so also of a QEMU in post-copy, which cannot let its guest go on and is ended. Raises
        HostError `qemu-hangs` when even that does not end it in time.
        """
        ...

    # storage moves
    async def copy_disks(
        self,
        vm: Vm,
        copies: tuple[DiskCopy, ...],
        disk_paths: Mapping[str, tuple[DiskPlace, ...]],
        bandwidth_bytes_per_s: int,
        timeout_s: float,
    ) -> None:
        """Begin to copy disks of this host to their new images, which are made; `vm` and `disk_paths` name those.

        What fails later is in `mirror_stats`; `ready` there: nothing is left to copy. Raises HostError `mirror-failed`.
        """
        ...

    async def hold_writes(self, vm_id: str, disks: tuple[str, ...], timeout_s: float) -> None:
        """Let the guest's disk requests wait, with old and new images alike and on stable storage.

        They wait until release_writes or undo_copies, whatever becomes of the agent. Raises HostError `mirror-failed`.
        """
        ...

    async def release_writes(self, vm_id: str) -> tuple[str, ...]:
        """Let the guest go on with the new images, and close the old ones.

        Returns the disks that QEMU left on their old images. Raises HostError `qemu-hangs`, `qemu-gone`.
        """
        ...

    async def undo_copies(self, vm_id: str, timeout_s: float) -> None:
        """End the copies; the guest goes on with the old images. Raises HostError `qemu-hangs`."""
        ...


class Runtime(Protocol):
    """Another program that runs VMs on this host, starts and stops them, and moves them by itself.

    kvmhv asks it, steers it, and never touches the QEMU behind it. A program that is not there has no VMs.
    Implemented by drivers/libvirt.
    """

    name: str

    @property
    def watch(self) -> int:
        """Names the unbroken time in which every event of the program has been heard; 0: it is not heard now."""
        ...

    def on_event(self, sink: EventSink) -> None:
        """MIGRATION_PASS (`pass`), STOP, RESUME and GONE of its VMs go to `sink`, like QEMU's own."""
        ...

    def vms(self) -> tuple[VmSummary, ...]:
        """Every VM by name, as its events told; asks nobody."""
        ...

    async def keep(self) -> None:
        """Connect, and again whenever the program is back; ends by cancellation."""
        ...

    def problems(self) -> tuple[Problem, ...]:
        """What keeps its VMs from being seen or moved; nothing where the program is not installed."""
        ...

    async def vm(self, vm_id: str) -> Vm:
        """Return a VM's definition as it is now; a layer's path is absolute, its location OUTSIDE."""
        ...

    async def state(self, vm_id: str) -> RunState:
        """Return what the program says of the VM's process."""
        ...

    async def look(self, vm_id: str) -> Whereabouts:
        """Return where the VM is; never raises."""
        ...

    async def start(self, vm_id: str) -> None:
        """Start it; no error if it runs."""
        ...

    async def power_button(self, vm_id: str) -> None:
        """Ask the guest to shut down."""
        ...

    async def kill(self, vm_id: str) -> None:
        """End its process; no error if there is none."""
        ...

    async def wait_off(self, vm_id: str, timeout_s: float) -> bool:
        """Wait for its process to end; False when it has not in time."""
        ...

    async def facts(self, vm: Vm) -> VmFacts:
        """Read what the check of a move needs."""
        ...

    async def info(self, arriving: Vm | None, copied: Collection[str]) -> RuntimeInfo | None:
        """Return what the program can do; with what speaks here against a VM of which these disks would be copied."""
        ...

    # target of a move
    async def prepare(self, vm: Vm, copied: Collection[str]) -> None:
        """Make the empty images of these disks; all or nothing, never over a file (HostError `file-exists`)."""
        ...

    async def adopt(self, vm: Vm) -> None:
        """Set what its own move does not bring along."""
        ...

    async def remove_disks(self, vm: Vm, names: Collection[str]) -> tuple[str, ...]:
        """Delete the images of these disks; returns the paths that stay because a VM here uses them."""
        ...

    # source of a move
    async def move(self, vm: Vm, plan: Plan) -> None:
        """Let it move the VM; returns at the end. Raises HostError with its words, which prove nothing."""
        ...

    async def progress(self, vm_id: str) -> tuple[MemoryStats, MirrorStats]:
        """Return how far its move is: memory, and all disks together."""
        ...

    async def stop_guest(self, vm_id: str) -> None:
        """Lift the bandwidth cap, then suspend the guest: the lever at the end of the last pass."""
        ...

    async def resume(self, vm_id: str) -> float:
        """Let the guest go on; returns the agent's monotonic ms. No error if it runs."""
        ...

    async def abort(self, vm_id: str, timeout_s: float) -> None:
        """End its move and wait until none is under way. Raises HostError `libvirt` if it still is."""
        ...

    async def end_arrival(self, vm_id: str) -> bool:
        """End what waits here for a VM to arrive, if it never ran; returns whether that was so."""
        ...

    async def end_copy(self, vm_id: str) -> None:
        """End and forget a copy that was succeeded on another host."""
        ...


# --- disks and network --------------------------------------------------------------------------------------------


class Disks(Protocol):
    """Image files in this host's locations. Implemented by drivers/storage."""

    async def locations(self) -> tuple[Location, ...]:
        """Every location with its free space, fresh."""
        ...

    def path(self, layer: Layer) -> Path:
        """Return the file of a layer in a location that is a directory here.

        Raises CallerError `location-unknown`, or `path-invalid` if it would leave the location.
        """
        ...

    def place(self, layer: Layer) -> DiskPlace:
        """Return where QEMU finds a layer. Raises as path()."""
        ...

    async def exists(self, layer: Layer) -> bool:
        """Whether something is there already under a layer's name."""
        ...

    async def create(self, layer: Layer, size_bytes: int, backing: Layer | None) -> None:
        """Make an empty image of exactly `size_bytes`; never overwrites a file (HostError `file-exists`)."""
        ...

    async def copy_in(self, file: Path, layer: Layer) -> None:
        """Copy (convert) an image file into a layer without backing."""
        ...

    async def describe(self, file: Path) -> tuple[str, int, tuple[Path, ...]]:
        """Return format, virtual size and the chain of backing files (top first, itself included) by `qemu-img info`.

        Raises CallerError `disk-invalid` for a file that is no image of a known format.
        """
        ...

    async def used_bytes(self, layer: Layer) -> int:
        """Allocated bytes of the image file."""
        ...

    async def remove(self, layer: Layer) -> None:
        """Remove the file and its directory if that is empty then; no error if it is gone."""
        ...


class Network(Protocol):
    """Taps, bridges and addresses of this host. Implemented by drivers/network."""

    async def switches(self) -> tuple[str, ...]:
        """Names of the bridges that VMs may be attached to."""
        ...

    async def add_tap(self, tap: str, switch: str) -> None:
        """Make a tap, attach it to the switch, set it up."""
        ...

    async def remove_tap(self, tap: str) -> None:
        """Remove the tap; no error if it is gone."""
        ...

    async def taps(self) -> tuple[str, ...]:
        """Names of all taps that kvmhv made (they start with `kv`)."""
        ...

    async def addresses(self) -> tuple[tuple[str, int], ...]:
        """(ip, prefix length) of every address of the host, loopback left out."""
        ...


class MigrationWays(Protocol):
    """Further networks for the connections of a move. Implemented by drivers/network over MPTCP."""

    async def possible(self) -> bool:
        """Whether this host's kernel can do that."""
        ...

    async def open(self, move_id: str, announced: tuple[str, ...]) -> None:
        """Let the host's connections take several networks; tell their other ends of its `announced` addresses.

        Raises HostError `network`. May be repeated.
        """
        ...

    async def close(self, move_id: str) -> None:
        """Take back what `open` did for this move, as far as no other needs it; never raises."""
        ...


class FrameWatch(Protocol):
    """A look at the taps of one VM. What comes from its opening on is kept: nothing is lost before somebody waits."""

    async def first_ms(self, timeout_s: float) -> float | None:
        """Return when the guest's first frame came, on the host's monotonic clock; None if none came in time."""
        ...

    async def close(self) -> None:
        """End it; may be repeated."""
        ...


class Frames(Protocol):
    """The frames that guests send. Implemented by drivers/frames."""

    async def watch(self, taps: Mapping[str, str]) -> FrameWatch:
        """Begin to look at taps (name -> the guest's MAC on it). Raises HostError; then nothing is open."""
        ...


class FlowWatch(Protocol):
    """The connections of one move, from the watch's opening on."""

    async def carried_bytes(self) -> int | None:
        """Return what they have carried so far, both ways; None if the kernel could not tell all of it."""
        ...

    def close(self) -> None:
        """End it; may be repeated."""
        ...


class Flows(Protocol):
    """What TCP connections carry. Implemented by drivers/flows."""

    async def watch(self, ip: str, ports: tuple[int, ...]) -> FlowWatch:
        """Begin to count the connections to these ports of a host. Raises HostError; then nothing is open."""
        ...


class Probes(Protocol):
    """Questions to a guest, over the network as its users ask. Implemented by drivers/probes."""

    async def first_answer_ms(self, probe: Probe, timeout_s: float) -> float | None:
        """Ask again and again; return when the first answer to that came, on the host's monotonic clock.

        None if none came in time. An answer to something that was asked before the call does not count.
        """
        ...


# --- the other agent, the journal, the clock ----------------------------------------------------------------------


class PeerConnection(Protocol):
    """One move's connection to the other agent: whole frames (bytes), in order, no duplicates within one connection."""

    peer_name: str
    """The host's name, proved by its certificate."""
    peer_ip: str

    async def send(self, frame: bytes) -> None:
        """Send a frame. Raises PeerUnreachable when the connection is gone."""
        ...

    def frames(self) -> AsyncIterator[bytes]:
        """Yield what arrives until the connection ends. Raises PeerBroke for a frame over the bound."""
        ...

    async def close(self) -> None:
        """End the connection; no error if it has ended."""
        ...


class Peer(Protocol):
    """Connections to other agents. Implemented by drivers/peer over mutual TLS."""

    def trusted(self, host: str) -> TrustedHost:
        """Return a host that this one trusts. Raises CallerError `host-unknown`."""
        ...

    async def connect(self, host: str, timeout_s: float) -> PeerConnection:
        """Connect to a trusted host's agent.

        Raises CallerError `host-unknown` (not trusted here), PeerUnreachable, Refused `peer-untrusted` (it does not
        trust this host).
        """
        ...

    async def send_files(self, host: str, move_id: str, files: Mapping[str, Path], timeout_s: float) -> None:
        """Upload files that belong to the VM (kernel, initrd), by name, to the target, for a move that it has let in.

        What the target has already is not sent.
        """
        ...


class Journal(Protocol):
    """What survives. Implemented by drivers/journal: durable in SQLite, volatile on tmpfs (survives the agent only)."""

    def write(self, move_id: str, role: str, state: bytes, *, durable: bool) -> None:
        """Keep a machine's state; durable: on disk when it returns. Both keep only the newest, by a sequence number."""
        ...

    def load(self) -> tuple[tuple[str, str, bytes], ...]:
        """Return (move id, role, newest state) of every move that has not been ended here."""
        ...

    def end(self, move_id: str, role: str, report: bytes) -> None:
        """Replace a move's states by its final report."""
        ...

    def reports(self) -> tuple[bytes, ...]:
        """Return the reports of ended moves, the newest last."""
        ...

    @property
    def volatile_id(self) -> str:
        """Names this volatile journal; another one after a reboot."""
        ...


class Records(Protocol):
    """Small durable records by kind and key (VMs, settings, trust, tokens). Implemented by drivers/database."""

    def put(self, kind: str, key: str, value: bytes) -> None:
        """Keep a record; on disk when it returns."""
        ...

    def get(self, kind: str, key: str) -> bytes | None:
        """Return a record, None if there is none."""
        ...

    def all(self, kind: str) -> tuple[tuple[str, bytes], ...]:
        """Return every (key, value) of a kind, by key."""
        ...

    def delete(self, kind: str, key: str) -> None:
        """Forget a record; no error if there is none."""
        ...


class Clock(Protocol):
    """Time. Decisions use `monotonic_ms` only."""

    def monotonic_ms(self) -> float:
        """Milliseconds that never go backward on this host."""
        ...

    def wall_s(self) -> float:
        """UNIX time, for people."""
        ...
