"""What kvmhv reads in libvirt's XML, and where an arriving disk's image may be made. No libvirt is needed."""

from pathlib import Path

import msgspec
import pytest

from kvmhv.drivers.libvirt import arrival
from kvmhv.drivers.libvirt.definition import Domain, domain_of, needs_of, paths_of, vm_of
from kvmhv.errors import HostError
from kvmhv.messages import Enquire
from kvmhv.model import OUTSIDE, Accel, DiskFormat, MoveRequest

XML = """<domain type='kvm' id='3'>
  <name>db01</name><uuid>71282b6f-ce60-4a46-b16e-db166c3fad53</uuid>
  <memory unit='KiB'>2097152</memory><vcpu placement='static'>2</vcpu>
  <os><type arch='x86_64' machine='pc-q35-10.0'>hvm</type>
    <loader readonly='yes' type='pflash'>/usr/share/OVMF.fd</loader></os>
  <cpu mode='custom' match='exact'><model fallback='forbid'>Skylake-Client-IBRS</model></cpu>
  <devices>
    <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/images/db01.qcow2'/>
      <backingStore type='file'><format type='raw'/><source file='/images/base.raw'/><backingStore/></backingStore>
      <target dev='vda' bus='virtio'/></disk>
    <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/db'/>
      <target dev='vdb' bus='virtio'/></disk>
    <disk type='network' device='disk'><source protocol='rbd' name='pool/db'/><target dev='vdc' bus='virtio'/></disk>
    <disk type='file' device='cdrom'><source file='/images/media.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/images/shared.raw'/>
      <target dev='vdd' bus='virtio'/><shareable/></disk>
    <interface type='network'><mac address='52:54:00:11:22:33'/><source network='a network of many words'/></interface>
    <interface type='bridge'><mac address='52:54:00:11:22:34'/><source bridge='lan'/></interface>
    <hostdev mode='subsystem' type='pci'/>
  </devices>
</domain>"""
KEPT = Domain(xml=XML, persistent=True, autostart=True)
VM = vm_of(KEPT, {"vda": 8 << 30})


def test_a_domain_is_a_vm_of_its_own_kind() -> None:
    assert (VM.name, VM.runtime, VM.memory_bytes, VM.cpus) == ("db01", "libvirt", 2 << 30, 2)
    assert (VM.machine, VM.cpu) == ("pc-q35-10.0", "Skylake-Client-IBRS")
    assert domain_of(VM) == KEPT


def test_only_what_the_guest_alone_writes_is_its_disk() -> None:
    assert [disk.name for disk in VM.disks] == ["vda", "vdb"]
    assert [(layer.location, layer.path, layer.format) for layer in VM.disks[0].layers] == [
        (OUTSIDE, "/images/db01.qcow2", DiskFormat.QCOW2),
        (OUTSIDE, "/images/base.raw", DiskFormat.RAW),
    ]
    assert VM.disks[0].size_bytes == 8 << 30
    assert paths_of(XML)["sda"] == ("/images/media.iso",)


def test_what_another_host_must_have() -> None:
    needs = needs_of(XML)
    assert needs.accel is Accel.KVM
    assert needs.bridges == ("lan",)
    assert needs.networks == ("a network of many words",)
    assert needs.files == ("/images/media.iso", "/images/shared.raw", "/usr/share/OVMF.fd")
    assert needs.host_devices == 1


def test_it_passes_the_border_between_two_hosts() -> None:
    asked = Enquire(vm=VM, request=MoveRequest(vm=VM.name, target="host2"))
    assert msgspec.json.decode(msgspec.json.encode(asked), type=Enquire).vm == VM


@pytest.mark.parametrize("path", ["/etc/cron.d/x", "/images/../etc/x", "images/x", "/images2/x"])
def test_another_host_does_not_say_where_images_are_made(path: str) -> None:
    assert not arrival.may_be_made(Path(path), (Path("/images"),))
    assert arrival.may_be_made(Path("/images/below/x.qcow2"), (Path("/images"),))


def names(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.iterdir())


async def test_images_are_made_all_or_none_and_never_over_a_file(tmp_path: Path) -> None:
    xml = XML.replace("/images/", f"{tmp_path}/").replace("/dev/vg/db", f"{tmp_path}/db.raw")
    vm = vm_of(Domain(xml=xml, persistent=True, autostart=False), {"vda": 1 << 20, "vdb": 1 << 20})
    (tmp_path / "db.raw").write_text("somebody's")
    with pytest.raises(HostError, match="file-exists"):
        await arrival.make_images(vm, ("vda", "vdb"), (tmp_path,), 30.0)
    assert names(tmp_path) == ["db.raw"]
    assert (tmp_path / "db.raw").read_text() == "somebody's"
    (tmp_path / "db.raw").unlink()
    await arrival.make_images(vm, ("vda", "vdb"), (tmp_path,), 30.0)
    assert names(tmp_path) == ["db.raw", "db01.qcow2"]
    used = frozenset({str(tmp_path / "db.raw")})
    assert arrival.remove_images(vm, ("vda", "vdb"), used) == (str(tmp_path / "db.raw"),)
    assert names(tmp_path) == ["db.raw"]
