"""What a running QEMU says of its VM before a move."""

import asyncio

from kvmhv.drivers.qemu import answers, page_sample, process
from kvmhv.drivers.qemu.dirty_rate import short as sampled_dirty_rate
from kvmhv.drivers.qemu.graph import layer_node
from kvmhv.drivers.qemu.instance import Instance
from kvmhv.drivers.qemu.nodes import top_nodes, used_bytes
from kvmhv.model import Vm, VmFacts


async def read(instance: Instance, vm: Vm, *, dirty_rate: bool, methods: tuple[str, ...] | None) -> VmFacts:
    """Read what the check of a move needs; a dirty rate takes the time to sample it.

    `methods`: how QEMU can compress memory, to see how far it shrinks; None: nobody wants to know.
    """
    qmp, pid = instance.qmp, instance.process.pid
    said = await qmp.together(("query-status", {}), ("query-migrate", {}))
    running = qmp.read(answers.Status, said[0], "query-status").running
    migration = qmp.read(answers.Migration, said[1], "query-migrate")
    used = await used_bytes(qmp) if vm.disks else {}
    tops = await top_nodes(qmp) if vm.disks else {}
    sampled = None if running else 0.0
    if running and dirty_rate:
        sampled = await sampled_dirty_rate(qmp)
    elif running:
        await instance.dirty_sample.begin(qmp)
    samples = await asyncio.to_thread(page_sample.samples, pid, vm.memory_bytes, methods) if methods is not None else ()
    return VmFacts(
        running=running,
        qemu_version=qmp.version,
        accel=instance.accel,
        memory_used_bytes=await asyncio.to_thread(process.guest_memory_bytes, pid, vm.memory_bytes),
        dirty_bytes_per_s=sampled,
        blockers=migration.blocked_reasons,
        compression=samples,
        disk_used_bytes={
            disk.name: sum(used.get(layer_node(tops[disk.name], index), 0) for index in range(len(disk.layers)))
            for disk in vm.disks
        },
    )
