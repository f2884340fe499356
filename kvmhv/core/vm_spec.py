"""What `vm create` asks for, checked against the host and turned into a VM: what the guest sees is fixed here.

PCI slots (bus 0, function 0). A device keeps its slot for life, whatever is added or removed beside it, and its name
says the slot: disk3 sits in DISK_SLOTS[3].
    0x00        the machine's host bridge
    0x08-0x0f   disk0 .. disk7
    0x10-0x17   nic0 .. nic7
    0x1d-0x1f   devices that every VM has (drivers/qemu/argv.py)
"""

import hashlib
import re
from collections.abc import Collection, Iterable

import msgspec

from kvmhv.errors import CallerError
from kvmhv.model import (
    CPUS_MAX,
    DEFAULT_CPU,
    DEFAULT_MACHINE,
    DISK_MAX_BYTES,
    DISK_MIN_BYTES,
    GIB,
    MEMORY_MAX_BYTES,
    MEMORY_MIN_BYTES,
    MIB,
    VM_NAME_PATTERN,
    DirectKernel,
    Disk,
    DiskFormat,
    DiskSpec,
    Image,
    Layer,
    Nic,
    Struct,
    Vm,
    VmSpec,
)

DISK_SLOTS = range(0x08, 0x10)
NIC_SLOTS = range(0x10, 0x18)

CPUS_PER_HOST_CPU = 8
"""More virtual CPUs than this for each CPU of the host only wait for each other."""

MACHINE_PATTERN = r"pc-q35-\d+\.\d+"
BASELINE_PATTERN = r"x86-64-v[1-4]"
"""kvmhv's own CPU baselines; every other model is QEMU's."""
CPU_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
APPEND_MAX = 2048
SECTOR_BYTES = 512


class HostFacts(Struct, frozen=True, kw_only=True):
    """What a spec is checked against."""

    host: str
    cpus: int
    memory_bytes: int
    machines: Collection[str]
    cpu_models: Collection[str]
    switches: Collection[str]
    locations: Collection[str]
    vm_names: Collection[str]
    macs: Collection[str]
    """MACs of the VMs that are here."""


def check_name(name: str, what: str = "VM") -> None:
    """Raise CallerError `name-invalid` unless it can be the name of a VM or image."""
    if re.fullmatch(VM_NAME_PATTERN, name) is None:
        shown = name if len(name) <= 40 else f"{name[:40]}..."
        raise CallerError(
            "name-invalid",
            f"{shown!r} ({len(name)} characters) cannot be the name of a {what}",
            "use 1 to 63 ASCII letters, digits, dots, underscores and dashes, beginning with a letter or digit",
        )


def check(spec: VmSpec, facts: HostFacts) -> None:
    """Check all of a spec that can be checked without looking at image files.

    Raises CallerError: `name-invalid`, `vm-exists`, `memory-invalid`, `cpus-invalid`, `machine-invalid`,
    `cpu-invalid`, `disk-spec-invalid`, `size-invalid`, `location-unknown`, `switch-unknown`, `mac-invalid`,
    `append-invalid`.
    """
    check_name(spec.name)
    if spec.name in facts.vm_names:
        raise CallerError(
            "vm-exists", f"there is a VM {spec.name!r} on {facts.host}", "choose another name", http_status=409
        )
    _check_memory(spec.memory_bytes, facts)
    _check_cpus(spec.cpus, facts)
    _check_machine(spec.machine or DEFAULT_MACHINE, facts)
    _check_cpu(spec.cpu or DEFAULT_CPU, facts)
    if len(spec.disks) > len(DISK_SLOTS):
        raise CallerError("disk-spec-invalid", f"{len(spec.disks)} disks", f"a VM has {len(DISK_SLOTS)} at most")
    for index, disk in enumerate(spec.disks):
        _check_disk(f"disk{index}", disk, facts)
    _check_nics(spec, facts)
    append = spec.append or ""
    if len(append) > APPEND_MAX or not (append.isascii() and append.isprintable()):
        raise CallerError(
            "append-invalid",
            "the kernel's command line is not usable",
            f"give up to {APPEND_MAX} printable ASCII characters",
        )


def with_image(spec: VmSpec, image: Image) -> VmSpec:
    """Return the spec as its `image` completes it: the image's disk is disk0, unless a disk of the spec uses it."""
    used = any(image.name in (disk.image, disk.backing) for disk in spec.disks)
    if image.disk_format is None or used:
        return spec
    return msgspec.structs.replace(spec, disks=(DiskSpec(image=image.name), *spec.disks))


def build(
    spec: VmSpec,
    vm_id: str,
    facts: HostFacts,
    disks: Iterable[tuple[int, tuple[Layer, ...]]],
    kernel: DirectKernel | None,
) -> Vm:
    """Return the VM of a checked spec; `disks`: size and layers of each disk of the spec, in its order."""
    return Vm(
        id=vm_id,
        name=spec.name,
        memory_bytes=spec.memory_bytes,
        cpus=spec.cpus,
        machine=spec.machine or DEFAULT_MACHINE,
        cpu=spec.cpu or DEFAULT_CPU,
        disks=tuple(
            Disk(name=f"disk{index}", size_bytes=size_bytes, layers=layers, pci_slot=DISK_SLOTS[index])
            for index, (size_bytes, layers) in enumerate(disks)
        ),
        nics=_nics(spec, vm_id, facts),
        kernel=kernel,
        free_page_reporting=spec.free_page_reporting,
    )


def layer_path(vm_name: str, disk: str, depth: int, format: DiskFormat) -> str:  # noqa: A002
    """Return the path, inside its location, of a layer that belongs to the VM; depth 0 is the layer that is written."""
    return f"{vm_name}/{disk}.{format.value}" if depth == 0 else f"{vm_name}/{disk}.base{depth}.{format.value}"


def belongs_to_vm(vm_name: str, depth: int, layer: Layer) -> bool:
    """Say whether a layer is the VM's own, to be deleted with it: its top layers, and all in the VM's directory."""
    return depth == 0 or layer.path.startswith(f"{vm_name}/")


def _check_memory(memory_bytes: int, facts: HostFacts) -> None:
    # Whole MiB: what QEMU's machines align to; rounding would give the guest something that nobody asked for.
    if not MEMORY_MIN_BYTES <= memory_bytes <= MEMORY_MAX_BYTES or memory_bytes % MIB:
        raise CallerError(
            "memory-invalid",
            f"a VM cannot have {memory_bytes} bytes of memory",
            f"give whole MiB, from {MEMORY_MIN_BYTES // MIB}M to {MEMORY_MAX_BYTES // GIB}G",
        )
    if memory_bytes > facts.memory_bytes:
        raise CallerError(
            "memory-invalid",
            f"{memory_bytes // MIB} MiB is more than {facts.host} has ({facts.memory_bytes // MIB} MiB)",
            "give the VM less memory, or create it on a larger host",
        )


def _check_cpus(cpus: int, facts: HostFacts) -> None:
    most = min(CPUS_MAX, CPUS_PER_HOST_CPU * facts.cpus)
    if not 1 <= cpus <= most:
        raise CallerError(
            "cpus-invalid",
            f"a VM on {facts.host} cannot have {cpus} CPUs",
            f"give 1 to {most} ({CPUS_PER_HOST_CPU} for each of the host's {facts.cpus}, {CPUS_MAX} at most)",
        )


def _check_machine(machine: str, facts: HostFacts) -> None:
    if re.fullmatch(MACHINE_PATTERN, machine) is None:
        reason = {
            "q35": "an unversioned name means another machine on each QEMU version, and the VM could not move",
            "pc": "an unversioned name means another machine on each QEMU version, and the VM could not move",
            "microvm": "it has no versions and no PCI slots, so QEMU cannot move it",
            "none": "it has no devices",
        }.get(machine, "kvmhv runs versioned q35 machines")
        raise CallerError(
            "machine-invalid", f"machine {machine[:60]!r}: {reason}", f"use a versioned one, e.g. {DEFAULT_MACHINE}"
        )
    if machine not in facts.machines:
        has = sorted(name for name in facts.machines if re.fullmatch(MACHINE_PATTERN, name))
        raise CallerError(
            "machine-invalid", f"the QEMU of {facts.host} has no machine {machine!r}", f"it has: {', '.join(has)}"
        )


def _check_cpu(cpu: str, facts: HostFacts) -> None:
    if re.fullmatch(CPU_PATTERN, cpu) is None:
        raise CallerError("cpu-invalid", f"{cpu[:60]!r} is no CPU model", f"use {DEFAULT_CPU}, or a model of QEMU's")
    if cpu not in facts.cpu_models and re.fullmatch(BASELINE_PATTERN, cpu) is None:
        raise CallerError(
            "cpu-invalid",
            f"the QEMU of {facts.host} has no CPU model {cpu!r}",
            f"use {DEFAULT_CPU}, or a model that `qemu-system-x86_64 -cpu help` lists",
        )


def _check_disk(name: str, disk: DiskSpec, facts: HostFacts) -> None:
    given = [key for key in ("file", "image") if getattr(disk, key) is not None]
    if len(given) > 1 or (given and (disk.size_bytes is not None or disk.backing is not None)):
        raise CallerError("disk-spec-invalid", f"{name}: size, file and image exclude each other", _DISK_TODO)
    if not given and disk.size_bytes is None and disk.backing is None and disk.lun is None:
        raise CallerError("disk-spec-invalid", f"{name}: it has neither size nor file, image or backing", _DISK_TODO)
    if disk.backing is not None and disk.format == DiskFormat.RAW:
        raise CallerError("disk-spec-invalid", f"{name}: a raw disk has no backing file", "use format=qcow2")
    if disk.size_bytes is not None:
        check_disk_size(name, disk.size_bytes)
    if disk.location is not None and disk.location not in facts.locations:
        raise CallerError(
            "location-unknown",
            f"{name}: {facts.host} has no location {disk.location[:60]!r}",
            f"it has: {', '.join(sorted(facts.locations))}",
            http_status=404,
        )
    for text in (disk.file, disk.image, disk.backing):
        if text is not None and (not text or "\0" in text or len(text) > 4096):
            raise CallerError("disk-spec-invalid", f"{name}: {text[:60]!r} is no file or image", _DISK_TODO)


_DISK_TODO = "write size=4G, file=PATH, image=NAME, lun=NUMBER or backing=PATH|IMAGE (with or without size)"


def check_disk_size(name: str, size_bytes: int) -> None:
    """Raise CallerError `size-invalid` unless a disk can have this size."""
    if not DISK_MIN_BYTES <= size_bytes <= DISK_MAX_BYTES or size_bytes % SECTOR_BYTES:
        raise CallerError(
            "size-invalid",
            f"{name} cannot have {size_bytes} bytes",
            f"give whole 512-byte sectors, from {DISK_MIN_BYTES} bytes to {DISK_MAX_BYTES // GIB // 1024}T",
        )


def _check_nics(spec: VmSpec, facts: HostFacts) -> None:
    if len(spec.switches) > len(NIC_SLOTS):
        raise CallerError("switch-unknown", f"{len(spec.switches)} network cards", f"a VM has {len(NIC_SLOTS)} at most")
    for switch in spec.switches:
        if switch not in facts.switches:
            has = ", ".join(sorted(facts.switches)) or "none"
            raise CallerError(
                "switch-unknown", f"{facts.host} has no switch {switch[:60]!r}", f"it has: {has}", http_status=404
            )
    if len(spec.macs) > len(spec.switches):
        raise CallerError(
            "mac-invalid", "there are more MACs than switches", "give one --mac for each --switch at most"
        )
    seen = set(facts.macs)
    for mac in (text.lower() for text in spec.macs):
        if (
            re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", mac) is None
            or int(mac[:2], 16) & 1
            or not int(mac.replace(":", ""), 16)
        ):
            raise CallerError("mac-invalid", f"{mac[:40]!r} is no MAC of a network card", "e.g. 52:54:00:12:34:56")
        if mac in seen:
            raise CallerError("mac-invalid", f"MAC {mac} is used twice", "choose another one, or let kvmhv choose")
        seen.add(mac)


def _nics(spec: VmSpec, vm_id: str, facts: HostFacts) -> tuple[Nic, ...]:
    taken = {*facts.macs, *(mac.lower() for mac in spec.macs)}
    nics = []
    for index, switch in enumerate(spec.switches):
        mac = spec.macs[index].lower() if index < len(spec.macs) else _made_mac(vm_id, index, taken)
        taken.add(mac)
        nics.append(Nic(name=f"nic{index}", switch=switch, mac=mac, pci_slot=NIC_SLOTS[index]))
    return tuple(nics)


def _made_mac(vm_id: str, index: int, taken: Collection[str]) -> str:
    """A locally administered MAC (52:54:00, as QEMU's own) that follows from the VM's id; the next if it is taken."""
    for attempt in range(256):
        digest = hashlib.sha256(f"{vm_id}/{index}/{attempt}".encode()).hexdigest()
        mac = f"52:54:00:{digest[0:2]}:{digest[2:4]}:{digest[4:6]}"
        if mac not in taken:
            return mac
    raise AssertionError("256 MACs in a row are taken")
