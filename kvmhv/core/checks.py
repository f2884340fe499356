"""Can this VM run there (Hyper-V: Compare-VM)? Every check looks, and every finding is returned.

Each finding has a stable id; docs/errors.md has a paragraph for each.
"""

from collections.abc import Iterator

from kvmhv.core import addresses, checks_post_copy, performance
from kvmhv.model import (
    MIB,
    Accel,
    Disk,
    DiskFormat,
    Finding,
    Inventory,
    Location,
    LocationKind,
    MoveRequest,
    Severity,
    Vm,
)

NEEDED_CAPABILITIES = ("events", "return-path", "pause-before-switchover")
"""QEMU's migration capabilities without which kvmhv cannot steer a move."""

LATE = "late-block-activate"
"""The target takes its disks over at `cont`, not as soon as all is loaded: until the grant they are the source's."""

TCG_FIXED_IN = (9, 0, 0)
"""QEMU before 9.0 loses dirty pages under TCG (commit "physmem: Fix migration dirty bitmap coherency with TCG...")."""

OLDEST_QEMU = (7, 2, 0)

QEMU_OVERHEAD_BYTES = 64 * MIB
"""What a QEMU process needs beside the guest's memory, at least."""

LARGE_BLOCK_BYTES = 4096
"""The largest block in which a file system may want to be read and written past the cache."""


def check(vm: Vm, request: MoveRequest, source: Inventory, target: Inventory) -> tuple[Finding, ...]:
    """Return all findings, errors first. Of a VM that another program runs checks_steered.py has them."""
    found = [
        *guest(vm, source),
        *_identity(vm, target),
        *_processor(vm, source, target),
        *memory(vm, target),
        *_free_pages(vm, target),
        *_devices(vm, source, target),
        *_disks(vm, request, source, target),
        *channels(source, target),
        *performance.findings(request.performance, source, target),
        *checks_post_copy.findings(vm, request, source, target),
    ]
    return tuple(sorted(found, key=lambda finding: finding.severity != Severity.ERROR))


def shared(location: str, source: Inventory, target: Inventory) -> bool:
    """Whether both hosts see the same storage at a location: each has just read there what the other had written."""
    there = _location(target, location)
    return location in source.proven_shared and there is not None and there.shared_id is not None


def moves(disk: Disk, source: Inventory, target: Inventory, request: MoveRequest | None = None) -> bool:
    """Whether a disk has to travel: a layer lies where the target does not see it, or it is asked to go elsewhere."""
    if request is not None and request.include_storage and request.storage not in (None, disk.layers[0].location):
        return True
    return not all(shared(layer.location, source, target) for layer in disk.layers)


def _error(id_: str, about: str, host: str, text: str, todo: str) -> Finding:
    return Finding(id=id_, severity=Severity.ERROR, object=about, host=host, text=text, todo=todo)


def _warning(id_: str, about: str, host: str, text: str, todo: str) -> Finding:
    return Finding(id=id_, severity=Severity.WARNING, object=about, host=host, text=text, todo=todo)


def _location(inventory: Inventory, name: str) -> Location | None:
    return next((location for location in inventory.locations if location.name == name), None)


def guest(vm: Vm, source: Inventory) -> Iterator[Finding]:
    """Does it run, and can its QEMU send it?"""
    now = source.facts_of_vm
    if now is None or not now.running:
        yield _error(
            "vm-not-running",
            vm.name,
            source.host,
            f"{vm.name} does not run on {source.host}: there is no memory to move",
            f"start it (kvmhv vm start {vm.name})",
        )
        return
    if now.accel is Accel.TCG and now.qemu_version < TCG_FIXED_IN:
        version = ".".join(map(str, now.qemu_version))
        yield _error(
            "tcg-source-corrupts",
            vm.name,
            source.host,
            f"{vm.name} runs under TCG on QEMU {version}, which loses memory writes while it migrates (fixed in 9.0)",
            f"install QEMU 9.0 or newer on {source.host} (or make KVM work there), then stop and start the VM",
        )
    for blocker in now.blockers:
        yield _error(
            "device-cannot-migrate",
            vm.name,
            source.host,
            f"QEMU on {source.host} says that {vm.name} cannot migrate: {blocker}",
            "run the VM without that device: only a running VM can be moved",
        )


def _identity(vm: Vm, target: Inventory) -> Iterator[Finding]:
    if vm.id in target.vm_ids:
        yield _error(
            "id-taken",
            vm.name,
            target.host,
            f"{target.host} already has a VM with this id ({vm.id})",
            f"if it is an old copy: kvmhv --host {target.host} vm remove {vm.name}",
        )
    elif vm.name in target.vm_names:
        yield _error(
            "name-taken",
            vm.name,
            target.host,
            f"{target.host} already has another VM named {vm.name}",
            "rename or remove one of the two",
        )


def _processor(vm: Vm, source: Inventory, target: Inventory) -> Iterator[Finding]:
    if vm.machine not in target.qemu.machines:
        yield _error(
            "machine-missing",
            vm.name,
            target.host,
            f"QEMU {target.qemu.version_text} on {target.host} has no machine type {vm.machine}",
            f"install a QEMU on {target.host} that has it",
        )
    missing = target.qemu.cpu_models.get(vm.cpu)
    if missing is None:
        yield _error(
            "cpu-model-missing",
            vm.name,
            target.host,
            f"QEMU {target.qemu.version_text} on {target.host} does not know the CPU model {vm.cpu}",
            f"install a QEMU on {target.host} that has it, or give the VM another model",
        )
    elif missing:
        yield _error(
            "cpu-features-missing",
            vm.name,
            target.host,
            f"{target.host} cannot give the guest all features of {vm.cpu}: {', '.join(missing)} missing",
            "give the VM a CPU model that both hosts have (the default one is the safest)",
        )
    yield from _hypervisors(vm, source, target)


def _hypervisors(vm: Vm, source: Inventory, target: Inventory) -> Iterator[Finding]:
    accel = source.facts_of_vm.accel if source.facts_of_vm else source.qemu.accel
    if accel is not target.qemu.accel:
        yield _error(
            "accelerator-differs",
            vm.name,
            target.host,
            f"{vm.name} runs under {accel.upper()} on {source.host}, and {target.host} would run it under "
            f"{target.qemu.accel.upper()}: the guest's CPU would change while it runs",
            f"see kvmhv doctor on {target.host}",
        )
    elif accel is Accel.KVM and source.cpu_vendor != target.cpu_vendor:
        yield _error(
            "cpu-vendor-differs",
            vm.name,
            target.host,
            f"the CPUs are of different vendors: {source.cpu_vendor} and {target.cpu_vendor}",
            "name a target with CPUs of the same vendor: the running guest knows its own",
        )
    if target.qemu.version < OLDEST_QEMU:
        yield _error(
            "qemu-too-old",
            vm.name,
            target.host,
            f"QEMU {target.qemu.version_text} on {target.host} is older than 7.2",
            f"install QEMU 7.2 or newer on {target.host}",
        )
    elif source.facts_of_vm and target.qemu.version[:2] < source.facts_of_vm.qemu_version[:2]:
        yield _warning(
            "qemu-older-at-target",
            vm.name,
            target.host,
            f"{target.host} has the older QEMU ({target.qemu.version_text}): the versioned machine type "
            "makes this work in most cases; if the device state does not fit, the move fails and the VM stays",
            f"install the same QEMU on {target.host}",
        )
    if vm.cpus > target.cpus:
        yield _warning(
            "cpus-few",
            vm.name,
            target.host,
            f"{vm.name} has {vm.cpus} CPUs, {target.host} only {target.cpus}",
            "expect it to be slower there",
        )


def _free_pages(vm: Vm, target: Inventory) -> Iterator[Finding]:
    """A target that does not know of it would start a device that does not take the guest's state."""
    if vm.free_page_reporting and not target.qemu.free_page_reporting:
        yield _error(
            "free-page-reporting-missing",
            vm.name,
            target.host,
            f"the guest of {vm.name} reports free pages to its balloon, and QEMU {target.qemu.version_text} or kvmhv "
            f"{target.kvmhv_version} on {target.host} knows nothing of that",
            f"install this kvmhv on {target.host} too; or stop {vm.name} and kvmhv vm set {vm.name} "
            "--no-free-page-reporting",
        )


def memory(vm: Vm, target: Inventory) -> Iterator[Finding]:
    """Has the target room for it?"""
    needed = vm.memory_bytes + QEMU_OVERHEAD_BYTES
    if needed > target.memory_available_bytes:
        yield _error(
            "memory-short",
            vm.name,
            target.host,
            f"{target.host} has {target.memory_available_bytes // MIB} MiB of memory free, "
            f"{vm.name} needs {needed // MIB} MiB",
            f"free memory on {target.host}",
        )


def _devices(vm: Vm, source: Inventory, target: Inventory) -> Iterator[Finding]:
    for nic in vm.nics:
        if nic.switch not in target.switches:
            known = ", ".join(target.switches) or "none"
            yield _error(
                "switch-missing",
                nic.name,
                target.host,
                f"{target.host} has no switch named {nic.switch} (it has: {known})",
                f"make a bridge named {nic.switch} on {target.host}",
            )


def _disks(vm: Vm, request: MoveRequest, source: Inventory, target: Inventory) -> Iterator[Finding]:
    needed: dict[str, int] = {}
    virtual: dict[str, int] = {}
    for disk in vm.disks:
        if not moves(disk, source, target, request):
            continue
        where = request.storage or disk.layers[0].location
        place = _place(disk, where, request, source, target)
        if place is not None:
            yield place
        elif not request.include_storage:
            yield _error(
                "disk-local",
                disk.name,
                source.host,
                f"{disk.name} of {vm.name} lies on {source.host} alone (location {disk.layers[0].location})",
                "move it too (--include-storage), or put it on storage that both hosts share",
            )
        elif _location(target, where) is None:
            known = ", ".join(location.name for location in target.locations) or "none"
            yield _error(
                "location-missing",
                disk.name,
                target.host,
                f"{target.host} has no location named {where} for {disk.name} (it has: {known})",
                "name one with --storage, or add it there",
            )
        else:
            used = source.facts_of_vm.disk_used_bytes.get(disk.name, 0) if source.facts_of_vm else 0
            needed[where] = needed.get(where, 0) + used
            virtual[where] = virtual.get(where, 0) + disk.size_bytes
            if disk.layers[0].format is DiskFormat.RAW and disk.size_bytes % LARGE_BLOCK_BYTES:
                yield _uneven(disk, where, target)
    yield from _caches(vm, request, source, target)
    for name, used in needed.items():
        location = _location(target, name)
        free = location.free_bytes if location else 0
        if used > free:
            yield _error(
                "disk-space-short",
                vm.name,
                target.host,
                f"location {name} on {target.host} has {free // MIB} MiB free, the disks need {used // MIB} MiB",
                f"free space on {target.host}, or name another location with --storage",
            )
        elif virtual[name] > free:
            yield _warning(
                "disk-space-thin",
                vm.name,
                target.host,
                f"the disks may grow to {virtual[name] // MIB} MiB, location {name} on {target.host} has "
                f"{free // MIB} MiB free",
                "watch the free space there",
            )


def _uneven(disk: Disk, where: str, target: Inventory) -> Finding:
    """QEMU opens no raw image for writing that does not end with a block of the file system (seen: ext4, tmpfs)."""
    return _warning(
        "disk-size-uneven",
        disk.name,
        target.host,
        f"{disk.name} is a raw image of {disk.size_bytes} bytes, which are not whole blocks of {LARGE_BLOCK_BYTES}: if "
        f"{where} on {target.host} has such blocks, QEMU refuses the image there: the move then fails in setup",
        "with the VM stopped, make the image larger (qemu-img resize), or convert it to qcow2",
    )


def _place(disk: Disk, where: str, request: MoveRequest, source: Inventory, target: Inventory) -> Finding | None:
    """Say what is wrong with the target's location for a disk that has to travel."""
    place = _location(target, where)
    if place is None or place.shared_id is None:
        return None
    if where in source.not_shared:
        return _error(
            "storage-differs",
            disk.name,
            target.host,
            f"{source.host} and {target.host} both have a location {where}, but not the same storage there: "
            f"{source.not_shared[where]}",
            "let both use the same server and share; or name another location with --storage",
        )
    if request.include_storage and place.kind == LocationKind.ISCSI:
        return _error(
            "lun-not-chosen",
            disk.name,
            target.host,
            f"location {where} is an iSCSI target: no LUN can be chosen for {disk.name} by itself",
            "name another location with --storage",
        )
    return None


def _caches(vm: Vm, request: MoveRequest, source: Inventory, target: Inventory) -> Iterator[Finding]:
    """Mounts whose settings let one host read what is old, or lose what was acknowledged."""
    stay = {layer.location for disk in vm.disks if not moves(disk, source, target, request) for layer in disk.layers}
    for inventory in (source, target):
        for location in inventory.locations:
            if location.name in stay:
                for why in location.unsafe:
                    yield _error(
                        "storage-unsafe",
                        location.name,
                        inventory.host,
                        f"location {location.name} on {inventory.host}: {why}",
                        "mount it with the options that docs/storage.md names",
                    )


def channels(source: Inventory, target: Inventory) -> Iterator[Finding]:
    """Can the two QEMUs be steered, and talk?"""
    for inventory in (source, target):
        for capability in NEEDED_CAPABILITIES:
            if capability not in inventory.qemu.capabilities:
                yield _error(
                    "capability-missing",
                    capability,
                    inventory.host,
                    f"QEMU {inventory.qemu.version_text} on {inventory.host} lacks the capability {capability}",
                    f"install QEMU 7.2 or newer on {inventory.host}",
                )
    if addresses.choose(source.migration_addresses, target.migration_addresses) is None:
        yield _error(
            "migration-network-missing",
            "network",
            target.host,
            f"{source.host} and {target.host} have no network in common that both may use for migration",
            "see migration.networks and migration.use_any_network in `kvmhv host show` of both hosts",
        )
