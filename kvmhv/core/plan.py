"""A move's plan, made from both inventories after the check found nothing against it."""

import msgspec

from kvmhv.core import addresses, blackout, checks, performance
from kvmhv.model import (
    MIB,
    Base,
    Channels,
    Disk,
    DiskCopy,
    Inventory,
    Layer,
    Mode,
    MoveRequest,
    Plan,
    Rule,
    Timeouts,
    Vm,
)

BASE_BYTES_PER_S = 32 * MIB
"""A disk that copies a base no faster than that is a slow one; reading the copy may take as long."""
ENCRYPT = "tls"
"""Capability: a VM that another program runs travels encrypted."""


def make(
    vm: Vm,
    request: MoveRequest,
    rule: Rule,
    timeouts: Timeouts,
    source: Inventory,
    target: Inventory,
    throughput_bytes_per_s: float | None = None,
    link_bytes_per_s: float | None = None,
) -> Plan:
    """Return the plan. `checks.check` must have found no error.

    `throughput` is what the last move there reached, `link` the most that one did.
    """
    pair = addresses.choose(source.migration_addresses, target.migration_addresses)
    assert pair is not None, "the check lets no move pass without a network"
    here, there = pair
    used = source.facts_of_vm.disk_used_bytes if source.facts_of_vm else {}
    copies = []
    disks = []
    for disk in vm.disks:
        if not checks.moves(disk, source, target, request):
            disks.append(disk)
            continue
        where = request.storage or disk.layers[0].location
        layers = disk.layers if vm.runtime else own_layers(vm, disk, where)
        arrived = msgspec.structs.replace(disk, layers=layers)
        disks.append(arrived)
        copies.append(
            DiskCopy(
                disk=disk.name,
                size_bytes=disk.size_bytes,
                used_bytes=used.get(disk.name, 0),
                source_layers=disk.layers,
                target_layers=arrived.layers,
                base=None if vm.runtime else _base(disk, timeouts, source, target),
            )
        )
    disk_bytes = sum(copy.travelling_bytes for copy in copies)
    channels = Channels() if vm.runtime else performance.choose(rule.performance, source, target, link_bytes_per_s)
    ours = (*performance.capabilities(channels), *blackout.capabilities(rule))
    capabilities = _of_runtime(vm, source, target) if vm.runtime else (*_capabilities(copies, source, target), *ours)
    seconds, memory_bytes = estimate(vm, rule, source, throughput_bytes_per_s, disk_bytes, channels)
    return Plan(
        mode=Mode.SHARED_NOTHING if copies else Mode.SHARED_STORAGE,
        rule=rule,
        source_address=here.ip,
        target_address=there.ip,
        capabilities=capabilities,
        target_host=target.host,
        disk_copies=tuple(copies),
        target_vm=msgspec.structs.replace(vm, disks=tuple(disks), epoch=vm.epoch + 1),
        estimate_seconds=seconds,
        estimate_bytes=memory_bytes + disk_bytes,
        timeouts=timeouts,
        channels=channels,
        more_networks=() if vm.runtime else performance.more_networks(rule.performance, source, target),
    )


def _base(disk: Disk, timeouts: Timeouts, source: Inventory, target: Inventory) -> Base | None:
    """Return the disk's base if the target has it, and can copy and read it while it makes ready."""
    base = source.facts_of_vm.bases.get(disk.name) if source.facts_of_vm else None
    if base is None or base.sha256 not in target.bases or len(disk.layers) < 2:
        return None
    return base if base.data_bytes <= timeouts.prepare_s / 2 * BASE_BYTES_PER_S else None


def _capabilities(copies: list[DiskCopy], source: Inventory, target: Inventory) -> tuple[str, ...]:
    """Without copies the target opens the disks for writing when it runs, and not when all is loaded: see LATE."""
    late = not copies and all(checks.LATE in host.qemu.capabilities for host in (source, target))
    return (*checks.NEEDED_CAPABILITIES, checks.LATE) if late else checks.NEEDED_CAPABILITIES


def _of_runtime(vm: Vm, source: Inventory, target: Inventory) -> tuple[str, ...]:
    """Return what is asked of the program that moves the VM."""
    both = (host.runtimes.get(vm.runtime) for host in (source, target))
    return (ENCRYPT,) if all(one is not None and one.encrypts for one in both) else ()


def own_layers(vm: Vm, disk: Disk, location: str) -> tuple[Layer, ...]:
    """Lay a disk's chain out in a location: every layer is the VM's own there, named after disk and depth."""
    layers = []
    for depth, layer in enumerate(disk.layers):
        name = disk.name if depth == 0 else f"{disk.name}.base{depth}"
        path = f"{vm.name}/{name}.{layer.format.value}"
        layers.append(msgspec.structs.replace(layer, location=location, path=path))
    return tuple(layers)


def estimate(
    vm: Vm,
    rule: Rule,
    source: Inventory,
    throughput_bytes_per_s: float | None,
    disk_bytes: int,
    channels: Channels,
) -> tuple[float | None, int]:
    """Return (seconds, bytes of memory) that a move will take: each pass sends what was dirtied during the one before.

    Seconds are None where no throughput is known (no bandwidth set, no earlier move).
    """
    now = source.facts_of_vm
    first_pass = now.memory_used_bytes if now else vm.memory_bytes
    limits = [limit for limit in (rule.bandwidth_bytes_per_s, throughput_bytes_per_s) if limit]
    if not limits:
        return None, int(first_pass / channels.ratio)
    wire_rate = float(min(limits))
    rate = wire_rate * channels.ratio
    dirty = now.dirty_bytes_per_s if now and now.dirty_bytes_per_s else 0.0
    sent, to_send = 0.0, float(first_pass)
    for _ in range(rule.max_passes):
        sent += to_send
        to_send = min(float(first_pass), dirty * to_send / rate)
        if to_send <= rule.threshold_bytes:
            break
    sent += to_send
    return sent / rate + disk_bytes / wire_rate, int(sent / channels.ratio)
