"""The kernel's queues of a migration's connections: as long as the kernel likes, and short when the end comes near.

What QEMU has handed to the kernel counts as sent. A long queue lets a network run full while QEMU waits for a core; but
some MiB in it are in nobody's count of what remains, and a blackout has to wait for them. So have the blackouts of all
other moves over that network: where several leave at a time, they keep it full together, and all queues are short.
"""

from kvmhv.drivers.qemu.process import Process
from kvmhv.ports import MemoryStats

UNSENT_MAX_BYTES = 128 * 1024
"""A short queue holds so much more than is under way."""
SHORT_FOR_S = 0.5
"""What can be sent in this time is near the end: twice the time between two looks at the migration."""
FIRST_PASS = 1


class SendQueues:
    """The queues of one migration to these ports of a host, fitted whenever its progress is seen."""

    def __init__(self, process: Process, ip: str, ports: tuple[int, ...], *, touched_bytes: int, ratio: float) -> None:
        """Leave them as they are for now. `touched_bytes`: of the guest's memory; `ratio`: how far that shrinks."""
        self._process, self._ip, self._ports = process, ip, ports
        self._touched_bytes, self._ratio = touched_bytes, ratio
        self._short = False

    def fit(self, stats: MemoryStats, *, alone: bool) -> None:
        """Make them short, or leave them to the kernel again; no error for connections that are not there.

        `alone`: no other guest is sent from this host.
        """
        short = not alone or self._near_the_end(stats)
        if short != self._short:
            self._process.limit_unsent(self._ip, self._ports, UNSENT_MAX_BYTES if short else None)
            self._short = short

    def _near_the_end(self, stats: MemoryStats) -> bool:
        left_bytes = stats.remaining_bytes / self._ratio
        if stats.dirty_sync_count <= FIRST_PASS:  # memory that the guest never touched remains, but is not sent
            left_bytes = min(left_bytes, self._touched_bytes / self._ratio - stats.transferred_bytes)
        return left_bytes < stats.throughput_bytes_per_s * SHORT_FOR_S
