"""What QEMU says of its block nodes.

`query-named-block-nodes` looks at every image's file, in QEMU's main loop: with a share that is away QEMU stands still,
its guest and QMP too. So it is asked only when the share has just answered.
"""

import re

from kvmhv.drivers.qemu.answers import BlockDevice, BlockGraph, BlockNode
from kvmhv.drivers.qemu.qmp import Qmp
from kvmhv.errors import HostError


async def check_inactive(qmp: Qmp, nodes: set[str]) -> None:
    """Make sure that an incoming QEMU leaves disks alone that the source still runs from.

    Raises HostError `disk-active`. QEMU says so itself since 10.0; older ones do the same without saying it.
    """
    for node in await named(qmp):
        if node.node_name in nodes and node.active is True:
            text = f"the incoming QEMU has {node.node_name} open for itself while the source runs from it"
            raise HostError("disk-active", text, "report this, with the version of QEMU")


DEVICE = re.compile(r"/machine/peripheral/(.+)-device/virtio-backend")


async def top_nodes(qmp: Qmp) -> dict[str, str]:
    """Return the node that each disk's device reads and writes: `disk0` for disk0, until a storage move changed it."""
    found = {}
    for block in await qmp.ask(tuple[BlockDevice, ...], "query-block"):
        device = DEVICE.fullmatch(block.qdev)
        if device is not None and block.inserted is not None:
            found[device[1]] = block.inserted.node_name
    return found


async def node_names(qmp: Qmp) -> list[str]:
    """Return the names of all nodes, without a look at their images: what a move leaves is cleared up in any case."""
    graph = await qmp.ask(BlockGraph, "x-debug-query-block-graph")
    return [node.name for node in graph.nodes if node.type == "block-driver"]


async def used_bytes(qmp: Qmp) -> dict[str, int]:
    """Return the allocated bytes of each format and file node's image by node name."""
    return {node.node_name: node.image.actual_size for node in await named(qmp)}


async def named(qmp: Qmp) -> tuple[BlockNode, ...]:
    """Return every block node that has a name."""
    return await qmp.ask(tuple[BlockNode, ...], "query-named-block-nodes", {"flat": True})
