"""The block graph of a disk, as pure data: one format node and one file node for each layer.

    disk0 (written) -> disk0-file          node names; the guest's device, the export and the jobs are named after disk0
      backing: disk0-b1 (read only) -> disk0-b1-file
        backing: disk0-b2 ...

A storage move opens the new images beside the old ones, under names made of `disk0-alt`, and QEMU puts the new top in
the place of the old one; the next storage move uses `disk0` again. Which it is now QEMU knows (nodes.top_nodes).

At the target of a move the layers that are still to be copied are opened for writing (`arriving`); `exports.seal` makes
them read only again once the VM runs there.
"""

from kvmhv.model import Disk, DiskFormat, Layer, Plan
from kvmhv.places import DiskPlace, Lun, NfsImage

Node = dict[str, object]


ALTERNATIVE = "-alt"


def other_name(disk: str, top: str) -> str:
    """Return the name for the nodes of a disk's new images, while its top node is `top`."""
    return disk if top != disk else disk + ALTERNATIVE


def layer_node(disk: str, index: int) -> str:
    """Return the format node's name of a disk's layer; 0 is the top."""
    return disk if index == 0 else f"{disk}-b{index}"


def file_node(disk: str, index: int) -> str:
    """Return the file node's name of a disk's layer."""
    return f"{layer_node(disk, index)}-file"


def secret_id(disk: str, index: int) -> str:
    """Return the id of the object that holds the CHAP secret of a layer on a LUN."""
    return f"{file_node(disk, index)}-secret"


def open_file(disk: str, index: int, place: DiskPlace, *, buffered: bool) -> Node:
    """Return the protocol node of a layer: no page cache between guest and storage, flushes passed on.

    `buffered`: the file system cannot do without its page cache (no O_DIRECT). A backing file's descriptor is opened
    for writing only while something writes (auto-read-only), so several VMs may share it.
    """
    protocol = _protocol(disk, index, place)
    node: Node = {
        "driver": protocol["driver"],
        "node-name": file_node(disk, index),
        **protocol,
        "cache": {"direct": not buffered, "no-flush": False},
        "discard": "unmap",
    }
    if index:
        node["auto-read-only"] = True
    return node


def _protocol(disk: str, index: int, place: DiskPlace) -> Node:
    match place:
        case NfsImage():
            return place.options()
        case Lun():
            return place.options(secret_id(disk, index))
    return {"driver": "file", "filename": str(place), "aio": "threads"}


def open_layer(disk: str, index: int, count: int, image_format: DiskFormat, *, read_only: bool, buffered: bool) -> Node:
    """Return the format node of a layer of a disk with `count` layers."""
    node: Node = {
        "driver": image_format.value,
        "node-name": layer_node(disk, index),
        "file": file_node(disk, index),
        "read-only": read_only,
        "cache": {"direct": not buffered, "no-flush": False},
        "discard": "unmap",
    }
    if image_format is DiskFormat.QCOW2:
        node["backing"] = layer_node(disk, index + 1) if index + 1 < count else None
    return node


def disk_nodes(
    disk: Disk, paths: tuple[DiskPlace, ...], *, arriving: int, buffered: frozenset[DiskPlace]
) -> list[Node]:
    """Return a disk's nodes in the order in which they must be opened: the last backing file first.

    `arriving`: how many layers, from the top, a move writes here (0 outside a move in).
    """
    assert len(paths) == len(disk.layers) >= 1
    nodes: list[Node] = []
    for index in reversed(range(len(paths))):
        layer: Layer = disk.layers[index]
        without_direct = paths[index] in buffered
        nodes.append(open_file(disk.name, index, paths[index], buffered=without_direct))
        node = open_layer(
            disk.name,
            index,
            len(paths),
            layer.format,
            read_only=index >= max(1, arriving),
            buffered=without_direct,
        )
        if isinstance(paths[index], Lun) and layer.format is DiskFormat.RAW:
            node["size"] = layer.size_bytes or disk.size_bytes  # the LUN may be larger
        nodes.append(node)
    return nodes


def inet_address(plan: Plan, port: int) -> dict[str, object]:
    """Return QEMU's InetSocketAddress of the target's exports; `mptcp` also takes connections without it."""
    found: dict[str, object] = {"host": plan.target_address, "port": str(port)}
    return {**found, "mptcp": True} if plan.more_networks else found
