"""Frozen data that everyone shares: the VM, the host, the move and what was measured of it.

Sizes are in bytes, times in seconds or milliseconds as the name says. Nothing here does I/O or reads a clock.
"""

import enum
from typing import Annotated

import msgspec
from msgspec import Meta

GIB = 1024**3
MIB = 1024**2

VM_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$(?!\n)"
"""Names become file names, tap names and host-visible labels: letters, digits, dot, underscore, dash; 63 at most.

A pattern's `$` alone would let a last line feed through.
"""

COUNT_MAX = 2**53
"""What every JSON reader can hold exactly."""

# The types below are what another host, a file or a person may say: checked where it is read, so that nobody further in
# has to doubt them.
Name = Annotated[str, Meta(pattern=VM_NAME_PATTERN)]
Bytes = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
Epoch = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Ip = Annotated[str, Meta(pattern=r"^[0-9A-Fa-f.:]{2,45}$(?!\n)")]
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+=,-]{0,255}$(?!\n)")]
"""A name of QEMU's: machine, CPU model, capability."""
Bridge = Annotated[str, Meta(pattern=r"^[^\s/,:=]{1,15}$(?!\n)")]
"""Linux: an interface's name has 15 bytes at most."""
Mac = Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$(?!\n)")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
Text = Annotated[str, Meta(max_length=4096, pattern=r"^[^\0]*$")]
ClockMs = Annotated[float, Meta(ge=-1e15, le=1e15)]
"""A moment of a host's monotonic clock, or a time between two."""
WAIT_MAX_S = 30 * 86400.0
Wait = Annotated[float, Meta(gt=0, le=WAIT_MAX_S)]
"""The bound of a wait, in seconds: no wait is without one."""

MEMORY_MIN_BYTES = 1 * MIB
MEMORY_MAX_BYTES = 4096 * GIB
DISK_MIN_BYTES = 512
DISK_MAX_BYTES = 64 * 1024 * GIB
CPUS_MAX = 255
DEVICES_MAX = 32
"""Disks, or network cards, of one VM."""
LAYERS_MAX = 64
DeviceName = Annotated[str, Meta(pattern=r"^[a-z]{1,8}[0-9]{0,3}$(?!\n)")]
"""`disk0`; of another program's VM the name that the guest's bus gives: `vda`."""
OUTSIDE = "outside"
"""Stands for the location of a layer that lies in none (a VM of another program); its path is absolute then."""
PciSlot = Annotated[int, Meta(ge=0, le=31)]

DEFAULT_MACHINE = "pc-q35-7.2"
"""Every supported QEMU (7.2 to 10.x) has it, so a VM can move between all of them."""

DEFAULT_CPU = "x86-64-v2"
"""A named baseline of kvmhv's own (spelt out in drivers/qemu/argv.py): the same guest CPU on every host."""


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all shared records: immutable; fields that a newer version added are ignored when read."""


# --- the VM -------------------------------------------------------------------------------------------------------


class DiskFormat(enum.StrEnum):
    """Image formats that kvmhv runs."""

    QCOW2 = "qcow2"
    RAW = "raw"


class Layer(Struct, frozen=True, kw_only=True):
    """One image file of a disk: `location/path`, which means the same on every host that has the location."""

    location: Name
    path: Text
    format: DiskFormat
    size_bytes: Bytes = 0
    """Its virtual size where that may differ from the disk's (a backing layer's); 0: the disk's."""


class Disk(Struct, frozen=True, kw_only=True):
    """A virtual disk: its layers from the top (written) down to the last backing file (read only)."""

    name: DeviceName
    """`disk0`, `disk1`, ...: block node, device and export are named after it."""
    size_bytes: Bytes
    layers: Annotated[tuple[Layer, ...], Meta(max_length=LAYERS_MAX)]
    pci_slot: PciSlot


class Nic(Struct, frozen=True, kw_only=True):
    """A virtio network card on a named switch (a bridge of that name on the host)."""

    name: DeviceName
    switch: Bridge
    mac: Mac
    pci_slot: PciSlot


class DirectKernel(Struct, frozen=True, kw_only=True):
    """Direct kernel boot. The files belong to the VM (`kernel` and `initrd` in its directory) and move with it."""

    append: Text = ""
    kernel_sha256: Sha256
    kernel_bytes: Bytes
    initrd_sha256: Sha256 | None = None
    initrd_bytes: Bytes = 0


class ProbeKind(enum.StrEnum):
    """How a guest is asked whether it answers."""

    PING = "ping"
    TCP = "tcp"
    HTTP = "http"


class Probe(Struct, frozen=True, kw_only=True):
    """How the gap that a guest's users see is measured: what is asked again and again while the guest is moved."""

    kind: ProbeKind
    address: str
    """An IP address: no name service may stand between."""
    port: int = 0
    path: str = ""
    """http: what to ask for."""

    def __str__(self) -> str:
        """As it is given to `vm set --probe`."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        match self.kind:
            case ProbeKind.PING:
                return f"ping:{self.address}"
            case ProbeKind.TCP:
                return f"tcp:{host}:{self.port}"
        return f"http://{host}:{self.port}{self.path}"


class Vm(Struct, frozen=True, kw_only=True):
    """A VM's whole definition: what the guest sees, and nothing that differs between hosts."""

    id: Name
    """A UUID; file names are made of it."""
    name: Name
    memory_bytes: Bytes
    cpus: Annotated[int, Meta(ge=1, le=CPUS_MAX)]
    machine: Word = DEFAULT_MACHINE
    cpu: Word = DEFAULT_CPU
    disks: Annotated[tuple[Disk, ...], Meta(max_length=DEVICES_MAX)] = ()
    nics: Annotated[tuple[Nic, ...], Meta(max_length=DEVICES_MAX)] = ()
    kernel: DirectKernel | None = None
    epoch: Epoch = 0
    """Counts the VM's changes of host; a grant is for one epoch only."""
    probe: Probe | None = None
    """What its source asks while it moves."""
    runtime: Annotated[str, Meta(pattern=r"^[a-z]{0,16}$(?!\n)")] = ""
    """What runs it: empty, kvmhv itself; else the name of the program that owns it (`libvirt`)."""
    definition: Annotated[str, Meta(max_length=MIB)] = ""
    """The runtime's own words for all of the VM; only its driver reads them."""
    free_page_reporting: bool = False
    """Its balloon has the feature of this name: what the guest frees is given back to the host, and then need not be
    sent. The guest knows it, so it is the same on both hosts and for as long as the VM runs."""


class VmState(enum.StrEnum):
    """What a VM does on this host."""

    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    INCOMING = "incoming"
    STOPPING = "stopping"
    CRASHED = "crashed"
    """Its QEMU ended without being asked to."""
    UNKNOWN = "unknown"
    """The program that runs it does not answer."""
    DAMAGED = "damaged"
    """Its record on this host cannot be read."""


class Accel(enum.StrEnum):
    """How QEMU runs the guest's CPUs."""

    KVM = "kvm"
    TCG = "tcg"


# --- the host -----------------------------------------------------------------------------------------------------


class LocationKind(enum.StrEnum):
    """What a location is."""

    DIR = "dir"
    NFS = "nfs"
    SMB = "smb"
    ISCSI = "iscsi"


class Access(enum.StrEnum):
    """How this host reaches a location."""

    AUTO = "auto"
    """The operator's mount if `path` is given, else the kernel's client if there is one, else user space."""
    DIRECTORY = "directory"
    """A directory of this host, or a mount that the operator has made."""
    KERNEL = "kernel"
    """Mounted by the agent with the kernel's client."""
    USER = "user"
    """QEMU's own NFS or iSCSI driver; for SMB a FUSE mount of kvmhv's own."""


class LocationSpec(Struct, frozen=True, kw_only=True):
    """What `kvmhv storage add` asks for; the password or CHAP secret travels and is kept apart from it."""

    name: Name
    kind: LocationKind = LocationKind.DIR
    path: str = ""
    """dir: the directory; nfs, smb: where the operator has mounted it (empty: kvmhv reaches the server by itself)."""
    server: str = ""
    """nfs, smb: the server; iscsi: the portal. `host`, `host:port` or `[v6]:port`."""
    share: str = ""
    """nfs: the export's path; smb: the share's name; iscsi: the target's IQN."""
    user: str = ""
    access: Access = Access.AUTO
    shared: bool = False
    """dir: other hosts see this directory too (a cluster file system, a mount of a kind that kvmhv does not know)."""
    records_lun: Annotated[int, Meta(ge=0, le=16383)] = 1
    """iscsi: a small LUN of the target for kvmhv's own records; every other LUN is a disk."""


class Location(Struct, frozen=True, kw_only=True):
    """A named place for disks on a host."""

    name: str
    kind: str = "dir"
    path: str = ""
    free_bytes: Bytes = 0
    total_bytes: Bytes = 0
    shared_id: str | None = None
    """Set where other hosts may see the same storage: a hint of which (server and share). Only a proof says that."""
    access: Access = Access.DIRECTORY
    unsafe: tuple[str, ...] = ()
    """What about the mount's settings makes a move of a VM that stays on it unsafe."""
    silent: bool = False
    """It did not answer in time when it was last asked."""


class LocationReport(Struct, frozen=True, kw_only=True):
    """A location as `kvmhv storage list` and `show` have it."""

    spec: LocationSpec
    location: Location
    configured: bool
    """It stands in agent.toml, not in the database."""
    has_secret: bool
    vms: tuple[str, ...]
    """VMs of this host with disks on it."""
    problems: tuple["Problem", ...] = ()


class QemuInfo(Struct, frozen=True, kw_only=True):
    """What this host's QEMU can do, probed once per binary and accelerator (query-version, query-machines, ...)."""

    binary: str
    version: tuple[int, int, int]
    accel: Accel
    machines: tuple[str, ...]
    cpu_models: dict[str, tuple[str, ...]]
    """Usable CPU models by name, each with its `unavailable-features` here (empty: it runs fully)."""
    capabilities: tuple[str, ...]
    """Migration capabilities that it knows."""
    parameters: tuple[str, ...]
    """Migration parameters that it knows."""
    compressions: tuple[str, ...] = ()
    """How it can compress memory, the best first."""
    post_copy: bool = False
    """Whether it, the kernel and this kvmhv can let pages follow a guest."""
    free_page_reporting: bool = False
    """Whether it and this kvmhv can take what a guest reports as free."""

    @property
    def version_text(self) -> str:
        """Version as people write it, e.g. `10.0.13`."""
        return ".".join(str(part) for part in self.version)


class Refusal(Struct, frozen=True, kw_only=True):
    """A host says no to a move before anything is allocated: which setting of which host, and why."""

    code: str
    host: str
    setting: str | None
    text: str


class Address(Struct, frozen=True, kw_only=True):
    """An address of the host that migration traffic may use, and its network's priority (higher goes first)."""

    ip: str
    prefix: int
    priority: int = 0


class RuntimeInfo(Struct, frozen=True, kw_only=True):
    """Another program that runs VMs on a host, as far as a move between two of them depends on it."""

    version: str
    encrypts: bool
    """It can encrypt what travels."""
    findings: "tuple[Finding, ...]" = ()
    """What on this host speaks against the VM that is to arrive."""
    commands: dict[str, str] = {}
    """What an operator types to `end` a VM at once and to let one go on (`resume`), without the VM's name."""


class Inventory(Struct, frozen=True, kw_only=True):
    """What a host can tell about itself for the check of one VM's move: made fresh for each question."""

    host: str
    host_id: str
    boot_id: str
    kvmhv_version: str
    qemu: QemuInfo
    cpu_vendor: str
    memory_available_bytes: Bytes
    cpus: int
    locations: tuple[Location, ...]
    switches: tuple[str, ...]
    vm_names: tuple[str, ...]
    vm_ids: tuple[str, ...]
    migration_addresses: tuple[Address, ...]
    refusal: Refusal | None = None
    """Set when the host's settings would refuse this very move (limit, source address, switched off)."""
    facts_of_vm: "VmFacts | None" = None
    """Source only: what its running QEMU says of the VM."""
    proven_shared: tuple[str, ...] = ()
    """Source only: locations at which each side has just read what the other had written (agent/sharing.py)."""
    mptcp: bool = False
    """Its kernel can spread one connection over several networks."""
    rdma: tuple[str, ...] = ()
    """Names of its RDMA devices."""
    not_shared: dict[str, str] = {}
    """Source only: locations that may be shared by their kind, and why the proof failed."""
    bases: tuple[Sha256, ...] = ()
    """Target only: which of the VM's bases it has."""
    runtimes: dict[str, RuntimeInfo] = {}
    """Other programs that run VMs here and answer, by name."""


class VmFacts(Struct, frozen=True, kw_only=True):
    """What the running QEMU says of one VM, read before a move."""

    running: bool
    qemu_version: tuple[int, int, int]
    accel: Accel
    memory_used_bytes: Bytes
    dirty_bytes_per_s: float | None
    blockers: tuple[str, ...]
    """`blocked-reasons` of query-migrate: devices that cannot migrate."""
    disk_used_bytes: dict[str, int]
    """Allocated bytes per disk name."""
    bases: "dict[str, Base]" = {}
    """Lowest layers whose contents are known, by disk."""
    compression: "tuple[PageSample, ...]" = ()
    """How its memory shrinks; measured for a move that may compress."""


# --- a check's result ---------------------------------------------------------------------------------------------


class Severity(enum.StrEnum):
    """ERROR stops the move; WARNING is told and goes on."""

    ERROR = "error"
    WARNING = "warning"


class Finding(Struct, frozen=True, kw_only=True):
    """One line of a compatibility report (Hyper-V: Compare-VM's incompatibility)."""

    id: str
    """Stable, e.g. `switch-missing`; the manual has a paragraph for each."""
    severity: Severity
    object: str
    """What it is about, e.g. `nic0`, `disk1`, `web01`."""
    host: str
    text: str
    todo: str


# --- the move -----------------------------------------------------------------------------------------------------


class Phase(enum.StrEnum):
    """Hyper-V's four phases, and storage before memory when disks move too."""

    SETUP = "setup"
    STORAGE = "storage"
    MEMORY = "memory"
    STATE = "state"
    PAGES = "pages"
    """Post-copy: the guest runs at the target, and pages that it lacks still come from the source."""
    CLEANUP = "cleanup"


class Mode(enum.StrEnum):
    """What travels beside memory and state."""

    SHARED_NOTHING = "shared-nothing"
    SHARED_STORAGE = "shared-storage"
    STORAGE = "storage"
    """Nothing but disks, from one location of a host to another (Hyper-V: Move-VMStorage)."""


class Outcome(enum.StrEnum):
    """How a move ended. RUNNING: it has not ended."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    NEEDS_OPERATOR = "needs-operator"


class Rule(Struct, frozen=True, kw_only=True):
    """The pre-copy rule: stop when remaining <= threshold, or when `max_passes` are complete, whichever is first."""

    max_passes: Annotated[int, Meta(ge=1, le=COUNT_MAX)] = 10
    threshold_bytes: Bytes = 1 * MIB
    """Measured at 1 Gbit/s: the switchover itself costs some 35 ms; 1 MiB adds 9 ms to it, 4 MiB would double it."""
    bandwidth_bytes_per_s: Bytes = 0
    """0: as fast as the network takes it."""
    performance: str = "tcpip"
    """Hyper-V's performance option."""
    blackout_limit_ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 0
    """How long the blackout may be, as it is predicted before the guest is stopped; 0: no limit."""
    on_overrun: str = "cancel"
    """What happens when it would be longer: `cancel` the move, `throttle` the guest until it fits, `accept` it."""
    post_copy: bool = False
    """At the pass limit, or where the blackout would be too long, the guest runs at the target before all pages are
    there. Until they are, the loss of either QEMU or host loses what the guest had in memory."""


class PageSample(Struct, frozen=True, kw_only=True):
    """What compressing some of the guest's pages came to, on one core of the source."""

    method: str
    level: int
    ratio: float
    """Bytes before by bytes after."""
    bytes_per_s: float
    """Bytes before, in a second."""


class Channels(Struct, frozen=True, kw_only=True):
    """How the memory travels."""

    count: Annotated[int, Meta(ge=0, le=255)] = 0
    """Connections beside the main one, each with a thread; 0: all over one plain connection."""
    method: Word = "none"
    """How they compress: `zstd`, `zlib`."""
    level: Annotated[int, Meta(ge=0, le=22)] = 0
    ratio: Annotated[float, Meta(ge=0.01, le=1e6)] = 1.0
    """How far memory is expected to shrink."""


class IncomingAddress(Struct, frozen=True, kw_only=True):
    """Ports on which a waiting QEMU listens, at the plan's target address."""

    memory_port: Port
    disk_port: Port | None


class HostSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Hyper-V's host settings for live migration (`kvmhv host set migration.KEY=VALUE`)."""

    enabled: bool = False
    """Both directions."""
    moves_out: Annotated[int, Meta(ge=0, le=100)] = 2
    moves_in: Annotated[int, Meta(ge=0, le=100)] = 2
    storage_copies: Annotated[int, Meta(ge=0, le=100)] = 2
    """Moves that copy disks at the same time, both directions together."""
    use_any_network: bool = False
    networks: tuple[str, ...] = ()
    """Local subnets for migration traffic, `10.0.0.0/24` or with a priority `10.0.0.0/24@50` (higher goes first)."""
    sources: tuple[str, ...] = ()
    """Addresses and subnets of hosts that may move VMs in; empty: every trusted host."""
    performance: str = "tcpip"
    profile: str = "hyperv"
    threshold_bytes: Bytes = Rule().threshold_bytes
    bandwidth_bytes_per_s: Bytes = 0
    blackout_limit_ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 0
    on_overrun: str = Rule().on_overrun


class MoveRequest(Struct, frozen=True, kw_only=True):
    """What the operator asked for. None: the host's setting decides."""

    vm: str
    target: str
    include_storage: bool = False
    storage: str | None = None
    max_passes: int | None = None
    threshold_bytes: Bytes | None = None
    bandwidth_bytes_per_s: Bytes | None = None
    performance: str | None = None
    blackout_limit_ms: Annotated[int, Meta(ge=0, le=3_600_000)] | None = None
    on_overrun: str | None = None
    post_copy: bool = False
    """Explicit, never a host's setting: see Rule."""
    queue_s: Wait | None = None
    """How long it may wait for a slot of either host; None: it is refused at once where there is none."""


class StorageMoveRequest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `kvmhv vm move-storage` asks for."""

    vm: str
    location: str
    disks: tuple[str, ...] = ()
    """Empty: every disk of the VM that is not there yet."""
    lun: Annotated[int, Meta(ge=0, le=16383)] | None = None
    """To an iSCSI location: which LUN."""
    bandwidth_bytes_per_s: Bytes | None = None


class Base(Struct, frozen=True, kw_only=True):
    """The lowest layer of a disk, by what a guest reads of it: two with the same digest hold the same."""

    sha256: Sha256
    data_bytes: Bytes
    """What would have to be sent of it: blocks that are not all zeros."""
    stored_bytes: Bytes
    """What its file takes at the source."""


class DiskCopy(Struct, frozen=True, kw_only=True):
    """How one disk travels: its backing layers are copied as they are, its top is mirrored while it is written."""

    disk: DeviceName
    size_bytes: Bytes
    used_bytes: Bytes
    source_layers: tuple[Layer, ...]
    target_layers: tuple[Layer, ...]
    base: Base | None = None
    """Set if the target has the contents of the lowest layer: it makes that one by itself."""

    @property
    def travelling_bytes(self) -> int:
        """What of the used bytes goes to the target."""
        return max(0, self.used_bytes - (self.base.stored_bytes if self.base else 0))


class DiskSent(Struct, frozen=True, kw_only=True):
    """What of a disk went over the wire until both sides had all of it."""

    disk: DeviceName
    sent_bytes: int | None
    """TCP's count; None if that cannot be told (over several networks)."""


class DiskSaving(Struct, frozen=True, kw_only=True):
    """What of a disk did not have to be sent, and why."""

    disk: str
    size_bytes: int
    sent_bytes: int | None
    """What was: data, what the guest wrote meanwhile, TLS. None if that cannot be told (over several networks)."""
    unallocated_bytes: int
    """Never stored at the source, or given back by a discard."""
    base_bytes: int
    """Data of its base, which the target had already."""
    zero_bytes: int | None
    """Stored at the source and not sent: written zeros, and an image's own tables."""


class Plan(Struct, frozen=True, kw_only=True):
    """What a move will do, made from both inventories; both sides follow the same plan."""

    mode: Mode
    rule: Rule
    source_address: Ip
    target_address: Ip
    capabilities: tuple[Word, ...]
    disk_copies: tuple[DiskCopy, ...]
    target_host: Annotated[str, Meta(max_length=255)] = ""
    target_vm: Vm
    """The VM as it will be defined at the target (disk layers may lie elsewhere; epoch is one higher)."""
    estimate_seconds: float | None
    estimate_bytes: int
    timeouts: "Timeouts"
    channels: Channels = Channels()
    more_networks: tuple[tuple[str, str], ...] = ()
    """(source's, target's) addresses in further networks that the connections take as well, by MPTCP."""


class Timeouts(Struct, frozen=True, kw_only=True):
    """Bounds of every wait of a move, in seconds. They come from the source's configuration and travel in the plan."""

    answer_s: Wait = 20.0
    """A message that the other agent answers from memory."""
    prepare_s: Wait = 120.0
    """Target: making disks, starting QEMU."""
    storage_idle_s: Wait = 120.0
    """No byte of a disk copied for so long: the move fails."""
    storage_s: Wait = 48 * 3600.0
    """The whole storage phase."""
    memory_idle_s: Wait = 60.0
    """No page sent for so long: the move fails."""
    memory_s: Wait = 12 * 3600.0
    """The whole memory phase."""
    switchover_s: Wait = 30.0
    """From the guest's stop to the end of the transfer; beyond it the guest goes on at the source."""
    grant_s: Wait = 15.0
    """From the grant to the target's answer; beyond it the move needs the operator until the other side answers."""
    reconnect_s: Wait = 30.0
    """A lost peer before the grant: so long a side tries again before it gives the move up."""
    undo_s: Wait = 60.0
    """Taking back what a move made."""
    throttled_s: Wait = 120.0
    """A guest that is slowed down may take so long, and ten more passes, to come under the limit to its blackout."""


class Pass(Struct, frozen=True, kw_only=True):
    """One complete sweep of pre-copy."""

    number: int
    sent_bytes: int
    """Sent over the wire in this pass."""
    remaining_bytes: int
    """Dirty when it ended: what the next pass has to send."""
    dirty_bytes_per_second: float
    bytes_per_second: float
    seconds: float


class Stay(enum.StrEnum):
    """What the program that runs a VM says of it on one host."""

    ABSENT = "absent"
    OFF = "off"
    """Defined there, without a process."""
    RUNNING = "running"
    PAUSED = "paused"
    ARRIVING = "arriving"
    """It is made ready for a move in, and never ran there."""
    SILENT = "silent"
    """It does not answer."""


class Whereabouts(Struct, frozen=True, kw_only=True):
    """One host's answer to where a VM is that another program runs."""

    stay: Stay
    busy: bool = False
    """A move of it is still under way there."""
    ran: bool | None = None
    """Whether it ran there since the move began; None: that cannot be told."""


class PhaseTime(Struct, frozen=True, kw_only=True):
    """How long a phase took."""

    phase: Phase
    seconds: float


class Switchover(Struct, frozen=True, kw_only=True):
    """Why the guest was stopped, and after how many complete passes."""

    reason: str
    """`threshold`, `pass-limit`, or `blackout-limit`: it keeps to the limit, and more passes would not shorten it."""
    pass_number: int = msgspec.field(name="pass")
    remaining_bytes: int = 0
    predicted_ms: float | None = None
    """How long the blackout was expected to be when the guest was stopped."""


class Asked(Struct, frozen=True, kw_only=True):
    """Who asked for something: kept in a move's record and in the events."""

    who: str
    """The user, token or host."""
    authentication: str
    """How that is known: `local` (the kernel says it), `token`, `host` (its certificate)."""
    address: str = ""
    """Where the request came from; empty: this host's own socket."""
    via: str = ""
    """The host that forwarded the request and names who asked it."""

    def __str__(self) -> str:
        """For logs."""
        known = f"{self.who} via host {self.via}" if self.via else f"{self.authentication} {self.who}"
        return known + (f" at {self.address}" if self.address else "")


class Event(Struct, frozen=True, kw_only=True):
    """Something that happened on a host and is kept: a line of `kvmhv events`."""

    number: int
    """Counts this host's events; has no gaps while they are kept."""
    at: float
    """UNIX time, for people."""
    host: str
    kind: str
    """What happened, e.g. `move-asked`, `blackout`; the manual explains each."""
    text: str
    hyperv: int | None = None
    """Hyper-V's event number, where it has one for this."""
    move: str | None = None
    vm: str | None = None
    asked: Asked | None = None


class HostVersions(Struct, frozen=True, kw_only=True):
    """What ran on one of the two hosts when the move was checked."""

    host: str
    kvmhv: str
    qemu: str
    accel: Accel


class Estimate(Struct, frozen=True, kw_only=True):
    """How long a running move will still take, and how it will end if the guest goes on like this."""

    seconds_low: float
    seconds_likely: float
    seconds_high: float
    passes: int
    """Complete passes after which the guest will probably be stopped; a storage move has none."""
    switchover: str
    """What will probably end the passes: `threshold` or `pass-limit`; of a storage move empty."""
    blackout_ms: float
    """What the blackout will probably cost."""


class BlackoutStep(Struct, frozen=True, kw_only=True):
    """One moment of the blackout, counted from when the guest was told to stop."""

    name: str
    """`stopped`, `memory-sent`, `mirrors-ended`, `state-sent`, `loaded`, `granted`, `running`, `first-frame`,
    `first-answer`."""
    host: str
    at_ms: float


class EffectTime(Struct, frozen=True, kw_only=True):
    """Something that a side of a move did or waited for, by that host's clock; several may be under way at once."""

    effect: str
    """The effect's name, e.g. `Prepare`; `connect`; or the message that was waited for, e.g. `await Ready`."""
    at_ms: float
    """When it began, from the beginning of the move on this host."""
    took_ms: float


class QueuePlace(Struct, frozen=True, kw_only=True):
    """A move that waits for a slot: where in the source's queue it stands, and what it waits for."""

    place: int
    """1: the first."""
    until: float
    """UNIX time: when it gives up."""
    reason: str = ""
    """As its refusal would have been; empty: it is being tried for the first time."""
    setting: str | None = None
    host: str | None = None
    """Whose limit it is."""


class PagesFollowed(Struct, frozen=True, kw_only=True):
    """Post-copy: the pages that came while the guest ran at the target."""

    sent_bytes: int
    requests: int
    """How many of them it asked for before their turn: it stood and waited for them, a CPU at a time."""
    seconds: float
    """From its run at the target to the last page, so far."""
    attempts: int
    """How often their connection was to be made anew."""
    complete: bool
    """The last one is there."""


class MoveReport(Struct, frozen=True, kw_only=True):
    """A move as the API and `vm move --json` show it: while it runs and when it has ended."""

    id: str
    vm: str
    vm_id: str
    source: str
    target: str
    direction: str
    """`out` on the source's agent, `in` on the target's."""
    mode: Mode | None
    outcome: Outcome
    reason: str | None
    """Why it did not end well: which side and what; None when it did."""
    error: "ErrorBody | None"
    phase: Phase
    phases: tuple[PhaseTime, ...]
    passes: tuple[Pass, ...]
    switchover: Switchover | None
    blackout_ms: float | None
    """From the moment the source is told to stop to the target's RESUME; the clocks are aligned over the connection."""
    blackout_uncertainty_ms: float | None
    memory_bytes: int
    disk_bytes: int
    findings: tuple[Finding, ...]
    progress: float
    """0..1, never goes backward."""
    remaining_bytes: int
    storage_total_bytes: int
    storage_copied_bytes: int
    warnings: tuple[str, ...]
    started_at: float
    """UNIX time, for people; nothing is decided by it."""
    ended_at: float | None
    estimate: Estimate | None = None
    """While it runs, as soon as there is something to judge by."""
    throughput_bytes_per_s: float = 0.0
    """What travels now, disks or memory."""
    dirty_bytes: int = 0
    """Dirty when the running pass began: what it has to send."""
    dirty_bytes_per_s: float = 0.0
    """How fast the guest dirties memory, by the last complete pass."""
    blackout_steps: tuple[BlackoutStep, ...] = ()
    """The blackout in detail, in the order in which it happened."""
    effects: tuple[EffectTime, ...] = ()
    """Where the time went on this host, by what was done, in the order of their ends; the newest agent's alone."""
    blackout_limit_ms: int = 0
    """How long it may last; 0: no limit."""
    throttle_percent: int = 0
    """How far the guest's CPUs were slowed down to keep to it."""
    network_gap_ms: float | None = None
    """From the moment the source is told to stop to the first frame of the guest that the target's switch sees."""
    answer_gap_ms: float | None = None
    """From the moment the source is told to stop to the guest's first answer to its probe; None without a probe."""
    wire_bytes: int | None = None
    """What QEMU's connections carried both ways, by TCP's own count: with TLS and repeats, without TCP's headers."""
    asked: Asked | None = None
    request: MoveRequest | None = None
    versions: tuple[HostVersions, ...] = ()
    """Source, then target."""
    plan: Plan | None = None
    """What was decided; in the report of the end only."""
    disks: tuple[DiskCopy, ...] = ()
    """A storage move: which disks go from where to where."""
    writes_held_ms: float | None = None
    """A storage move: how long the guest's disk requests waited at the change from the old images to the new ones."""
    savings: tuple[DiskSaving, ...] = ()
    """What of each disk that travelled was not sent; there as soon as all of them are copied."""
    memory_zero_bytes: int | None = None
    """Memory of nothing but zeros, by QEMU's count: of each page a mark of some bytes was sent. Pages that the guest
    never touched or gave back, and any other of zeros; once in each pass that had it to send. None: not known."""
    pages: PagesFollowed | None = None
    """With post-copy, once the guest runs at the target without all of its pages: what followed it."""
    queue: QueuePlace | None = None
    """While it waits for a slot; its outcome is `running` then, too, because it has not ended."""
    queued_seconds: float | None = None
    """How long it waited for a slot; None: it was not to wait."""


class ErrorBody(Struct, frozen=True, kw_only=True):
    """An error as the REST API and `--json` show it."""

    code: str
    message: str
    todo: str
    host: str | None = None
    exit_status: int = 1
    findings: tuple[Finding, ...] = ()


# --- what the CLI and the API show --------------------------------------------------------------------------------


class VmSummary(Struct, frozen=True, kw_only=True):
    """A row of `vm list`."""

    name: str
    id: str
    state: VmState
    host: str
    memory_bytes: int
    cpus: int
    runtime: str = ""
    """The program that owns it; empty: kvmhv itself."""


class DiskIo(Struct, frozen=True, kw_only=True):
    """How far the guest's requests to a disk are, at one moment."""

    answered: int
    """Counts up with each answer; what it begins with means nothing."""
    waits: bool
    """At least one request is not answered yet."""


class IoStall(Struct, frozen=True, kw_only=True):
    """A disk that answers nothing while the guest waits for it: its storage is away, or far too slow."""

    disk: str
    place: str
    """`location/path` of its top layer."""
    since: float
    """UNIX time, for people: since then at least."""
    seconds: float


class VmDetails(Struct, frozen=True, kw_only=True):
    """`vm show`: the definition, and what runs of it here."""

    vm: Vm
    state: VmState
    host: str
    pid: int | None
    accel: Accel | None
    qemu_version: str | None
    started_at: float | None
    move: str | None
    """Id of the move that it is in."""
    console: str | None
    """UNIX socket of its serial console on the host."""
    exit_reason: str | None = None
    io_stalled: tuple[IoStall, ...] = ()


class DiskSpec(Struct, frozen=True, kw_only=True):
    """`--disk SPEC` of `vm create`; exactly one of size_bytes, file and image is given (size may go with backing)."""

    size_bytes: Bytes | None = None
    file: str | None = None
    image: str | None = None
    format: DiskFormat | None = None
    backing: str | None = None
    location: str | None = None
    lun: Annotated[int, Meta(ge=0, le=16383)] | None = None
    """On an iSCSI location: which LUN. Without size, file and image it is taken as it is."""


class VmSpec(Struct, frozen=True, kw_only=True):
    """What `vm create` asks for."""

    name: str
    memory_bytes: int
    cpus: int = 1
    machine: str | None = None
    cpu: str | None = None
    disks: tuple[DiskSpec, ...] = ()
    switches: tuple[str, ...] = ()
    macs: tuple[str, ...] = ()
    image: str | None = None
    append: str | None = None
    free_page_reporting: bool = True


class Image(Struct, frozen=True, kw_only=True):
    """An imported image: a kernel with its initrd, or a disk, or both."""

    name: str
    kernel_bytes: int | None = None
    kernel_sha256: str | None = None
    initrd_bytes: int | None = None
    initrd_sha256: str | None = None
    append: str = ""
    disk_bytes: int | None = None
    disk_virtual_bytes: int | None = None
    disk_format: DiskFormat | None = None


class TrustedHost(Struct, frozen=True, kw_only=True):
    """A host whose certificate is accepted."""

    name: str
    address: str
    """`host:port` of its agent."""
    fingerprint: str
    """SHA-256 of the certificate, hex."""


class HostReport(Struct, frozen=True, kw_only=True):
    """`host show`."""

    name: str
    id: str
    kvmhv_version: str
    listen: str
    address: str
    fingerprint: str
    qemu: QemuInfo | None
    accel_reason: str
    """Why KVM or TCG was chosen, in words."""
    settings: dict[str, object]
    locations: tuple[Location, ...]
    switches: tuple[str, ...]
    trusted: tuple[TrustedHost, ...]
    moves_out: int
    moves_in: int
    move_bound_s: float = 0.0
    """The most that a move from here takes until it has ended or the operator is told."""
    blackout_bound_s: float = 0.0
    """The most of it in which the guest may stand still."""


class Problem(Struct, frozen=True, kw_only=True):
    """A line of `kvmhv doctor`."""

    id: str
    severity: Severity
    text: str
    todo: str
