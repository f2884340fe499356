"""What QEMU answers, as far as it is read here: checked at the border, so that nothing further in meets a surprise.

Fields that are not listed are ignored: each version of QEMU says more. What is missing or of another type is an answer
that cannot be read (Qmp.read), as good as none.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from kvmhv.model import COUNT_MAX

Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Rate = Annotated[float, Meta(ge=0, le=1e15)]


class Answer(msgspec.Struct, frozen=True, kw_only=True, rename="kebab"):
    """Base of all answers."""


class VersionNumber(Answer, frozen=True, kw_only=True):
    """Three numbers."""

    major: Annotated[int, Meta(ge=0, le=COUNT_MAX)]
    minor: Annotated[int, Meta(ge=0, le=COUNT_MAX)]
    micro: Annotated[int, Meta(ge=0, le=COUNT_MAX)]


class Version(Answer, frozen=True, kw_only=True):
    """`version` of the greeting."""

    qemu: VersionNumber


class Status(Answer, frozen=True, kw_only=True):
    """query-status."""

    status: str
    running: bool


class Ram(Answer, frozen=True, kw_only=True):
    """`ram` of query-migrate."""

    transferred: Count = 0
    remaining: Count = 0
    total: Count = 0
    dirty_pages_rate: Count = 0
    page_size: Count = 4096
    mbps: Rate = 0.0
    dirty_sync_count: Count = 0
    duplicate: Count = 0
    postcopy_bytes: Count = 0
    postcopy_requests: Count = 0


class SocketAddress(Answer, frozen=True, kw_only=True):
    """One of `socket-address`."""

    type: str
    port: str = ""


class Migration(Answer, frozen=True, kw_only=True):
    """query-migrate; all of it is missing before the first migration."""

    status: str = ""
    ram: Ram = Ram()
    error_desc: str = ""
    cpu_throttle_percentage: Annotated[int, Meta(ge=0, le=100)] = 0
    blocked_reasons: tuple[str, ...] = ()
    socket_address: tuple[SocketAddress, ...] = ()


class Capability(Answer, frozen=True, kw_only=True):
    """One of query-migrate-capabilities."""

    capability: str
    state: bool


class Job(Answer, frozen=True, kw_only=True):
    """One of query-jobs."""

    id: str
    status: str
    current_progress: Count = 0
    total_progress: Count = 0
    error: str | None = None


class ImageInfo(Answer, frozen=True, kw_only=True):
    """`image` of a block node."""

    actual_size: Count = 0


class BlockNode(Answer, frozen=True, kw_only=True):
    """One of query-named-block-nodes."""

    node_name: str
    image: ImageInfo = ImageInfo()
    active: bool | None = None
    """Since QEMU 10.0."""


class GraphNode(Answer, frozen=True, kw_only=True):
    """One of `nodes` of x-debug-query-block-graph."""

    type: str
    name: str


class BlockGraph(Answer, frozen=True, kw_only=True):
    """x-debug-query-block-graph."""

    nodes: tuple[GraphNode, ...] = ()


class BlockDevice(Answer, frozen=True, kw_only=True):
    """One of query-block."""

    qdev: str = ""
    inserted: BlockNode | None = None


class ObjectProperty(Answer, frozen=True, kw_only=True):
    """One of qom-list and of device-list-properties."""

    name: str


class DirtyRate(Answer, frozen=True, kw_only=True):
    """query-dirty-rate."""

    status: str
    dirty_rate: Annotated[int, Meta(ge=-1, le=COUNT_MAX)] = -1
    """MiB in a second."""


class Queue(Answer, frozen=True, kw_only=True):
    """x-query-virtio-queue-status."""

    inuse: Count
    used_idx: Count


class YankInstance(Answer, frozen=True, kw_only=True, omit_defaults=True):
    """One of query-yank, which goes back as it came."""

    type: str
    id: str = ""
    node_name: str = ""


class MachineType(Answer, frozen=True, kw_only=True):
    """One of query-machines."""

    name: str
    alias: str = ""


class CpuDefinition(Answer, frozen=True, kw_only=True):
    """One of query-cpu-definitions."""

    name: str
    unavailable_features: tuple[str, ...] = ()
    deprecated: bool = False


class ExpandedModel(Answer, frozen=True, kw_only=True):
    """`model` of query-cpu-model-expansion."""

    props: dict[str, object]


class Expansion(Answer, frozen=True, kw_only=True):
    """query-cpu-model-expansion."""

    model: ExpandedModel
