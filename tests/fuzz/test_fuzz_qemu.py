"""What a broken QEMU may say: each answer is read or refused with a known code, no event costs the connection."""

import asyncio
import contextlib
import json
import math
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhv.core import plan
from kvmhv.drivers.qemu import blocks, dirty_rate, memory, nodes, probe, process
from kvmhv.drivers.qemu.qmp import Qmp, QmpLog
from kvmhv.errors import HostError
from kvmhv.model import Accel, Rule, Timeouts
from kvmhv.ports import MemoryStats, MirrorStats
from tests.fuzz import garble
from tests.sim import examples
from tests.test_qemu_qmp import GREETING

DOCUMENTED = {"qemu-garbled", "qemu-error", "qemu-gone", "qemu-hangs", "capability-missing", "mirror-failed"}
VM = examples.vm()
PLAN = plan.make(
    VM,
    examples.source_state(VM).request,
    Rule(),
    Timeouts(),
    examples.inventory("host1", running=VM),
    examples.inventory("host2", octet=2),
)
MIGRATION = {
    "status": "active",
    "ram": {
        "transferred": 1,
        "remaining": 2,
        "total": 3,
        "dirty-pages-rate": 4,
        "page-size": 4096,
        "mbps": 1.5,
        "dirty-sync-count": 2,
    },
    "error-desc": "no",
    "blocked-reasons": ["a device"],
    "socket-address": [{"type": "inet", "host": "10.0.0.2", "port": "49152"}],
}
ANSWERS: dict[str, Any] = {
    "query-status": {"status": "running", "running": True},
    "query-migrate": MIGRATION,
    "query-migrate-capabilities": [
        {"capability": name, "state": False} for name in (*memory.ALWAYS, *PLAN.capabilities, "xbzrle")
    ],
    "query-jobs": [
        {"id": f"mirror-{disk.name}", "status": "ready", "current-progress": 5, "total-progress": 5, "type": "mirror"}
        for disk in VM.disks
    ],
    "query-named-block-nodes": [{"node-name": "disk0", "image": {"actual-size": 5}, "active": True}],
    "query-block": [
        {
            "device": "",
            "qdev": "/machine/peripheral/disk0-device/virtio-backend",
            "inserted": {"node-name": "disk0-alt"},
        }
    ],
    "query-dirty-rate": {"status": "measured", "dirty-rate": 3},
    "query-yank": [{"type": "migration"}, {"type": "block-node", "node-name": "target-disk0"}],
    "query-machines": [{"name": "pc-q35-7.2", "alias": "q35", "cpu-max": 255}],
    "query-cpu-definitions": [{"name": "qemu64", "unavailable-features": [], "deprecated": False}],
    "query-migrate-parameters": {"max-bandwidth": 1},
    "device-list-properties": [{"name": "free-page-reporting"}],
    "query-cpu-model-expansion": {"model": {"name": "max", "props": {"sse4.2": True}}},
}


class Said(Qmp):
    """A connection on which one command is answered with something else."""

    def __init__(self, command: str, answer: Any) -> None:
        self._vm_name = "web01"
        self.version = (10, 0, 0)
        self._answers = {**ANSWERS, command: answer}

    async def execute(self, command: str, arguments: Any = None, **bound: Any) -> Any:
        return self._answers.get(command, {})


def _mirrors() -> blocks.Mirrors:
    copies = {copy.disk: blocks.DiskState(copy, copy.disk, [], mirroring=True) for copy in PLAN.disk_copies}
    return blocks.Mirrors(disks=copies)


READERS: dict[str, tuple[Callable[[Qmp], Awaitable[Any]], ...]] = {
    "query-migrate": (lambda qmp: memory.stats(qmp, 1.0), lambda qmp: memory.listen(qmp, PLAN, (49152, 49215))),
    "query-migrate-capabilities": (lambda qmp: memory.set_capabilities(qmp, PLAN),),
    "query-jobs": (lambda qmp: blocks.stats(qmp, _mirrors()),),
    "query-named-block-nodes": (nodes.used_bytes, lambda qmp: nodes.check_inactive(qmp, {"disk1"})),
    "query-block": (nodes.top_nodes,),
    "query-dirty-rate": (dirty_rate._measured,),
    "query-yank": (lambda qmp: memory.yank(qmp, 1.0),),
    **{
        command: (lambda qmp: probe._questions(qmp, Path("/bin/qemu"), Accel.TCG),)
        for command in ("query-machines", "query-cpu-definitions", "query-migrate-parameters")
    },
}


@st.composite
def _answer(draw: st.DrawFn) -> tuple[str, Any]:
    command = draw(st.sampled_from(sorted(READERS)))
    return command, draw(garble.garbled(ANSWERS[command]))


@given(_answer())
@settings(max_examples=400)
def test_each_answer_is_read_or_refused(said: tuple[str, Any]) -> None:
    command, answer = said
    for reader in READERS[command]:
        try:
            found = asyncio.run(_within(reader(Said(command, answer))))
        except HostError as error:
            assert error.code in DOCUMENTED
        else:
            _is_sane(found)


async def _within(work: Awaitable[Any]) -> Any:
    async with asyncio.timeout(5):
        return await work


def _is_sane(found: Any) -> None:
    """What the core and the reports take must be able to be kept and read again."""
    for one in found if isinstance(found, tuple) else (found,):
        if isinstance(one, MemoryStats | MirrorStats):
            assert msgspec.json.decode(msgspec.json.encode(one), type=type(one)) == one
        if isinstance(one, MemoryStats):
            assert one.remaining_bytes >= 0
            assert math.isfinite(one.throughput_bytes_per_s)


# --- over a real socket -------------------------------------------------------------------------------------------


class Liar:
    """A server that answers each command with the next of its lines, and truly when it has none left."""

    def __init__(self, lines: list[bytes]) -> None:
        self.lines = lines
        self.writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, ValueError):
            writer.write(json.dumps(GREETING).encode() + b"\n")
            text = ""
            while data := await reader.read(65536):
                text += data.decode()
                while text:
                    message, end = json.JSONDecoder().raw_decode(text)
                    text = text[end:].lstrip()
                    name = message.get("execute") or message.get("exec-oob")
                    if name != "qmp_capabilities" and self.lines:
                        line = self.lines.pop(0).replace(b"$ID", json.dumps(message["id"]).encode()[1:-1])
                        writer.write(line + b"\n")
                    else:
                        answer = {"return": ANSWERS.get(name, {})}
                        if "id" in message:
                            answer["id"] = message["id"]
                        writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()


EVENT = {"event": "BLOCK_JOB_COMPLETED", "data": {"device": "mirror-disk0"}, "timestamp": {"seconds": 1}}
REPLY = {"return": {"status": "running", "running": True}, "id": "$ID"}
LINES = (
    b'{"return": {}, "id": []}',
    b'{"return": {}, "id": {}}',
    b'{"event": []}',
    b'{"event": "STOP", "data": []}',
    b'{"event": {"a": 1}, "data": 7}',
    b'{"error": {}}',
    b'{"error": "no", "id": "$ID"}',
    b'{"error": {"class": 7}, "id": "$ID"}',
    b'{"id": "$ID"}',
    b"[" * 20_000,
    b'{"return": ' * 5_000,
    b'{"return": "' + b"a" * 200_000 + b'", "id": "$ID"}',
    b'{"return": {}, "id": "late"}',
    b'{"return": 1, "id": "$ID"}\n{"return": 2, "id": "$ID"}',
)
line = st.one_of(
    st.sampled_from(LINES),
    garble.garbled(EVENT).map(lambda value: json.dumps(value).encode()),
    garble.garbled(REPLY).map(lambda value: json.dumps(value).encode()),
    garble.spoilt(json.dumps(REPLY).encode()),
)


@contextlib.asynccontextmanager
async def _connected(lines: list[bytes], heard: list[Any]) -> AsyncIterator[Qmp]:
    with tempfile.TemporaryDirectory(prefix="qmp-") as name:
        liar = Liar(lines)
        listener = await asyncio.start_unix_server(liar.serve, Path(name) / "qmp.sock", limit=2**20)
        child = process.start(["/bin/sleep", "60"], Path(name) / "log")
        qmp = Qmp(
            "web01",
            child,
            Path(name) / "qmp.sock",
            QmpLog(Path(name) / "qmp.log", lambda: 0.0),
            now_ms=lambda: 0.0,
            deliver=lambda event, at_ms: heard.append(event),
            tail=lambda: "",
            timeout_s=0.2,
            connect_s=5.0,
        )
        try:
            yield qmp
        finally:
            await qmp.close()
            child.send(9)
            await child.wait_gone(5)
            child.release()
            listener.close()
            for writer in liar.writers:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()


@given(st.lists(line, max_size=3))
@settings(max_examples=12 if settings.default.max_examples < 1000 else 500)
def test_whatever_was_said_the_next_question_is_answered(lines: list[bytes]) -> None:
    """Each line costs one answer at most; the connection is there for the next question, or comes back for it."""

    async def ask() -> None:
        heard: list[Any] = []
        said = list(lines)
        async with _connected(said, heard) as qmp:
            for _ in lines:
                with contextlib.suppress(HostError):
                    await memory.stats(qmp, 0.2)
            said.clear()
            for _ in range(3):  # a line without an end eats the first answer after it
                stats = await memory.stats(qmp, 10.0)
                if stats.status == "active":
                    break
            assert stats.status == "active"
        assert all(isinstance(event["event"], str) and isinstance(event["data"], dict) for event in heard)

    with mock.patch("kvmhv.drivers.qemu.qmp.DYING_S", 0.02):  # nobody dies here
        asyncio.run(ask())
