"""The part of `Qemu` that storage moves and the watch on disk requests use."""

from collections.abc import Mapping
from typing import Protocol

from kvmhv.config import Config
from kvmhv.drivers.qemu import blocks, direct, requests, storage_move
from kvmhv.drivers.qemu.instance import Instance
from kvmhv.drivers.qemu.qmp import QmpLost
from kvmhv.drivers.qemu.storage_move import NewImage
from kvmhv.model import DiskCopy, DiskIo, Vm
from kvmhv.places import DiskPlace


class StorageMoves(Protocol):
    """Implements the storage moves of ports.Hypervisor, over what `Qemu` has."""

    _config: Config

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
            buffered = await direct.buffered({copy.disk: places}, self._config.waits.share_answer_s)
            images.append(NewImage(copy, disks[copy.disk], places, buffered))
        await instance.mirrors.close()
        instance.mirrors = await storage_move.begin(instance, images, bandwidth_bytes_per_s, timeout_s)

    async def hold_writes(self, vm_id: str, disks: tuple[str, ...], timeout_s: float) -> None:
        """Let the guest's disk requests wait, with old and new images alike and flushed."""
        await storage_move.hold(await self._instance(vm_id), disks, timeout_s)

    async def release_writes(self, vm_id: str) -> tuple[str, ...]:
        """Let the guest go on with the new images; returns the disks that QEMU left on their old ones."""
        instance = await self._instance(vm_id)
        stayed = await storage_move.release(instance, self._config.waits.release_s)
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

    async def disk_io(self, vm: Vm) -> dict[str, DiskIo]:
        """Look how far the guest's requests to each disk are; also while its storage is away."""
        return await requests.look((await self._instance(vm.id)).qmp, vm)

    async def known(self) -> tuple[str, ...]:
        """Ids of the VMs that have a live process."""
        ...

    async def _instance(self, vm_id: str) -> Instance: ...
