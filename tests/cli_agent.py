"""A scripted agent on a UNIX socket: it answers as it was told and remembers what it was asked."""

import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec

from kvmhv.errors import KvmhvError
from kvmhv.model import MoveReport, Outcome, Phase


@dataclass
class Request:
    """What came."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]

    def json(self) -> dict[str, object]:
        return msgspec.json.decode(self.body, type=dict[str, object])


@dataclass
class Raw:
    """An answer byte by byte; without a length the end of the connection ends it."""

    status: int
    chunks: Iterator[bytes]
    content_type: str = "text/event-stream"


Answer = Callable[[Request], object]


@dataclass
class ScriptedAgent:
    """`answers`: (method, path without query) -> the answer or a function of the request that returns or raises it."""

    socket: Path
    answers: dict[tuple[str, str], object] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def on(self, method: str, path: str, answer: object) -> None:
        self.answers[method, path] = answer

    def asked(self, method: str, path: str) -> list[Request]:
        return [it for it in self.requests if it.method == method and it.path.partition("?")[0] == path]


def _handler(agent: ScriptedAgent) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length", 0))
            request = Request(self.command, self.path, self.rfile.read(length), dict(self.headers))
            agent.requests.append(request)
            key = (self.command, self.path.partition("?")[0])
            try:
                if key not in agent.answers:
                    raise NotScripted(self.path)
                answer = agent.answers[key]
                value = answer(request) if callable(answer) else answer
                self._send(value)
            except KvmhvError as error:
                self._send(Raw(error.http_status, iter([msgspec.json.encode(error.body())]), "application/json"))
            except ConnectionError:
                self.close_connection = True

        def _send(self, value: object) -> None:
            raw = value if isinstance(value, Raw) else Raw(200, iter([msgspec.json.encode(value)]), "application/json")
            self.send_response(raw.status)
            self.send_header("Content-Type", raw.content_type)
            self.send_header("Connection", "close")
            self.end_headers()
            for chunk in raw.chunks:
                self.wfile.write(chunk)
                self.wfile.flush()
            self.close_connection = True

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _handle  # noqa: N815

        def log_message(self, *_args: object) -> None:
            return

    return Handler


class NotScripted(KvmhvError):
    """Nothing was scripted for this path."""

    exit_status = 2
    http_status = 404

    def __init__(self, path: str) -> None:
        super().__init__("not-scripted", f"nothing at {path}")


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = True

    def get_request(self) -> tuple[object, tuple[str, int]]:  # type: ignore[override]
        connection, _ = super().get_request()
        return connection, ("local", 0)


@contextmanager
def scripted_agent(socket: Path) -> Iterator[ScriptedAgent]:
    """Serve until the end of the block."""
    agent = ScriptedAgent(socket)
    with _Server(str(socket), _handler(agent)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield agent
        finally:
            server.shutdown()
            thread.join()


def events(*reports: MoveReport) -> Raw:
    """A stream of server-sent events that ends after these."""
    return Raw(200, iter([b": hello\n\n", *(b"data: " + msgspec.json.encode(it) + b"\n\n" for it in reports)]))


def report(**changes: object) -> MoveReport:
    """A move in its memory phase, with changes."""
    base = MoveReport(
        id="3f2a91c0d4",
        vm="web01",
        vm_id="b0a1",
        source="host1",
        target="host2",
        direction="out",
        mode=None,
        outcome=Outcome.RUNNING,
        reason=None,
        error=None,
        phase=Phase.SETUP,
        phases=(),
        passes=(),
        switchover=None,
        blackout_ms=None,
        blackout_uncertainty_ms=None,
        memory_bytes=0,
        disk_bytes=0,
        findings=(),
        progress=0.0,
        remaining_bytes=0,
        storage_total_bytes=0,
        storage_copied_bytes=0,
        warnings=(),
        started_at=1000.0,
        ended_at=None,
    )
    return msgspec.structs.replace(base, **changes)
