from pathlib import Path

import msgspec
import pytest

from kvmhv.drivers.qemu.argv import BALLOON_SLOT, ENTROPY_SLOT, PCI_SLOT_LAST, Launch, build, check_slots, cpu_argument
from kvmhv.drivers.qemu.rundir import VmDir
from kvmhv.errors import CallerError
from kvmhv.model import MIB, Accel, DirectKernel, Disk, DiskFormat, Layer, Nic, Vm

VM_ID = "5d6f9b1e-0f0e-4c39-9d3c-7a1f0f2b1c11"
RUN = Path("/run/kvmhv")
DIRECTORY = f"/run/kvmhv/vm/{VM_ID}"


def layer(path: str, image_format: str) -> Layer:
    return Layer(location="default", path=path, format=DiskFormat(image_format))


VM = Vm(
    id=VM_ID,
    name="web01",
    memory_bytes=256 * MIB,
    cpus=2,
    disks=(
        Disk(
            name="disk0",
            size_bytes=64 * MIB,
            layers=(layer("web01/disk0.qcow2", "qcow2"), layer("base.raw", "raw")),
            pci_slot=4,
        ),
    ),
    nics=(Nic(name="nic0", switch="lan", mac="52:54:00:12:34:56", pci_slot=5),),
)
LAUNCH = Launch(
    vm=VM,
    binary="/usr/bin/qemu-system-x86_64",
    accel=Accel.TCG,
    directory=VmDir(RUN, VM_ID),
    disk_paths={"disk0": (Path("/disks/web01/disk0.qcow2"), Path("/disks/base.raw"))},
    taps={"nic0": "kv0123456789n0"},
)


WHOLE = [
    "/usr/bin/qemu-system-x86_64",
    "-no-user-config",
    "-nodefaults",
    "-name",
    "guest=web01,debug-threads=on",
    "-uuid",
    VM_ID,
    "-machine",
    "pc-q35-7.2,accel=tcg,usb=off,vmport=off,smm=off,dump-guest-core=off",
    "-cpu",
    "qemu64,+cx16,+lahf-lm,+popcnt,+pni,+sse4.1,+sse4.2,+ssse3,-svm,enforce",
    "-smp",
    "cpus=2,sockets=1,cores=2,threads=1,maxcpus=2",
    "-m",
    "size=268435456B",
    "-rtc",
    "base=utc",
    "-global",
    "ICH9-LPC.disable_s3=1",
    "-global",
    "ICH9-LPC.disable_s4=1",
    "-boot",
    "strict=on",
    "-display",
    "none",
    "-vga",
    "none",
    "-chardev",
    f"socket,id=qmp,path={DIRECTORY}/qmp.sock,server=on,wait=off",
    "-mon",
    "chardev=qmp,mode=control",
    "-chardev",
    f"socket,id=console,path={DIRECTORY}/console.sock,server=on,wait=off,logfile={DIRECTORY}/console.log,logappend=on",
    "-serial",
    "chardev:console",
    "-blockdev",
    '{"driver": "file", "node-name": "disk0-b1-file", "filename": "/disks/base.raw", "aio": "threads", '
    '"cache": {"direct": true, "no-flush": false}, "discard": "unmap", "auto-read-only": true}',
    "-blockdev",
    '{"driver": "raw", "node-name": "disk0-b1", "file": "disk0-b1-file", "read-only": true, '
    '"cache": {"direct": true, "no-flush": false}, "discard": "unmap"}',
    "-blockdev",
    '{"driver": "file", "node-name": "disk0-file", "filename": "/disks/web01/disk0.qcow2", "aio": "threads", '
    '"cache": {"direct": true, "no-flush": false}, "discard": "unmap"}',
    "-blockdev",
    '{"driver": "qcow2", "node-name": "disk0", "file": "disk0-file", "read-only": false, '
    '"cache": {"direct": true, "no-flush": false}, "discard": "unmap", "backing": "disk0-b1"}',
    "-device",
    "virtio-blk-pci,id=disk0-device,drive=disk0,serial=disk0,bus=pcie.0,addr=0x4,bootindex=1,"
    "werror=stop,rerror=stop,write-cache=on",
    "-netdev",
    "tap,id=nic0,ifname=kv0123456789n0,script=no,downscript=no,vhost=off",
    "-device",
    "virtio-net-pci,id=nic0-device,netdev=nic0,mac=52:54:00:12:34:56,bus=pcie.0,addr=0x5,romfile=",
    "-device",
    "virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x1d",
    "-object",
    "rng-random,id=entropy0,filename=/dev/urandom",
    "-device",
    "virtio-rng-pci,id=rng0,rng=entropy0,bus=pcie.0,addr=0x1e,romfile=",
    "-msg",
    "timestamp=on",
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
]


def with_vm(**changes: object) -> Launch:
    return msgspec.structs.replace(LAUNCH, vm=msgspec.structs.replace(VM, **changes))


def value_of(argv: list[str], option: str) -> list[str]:
    return [argv[index + 1] for index, argument in enumerate(argv) if argument == option]


def test_the_whole_command_line() -> None:
    assert build(LAUNCH) == WHOLE


def test_a_balloon_that_takes_back_what_the_guest_frees() -> None:
    assert "free-page-reporting" not in " ".join(build(LAUNCH))
    argv = build(with_vm(free_page_reporting=True))
    assert argv[WHOLE.index("virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x1d")] == (
        "virtio-balloon-pci,id=balloon0,bus=pcie.0,addr=0x1d,free-page-reporting=on"
    )
    assert len(argv) == len(WHOLE)


def test_the_target_builds_the_same_machine_and_waits() -> None:
    arriving = build(msgspec.structs.replace(LAUNCH, incoming=True))
    assert arriving == [*build(LAUNCH), "-incoming", "defer", "-S"]


def test_layers_that_a_move_writes_are_open_for_writing() -> None:
    argv = build(msgspec.structs.replace(LAUNCH, incoming=True, arriving={"disk0": 2}))
    writable = [node for node in value_of(argv, "-blockdev") if '"read-only": false' in node]
    assert [node.split('"node-name": ')[1].split(",")[0] for node in writable] == ['"disk0-b1"', '"disk0"']


def test_only_the_top_is_written_when_only_the_top_travels() -> None:
    argv = build(msgspec.structs.replace(LAUNCH, incoming=True, arriving={"disk0": 1}))
    assert argv == [*build(LAUNCH), "-incoming", "defer", "-S"]


def test_a_disk_without_backing_says_so() -> None:
    disk = Disk(name="disk0", size_bytes=MIB, layers=(layer("a", "qcow2"),), pci_slot=4)
    launch = msgspec.structs.replace(with_vm(disks=(disk,)), disk_paths={"disk0": (Path("/a"),)})
    assert '"backing": null' in value_of(build(launch), "-blockdev")[-1]


def test_a_file_system_without_o_direct() -> None:
    argv = build(msgspec.structs.replace(LAUNCH, buffered=frozenset({Path("/disks/base.raw")})))
    assert ['"direct": true' in node for node in value_of(argv, "-blockdev")] == [False, False, True, True]


def test_a_kernel_that_belongs_to_the_vm() -> None:
    kernel = DirectKernel(append="console=ttyS0 quiet", kernel_sha256="00", kernel_bytes=1)
    launch = msgspec.structs.replace(with_vm(kernel=kernel), kernel_paths=(Path("/k"), Path("/i")))
    argv = build(launch)
    assert argv[argv.index("-kernel") :][:6] == ["-kernel", "/k", "-initrd", "/i", "-append", "console=ttyS0 quiet"]
    argv = build(msgspec.structs.replace(launch, kernel_paths=(Path("/k"), None)))
    assert "-initrd" not in argv


def test_commas_in_paths_are_escaped_where_qemu_splits_at_them() -> None:
    argv = build(msgspec.structs.replace(LAUNCH, directory=VmDir(Path("/run/a,b"), VM_ID)))
    assert f"socket,id=qmp,path=/run/a,,b/vm/{VM_ID}/qmp.sock,server=on,wait=off" in argv


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"nics": (Nic(name="nic0", switch="lan", mac="52:54:00:12:34:56", pci_slot=4),)}, "pci-slot"),
        ({"nics": (Nic(name="nic0", switch="lan", mac="52:54:00:12:34:56", pci_slot=BALLOON_SLOT),)}, "pci-slot"),
        ({"nics": (Nic(name="nic0", switch="lan", mac="52:54:00:12:34:56", pci_slot=0),)}, "pci-slot"),
        ({"nics": (Nic(name="nic1", switch="lan", mac="52:54:00:12:34:56", pci_slot=6),)}, "vm-invalid"),
        ({"disks": (Disk(name="disk1", size_bytes=1, layers=(layer("a", "raw"),), pci_slot=7),)}, "vm-invalid"),
        ({"kernel": DirectKernel(kernel_sha256="00", kernel_bytes=1)}, "vm-invalid"),
    ],
)
def test_a_wrong_definition_is_refused(changes: dict[str, object], code: str) -> None:
    with pytest.raises(CallerError) as caught:
        build(with_vm(**changes))
    assert caught.value.code == code


def test_every_slot_that_is_for_devices_may_be_used() -> None:
    slots = range(1, PCI_SLOT_LAST + 1)
    nics = tuple(Nic(name=f"nic{slot}", switch="lan", mac="52:54:00:12:34:56", pci_slot=slot) for slot in slots)
    check_slots(msgspec.structs.replace(VM, disks=(), nics=nics))
    assert not {BALLOON_SLOT, ENTROPY_SLOT, 0, 0x1F} & set(slots)


@pytest.mark.parametrize(
    ("cpu", "argument"),
    [
        ("Skylake-Server-v4", "Skylake-Server-v4,enforce"),
        ("EPYC,-svm,enforce", "EPYC,-svm,enforce"),
    ],
)
def test_other_cpus_are_passed_through_and_enforced(cpu: str, argument: str) -> None:
    assert cpu_argument(cpu) == argument
