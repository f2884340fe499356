"""core/vm_spec.py: what a VM may be, and that everything the guest sees is fixed."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhv.core import vm_spec
from kvmhv.errors import CallerError
from kvmhv.model import (
    DEFAULT_CPU,
    DEFAULT_MACHINE,
    GIB,
    MIB,
    DiskFormat,
    DiskSpec,
    Image,
    Layer,
    VmSpec,
)

FACTS = vm_spec.HostFacts(
    host="host1",
    cpus=2,
    memory_bytes=8 * GIB,
    machines=("pc-q35-7.2", "pc-q35-10.0", "pc-i440fx-7.2", "q35", "pc", "microvm", "none"),
    cpu_models=("qemu64", "Skylake-Client-v3", "max", "host"),
    switches=("lan", "dmz"),
    locations=("default", "fast"),
    vm_names=("taken",),
    macs=("52:54:00:00:00:01",),
)
SPEC = VmSpec(name="web01", memory_bytes=256 * MIB)
VM_ID = "0b5b3b0e-7d0e-4a39-9f5c-1f2f3c4d5e6f"


def refused(spec: VmSpec, facts: vm_spec.HostFacts = FACTS) -> CallerError:
    with pytest.raises(CallerError) as error:
        vm_spec.check(spec, facts)
    assert error.value.todo
    assert len(error.value.message) < 300
    return error.value


def spec(**changes: object) -> VmSpec:
    return msgspec.structs.replace(SPEC, **changes)


@pytest.mark.parametrize("name", ["a", "web01", "Web-01.example_x", "0", "a" * 63])
def test_good_names(name: str) -> None:
    vm_spec.check(spec(name=name), FACTS)


@pytest.mark.parametrize(
    "name",
    ["", " ", "web 01", "a" * 64, "a" * 300, "wéb", "веб", "-web", ".web", "_images", "a/b", "a\n", "a\0", "\u202ea"],
)
def test_bad_names(name: str) -> None:
    error = refused(spec(name=name))
    assert error.code == "name-invalid"
    assert "63" in error.todo


def test_a_name_that_is_taken() -> None:
    error = refused(spec(name="taken"))
    assert (error.code, error.http_status) == ("vm-exists", 409)


@pytest.mark.parametrize("memory_bytes", [MIB, 256 * MIB, 8 * GIB])
def test_good_memory(memory_bytes: int) -> None:
    vm_spec.check(spec(memory_bytes=memory_bytes), FACTS)


@pytest.mark.parametrize("memory_bytes", [0, -MIB, 1, MIB - 1, MIB + 1, 10 * 1024 * GIB, 8 * GIB + MIB])
def test_bad_memory(memory_bytes: int) -> None:
    assert refused(spec(memory_bytes=memory_bytes)).code == "memory-invalid"


def test_cpus_are_bounded_by_the_host_and_by_the_machine() -> None:
    vm_spec.check(spec(cpus=16), FACTS)
    for cpus in (0, -1, 17, 256):
        assert refused(spec(cpus=cpus)).code == "cpus-invalid"
    large = msgspec.structs.replace(FACTS, cpus=128)
    vm_spec.check(spec(cpus=255), large)
    assert refused(spec(cpus=256), large).code == "cpus-invalid"


@pytest.mark.parametrize("machine", [None, "pc-q35-7.2", "pc-q35-10.0"])
def test_good_machines(machine: str | None) -> None:
    vm_spec.check(spec(machine=machine), FACTS)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        ("q35", "unversioned"),
        ("pc", "unversioned"),
        ("microvm", "cannot move"),
        ("none", "no devices"),
        ("pc-i440fx-7.2", "q35"),
        ("pc-q35-9.9", "has no machine"),
        ("pc-q35-7.2,accel=kvm", "q35"),
        ("", "q35"),
    ],
)
def test_bad_machines(machine: str, reason: str) -> None:
    error = refused(spec(machine=machine or "?"))
    assert error.code == "machine-invalid"
    assert reason in error.message


@pytest.mark.parametrize("cpu", [None, DEFAULT_CPU, "x86-64-v3", "qemu64", "host"])
def test_good_cpus(cpu: str | None) -> None:
    vm_spec.check(spec(cpu=cpu), FACTS)


@pytest.mark.parametrize("cpu", ["pentium9", "qemu64,+svm", "x86-64-v9", "-cpu", "a" * 64])
def test_bad_cpus(cpu: str) -> None:
    assert refused(spec(cpu=cpu)).code == "cpu-invalid"


@pytest.mark.parametrize(
    "disk",
    [
        DiskSpec(size_bytes=512),
        DiskSpec(size_bytes=64 * 1024 * GIB),
        DiskSpec(size_bytes=GIB, format=DiskFormat.RAW, location="fast"),
        DiskSpec(size_bytes=GIB, backing="debian"),
        DiskSpec(backing="/srv/base.qcow2"),
        DiskSpec(file="/srv/x.raw", format=DiskFormat.RAW),
        DiskSpec(image="debian"),
    ],
)
def test_good_disks(disk: DiskSpec) -> None:
    vm_spec.check(spec(disks=(disk,)), FACTS)


@pytest.mark.parametrize(
    ("disk", "code"),
    [
        (DiskSpec(), "disk-spec-invalid"),
        (DiskSpec(size_bytes=0), "size-invalid"),
        (DiskSpec(size_bytes=513), "size-invalid"),
        (DiskSpec(size_bytes=64 * 1024 * GIB + 512), "size-invalid"),
        (DiskSpec(size_bytes=GIB, file="/x"), "disk-spec-invalid"),
        (DiskSpec(size_bytes=GIB, image="x"), "disk-spec-invalid"),
        (DiskSpec(image="x", file="/x"), "disk-spec-invalid"),
        (DiskSpec(image="x", backing="/x"), "disk-spec-invalid"),
        (DiskSpec(size_bytes=GIB, backing="x", format=DiskFormat.RAW), "disk-spec-invalid"),
        (DiskSpec(size_bytes=GIB, location="nfs"), "location-unknown"),
        (DiskSpec(file=""), "disk-spec-invalid"),
        (DiskSpec(file="/a\0b"), "disk-spec-invalid"),
        (DiskSpec(file="/" * 5000), "disk-spec-invalid"),
    ],
)
def test_bad_disks(disk: DiskSpec, code: str) -> None:
    error = refused(spec(disks=(DiskSpec(size_bytes=GIB), disk)))
    assert error.code == code
    assert "disk1" in error.message


def test_nine_disks_and_nine_nics_are_too_many() -> None:
    assert refused(spec(disks=(DiskSpec(size_bytes=GIB),) * 9)).code == "disk-spec-invalid"
    assert refused(spec(switches=("lan",) * 9)).code == "switch-unknown"


def test_switches_must_be_there() -> None:
    error = refused(spec(switches=("lan", "wan")))
    assert (error.code, error.http_status) == ("switch-unknown", 404)
    assert "dmz, lan" in error.todo


@pytest.mark.parametrize(
    "macs",
    [
        ("52:54:00:00:00:01",),  # another VM's
        ("52:54:00:00:00:02", "52:54:00:00:00:02"),
        ("01:00:5e:00:00:01",),  # multicast
        ("00:00:00:00:00:00",),
        ("52:54:00:00:00",),
        ("52-54-00-00-00-02",),
        ("52:54:00:00:00:0g",),
        ("52:54:00:00:00:02",) * 3,
    ],
)
def test_bad_macs(macs: tuple[str, ...]) -> None:
    assert refused(spec(switches=("lan", "lan"), macs=macs)).code == "mac-invalid"


@pytest.mark.parametrize("append", ["a\nb", "ü", "x" * 2049])
def test_bad_command_lines(append: str) -> None:
    assert refused(spec(append=append)).code == "append-invalid"


def test_the_vm_has_everything_that_the_guest_sees() -> None:
    wanted = spec(
        disks=(DiskSpec(size_bytes=GIB), DiskSpec(size_bytes=2 * GIB)),
        switches=("lan", "dmz"),
        macs=("52:54:00:AA:BB:CC",),
        cpus=2,
    )
    vm_spec.check(wanted, FACTS)
    layers = tuple((Layer(location="default", path=f"web01/disk{n}.qcow2", format=DiskFormat.QCOW2),) for n in range(2))
    vm = vm_spec.build(wanted, VM_ID, FACTS, ((GIB, layers[0]), (2 * GIB, layers[1])), None)
    assert (vm.id, vm.name, vm.machine, vm.cpu, vm.cpus, vm.epoch) == (
        VM_ID, "web01", DEFAULT_MACHINE, DEFAULT_CPU, 2, 0,
    )  # fmt: skip
    assert [(disk.name, disk.size_bytes, disk.pci_slot) for disk in vm.disks] == [
        ("disk0", GIB, 0x08), ("disk1", 2 * GIB, 0x09),
    ]  # fmt: skip
    assert [(nic.name, nic.switch, nic.pci_slot) for nic in vm.nics] == [("nic0", "lan", 0x10), ("nic1", "dmz", 0x11)]
    assert vm.nics[0].mac == "52:54:00:aa:bb:cc"
    assert vm.nics[1].mac.startswith("52:54:00:")
    assert vm == vm_spec.build(wanted, VM_ID, FACTS, ((GIB, layers[0]), (2 * GIB, layers[1])), None)


def test_a_made_mac_avoids_those_that_are_taken() -> None:
    wanted = spec(switches=("lan",))
    first = vm_spec.build(wanted, VM_ID, FACTS, (), None).nics[0].mac
    second = vm_spec.build(wanted, VM_ID, msgspec.structs.replace(FACTS, macs=(first,)), (), None).nics[0].mac
    assert first != second
    assert second.startswith("52:54:00:")


def test_an_image_with_a_disk_gives_disk0_unless_the_spec_uses_it() -> None:
    image = Image(name="debian", disk_format=DiskFormat.QCOW2, disk_virtual_bytes=GIB)
    more = DiskSpec(size_bytes=GIB)
    assert vm_spec.with_image(spec(disks=(more,)), image).disks == (DiskSpec(image="debian"), more)
    for used in (DiskSpec(image="debian"), DiskSpec(size_bytes=GIB, backing="debian")):
        assert vm_spec.with_image(spec(disks=(used,)), image).disks == (used,)
    assert vm_spec.with_image(SPEC, Image(name="kernel", kernel_bytes=1)) == SPEC


def test_which_layers_belong_to_a_vm() -> None:
    def layer(path: str) -> Layer:
        return Layer(location="default", path=path, format=DiskFormat.QCOW2)

    assert vm_spec.layer_path("web01", "disk0", 0, DiskFormat.QCOW2) == "web01/disk0.qcow2"
    assert vm_spec.layer_path("web01", "disk0", 2, DiskFormat.RAW) == "web01/disk0.base2.raw"
    assert vm_spec.belongs_to_vm("web01", 0, layer("elsewhere/x.qcow2"))
    assert vm_spec.belongs_to_vm("web01", 1, layer("web01/disk0.base1.qcow2"))
    assert not vm_spec.belongs_to_vm("web01", 1, layer("web01x/disk0.qcow2"))
    assert not vm_spec.belongs_to_vm("web01", 1, layer("_images/debian.qcow2"))


@given(
    st.builds(
        VmSpec,
        name=st.text(max_size=70),
        memory_bytes=st.integers(-1, 2**70) | st.sampled_from([MIB, GIB]),
        cpus=st.integers(-1, 300),
        machine=st.none() | st.text(max_size=20),
        cpu=st.none() | st.text(max_size=20),
        switches=st.lists(st.sampled_from(["lan", "dmz", "wan"]), max_size=10).map(tuple),
        macs=st.lists(st.text("0123456789abcdefABCDEF:", max_size=18), max_size=3).map(tuple),
        append=st.none() | st.text(max_size=20),
    )
)
def test_any_spec_is_built_or_refused(wanted: VmSpec) -> None:
    try:
        vm_spec.check(wanted, FACTS)
    except CallerError as error:
        assert error.code
        return
    vm = vm_spec.build(wanted, VM_ID, FACTS, (), None)
    slots = [device.pci_slot for device in (*vm.disks, *vm.nics)]
    assert len(set(slots)) == len(slots)
    assert len({nic.mac for nic in vm.nics}) == len(vm.nics)
