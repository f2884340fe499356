"""Processes by pidfd, with real ones."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from kvmhv.drivers.qemu import process
from kvmhv.drivers.qemu.process import Process
from kvmhv.errors import HostError

SLEEPER = "/bin/sleep"
CONNECT = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
print("connected", flush=True)
print(len(connection.recv(1)), flush=True)
print(connection.getsockopt(socket.IPPROTO_TCP, 25), flush=True)
"""


def _wait_for_exec(child: Process) -> None:
    """A process has no arguments for a moment, between its fork and its exec."""
    deadline = time.monotonic() + 10
    while not process.arguments(child.pid):
        assert time.monotonic() < deadline


@pytest.fixture
async def sleeper(tmp_path: Path) -> AsyncIterator[Process]:
    child = process.start([SLEEPER, "61.5", "62.5"], tmp_path / "log")
    _wait_for_exec(child)
    yield child
    child.send(signal.SIGKILL)
    assert await child.wait_gone(10)


async def test_a_process_is_in_its_own_session_and_reaped(sleeper: Process) -> None:
    assert os.getsid(sleeper.pid) == sleeper.pid
    assert not sleeper.gone
    assert not await sleeper.wait_gone(0)
    sleeper.send(signal.SIGTERM)
    assert await sleeper.wait_gone(10)
    assert sleeper.exit_status == -signal.SIGTERM
    assert process.arguments(sleeper.pid) == []
    sleeper.send(signal.SIGKILL)  # no error, and nobody else is hit
    sleeper.release()


async def test_a_process_is_found_again_by_its_arguments(sleeper: Process) -> None:
    found = process.find((SLEEPER, "61.5"))
    assert found is not None
    assert found.pid == sleeper.pid
    found.send(signal.SIGKILL)
    assert await found.wait_gone(10)
    assert await sleeper.wait_gone(10)
    # One of the two reaped it and knows how it ended.
    assert {found.exit_status, sleeper.exit_status} == {None, -signal.SIGKILL}
    assert process.find((SLEEPER, "61.5")) is None


async def test_a_part_of_an_argument_is_no_mark(sleeper: Process) -> None:
    assert process.find((SLEEPER, "61")) is None
    assert process.arguments(sleeper.pid) == [SLEEPER, "61.5", "62.5"]
    assert process.resident_bytes(sleeper.pid) > 0


async def test_letting_go_leaves_it_running(sleeper: Process) -> None:
    other = process.find((SLEEPER, "61.5"))
    assert other is not None
    other.release()
    assert not sleeper.gone


async def test_what_is_gone_has_no_arguments(sleeper: Process) -> None:
    sleeper.send(signal.SIGKILL)
    await sleeper.wait_gone(10)
    assert process.arguments(sleeper.pid) == []
    assert process.resident_bytes(sleeper.pid) == 0
    assert sleeper.cut("127.0.0.1", (1,)) == 0


async def test_output_goes_to_the_log_and_the_status_is_known(tmp_path: Path) -> None:
    child = process.start(["/bin/sh", "-c", "echo out; echo err >&2; exit 3"], tmp_path / "log")
    assert await child.wait_gone(10)
    assert child.exit_status == 3
    assert (tmp_path / "log").read_text() == "out\nerr\n"


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError) as caught:
        process.start(["/nowhere/qemu"], tmp_path / "log")
    assert caught.value.code == "qemu-missing"


async def test_a_connection_is_cut_from_outside(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        child = process.start(["/usr/bin/env", "python3", "-c", CONNECT, str(port)], tmp_path / "log")
        accepted, _ = await asyncio.to_thread(server.accept)
        with accepted:
            assert child.cut("127.0.0.2", (port,)) == 0
            assert child.cut("127.0.0.1", (port + 1,)) == 0
            assert not child.gone
            assert child.limit_unsent("127.0.0.2", (port,), 4096) == 0
            assert child.limit_unsent("127.0.0.1", (port,), 131072) == 1
            assert child.cut("127.0.0.1", (port + 1, port)) == 1
            assert await child.wait_gone(10)
    assert child.exit_status == 0
    assert (tmp_path / "log").read_text() == "connected\n0\n131072\n"
