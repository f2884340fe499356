"""Disks of a move over QMP, at the source: backing layers are copied, tops are mirrored (the target: exports.py).

How one disk travels. Its backing layers are read only at the source: each is copied as it is, the lowest first, by a
job that reads a second node over the same file (`copy-disk0-b1`) and writes the export of the same name. Then the top
is mirrored with sync=top, and every write of the guest goes to both sides. This order matters: a write to the target's
top may have to fill a cluster up from the layer below, which must be there by then.

Names: node `target-disk0` (the target's export seen from the source), job `mirror-disk0` (top), job `layer-disk0-b1`.
Jobs are kept after their end (auto-dismiss off), so how one ended is never lost with an event.
"""

import asyncio
import math
from dataclasses import dataclass, field
from functools import partial

from kvmhv.config import Waits
from kvmhv.drivers.qemu.answers import Job
from kvmhv.drivers.qemu.disk_wire import DiskWire
from kvmhv.drivers.qemu.graph import Node, file_node, inet_address, layer_node
from kvmhv.drivers.qemu.keys import TLS_OBJECT
from kvmhv.drivers.qemu.nodes import node_names, top_nodes, used_bytes
from kvmhv.drivers.qemu.process import Process
from kvmhv.drivers.qemu.qmp import Event, Qmp, QmpLost, QmpRefused
from kvmhv.errors import HostError, KvmhvError
from kvmhv.model import DiskCopy, DiskFormat, Plan
from kvmhv.ports import MirrorStats

MIRROR = "mirror-"
LAYER = "layer-"
TARGET = "target-"
COPY = "copy-"
POLL_S = 0.1
BUFFER_MIN_BYTES = 64 * 1024
BUFFER_MAX_BYTES = 16 * 1024 * 1024
"""QEMU's own."""
NODE_NAME_MAX = 31
ENDS_OF_JOBS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
NBD_GREETING = b"NBDMAGICIHAVEOPT"
"""The first bytes of a server (the NBD protocol, "fixed newstyle negotiation")."""


def layers_arriving(copy: DiskCopy) -> int:
    """Return how many of a disk's layers travel, from the top: a base below them is there already."""
    return len(copy.source_layers) - (copy.base is not None)


@dataclass
class LayerCopy:
    """A backing layer's copy."""

    index: int
    total_bytes: int
    copied_bytes: int = 0


@dataclass
class DiskState:
    """One disk's copy: layers first, then the top's mirror."""

    copy: DiskCopy
    top: str
    """Its top node at the source: `disk0`, or another one after a storage move."""
    layers: list[LayerCopy]
    mirroring: bool = False
    error: str = ""


@dataclass
class Mirrors:
    """The copies of one VM's disks during one move."""

    disks: dict[str, DiskState] = field(default_factory=dict)
    tasks: list["asyncio.Task[None]"] = field(default_factory=list)
    wire: DiskWire = field(default_factory=lambda: DiskWire(None))

    async def close(self) -> None:
        """Stop to go from layer to layer; jobs in QEMU go on."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()


async def begin(qmp: Qmp, process: Process, plan: Plan, port: int, waits: Waits) -> Mirrors:
    """Begin to copy every disk of the plan; returns when the first jobs run. Raises HostError `mirror-failed`."""
    look = partial(process.sent_bytes, plan.target_address, (port,))
    mirrors = Mirrors(wire=DiskWire(None if plan.more_networks else look))
    tops = await top_nodes(qmp)
    try:
        for copy in plan.disk_copies:
            layers = await backing_layers(qmp, copy, tops[copy.disk])
            state = mirrors.disks[copy.disk] = DiskState(copy, tops[copy.disk], layers)
            if layers:
                task = _copy_disk(qmp, plan, port, state, mirrors.wire, waits)
                mirrors.tasks.append(asyncio.create_task(task, name=f"copy {copy.disk}"))
            else:
                await _mirror_top(qmp, plan, port, state, mirrors.wire, waits)
    except QmpRefused as error:
        await mirrors.close()
        raise failed(error.message) from error
    return mirrors


async def stats(qmp: Qmp, mirrors: Mirrors) -> tuple[MirrorStats, ...]:
    """Return each disk's progress, over all its layers. Raises HostError when QEMU does not answer."""
    under_way = await jobs(qmp)
    mirrors.wire.note()
    found = []
    for name, state in mirrors.disks.items():
        copied = sum(layer.copied_bytes for layer in state.layers)
        total = sum(max(layer.total_bytes, layer.copied_bytes) for layer in state.layers)
        top = under_way.get(MIRROR + name)
        if top is not None:
            copied += top.current_progress
            total += top.total_progress
        elif not state.mirroring:
            total += state.copy.travelling_bytes
        error = state.error or job_error(top, state.mirroring)
        found.append(
            MirrorStats(
                disk=name,
                copied_bytes=copied,
                total_bytes=total,
                ready=top is not None and top.status == "ready" and not error,
                error=error,
                sent_bytes=mirrors.wire.sent_bytes(name),
            )
        )
    return tuple(found)


async def finish(qmp: Qmp, disks: tuple[str, ...]) -> None:
    """End ready mirrors in sync and without pivot, and let the target's exports go. The guest is stopped.

    Raises HostError `mirror-failed`: a mirror was not in sync; the target's image is then of no use.
    """
    await asyncio.gather(*(finish_job(qmp, MIRROR + disk) for disk in disks))
    names = [f"{TARGET}{disk}" for disk in disks]
    await qmp.together(
        *(("job-dismiss", {"id": MIRROR + disk}) for disk in disks),
        *(("blockdev-del", {"node-name": name}) for name in names),
    )


async def undo(qmp: Qmp, timeout_s: float) -> None:
    """End every job of a move by force and remove its nodes; no error for what is not there.

    Raises QmpLost if they do not end in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            for job_id, job in (await jobs(qmp)).items():
                await end_by_force(qmp, job_id, job.status)
            for name in await node_names(qmp):
                if name.startswith((TARGET, COPY)):
                    await qmp.execute("blockdev-del", {"node-name": name})
    except TimeoutError:
        raise QmpLost("qemu-hangs", "the copies of the disks do not end", "end the VM's QEMU by hand") from None


# ---


async def backing_layers(qmp: Qmp, copy: DiskCopy, top: str) -> list[LayerCopy]:
    """Return the backing layers that travel with their allocated bytes, the lowest first."""
    indexes = range(layers_arriving(copy) - 1, 0, -1)
    if not indexes:
        return []
    used = await used_bytes(qmp)
    return [LayerCopy(index, used.get(layer_node(top, index), 0)) for index in indexes]


async def _copy_disk(qmp: Qmp, plan: Plan, port: int, state: DiskState, wire: DiskWire, waits: Waits) -> None:
    """Copy the backing layers, the lowest first, then begin the top's mirror; what fails is kept in `state.error`."""
    try:
        async with asyncio.timeout(plan.timeouts.storage_s):
            for layer in state.layers:
                await _copy_layer(qmp, plan, port, state, layer, wire, waits)
            await _mirror_top(qmp, plan, port, state, wire, waits)
    except TimeoutError:
        state.error = f"not copied in {plan.timeouts.storage_s:g} s"
    except KvmhvError as error:
        state.error = error.message


async def _copy_layer(
    qmp: Qmp, plan: Plan, port: int, state: DiskState, layer: LayerCopy, wire: DiskWire, waits: Waits
) -> None:
    name = layer_node(state.copy.disk, layer.index)
    async with wire.opens(state.copy.disk):
        await _add_target(qmp, plan, port, name, waits)
    await copy_layer(qmp, state, layer, TARGET + name, pace(plan.rule.bandwidth_bytes_per_s, len(plan.disk_copies)))
    wire.note()
    await qmp.execute("blockdev-del", {"node-name": TARGET + name})


async def copy_layer(qmp: Qmp, state: DiskState, layer: LayerCopy, target: str, pace_of_it: dict[str, int]) -> None:
    """Copy a backing layer as it is to a node. Raises HostError `mirror-failed`."""
    name = layer_node(state.copy.disk, layer.index)
    source: Node = {
        "driver": state.copy.source_layers[layer.index].format.value,
        "node-name": COPY + name,
        "file": file_node(state.top, layer.index),
        "read-only": True,
    }
    lowest = layer.index + 1 >= len(state.copy.source_layers)
    if state.copy.source_layers[layer.index].format is DiskFormat.QCOW2:
        source["backing"] = None if lowest else layer_node(state.top, layer.index + 1)
    await qmp.execute("blockdev-add", source)
    job_id = LAYER + name
    await qmp.execute(
        "blockdev-mirror",
        {
            "job-id": job_id,
            "device": COPY + name,
            "target": target,
            "sync": "full" if lowest else "top",
            **pace_of_it,
            "auto-dismiss": False,
        },
    )
    while True:
        job = (await jobs(qmp)).get(job_id)
        error = job_error(job, started=True)
        if job is None or error:
            raise failed(f"{name}: {error}")
        layer.copied_bytes, layer.total_bytes = job.current_progress, job.total_progress
        if job.status == "ready":
            break
        await asyncio.sleep(POLL_S)
    await finish_job(qmp, job_id)
    await qmp.together(("job-dismiss", {"id": job_id}), ("blockdev-del", {"node-name": COPY + name}))


async def _mirror_top(qmp: Qmp, plan: Plan, port: int, state: DiskState, wire: DiskWire, waits: Waits) -> None:
    disk = state.copy.disk
    async with wire.opens(disk):
        await _add_target(qmp, plan, port, disk, waits)
    await qmp.execute(
        "blockdev-mirror",
        {
            "job-id": MIRROR + disk,
            "device": state.top,
            "target": TARGET + disk,
            "sync": "top" if len(state.copy.target_layers) > 1 else "full",
            "copy-mode": "write-blocking",
            **pace(plan.rule.bandwidth_bytes_per_s, len(plan.disk_copies)),
            "auto-dismiss": False,
        },
    )
    state.mirroring = True


def pace(bandwidth_bytes_per_s: int, disks: int) -> dict[str, int]:
    """Return the limit of one of the copies that run at once; the guest's own writes are not held.

    A mirror reads as much as its buffer holds and then pauses until that much was allowed: the buffer (16 MiB if not
    told) holds what goes in a second, or a slow copy would look like one that stands still.
    """
    speed = bandwidth_bytes_per_s // max(1, disks)
    if not speed:
        return {}
    return {"speed": speed, "buf-size": max(BUFFER_MIN_BYTES, min(BUFFER_MAX_BYTES, speed))}


async def _add_target(qmp: Qmp, plan: Plan, port: int, export_name: str, waits: Waits) -> None:
    assert len(TARGET + export_name) <= NODE_NAME_MAX
    await _greeted(plan.target_address, port, waits.greeting_s)
    await qmp.execute(
        "blockdev-add",
        {
            "driver": "nbd",
            "node-name": TARGET + export_name,
            "server": {"type": "inet", **inet_address(plan, port)},
            "export": export_name,
            "tls-creds": TLS_OBJECT,
            # Zeroes travel as a request, not as data, and stay holes at the target; also those that somebody wrote.
            "discard": "unmap",
            "detect-zeroes": "unmap",
            "open-timeout": math.ceil(waits.handshake_s),
        },
    )


async def _greeted(ip: str, port: int, timeout_s: float) -> None:
    """Make sure that the target's NBD server answers, before QEMU waits for it.

    While QEMU connects, its main loop and so the guest stand still; a target that accepts and says nothing (its host
    hangs) would hold them for as long as TCP has patience. Raises HostError `mirror-failed`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(ip, port)
            try:
                await reader.readexactly(len(NBD_GREETING))
            finally:
                writer.close()
                await writer.wait_closed()
    except TimeoutError:
        raise failed(f"the target's NBD server ({ip} port {port}) said nothing in {timeout_s:g} s") from None
    except (OSError, EOFError) as error:
        raise failed(f"the target's NBD server ({ip} port {port}): {error}") from error


async def finish_job(qmp: Qmp, job_id: str) -> None:
    """End a ready mirror job in sync; its end is an event, whose name says whether it was in sync."""

    def ended(event: Event) -> bool:
        return event["event"] in ENDS_OF_JOBS and event["data"].get("device") == job_id

    try:
        with qmp.catch(ended) as end:
            await qmp.execute("block-job-cancel", {"device": job_id})
            event, _ = await qmp.wait(end, f"the end of {job_id}")
    except QmpRefused as error:
        raise failed(f"{job_id}: {error.description}") from error
    if event["event"] != "BLOCK_JOB_COMPLETED" or "error" in event["data"]:
        raise failed(f"{job_id}: {event['data'].get('error', 'it was not in sync')}")


async def end_by_force(qmp: Qmp, job_id: str, status: str) -> None:
    """End a job, whatever it does, and forget it."""
    while status != "concluded":
        try:
            await qmp.execute("block-job-cancel", {"device": job_id, "force": True})
        except QmpRefused as error:
            # It is just ending: looked at again below.
            if "not" not in error.description.lower() and "in use" not in error.description.lower():
                raise
        await asyncio.sleep(POLL_S / 5)
        job = (await jobs(qmp)).get(job_id)
        if job is None:
            return
        status = job.status
    await qmp.execute("job-dismiss", {"id": job_id})


async def jobs(qmp: Qmp) -> dict[str, Job]:
    """Return the jobs of moves by id."""
    found = await qmp.ask(tuple[Job, ...], "query-jobs")
    return {job.id: job for job in found if job.id.startswith((MIRROR, LAYER))}


def job_error(job: Job | None, started: bool) -> str:
    """Return why a job has ended before its time, empty if it has not."""
    if job is None:
        return "its job is gone" if started else ""
    if job.status == "concluded":
        return job.error or "it ended before its time"
    return ""


def failed(text: str) -> HostError:
    """Return the error of a copy."""
    return HostError("mirror-failed", f"copying a disk failed: {text}", "see both VMs' qemu.log; the guest runs on")
