"""When the kernel's queues of a migration are short: with a real process and its real connection."""

import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmhv.drivers.qemu import process
from kvmhv.drivers.qemu.process import TCP_NOTSENT_LOWAT
from kvmhv.drivers.qemu.send_queues import UNSENT_MAX_BYTES, SendQueues
from kvmhv.ports import MemoryStats

MIB = 1 << 20
SAYS_ITS_LIMIT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while connection.recv(1):
    connection.sendall(b"%d\\n" % connection.getsockopt(socket.IPPROTO_TCP, int(sys.argv[2])))
"""


class Sender:
    """A process with one connection, and the queues of it."""

    def __init__(self, connection: socket.socket, queues: SendQueues) -> None:
        self._connection, self._queues = connection, queues
        self._answers = connection.makefile()

    def unsent_max_bytes(
        self, *, dirty_sync: int = 1, sent_mib: int, remaining_mib: int, mib_per_s: float, alone: bool = True
    ) -> int:
        """Show it the migration's progress; returns what its connection takes, 0 for what the kernel likes."""
        self._queues.fit(
            MemoryStats(
                status="active",
                transferred_bytes=sent_mib * MIB,
                remaining_bytes=remaining_mib * MIB,
                throughput_bytes_per_s=mib_per_s * MIB,
                dirty_sync_count=dirty_sync,
            ),
            alone=alone,
        )
        self._connection.sendall(b"?")
        return int(self._answers.readline())


@pytest.fixture
async def sender(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Sender]:
    ratio = getattr(request, "param", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = [SAYS_ITS_LIMIT, str(port), str(TCP_NOTSENT_LOWAT)]
        child = process.start(["/usr/bin/env", "python3", "-c", *script], tmp_path / "log")
        server.settimeout(10)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(10)
            yield Sender(connection, SendQueues(child, "127.0.0.1", (port,), touched_bytes=400 * MIB, ratio=ratio))
            connection.shutdown(socket.SHUT_RDWR)
        assert await child.wait_gone(10)
        child.release()


async def test_they_are_short_before_each_end_of_a_pass_and_the_kernels_in_between(sender: Sender) -> None:
    assert sender.unsent_max_bytes(sent_mib=0, remaining_mib=1024, mib_per_s=0) == 0
    assert sender.unsent_max_bytes(sent_mib=100, remaining_mib=900, mib_per_s=100) == 0
    assert sender.unsent_max_bytes(sent_mib=390, remaining_mib=40, mib_per_s=100) == UNSENT_MAX_BYTES
    assert sender.unsent_max_bytes(dirty_sync=2, sent_mib=430, remaining_mib=200, mib_per_s=100) == 0
    assert sender.unsent_max_bytes(dirty_sync=2, sent_mib=590, remaining_mib=40, mib_per_s=100) == UNSENT_MAX_BYTES
    assert sender.unsent_max_bytes(dirty_sync=3, sent_mib=630, remaining_mib=1, mib_per_s=100) == UNSENT_MAX_BYTES


async def test_memory_that_the_guest_never_touched_is_not_waited_for(sender: Sender) -> None:
    assert sender.unsent_max_bytes(sent_mib=340, remaining_mib=600, mib_per_s=100) == 0
    assert sender.unsent_max_bytes(sent_mib=360, remaining_mib=600, mib_per_s=100) == UNSENT_MAX_BYTES


@pytest.mark.parametrize("sender", [4.0], indirect=True)
async def test_what_shrinks_on_its_way_is_counted_as_it_is_on_the_wire(sender: Sender) -> None:
    assert sender.unsent_max_bytes(sent_mib=0, remaining_mib=300, mib_per_s=100) == 0
    assert sender.unsent_max_bytes(sent_mib=60, remaining_mib=160, mib_per_s=100) == UNSENT_MAX_BYTES


async def test_they_are_short_while_others_leave_too_and_the_kernels_again_when_those_are_gone(sender: Sender) -> None:
    assert sender.unsent_max_bytes(sent_mib=0, remaining_mib=1024, mib_per_s=100, alone=False) == UNSENT_MAX_BYTES
    assert sender.unsent_max_bytes(sent_mib=100, remaining_mib=900, mib_per_s=100) == 0
