"""What QEMU says of its block nodes."""

from kvmhv.drivers.qemu.qmp import Qmp
from kvmhv.errors import HostError


async def check_inactive(qmp: Qmp, nodes: set[str]) -> None:
    """Make sure that an incoming QEMU leaves disks alone that the source still runs from.

    Raises HostError `disk-active`. QEMU says so itself since 10.0; older ones do the same without saying it.
    """
    for node in await qmp.execute("query-named-block-nodes", {"flat": True}):
        if node["node-name"] in nodes and node.get("active") is True:
            text = f"the incoming QEMU has {node['node-name']} open for itself while the source runs from it"
            raise HostError("disk-active", text, "report this, with the version of QEMU")


async def used_bytes(qmp: Qmp) -> dict[str, int]:
    """Return the allocated bytes of each format and file node's image by node name."""
    nodes = await qmp.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node["image"].get("actual-size", 0) for node in nodes}
