"""The part of `Qemu` that storage moves use."""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from kvmhv.drivers.qemu import blocks, storage_move
from kvmhv.drivers.qemu.instance import Instance
from kvmhv.drivers.qemu.qmp import QmpLost
from kvmhv.drivers.qemu.storage_move import NewImage
from kvmhv.model import DiskCopy, Vm
from kvmhv.places import DiskPlace


class StorageMoves(Protocol):
    """Implements the storage moves of ports.Hypervisor, over what `Qemu` has."""

    async def copy_disks(
        self,
        vm: Vm,
        copies: tuple[DiskCopy, ...],
        disk_paths: Mapping[str, tuple[DiskPlace, ...]],
        bandwidth_bytes_per_s: int,
        timeout_s: float,
    ) -> None:
        """Begin to copy disks to their new images; what fails later is in `mirror_stats`."""
        instance = await self._instance(vm.id)
        disks = {disk.name: disk for disk in vm.disks}
        images = []
        for copy in copies:
            places = disk_paths[copy.disk]
            buffered = frozenset(place for place in places if not has_direct(place))
            images.append(NewImage(copy, disks[copy.disk], places, buffered))
        await instance.mirrors.close()
        instance.mirrors = await storage_move.begin(instance, images, bandwidth_bytes_per_s, timeout_s)

    async def hold_writes(self, vm_id: str, disks: tuple[str, ...], timeout_s: float) -> None:
        """Let the guest's disk requests wait, with old and new images alike and flushed."""
        await storage_move.hold(await self._instance(vm_id), disks, timeout_s)

    async def release_writes(self, vm_id: str) -> tuple[str, ...]:
        """Let the guest go on with the new images; returns the disks that QEMU left on their old ones."""
        instance = await self._instance(vm_id)
        stayed = await storage_move.release(instance)
        instance.mirrors = blocks.Mirrors()
        return stayed

    async def undo_copies(self, vm_id: str, timeout_s: float) -> None:
        """End the copies; the guest goes on with the old images. No error if there is no process."""
        if vm_id not in await self.known():
            return
        instance = await self._instance(vm_id)
        try:
            await storage_move.undo(instance, timeout_s)
        except QmpLost:
            if not instance.process.gone:
                raise
        instance.mirrors = blocks.Mirrors()

    async def known(self) -> tuple[str, ...]:
        """Ids of the VMs that have a live process."""
        ...

    async def _instance(self, vm_id: str) -> Instance: ...


def has_direct(path: DiskPlace) -> bool:
    """Whether a file's file system can be used without its page cache (O_DIRECT); the network drivers have none."""
    if not isinstance(path, Path):
        return True
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC))
    except OSError as error:
        return error.errno != errno.EINVAL
    return True
