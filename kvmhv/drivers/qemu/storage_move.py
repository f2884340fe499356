"""A storage move over QMP: disks are copied to new images inside one QEMU, which then takes these instead.

The job that mirrors a disk does not finish by itself (`auto-finalize` off): told to complete, it waits in `pending`
with source and target alike, the target flushed, and the guest's requests held back in QEMU. `job-finalize` puts the
new top node in the place of the old one and lets the requests go on; to cancel it lets them go on with the old one.
Nothing but the agent does either, so what is written down in between is true whatever dies.

A new image that is slow or hangs holds no guest write up while the mirror works in the background, until it has copied
everything once. Only then does a write wait for both sides, so that the copy comes to an end however much the guest
writes. A QEMU that cannot change that under way (before 8.2) lets writes wait from the beginning.
"""

import asyncio
import re
from dataclasses import dataclass

from kvmhv.drivers.qemu import blocks
from kvmhv.drivers.qemu.answers import ObjectProperty, Status
from kvmhv.drivers.qemu.blocks import DiskState, LayerCopy, Mirrors
from kvmhv.drivers.qemu.graph import Node, disk_nodes, layer_node, other_name, secret_id
from kvmhv.drivers.qemu.instance import Instance
from kvmhv.drivers.qemu.nodes import named, top_nodes
from kvmhv.drivers.qemu.qmp import Qmp, QmpLost, QmpRefused
from kvmhv.drivers.qemu.rundir import keep_json, read_json
from kvmhv.errors import HostError, KvmhvError
from kvmhv.model import Disk, DiskCopy
from kvmhv.places import DiskPlace, Lun

POLL_S = 0.02
CONVERGING_POLL_S = 0.2
SWITCHES_COPY_MODE = (8, 2, 0)
"""From here on `block-job-change` is there."""
HOLDS_REQUESTS = (8, 0, 0)
"""Older ones let requests that wait go on too early when the node is changed, and die of it if it is a raw one."""


@dataclass(frozen=True)
class NewImage:
    """Where a disk goes, as QEMU opens it."""

    copy: DiskCopy
    disk: Disk
    """As it will be defined."""
    places: tuple[DiskPlace, ...]
    buffered: frozenset[DiskPlace]


async def begin(instance: Instance, images: list[NewImage], bandwidth_bytes_per_s: int, timeout_s: float) -> Mirrors:
    """Begin to copy; what fails later is in the mirrors' state. Raises HostError `mirror-failed`."""
    qmp = instance.qmp
    await remove_unused(qmp)
    tops = await top_nodes(qmp)
    new_tops = {disk: other_name(disk, top) for disk, top in tops.items() if disk in {one.copy.disk for one in images}}
    keep_json(instance.directory.new_tops, new_tops)
    mirrors = Mirrors()
    pace = blocks.pace(bandwidth_bytes_per_s, len(images))
    for image in images:
        top = tops.get(image.copy.disk)
        if top is None:
            raise blocks.failed(f"QEMU has no {image.copy.disk}")
        layers = await blocks.backing_layers(qmp, image.copy, top)
        state = mirrors.disks[image.copy.disk] = DiskState(image.copy, top, layers)
        task = asyncio.create_task(_copy(qmp, image, state, pace, timeout_s), name=f"copy {image.copy.disk}")
        mirrors.tasks.append(task)
    return mirrors


async def hold(instance: Instance, disks: tuple[str, ...], timeout_s: float) -> None:
    """Let every mirror come to its end and wait there, the guest's requests with it. Raises HostError `mirror-failed`.

    After an error `undo` is to be called.
    """
    qmp = instance.qmp
    names = [blocks.MIRROR + disk for disk in disks]
    try:
        async with asyncio.timeout(timeout_s):
            await _write_to_both(qmp, names)
            if qmp.version < HOLDS_REQUESTS and (await qmp.ask(Status, "query-status")).running:
                instance.directory.held_mark.touch()
                await qmp.execute("stop")
            await qmp.together(*(("job-complete", {"id": name}) for name in names))
            await _pending(qmp, names)
    except QmpRefused as error:
        raise blocks.failed(error.message) from error
    except TimeoutError:
        raise blocks.failed(f"old and new images were not alike within {timeout_s:g} s") from None


async def release(instance: Instance, timeout_s: float) -> tuple[str, ...]:
    """Take the new images and let the guest's requests go on; the old ones are closed. Can be repeated.

    Returns the disks that QEMU left on their old images. Raises QmpLost.
    """
    qmp = instance.qmp
    for name, job in (await blocks.jobs(qmp)).items():
        if job.status == "pending":
            await qmp.execute("job-finalize", {"id": name})
    await _ended(qmp, timeout_s)
    await _run_on(instance)
    wanted = read_json(instance.directory.new_tops, dict[str, str])
    if wanted is None:
        raise HostError("run-dir", f"{instance.directory.new_tops} cannot be read", "end the VM's QEMU by hand")
    now = await top_nodes(qmp)
    await remove_unused(qmp)
    return tuple(disk for disk, top in wanted.items() if now.get(disk) != top)


async def undo(instance: Instance, timeout_s: float) -> None:
    """End every copy; the guest goes on with the old images, the new ones are closed. Can be repeated.

    Raises QmpLost `qemu-hangs` if they do not end in time.
    """
    await instance.mirrors.close()
    try:
        async with asyncio.timeout(timeout_s):
            for name, job in (await blocks.jobs(instance.qmp)).items():
                await blocks.end_by_force(instance.qmp, name, job.status)
            await _run_on(instance)
            await remove_unused(instance.qmp)
    except TimeoutError:
        raise QmpLost("qemu-hangs", "the copies of the disks do not end", "see that both locations answer") from None


async def remove_unused(qmp: Qmp) -> None:
    """Close the images that no device uses: new ones of a move that was undone, old ones of one that is done."""
    names = [node.node_name for node in await named(qmp)]
    objects = [one.name for one in await qmp.ask(tuple[ObjectProperty, ...], "qom-list", {"path": "/objects"})]
    for disk, top in (await top_nodes(qmp)).items():
        prefix = re.escape(other_name(disk, top))
        copies = [name for name in names if name.startswith(f"{blocks.COPY}{disk}-b")]
        nodes = [name for name in names if re.fullmatch(rf"{prefix}(-b\d+)?(-file)?", name)]
        for name in (*copies, *sorted(nodes, key=_depth)):
            await qmp.execute("blockdev-del", {"node-name": name})
        for name in objects:
            if re.fullmatch(rf"{prefix}(-b\d+)?-file-secret", name):
                await qmp.execute("object-del", {"id": name})


# ---


async def _copy(qmp: Qmp, image: NewImage, state: DiskState, pace: dict[str, int], timeout_s: float) -> None:
    """Copy the backing layers, the lowest first, then begin the top's mirror; what fails is kept in `state.error`."""
    name = other_name(image.copy.disk, state.top)
    try:
        async with asyncio.timeout(timeout_s):
            for layer in state.layers:
                await _open(qmp, image, name, layer.index)
                await _copy_layer(qmp, image, name, state, layer, pace)
            await _open(qmp, image, name, 0)
            await qmp.execute(
                "blockdev-mirror",
                {
                    "job-id": blocks.MIRROR + image.copy.disk,
                    "device": state.top,
                    "target": name,
                    "sync": "top" if len(image.places) > 1 else "full",
                    "copy-mode": "background" if qmp.version >= SWITCHES_COPY_MODE else "write-blocking",
                    **pace,
                    "auto-finalize": False,
                    "auto-dismiss": False,
                },
            )
            state.mirroring = True
            await _converged(qmp, blocks.MIRROR + image.copy.disk)
    except TimeoutError:
        state.error = f"not copied in {timeout_s:g} s"
    except KvmhvError as error:
        state.error = error.message


async def _converged(qmp: Qmp, job_id: str) -> None:
    """Wait until all is copied once; from then on the guest writes no faster than the new image takes it."""
    first_bytes = 0
    while True:
        job = (await blocks.jobs(qmp)).get(job_id)
        if job is None or job.status != "running":
            return
        first_bytes = first_bytes or job.total_progress
        if first_bytes and job.current_progress >= first_bytes:
            await _write_to_both(qmp, [job_id])
            return
        await asyncio.sleep(CONVERGING_POLL_S)


async def _write_to_both(qmp: Qmp, names: list[str]) -> None:
    """Let every write of the guest go to the new image too; from the beginning it does where QEMU cannot change it."""
    if qmp.version >= SWITCHES_COPY_MODE:
        change = {"type": "mirror", "copy-mode": "write-blocking"}
        await qmp.together(*(("block-job-change", {"id": name, **change}) for name in names))


async def _copy_layer(
    qmp: Qmp, image: NewImage, name: str, state: DiskState, layer: LayerCopy, pace: dict[str, int]
) -> None:
    await blocks.copy_layer(qmp, state, layer, layer_node(name, layer.index), pace)
    sealed = {**_nodes(image, name, layer.index)[1], "read-only": True}
    await qmp.execute("blockdev-reopen", {"options": [sealed]})


def _nodes(image: NewImage, name: str, index: int) -> list[Node]:
    """Return a layer's file node and format node."""
    disk = Disk(name=name, size_bytes=image.disk.size_bytes, layers=image.disk.layers, pci_slot=image.disk.pci_slot)
    nodes = disk_nodes(disk, image.places, arriving=len(image.places), buffered=image.buffered)
    at = 2 * (len(image.places) - 1 - index)
    return nodes[at : at + 2]


async def _open(qmp: Qmp, image: NewImage, name: str, index: int) -> None:
    place = image.places[index]
    if isinstance(place, Lun) and place.user:
        secret = {"qom-type": "secret", "id": secret_id(name, index), "format": "raw", "file": place.secret_file}
        await qmp.execute("object-add", secret)
    for node in _nodes(image, name, index):
        await qmp.execute("blockdev-add", node)


async def _pending(qmp: Qmp, names: list[str]) -> None:
    """Wait until all jobs hold. Raises HostError `mirror-failed` when one has ended."""
    while True:
        jobs = await blocks.jobs(qmp)
        for name in names:
            error = blocks.job_error(jobs.get(name), started=True)
            if error:
                raise blocks.failed(f"{name}: {error}")
        if all(jobs[name].status == "pending" for name in names):
            return
        await asyncio.sleep(POLL_S)


async def _ended(qmp: Qmp, timeout_s: float) -> None:
    """Wait until every job has ended. Raises QmpLost `qemu-hangs`."""
    try:
        async with asyncio.timeout(timeout_s):
            while under_way := await blocks.jobs(qmp):
                for name, job in under_way.items():
                    if job.status == "concluded":
                        await qmp.execute("job-dismiss", {"id": name})
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise QmpLost("qemu-hangs", "QEMU does not take the new images", "end the VM's QEMU by hand") from None


def _depth(name: str) -> tuple[int, bool]:
    """Order nodes so that each comes before those that it stands on."""
    found = re.search(r"-b(\d+)", name)
    return int(found[1]) if found else 0, name.endswith("-file")


async def _run_on(instance: Instance) -> None:
    """Let a guest run again that `hold` has stopped."""
    if instance.directory.held_mark.exists():
        await instance.qmp.execute("cont")
        instance.directory.held_mark.unlink()
