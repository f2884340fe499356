"""Every finding of the check has its test: one host that lacks one thing, and that finding alone."""

from typing import Any

import msgspec
import pytest

from kvmhv.core import checks
from kvmhv.model import GIB, MIB, Accel, Address, DiskFormat, Finding, Inventory, MoveRequest, QemuInfo, Severity, Vm
from tests.sim import examples

VM = examples.vm()
REQUEST = MoveRequest(vm="web01", target="host2", include_storage=True)
SOURCE = examples.inventory("host1", running=VM)
TARGET = examples.inventory("host2", octet=2)


def change(value: Any, **changes: object) -> Any:
    return msgspec.structs.replace(value, **changes)


def findings(
    source: Inventory = SOURCE, target: Inventory = TARGET, request: MoveRequest = REQUEST, moving: Vm = VM
) -> tuple[Finding, ...]:
    return checks.check(moving, request, source, target)


def ids(*arguments: Any, **named: Any) -> list[str]:
    return [finding.id for finding in findings(*arguments, **named)]


def of_vm(**changes: object) -> Inventory:
    return change(SOURCE, facts_of_vm=change(SOURCE.facts_of_vm, **changes))


def qemu(inventory: Inventory, **changes: object) -> Inventory:
    return change(inventory, qemu=change(inventory.qemu, **changes))


def test_two_hosts_that_suit_each_other_have_no_finding() -> None:
    assert findings() == ()


SOURCES: dict[str, Inventory] = {
    "vm-not-running": of_vm(running=False),
    "tcg-source-corrupts": of_vm(qemu_version=(8, 2, 0)),
    "device-cannot-migrate": of_vm(blockers=("ivshmem",)),
    "capability-missing": qemu(SOURCE, capabilities=("events", "return-path")),
}
TARGETS: dict[str, Inventory] = {
    "id-taken": change(TARGET, vm_ids=(VM.id,)),
    "name-taken": change(TARGET, vm_names=(VM.name,)),
    "machine-missing": qemu(TARGET, machines=("pc-q35-10.0",)),
    "cpu-model-missing": qemu(TARGET, cpu_models={}),
    "cpu-features-missing": qemu(TARGET, cpu_models={VM.cpu: ("avx",)}),
    "accelerator-differs": qemu(TARGET, accel=Accel.KVM),
    "qemu-too-old": qemu(TARGET, version=(6, 2, 0)),
    "memory-short": change(TARGET, memory_available_bytes=VM.memory_bytes),
    "switch-missing": change(TARGET, switches=("wan",)),
    "location-missing": change(TARGET, locations=()),
    "disk-space-short": change(TARGET, locations=(change(TARGET.locations[0], free_bytes=MIB),)),
    "migration-network-missing": change(TARGET, migration_addresses=(Address(ip="10.9.0.2", prefix=24),)),
    "capability-missing": qemu(TARGET, capabilities=("events",)),
}
WARNINGS: dict[str, Inventory] = {
    "qemu-older-at-target": qemu(TARGET, version=(9, 2, 0)),
    "disk-space-thin": change(TARGET, locations=(change(TARGET.locations[0], free_bytes=2 * GIB),)),
}


@pytest.mark.parametrize("expected", list(SOURCES))
def test_what_is_wrong_with_the_source(expected: str) -> None:
    assert set(ids(source=SOURCES[expected])) == {expected}


@pytest.mark.parametrize("expected", list(TARGETS))
def test_what_is_wrong_with_the_target(expected: str) -> None:
    found = findings(target=TARGETS[expected])
    assert {finding.id for finding in found} == {expected}
    assert all(finding.severity is Severity.ERROR for finding in found)


@pytest.mark.parametrize("expected", list(WARNINGS))
def test_what_is_only_told(expected: str) -> None:
    (finding,) = findings(target=WARNINGS[expected])
    assert (finding.id, finding.severity) == (expected, Severity.WARNING)


def test_a_guest_that_reports_free_pages_goes_only_where_they_are_taken() -> None:
    """An older kvmhv says nothing of it, which is a no; a guest that reports none can go there."""
    older = change(TARGET, qemu=msgspec.convert(without(TARGET.qemu, "free_page_reporting"), QemuInfo))
    assert ids(target=older) == []
    reports = change(VM, free_page_reporting=True)
    assert ids(moving=reports) == []
    (found,) = findings(target=older, moving=reports)
    assert (found.id, found.severity, found.host) == ("free-page-reporting-missing", Severity.ERROR, "host2")


def without(value: Any, field: str) -> dict[str, object]:
    return {name: held for name, held in msgspec.to_builtins(value).items() if name != field}


def test_cpus_few_is_a_warning() -> None:
    (finding,) = findings(moving=change(VM, cpus=8))
    assert (finding.id, finding.severity) == ("cpus-few", Severity.WARNING)


@pytest.mark.parametrize(
    ("image_format", "size_bytes", "told"),
    [("raw", 2 * MIB + 512, True), ("raw", 2 * MIB + 4096, False), ("qcow2", 2 * MIB + 512, False)],
)
def test_a_raw_disk_that_ends_within_a_block_is_told(image_format: str, size_bytes: int, told: bool) -> None:
    layers = tuple(change(layer, format=DiskFormat(image_format)) for layer in VM.disks[0].layers)
    disk = change(VM.disks[0], layers=layers, size_bytes=size_bytes)
    found = findings(moving=change(VM, disks=(disk, *VM.disks[1:])))
    assert [(one.id, one.severity) for one in found] == ([("disk-size-uneven", Severity.WARNING)] if told else [])


def test_never_across_vendors_under_kvm() -> None:
    source = change(qemu(SOURCE, accel=Accel.KVM), facts_of_vm=change(SOURCE.facts_of_vm, accel=Accel.KVM))
    target = change(qemu(TARGET, accel=Accel.KVM), cpu_vendor="AuthenticAMD")
    assert ids(source=source, target=target) == ["cpu-vendor-differs"]
    assert ids(source=source, target=change(target, cpu_vendor="GenuineIntel")) == []


def test_an_old_qemu_under_kvm_may_be_the_source() -> None:
    source = change(SOURCE, facts_of_vm=change(SOURCE.facts_of_vm, accel=Accel.KVM, qemu_version=(7, 2, 0)))
    assert ids(source=source, target=qemu(TARGET, accel=Accel.KVM)) == []


def test_all_findings_at_once_errors_first_each_with_a_way_out() -> None:
    target = change(
        qemu(TARGET, machines=(), version=(9, 2, 0)), switches=(), locations=(), vm_names=(VM.name,), cpus=0
    )
    found = findings(target=target)
    assert {"name-taken", "machine-missing", "switch-missing", "location-missing", "cpus-few"} <= {
        finding.id for finding in found
    }
    severities = [finding.severity for finding in found]
    assert severities == sorted(severities, key=lambda severity: severity is not Severity.ERROR)
    for finding in found:
        assert finding.text
        assert finding.todo
        assert finding.host in ("host1", "host2")


def test_a_local_disk_stays_unless_it_is_asked_to_come() -> None:
    assert ids(request=change(REQUEST, include_storage=False)) == ["disk-local"]
    assert ids(request=change(REQUEST, include_storage=False), moving=examples.vm(disks=0)) == []


def test_a_disk_that_both_hosts_see_does_not_travel() -> None:
    source, target = examples.shared(SOURCE), examples.shared(TARGET)
    assert not checks.moves(VM.disks[0], source, target)
    assert ids(source, target, change(REQUEST, include_storage=False)) == []
    assert checks.moves(VM.disks[0], source, TARGET)
    unproven = change(source, proven_shared=(), not_shared={"default": "it does not see it"})
    assert checks.moves(VM.disks[0], unproven, target)
    assert ids(unproven, target, change(REQUEST, include_storage=False)) == ["storage-differs"]
    assert ids(unproven, target) == ["storage-differs"]


def test_a_mount_that_caches_is_not_for_a_disk_that_stays_on_it() -> None:
    source, target = examples.shared(SOURCE), examples.shared(TARGET)
    caching = change(target, locations=(change(target.locations[0], unsafe=("cifs caches",)),))
    assert ids(source, caching) == ["storage-unsafe"]


def test_a_disk_that_both_hosts_see_can_go_elsewhere_while_the_vm_moves() -> None:
    source, target = examples.shared(SOURCE), examples.shared(TARGET)
    fast = change(target.locations[0], name="fast", shared_id=None)
    target = change(target, locations=(*target.locations, fast))
    request = change(REQUEST, storage="fast")
    assert checks.moves(VM.disks[0], source, target, request)
    assert ids(source, target, request) == []
    lun = change(target, locations=(*target.locations, change(fast, name="san", kind="iscsi", shared_id="iscsi")))
    assert ids(source, lun, change(REQUEST, storage="san")) == ["lun-not-chosen"]


def test_a_named_location_is_where_the_space_is_looked_for() -> None:
    assert ids(request=change(REQUEST, storage="fast")) == ["location-missing"]
    fast = change(TARGET.locations[0], name="fast", free_bytes=MIB)
    target = change(TARGET, locations=(*TARGET.locations, fast))
    assert ids(target=target, request=change(REQUEST, storage="fast")) == ["disk-space-short"]


def test_the_disks_of_one_location_are_added_up() -> None:
    moving = examples.vm(disks=3)
    source = examples.inventory("host1", running=moving)
    target = change(TARGET, locations=(change(TARGET.locations[0], free_bytes=2 * GIB),))
    assert ids(source, target, REQUEST, moving) == ["disk-space-short"]
