"""The plan of a move, made from both inventories."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from kvmhv.core import plan
from kvmhv.model import GIB, MIB, Channels, DiskFormat, Inventory, Layer, Mode, MoveRequest, Plan, Rule, Timeouts, Vm
from tests.sim import examples

TARGET = examples.inventory("host2", octet=2)


def made(
    moving: Vm, *, source: Inventory | None = None, target: Inventory = TARGET, storage: str | None = None
) -> Plan:
    request = MoveRequest(vm=moving.name, target="host2", include_storage=True, storage=storage)
    return plan.make(moving, request, Rule(), Timeouts(), source or examples.inventory("host1", running=moving), target)


def test_local_disks_travel_and_the_epoch_goes_up() -> None:
    moving = examples.vm(disks=2, epoch=4)
    result = made(moving)
    assert result.mode is Mode.SHARED_NOTHING
    assert [copy.disk for copy in result.disk_copies] == ["disk0", "disk1"]
    assert result.target_vm.epoch == 5
    assert (result.source_address, result.target_address) == ("10.0.0.1", "10.0.0.2")
    assert result.estimate_bytes == 128 * MIB + 2 * GIB


def test_nothing_else_of_the_vm_changes() -> None:
    moving = examples.vm()
    target_vm = made(moving).target_vm
    assert msgspec.structs.replace(target_vm, epoch=0, disks=moving.disks) == moving


def test_what_both_hosts_see_stays_where_it_is() -> None:
    moving = examples.vm()
    source = examples.shared(examples.inventory("host1", running=moving))
    result = made(moving, source=source, target=examples.shared(TARGET))
    assert result.mode is Mode.SHARED_STORAGE
    assert result.disk_copies == ()
    assert result.target_vm.disks == moving.disks


def test_a_chain_is_laid_out_layer_by_layer_in_the_named_location() -> None:
    base = Layer(location="images", path="base/debian.raw", format=DiskFormat.RAW)
    top = examples.disk()
    moving = examples.vm()
    disk = msgspec.structs.replace(top, layers=(*top.layers, base))
    moving = msgspec.structs.replace(moving, disks=(disk,))
    (copy,) = made(moving, storage="fast").disk_copies
    assert copy.source_layers == disk.layers
    assert [(one.location, one.path, one.format) for one in copy.target_layers] == [
        ("fast", "web01/disk0.qcow2", DiskFormat.QCOW2),
        ("fast", "web01/disk0.base1.raw", DiskFormat.RAW),
    ]


def estimate(dirty: float, rate: int, *, passes: int = 10) -> tuple[float | None, int]:
    moving = examples.vm(disks=0)
    source = examples.inventory("host1", running=moving)
    now = msgspec.structs.replace(source.facts_of_vm, dirty_bytes_per_s=dirty)  # type: ignore[type-var]
    source = msgspec.structs.replace(source, facts_of_vm=now)
    rule = Rule(max_passes=passes, threshold_bytes=MIB, bandwidth_bytes_per_s=rate)
    return plan.estimate(moving, rule, source, None, 0, Channels())


def test_without_a_known_throughput_there_is_no_time() -> None:
    assert estimate(0, 0) == (None, 128 * MIB)


def test_an_idle_guest_is_sent_once() -> None:
    seconds, sent_bytes = estimate(0, 64 * MIB)
    assert (seconds, sent_bytes) == (2.0, 128 * MIB)


def test_a_guest_that_dirties_faster_than_the_link_is_sent_once_a_pass_and_once_more() -> None:
    _, sent_bytes = estimate(1e12, 64 * MIB, passes=10)
    assert sent_bytes == 11 * 128 * MIB


@given(st.floats(0, 1e9), st.integers(MIB, GIB))
def test_the_estimate_is_bounded_by_the_passes(dirty: float, rate: int) -> None:
    seconds, sent_bytes = estimate(dirty, rate)
    assert 128 * MIB <= sent_bytes <= 11 * 128 * MIB
    assert seconds is not None
    assert seconds > 0
