"""One QMP connection against a server that says what the test wants, in the place of QEMU."""

import asyncio
import json
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from kvmhv.drivers.qemu import process
from kvmhv.drivers.qemu.process import Process
from kvmhv.drivers.qemu.qmp import LOG_MAX_BYTES, Event, Qmp, QmpLog, QmpLost, QmpRefused

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 13}}, "capabilities": ["oob"]}}
NO_CPU = {"class": "GenericError", "desc": "no such CPU"}


class Server:
    """A QMP server: answers `return {}`; `hang` is not answered, `refuse` refused, `event` sends events first."""

    def __init__(self) -> None:
        self.heard: list[dict[str, Any]] = []
        self.writers: list[asyncio.StreamWriter] = []
        self.connections = 0
        self.hung = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        self.say(writer, GREETING)
        try:
            text = ""
            while data := await reader.read(65536):
                text += data.decode()  # messages follow each other without a mark between them
                while text:
                    message, end = json.JSONDecoder().raw_decode(text)
                    text = text[end:].lstrip()
                    self.answer(writer, message)
        except ConnectionError:
            pass
        finally:
            writer.close()

    def say(self, writer: asyncio.StreamWriter, what: object) -> None:
        writer.write(json.dumps(what).encode() + b"\r\n")

    def answer(self, writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
        self.heard.append(message)
        name = message.get("execute") or message.get("exec-oob")
        extra = {"id": message["id"]} if "id" in message else {}
        if name == "hang":
            self.hung.set()
            return
        if name == "close":
            writer.close()
            return
        if name == "event":
            for data in message["arguments"]["events"]:
                self.say(writer, {"event": "SAID", "data": data, "timestamp": {"seconds": 0, "microseconds": 0}})
        self.say(writer, {"error": NO_CPU, **extra} if name == "refuse" else {"return": {}, **extra})

    @property
    def commands(self) -> list[str]:
        return [message.get("execute") or f"oob {message['exec-oob']}" for message in self.heard]


class World:
    """A process, its server and the connection."""

    def __init__(self, server: Server, child: Process, qmp: Qmp, events: list[Any], directory: Path) -> None:
        self.server, self.child, self.qmp, self.events, self.directory = server, child, qmp, events, directory


@pytest.fixture
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="qmp-") as name:
        directory, server, events = Path(name), Server(), []
        listener = await asyncio.start_unix_server(server.serve, directory / "qmp.sock")
        child = process.start(["/bin/sleep", "60"], directory / "log")
        ticks = iter(range(1_000_000))

        def deliver(event: Event, at_ms: float) -> None:
            events.append((event["event"], event.get("data"), at_ms))
            if event.get("data") == {"number": 666}:
                raise RuntimeError("a bug of the receiver")

        qmp = Qmp(
            "web01",
            child,
            directory / "qmp.sock",
            QmpLog(directory / "qmp.log", lambda: 0.0),
            now_ms=lambda: float(next(ticks)),
            deliver=deliver,
            tail=lambda: "out of memory",
            timeout_s=10.0,
            connect_s=5.0,
        )
        yield World(server, child, qmp, events, directory)
        await qmp.close()
        child.send(signal.SIGKILL)
        await child.wait_gone(10)
        listener.close()
        for writer in server.writers:
            writer.close()
        await asyncio.sleep(0)


async def test_commands_wait_for_the_connection_and_know_the_version(world: World) -> None:
    assert await world.qmp.execute("query-status") == {}
    assert world.qmp.version == (10, 0, 13)
    assert world.server.commands == ["qmp_capabilities", "query-status"]


async def test_several_commands_are_sent_in_order_without_waiting(world: World) -> None:
    with pytest.raises(QmpRefused, match="QEMU refused refuse: no such CPU"):
        await world.qmp.together(("one", {}), ("refuse", {}), ("three", {}))
    assert world.server.commands[1:] == ["one", "refuse", "three"]


async def test_out_of_band(world: World) -> None:
    await world.qmp.execute("query-yank", oob=True)
    assert world.server.commands[-1] == "oob query-yank"


async def test_a_command_that_is_not_answered_is_told_from_a_dead_process(world: World) -> None:
    with pytest.raises(QmpLost, match=r"web01: QEMU does not answer hang: no answer in 0\.05 s") as caught:
        await world.qmp.execute("hang", timeout_s=0.05)
    assert (caught.value.code, "out of memory" in caught.value.message) == ("qemu-hangs", True)
    assert await world.qmp.execute("query-status") == {}  # the connection is as good as before
    world.server.hung.clear()
    waiting = asyncio.create_task(world.qmp.execute("hang"))
    await world.server.hung.wait()
    for writer in world.server.writers:
        writer.close()
    world.child.send(signal.SIGKILL)
    with pytest.raises(QmpLost, match="ended with status -9 during hang") as caught:
        await waiting
    assert caught.value.code == "qemu-gone"
    with pytest.raises(QmpLost) as caught:  # at once, not after the deadline
        await world.qmp.execute("query-status")
    assert caught.value.code == "qemu-gone"


async def test_it_connects_again_while_the_process_lives(world: World) -> None:
    await world.qmp.execute("query-status")
    with pytest.raises(QmpLost) as caught:
        await world.qmp.execute("close")
    assert caught.value.code == "qemu-hangs"
    assert await world.qmp.execute("query-status") == {}
    assert world.server.connections == 2


async def test_events_arrive_in_order_and_a_bug_of_the_receiver_costs_none(world: World) -> None:
    data = [{"number": 1}, {"number": 666}, {"number": 3}]
    await world.qmp.execute("event", {"events": data})
    assert [event[1] for event in world.events] == data
    assert [event[2] for event in world.events] == sorted(event[2] for event in world.events)


async def test_an_event_is_caught(world: World) -> None:
    with world.qmp.catch(lambda event: event["data"] == {"number": 2}) as caught:
        await world.qmp.execute("event", {"events": [{"number": 1}, {"number": 2}]})
        event, at_ms = await world.qmp.wait(caught, "the second")
    assert (event["data"], at_ms) == ({"number": 2}, world.events[1][2])


async def test_an_event_that_does_not_come(world: World) -> None:
    with world.qmp.catch(lambda _event: True) as caught, pytest.raises(QmpLost, match=r"no event in 0\.01 s"):
        await world.qmp.wait(caught, "STOP", timeout_s=0.01)


async def test_waiting_to_be_connected_ends_with_the_process(world: World) -> None:
    assert await world.qmp.wait_connected(10.0)
    world.child.send(signal.SIGKILL)
    for writer in world.server.writers:
        writer.close()
    await world.child.wait_gone(10)
    await world.qmp.drain(10.0)
    assert not await world.qmp.wait_connected(10.0)


async def test_everything_is_in_the_log(world: World) -> None:
    await world.qmp.execute("event", {"events": [{"number": 1}]})
    with pytest.raises(QmpRefused):
        await world.qmp.execute("refuse")
    lines = [line.split(" ", 2)[1:] for line in (world.directory / "qmp.log").read_text().splitlines()]
    assert [sign for sign, _ in lines] == [">", "*", "<", ">", "<"]
    assert json.loads(lines[-1][1]) == {"error": "no such CPU", "of": "refuse"}


def test_the_log_is_bounded(tmp_path: Path) -> None:
    log = QmpLog(tmp_path / "qmp.log", lambda: 1.5)
    (tmp_path / "qmp.log").write_text("x" * LOG_MAX_BYTES)
    log.write(">", {"execute": "y" * 100_000})
    log.write("<", {"return": {}})
    assert (tmp_path / "qmp.log").read_text() == '1.500 < {"return":{}}\n'
    assert (tmp_path / "qmp.log.1").stat().st_size < LOG_MAX_BYTES + 5000
    QmpLog(tmp_path / "gone" / "qmp.log", lambda: 0.0).write(">", {})
    log.close()
    log.write("<", {"lost": "no answer"})
    assert (tmp_path / "qmp.log").read_text().splitlines()[-1] == '1.500 < {"lost":"no answer"}'
