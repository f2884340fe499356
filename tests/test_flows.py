"""What connections carried, counted by the kernel: those that ended, those that are there, and no others."""

import asyncio
import socket

import pytest

from kvmhv.drivers.flows import TcpFlows, TcpFlowWatch

MIB = 1 << 20
FIN = 1
"""The end of the other side's stream is one byte of the sequence, and the kernel counts it."""


def connect(server: socket.socket) -> tuple[socket.socket, socket.socket]:
    near = socket.create_connection(server.getsockname()[:2])
    far, _ = server.accept()
    return near, far


async def carry(near: socket.socket, far: socket.socket, count: int) -> None:
    def read() -> None:
        left = count
        while left:
            left -= len(far.recv(min(left, 65536)))

    reading = asyncio.create_task(asyncio.to_thread(read))
    await asyncio.to_thread(near.sendall, b"x" * count)
    await reading


async def settled(watch: TcpFlowWatch, least: int) -> int | None:
    """The kernel tells the end of a connection a moment after it."""
    seen = await watch.carried_bytes()
    for _ in range(200):
        if seen is not None and seen >= least:
            break
        await asyncio.sleep(0.01)
        seen = await watch.carried_bytes()
    return seen


def assert_about(seen: int | None, expected: int) -> None:
    """What TCP had to send twice, on a busy machine even to itself, is counted twice."""
    assert seen is not None
    assert expected <= seen < 1.2 * expected


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
async def test_ended_and_open_connections_both_ways_and_nothing_else(ip: str) -> None:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    servers = [socket.create_server((ip, 0), family=family) for _ in range(3)]
    ports = [server.getsockname()[1] for server in servers]
    watch = await TcpFlows().watch(ip, (ports[0], ports[1]))
    try:
        ended, open_still, other = (connect(server) for server in servers)
        await carry(*ended, 3 * MIB)
        await carry(ended[1], ended[0], 1000)
        for one in ended:
            one.close()
        await carry(*other, 4 * MIB)
        for one in other:
            one.close()
        await carry(*open_still, 5000)
        expected = 3 * MIB + 1000 + 5000 + FIN
        assert_about(await settled(watch, expected), expected)
        for one in open_still:
            one.close()
        for server in servers:
            server.close()
    finally:
        watch.close()
        watch.close()


async def test_a_connection_is_counted_once_whether_it_ends_before_or_after_the_look() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = await TcpFlows().watch("127.0.0.1", (server.getsockname()[1],))
        near, far = connect(server)
        await carry(near, far, MIB)
        assert_about(await settled(watch, MIB), MIB)
        near.close()
        far.close()
        assert_about(await settled(watch, MIB + FIN), MIB + FIN)
        watch.close()
