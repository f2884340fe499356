"""The agent as a process: one at a time, READY to systemd, a clean and quick end, a restart after a kill."""

import asyncio
import json
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

Start = Any


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for the paths of UNIX sockets (107 bytes)."""
    with tempfile.TemporaryDirectory(prefix="kvmhv-") as directory:
        yield Path(directory)


@pytest.fixture
async def start(short_path: Path) -> AsyncIterator[Start]:
    """Start an agent on a state directory; all are gone afterwards."""
    started: list[asyncio.subprocess.Process] = []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]

    async def begin(**changes: str) -> asyncio.subprocess.Process:
        values = {
            "name": "host1",
            "listen": f"127.0.0.1:{port}",
            "state_dir": str(short_path / "state"),
            "run_dir": str(short_path / "run"),
            **changes,
        }
        config = short_path / "agent.toml"
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        code = f"import sys, pathlib; from kvmhv.agent.main import run; sys.exit(run(pathlib.Path({str(config)!r})))"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            code,
            env={"NOTIFY_SOCKET": str(short_path / "notify"), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.returncode is None:
            process.kill()
        await process.communicate()


class Systemd:
    """Hears what the agent tells the service manager."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(str(directory / "notify"))

    async def heard(self) -> bytes:
        async with asyncio.timeout(30):
            return await asyncio.get_running_loop().sock_recv(self._socket, 100)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def systemd(short_path: Path) -> Any:
    listening = Systemd(short_path)
    yield listening
    listening.close()


async def ask(short_path: Path, path: str) -> Any:
    connector = aiohttp.UnixConnector(path=str(short_path / "run/agent.sock"))
    async with aiohttp.ClientSession("http://local", connector=connector) as session, session.get(path) as response:
        return await response.json()


async def test_one_agent_at_a_time_and_a_clean_end(start: Start, systemd: Systemd, short_path: Path) -> None:
    first = await start()
    assert await systemd.heard() == b"READY=1"
    assert (await ask(short_path, "/v1/host"))["name"] == "host1"
    second = await start(run_dir=str(short_path / "other"))
    _, said = await asyncio.wait_for(second.communicate(), 30)
    assert second.returncode == 1 and b"another agent works on" in said
    first.send_signal(signal.SIGTERM)
    assert await systemd.heard() == b"STOPPING=1"
    _, said = await asyncio.wait_for(first.communicate(), 5)
    assert first.returncode == 0
    assert b"Traceback" not in said and b"never awaited" not in said
    assert not (short_path / "run/agent.sock").exists()


async def test_a_killed_agent_starts_again_as_it_was(start: Start, systemd: Systemd, short_path: Path) -> None:
    first = await start()
    await systemd.heard()
    before = await ask(short_path, "/v1/host")
    first.kill()
    await first.communicate()
    assert (short_path / "run/agent.sock").exists()
    second = await start(log_format="json")
    assert await systemd.heard() == b"READY=1"
    after = await ask(short_path, "/v1/host")
    assert (before["id"], before["fingerprint"]) == (after["id"], after["fingerprint"])
    second.send_signal(signal.SIGINT)
    _, said = await asyncio.wait_for(second.communicate(), 5)
    lines = [json.loads(line) for line in said.decode().splitlines()]
    assert [line["event"] for line in lines] == ["agent ready", "agent stopping; VMs run on"]
    assert all(line["level"] == "info" and line["timestamp"].endswith("Z") for line in lines)


async def test_a_taken_port_is_told_in_one_line(start: Start, short_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await start(listen=f"127.0.0.1:{taken.getsockname()[1]}")
        _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert b"(listen)" in said and b"Traceback" not in said


@pytest.mark.parametrize("name", ["two words", "-x", "x" * 64])
async def test_a_name_that_is_none(start: Start, name: str) -> None:
    process = await start(name=name)
    _, said = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 2 and b"config-invalid" in said
