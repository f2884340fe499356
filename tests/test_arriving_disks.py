"""agent/arriving_disks.py: which disks a trusted host's offer may name."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmhv.agent import arriving_disks
from kvmhv.agent.vm_disks import VmDisks
from kvmhv.config import Waits, from_data
from kvmhv.drivers.storage.storage import Attached, Storage
from kvmhv.drivers.storage.volumes import DirectoryVolume
from kvmhv.errors import KvmhvError
from kvmhv.messages import Offer
from kvmhv.model import Access, Disk, DiskFormat, Layer, Plan, Vm
from tests.test_wire import MESSAGES

PLAN = next(message for message in MESSAGES if isinstance(message, Offer)).plan
SHARED = ("share",)


@pytest.fixture
def disks(tmp_path: Path) -> VmDisks:
    storage = Storage(from_data({"state_dir": str(tmp_path), "locations": {"alias": f"{tmp_path}/disks/"}}, "test"))
    share = DirectoryVolume(tmp_path / "share", Waits())
    storage.attach("share", Attached("nfs", share, "nfs:server:/vms", Access.DIRECTORY, "share"))
    nothing: Any = None
    return VmDisks(nothing, storage, nothing, None, nothing)


def vm(name: str, *layers: str, runtime: str = "") -> Vm:
    """A VM with one disk; a layer is LOCATION/PATH, the top first."""
    parts = [text.split("/", 1) for text in layers]
    made = tuple(Layer(location=where, path=path, format=DiskFormat.QCOW2) for where, path in parts)
    disk = Disk(name="disk0", size_bytes=4096, layers=made, pci_slot=8)
    return msgspec.structs.replace(PLAN.target_vm, id=name, name=name, disks=(disk,), runtime=runtime)


def offered(disks: VmDisks, coming: Vm, *others: Vm, copied: bool = False) -> str:
    """Return the refusal's code, empty for what is let in."""
    copies = tuple(msgspec.structs.replace(PLAN.disk_copies[0], disk=disk.name) for disk in coming.disks if copied)
    plan: Plan = msgspec.structs.replace(PLAN, target_vm=coming, disk_copies=copies)
    try:
        arriving_disks.check(plan, disks, others, SHARED)
    except KvmhvError as error:
        return error.code
    return ""


def test_what_is_copied_may_lie_anywhere_but_on_another_vms_image(disks: VmDisks) -> None:
    assert offered(disks, vm("evil", "default/evil/disk0.qcow2"), copied=True) == ""
    other = vm("web01", "default/web01/disk0.qcow2")
    for path in ("default/web01/disk0.qcow2", "alias/web01/disk0.qcow2"):
        assert offered(disks, vm("evil", path), other, copied=True) == "disk-in-use"


def test_what_is_not_copied_lies_where_the_source_was_shown_to_see_it(disks: VmDisks) -> None:
    assert offered(disks, vm("web01", "share/web01/disk0.qcow2", "share/base.qcow2")) == ""
    assert offered(disks, vm("evil", "default/web01/disk0.qcow2")) == "not-shared"
    assert offered(disks, vm("evil", "share/evil/disk0.qcow2", "default/secret.raw")) == "not-shared"
    assert offered(disks, vm("evil", "elsewhere/disk0.qcow2")) == "location-unknown"
    assert offered(disks, vm("evil", "share/../../etc/shadow")) == "path-invalid"


def test_an_image_of_another_vm_is_no_disk_and_no_base(disks: VmDisks) -> None:
    other = vm("web01", "share/web01/disk0.qcow2", "share/base.qcow2")
    assert offered(disks, vm("evil", "share/web01/disk0.qcow2"), other) == "disk-in-use"
    assert offered(disks, vm("evil", "share/evil/disk0.qcow2", "share/web01/disk0.qcow2"), other) == "disk-in-use"
    assert offered(disks, vm("evil", "share/base.qcow2"), other) == "disk-in-use"
    assert offered(disks, vm("web02", "share/web02/disk0.qcow2", "share/base.qcow2"), other) == ""
    gone = vm("old", "gone/disk0.qcow2")
    assert offered(disks, vm("web02", "share/web02/disk0.qcow2"), gone) == ""


def test_disks_of_another_program_are_its_own_to_open(disks: VmDisks) -> None:
    assert offered(disks, vm("guest", "outside//srv/disk0.qcow2", runtime="libvirt")) == ""
