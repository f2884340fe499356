"""agent/owners.py: two hosts and the records beside the disks that both see."""

import asyncio
import errno
from pathlib import Path

import msgspec
import pytest

from kvmhv.agent.owners import Owners
from kvmhv.config import Waits, from_data
from kvmhv.drivers.storage.storage import Attached, Storage
from kvmhv.drivers.storage.volumes import DirectoryVolume
from kvmhv.errors import KvmhvError, Refused
from kvmhv.model import Access, Disk, DiskFormat, Layer, Vm

LAYER = Layer(location="share", path="2", format=DiskFormat.RAW)
VM = Vm(
    id="11111111-2222-3333-4444-555555555555",
    name="web01",
    memory_bytes=1 << 27,
    cpus=1,
    disks=(Disk(name="disk0", pci_slot=3, size_bytes=1 << 20, layers=(LAYER,)),),
)


def host(number: int, tmp_path: Path) -> Owners:
    """A host that sees `tmp_path`/share."""
    (tmp_path / "share").mkdir(exist_ok=True)
    storage = Storage(from_data({"state_dir": str(tmp_path / f"host{number}")}, "test"))
    volume = DirectoryVolume(tmp_path / "share", Waits())
    storage.attach("share", Attached("dir", volume, "share", Access.DIRECTORY, "share"))
    return Owners(f"host{number}", f"id{number}", storage)


async def outcome(of: "asyncio.Future[None]") -> str:
    try:
        await of
    except KvmhvError as error:
        return error.code
    return ""


@pytest.mark.parametrize("again", range(5))
async def test_of_hosts_that_take_one_lun_at_once_exactly_one_has_it(tmp_path: Path, again: int) -> None:
    hosts = [host(number, tmp_path) for number in range(4)]
    taking = (one.take(LAYER, f"vm-of-{number}", "web01", 0) for number, one in enumerate(hosts))
    codes = await asyncio.gather(*(outcome(asyncio.ensure_future(one)) for one in taking))
    assert sorted(codes) == ["", "disk-owned", "disk-owned", "disk-owned"]
    owner = msgspec.json.decode((tmp_path / "share/2.owner").read_bytes())
    assert owner["vm_id"] == f"vm-of-{codes.index('')}"


async def test_a_disk_that_another_host_owns_is_not_deleted(tmp_path: Path) -> None:
    here, there = host(1, tmp_path), host(2, tmp_path)
    await here.claim_to_remove(VM)  # never started: there is no record, and none is made
    assert not (tmp_path / "share/2.owner").exists()
    await there.claim(VM, take_over=False)
    with pytest.raises(Refused) as refused:
        await here.claim_to_remove(VM)
    assert (refused.value.code, "--keep-disks" in refused.value.todo) == ("vm-owned-elsewhere", True)
    await there.let_go(VM)
    await here.claim_to_remove(VM)
    with pytest.raises(Refused) as refused:
        await there.claim(VM, take_over=False)
    assert refused.value.code == "vm-owned-elsewhere"


async def test_a_disk_that_another_vm_was_last_on_is_not_deleted(tmp_path: Path) -> None:
    here, there = host(1, tmp_path), host(2, tmp_path)
    other = msgspec.structs.replace(VM, id="99999999-2222-3333-4444-555555555555", name="other")
    await there.claim(other, take_over=False)
    await there.let_go(other)
    with pytest.raises(Refused) as refused:
        await here.claim_to_remove(VM)
    assert refused.value.code == "disk-owned"


async def test_a_disk_on_a_full_share_can_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = host(1, tmp_path), host(2, tmp_path)
    await here.claim(VM, take_over=False)
    await here.let_go(VM)

    def full(*_swap: object) -> bool:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DirectoryVolume, "swap_record", full)
    await here.claim_to_remove(VM)
    monkeypatch.undo()
    await there.claim(VM, take_over=False)
    monkeypatch.setattr(DirectoryVolume, "swap_record", full)
    with pytest.raises(Refused):
        await here.claim_to_remove(VM)
