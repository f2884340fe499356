"""A VM, two hosts and a plan that suit each other: what the tests of the pure core start from."""

import msgspec

from kvmhv.core import checks
from kvmhv.core.handover import SourceHold, TargetHold
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.messages import Offer
from kvmhv.model import (
    GIB,
    MIB,
    Accel,
    Address,
    Disk,
    DiskFormat,
    Inventory,
    Layer,
    Location,
    MoveRequest,
    Nic,
    QemuInfo,
    Rule,
    Timeouts,
    Vm,
    VmFacts,
)

QEMU = QemuInfo(
    binary="/usr/bin/qemu-system-x86_64",
    version=(10, 0, 13),
    accel=Accel.TCG,
    machines=("pc-q35-7.2", "pc-q35-10.0"),
    cpu_models={"x86-64-v2": (), "qemu64": ()},
    capabilities=(*checks.NEEDED_CAPABILITIES, "multifd"),
    parameters=("max-bandwidth", "downtime-limit"),
    free_page_reporting=True,
)

TIGHT = Timeouts(
    answer_s=0.5,
    prepare_s=4.0,
    storage_idle_s=2.0,
    storage_s=4.0,
    memory_idle_s=2.0,
    memory_s=6.0,
    switchover_s=1.0,
    grant_s=1.0,
    reconnect_s=1.0,
    undo_s=1.5,
)
"""So short that many waits are too long: every fourth world has them."""


def disk(name: str = "disk0", location: str = "default", size_bytes: int = 4 * GIB) -> Disk:
    """A qcow2 disk of one layer."""
    layer = Layer(location=location, path=f"web01/{name}.qcow2", format=DiskFormat.QCOW2)
    return Disk(name=name, size_bytes=size_bytes, layers=(layer,), pci_slot=4)


def vm(*, disks: int = 1, epoch: int = 0, name: str = "web01") -> Vm:
    """A VM with so many local disks and one nic."""
    return Vm(
        id=f"id-{name}",
        name=name,
        memory_bytes=256 * MIB,
        cpus=1,
        disks=tuple(disk(f"disk{number}") for number in range(disks)),
        nics=(Nic(name="nic0", switch="lan", mac="52:54:00:00:00:01", pci_slot=16),),
        epoch=epoch,
    )


def inventory(host: str, *, octet: int = 1, running: Vm | None = None, used_bytes: int = 128 * MIB) -> Inventory:
    """A host with room for everything; `running` is the VM that it is asked about as the source."""
    facts_of_vm = None
    if running is not None:
        facts_of_vm = VmFacts(
            running=True,
            qemu_version=QEMU.version,
            accel=Accel.TCG,
            memory_used_bytes=used_bytes,
            dirty_bytes_per_s=1e6,
            blockers=(),
            disk_used_bytes={one.name: GIB for one in running.disks},
        )
    return Inventory(
        host=host,
        host_id=f"host-id-{host}",
        boot_id=f"boot-{host}",
        kvmhv_version="0.1.0",
        qemu=QEMU,
        cpu_vendor="GenuineIntel",
        memory_available_bytes=8 * GIB,
        cpus=4,
        locations=(Location(name="default", path="/var/lib/kvmhv/disks", free_bytes=100 * GIB, total_bytes=200 * GIB),),
        switches=("lan",),
        vm_names=(running.name,) if running else (),
        vm_ids=(running.id,) if running else (),
        migration_addresses=(Address(ip=f"10.0.0.{octet}", prefix=24),),
        facts_of_vm=facts_of_vm,
    )


def source_state(  # one example with every knob that a test turns
    moving: Vm,
    *,
    source: str = "host1",
    target: str = "host2",
    move_id: str = "move-1",
    rule: Rule | None = None,
    timeouts: Timeouts | None = None,
    volatile_id: str = "volatile-1",
    used_bytes: int = 128 * MIB,
    shares: bool = False,
) -> SourceState:
    """A source that has not begun; `shares`: the VM's disks are on storage that both hosts see."""
    request = MoveRequest(vm=moving.name, target=target, include_storage=not shares)
    here = inventory(source, octet=1 if source == "host1" else 2, running=moving, used_bytes=used_bytes)
    return SourceState(
        move_id=move_id,
        source=source,
        target=target,
        vm=moving,
        request=request,
        rule=rule or Rule(),
        timeouts=timeouts or Timeouts(),
        inventory=shared(here) if shares else here,
        psk_hex="00" * 32,
        hold=SourceHold(epoch=moving.epoch + 1, announced=False),
        started_wall_s=1e9,
        volatile_id=volatile_id,
    )


def target_state(source: SourceState, offer: Offer, *, volatile_id: str = "volatile-2") -> TargetState:
    """A target that has let this offer in."""
    return TargetState(
        move_id=source.move_id,
        source=source.source,
        target=source.target,
        plan=offer.plan,
        psk_hex=offer.psk_hex,
        hold=TargetHold(epoch=offer.epoch),
        started_wall_s=1e9,
        volatile_id=volatile_id,
    )


def shared(here: Inventory, name: str = "default") -> Inventory:
    """The same host with a location that other hosts see too, as has just been proved."""
    locations = tuple(
        msgspec.structs.replace(one, shared_id="nfs-1") if one.name == name else one for one in here.locations
    )
    return msgspec.structs.replace(here, locations=locations, proven_shared=(name,))
