"""QEMU's command line for a VM: a pure function, so that both sides of a move build the same machine.

PCI slots on the root bus (q35):

    0x00         host bridge                      0x1d   memory balloon
    0x01..0x1c   the VM's disks and network cards 0x1e   entropy
                 (each record has its slot)       0x1f   chipset (ISA, SATA, SMBus)

No option ROM, no vhost and no SMM: what the guest sees depends on the VM only, never on the host's firmware package,
kernel or accelerator.
"""

import json
from pathlib import Path

import msgspec

from kvmhv.drivers.qemu.graph import Node, disk_nodes, layer_node, open_layer, secret_id
from kvmhv.drivers.qemu.rundir import VmDir
from kvmhv.errors import CallerError
from kvmhv.model import DEFAULT_CPU, Accel, Struct, Vm
from kvmhv.places import DiskPlace, Lun

PCI_SLOT_FIRST = 0x01
PCI_SLOT_LAST = 0x1C
BALLOON_SLOT = 0x1D
ENTROPY_SLOT = 0x1E

X86_64_V2_FEATURES = ("cx16", "lahf-lm", "popcnt", "pni", "sse4.1", "sse4.2", "ssse3")
"""x86-64-v2 of the System V ABI for AMD64 (pni is SSE3): what every CPU since 2009 has, and TCG too."""

X86_64_V2 = ",".join(["qemu64", *(f"+{feature}" for feature in X86_64_V2_FEATURES), "-svm", "enforce"])
"""Spelt out on `qemu64` without nested virtualisation; `enforce`: QEMU refuses to start where something is missing."""

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""QEMU needs none of these; a guest that breaks into it gets no new process and no privileges."""

KernelPaths = tuple[Path, Path | None]


class Launch(Struct, frozen=True, kw_only=True):
    """What a command line is made of beside the VM itself."""

    vm: Vm
    binary: str
    accel: Accel
    directory: VmDir
    disk_paths: dict[str, tuple[DiskPlace, ...]]
    """Places of each disk's layers, top first."""
    taps: dict[str, str]
    """Each nic's tap."""
    kernel_paths: KernelPaths | None = None
    incoming: bool = False
    paused: bool = False
    """The guest is not to run."""
    arriving: dict[str, int] = msgspec.field(default_factory=dict)
    """Move in: how many layers of a disk, from the top, are written by the move."""
    buffered: frozenset[DiskPlace] = frozenset()
    """Files on file systems without O_DIRECT."""


def build(launch: Launch) -> list[str]:
    """Return the whole command line. Raises CallerError `pci-slot` or `vm-invalid`: the VM's definition is wrong."""
    vm = launch.vm
    check_slots(vm)
    pairs: list[tuple[str, str]] = [
        *_machine(launch),
        *_monitor_and_console(launch.directory),
        *_disks(launch),
        *_nics(launch),
        ("-device", _balloon(vm)),
        ("-object", "rng-random,id=entropy0,filename=/dev/urandom"),
        ("-device", f"virtio-rng-pci,id=rng0,rng=entropy0,bus=pcie.0,addr={ENTROPY_SLOT:#x},romfile="),
        *_kernel(launch),
        ("-msg", "timestamp=on"),
        ("-sandbox", SANDBOX),
    ]
    argv = [launch.binary, "-no-user-config", "-nodefaults"]
    for option, value in pairs:
        argv += [option, value]
    if launch.incoming:
        argv += ["-incoming", "defer"]
    if launch.incoming or launch.paused:
        argv.append("-S")
    return argv


def check_slots(vm: Vm) -> None:
    """Raise CallerError `pci-slot` if two devices share a slot or one has a slot that is not for it."""
    taken: dict[int, str] = {}
    for name, slot in [(disk.name, disk.pci_slot) for disk in vm.disks] + [(nic.name, nic.pci_slot) for nic in vm.nics]:
        if not PCI_SLOT_FIRST <= slot <= PCI_SLOT_LAST:
            raise CallerError(
                "pci-slot",
                f"{name} has PCI slot {slot:#x}; devices have {PCI_SLOT_FIRST:#x} to {PCI_SLOT_LAST:#x}",
                "give it a free slot",
            )
        if slot in taken:
            raise CallerError("pci-slot", f"{name} and {taken[slot]} have the same PCI slot", "give each its own")
        taken[slot] = name


def cpu_argument(cpu: str) -> str:
    """Return `-cpu` of a model: kvmhv's own baseline spelt out, any other as it is, and always enforced."""
    if cpu == DEFAULT_CPU:
        return X86_64_V2
    return cpu if "enforce" in cpu.split(",") else f"{cpu},enforce"


def qmp_chardev(directory: VmDir) -> str:
    """Return the QMP chardev: also the mark by which a process is known again."""
    return f"socket,id=qmp,path={_escape(directory.qmp_socket)},server=on,wait=off"


def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")


def _machine(launch: Launch) -> list[tuple[str, str]]:
    vm = launch.vm
    return [
        ("-name", f"guest={vm.name},debug-threads=on"),
        ("-uuid", vm.id),
        (
            "-machine",
            f"{vm.machine},accel={launch.accel.value},usb=off,vmport=off,smm=off,dump-guest-core=off",
        ),
        ("-cpu", cpu_argument(vm.cpu)),
        ("-smp", f"cpus={vm.cpus},sockets=1,cores={vm.cpus},threads=1,maxcpus={vm.cpus}"),
        ("-m", f"size={vm.memory_bytes}B"),
        ("-rtc", "base=utc"),
        # A guest in S3 is neither running nor stopped for a move; QEMU's own managers switch it off too.
        ("-global", "ICH9-LPC.disable_s3=1"),
        ("-global", "ICH9-LPC.disable_s4=1"),
        ("-boot", "strict=on"),
        ("-display", "none"),
        ("-vga", "none"),
    ]


def _monitor_and_console(directory: VmDir) -> list[tuple[str, str]]:
    console = _escape(directory.console_socket)
    log = _escape(directory.console_log)
    return [
        ("-chardev", qmp_chardev(directory)),
        ("-mon", "chardev=qmp,mode=control"),
        ("-chardev", f"socket,id=console,path={console},server=on,wait=off,logfile={log},logappend=on"),
        ("-serial", "chardev:console"),
    ]


def _disks(launch: Launch) -> list[tuple[str, str]]:
    pairs = []
    for number, disk in enumerate(launch.vm.disks):
        paths = launch.disk_paths.get(disk.name, ())
        if len(paths) != len(disk.layers) or not paths:
            raise CallerError(
                "vm-invalid", f"{disk.name} has {len(disk.layers)} layers and {len(paths)} files", "check its disks"
            )
        for index, place in enumerate(paths):
            secret = place.secret_object(secret_id(disk.name, index)) if isinstance(place, Lun) else None
            pairs += [("-object", secret)] if secret else []
        nodes = disk_nodes(disk, paths, arriving=launch.arriving.get(disk.name, 0), buffered=launch.buffered)
        pairs += [("-blockdev", json.dumps(node)) for node in nodes]
        # An I/O error stops the VM instead of reaching the guest (Hyper-V: critical pause); `cont` tries again.
        pairs.append(
            (
                "-device",
                f"virtio-blk-pci,id={disk.name}-device,drive={disk.name},serial={disk.name},bus=pcie.0,"
                f"addr={disk.pci_slot:#x},bootindex={number + 1},werror=stop,rerror=stop,write-cache=on",
            )
        )
    return pairs


def _nics(launch: Launch) -> list[tuple[str, str]]:
    pairs = []
    for nic in launch.vm.nics:
        tap = launch.taps.get(nic.name)
        if tap is None:
            raise CallerError("vm-invalid", f"{nic.name} has no tap", "check its network cards")
        pairs.append(("-netdev", f"tap,id={nic.name},ifname={tap},script=no,downscript=no,vhost=off"))
        pairs.append(
            (
                "-device",
                f"virtio-net-pci,id={nic.name}-device,netdev={nic.name},mac={nic.mac},bus=pcie.0,"
                f"addr={nic.pci_slot:#x},romfile=",
            )
        )
    return pairs


def _balloon(vm: Vm) -> str:
    reporting = ",free-page-reporting=on" if vm.free_page_reporting else ""
    return f"virtio-balloon-pci,id=balloon0,bus=pcie.0,addr={BALLOON_SLOT:#x}{reporting}"


def _kernel(launch: Launch) -> list[tuple[str, str]]:
    if launch.vm.kernel is None:
        return []
    if launch.kernel_paths is None:
        raise CallerError("vm-invalid", f"{launch.vm.name} boots from a kernel that is not there", "import it again")
    kernel, initrd = launch.kernel_paths
    pairs = [("-kernel", str(kernel))]
    if initrd is not None:
        pairs.append(("-initrd", str(initrd)))
    pairs.append(("-append", launch.vm.kernel.append))
    return pairs


def arriving_nodes(launch: Launch) -> tuple[list[str], list[Node]]:
    """Return the nodes that a move writes, and those of them that are read only once it is over, as they are then."""
    nodes, sealed = [], []
    for disk in launch.vm.disks:
        for index in range(launch.arriving.get(disk.name, 0)):
            nodes.append(layer_node(disk.name, index))
            if index:
                buffered = launch.disk_paths[disk.name][index] in launch.buffered
                form = disk.layers[index].format
                sealed.append(open_layer(disk.name, index, len(disk.layers), form, read_only=True, buffered=buffered))
    return nodes, sealed
