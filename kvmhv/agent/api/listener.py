"""The agent's two doors: TLS on the network and the UNIX socket on the host, with one application behind both.

asyncio's own server swallows failed handshakes. Here each connection is accepted, shaken hands with and only then given
to aiohttp, so that a refusal is logged and counted with the peer's address, handshakes have a deadline, and strangers
can hold only few connections open.
"""

import asyncio
import contextlib
import errno
import grp
import os
import socket
import ssl
import stat
import weakref
from collections import Counter
from collections.abc import Coroutine
from pathlib import Path

import structlog
from aiohttp import web

from kvmhv.agent.api.access import plain_ip
from kvmhv.agent.api.app import make_app
from kvmhv.agent.api.services import Services
from kvmhv.config import split_address
from kvmhv.errors import HostError

HANDSHAKE_S = 10.0
FIRST_REQUEST_S = 10.0
"""A connection that has not asked for anything after so long is ended."""
HALF_OPEN_MAX = 64
HALF_OPEN_MAX_PER_IP = 16
ACCEPT_AGAIN_S = 0.5
BACKLOG = 128
SHUTDOWN_S = 1.0
"""Requests that run get so long to end when the agent stops; streams never end by themselves."""
KEEPALIVE_S = 75.0

log = structlog.get_logger()


class Listener:
    """Serves the API. `start` opens both doors, `close` ends every connection within a few seconds."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._config = services.config
        self._trust = services.trusting.trust
        self._without_certificate: weakref.WeakSet[asyncio.Transport] = weakref.WeakSet()
        self._awake: weakref.WeakSet[asyncio.BaseTransport] = weakref.WeakSet()
        self._runner = web.AppRunner(
            make_app(services, self._note_request), shutdown_timeout=SHUTDOWN_S, keepalive_timeout=KEEPALIVE_S
        )
        self._half_open: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._tcp: socket.socket | None = None
        self._unix: asyncio.Server | None = None

    async def start(self) -> None:
        """Open both doors. Raises HostError `listen` (port or socket taken); then neither is open."""
        await self._runner.setup()
        try:
            self._tcp = _bind(self._config.listen)
            self._unix = await self._open_unix()
        except BaseException:
            await self.close()
            raise
        self._spawn(self._accept(self._tcp))

    @property
    def port(self) -> int:
        """TCP port that is listened on."""
        assert self._tcp is not None
        return int(self._tcp.getsockname()[1])

    async def close(self) -> None:
        """Close both doors and end every connection; no error if they are closed."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tcp is not None:
            self._tcp.close()
            self._tcp = None
        if self._unix is not None:
            self._unix.close()
            self._unix = None
            self._config.socket_path.unlink(missing_ok=True)
        await self._runner.cleanup()

    # --- TLS

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(listening)
            except OSError as error:
                # Out of file descriptors or memory, or a connection that ended before it was accepted.
                if error.errno != errno.ECONNABORTED:
                    log.error("cannot accept connections", error=str(error))
                    await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            ip = plain_ip(address[0])
            if self._is_full(ip):
                self._services.metrics.peer_refused("too-many")
                connection.close()
                continue
            self._half_open[ip] += 1
            self._spawn(self._shake_hands(connection, ip))

    def _is_full(self, ip: str) -> bool:
        server = self._runner.server
        open_now = len(server.connections) if server is not None else 0
        return (
            self._half_open.total() >= HALF_OPEN_MAX
            or self._half_open[ip] >= HALF_OPEN_MAX_PER_IP
            or open_now >= self._config.limits.connections
        )

    async def _shake_hands(self, connection: socket.socket, ip: str) -> None:
        loop = asyncio.get_running_loop()
        server = self._runner.server
        assert server is not None
        try:
            transport, _ = await loop.connect_accepted_socket(
                server,
                connection,
                ssl=self._trust.server_context(),
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except ssl.SSLCertVerificationError as error:
            self._refused(ip, "untrusted", getattr(error, "verify_message", str(error)))
        except ssl.SSLError as error:
            self._refused(ip, "tls", error.reason or str(error))
        except OSError as error:
            self._refused(ip, "handshake", str(error) or type(error).__name__)
        else:
            self._admit(transport)
            loop.call_later(FIRST_REQUEST_S, self._end_if_silent, transport)
        finally:
            self._half_open[ip] -= 1
            if self._half_open[ip] <= 0:
                del self._half_open[ip]

    def _admit(self, transport: asyncio.Transport) -> None:
        """Keep room for trusted hosts: everybody else shares one half of the connections."""
        if transport.get_extra_info("ssl_object").getpeercert(binary_form=True) is not None:
            return
        still_open = sum(not other.is_closing() for other in self._without_certificate)
        if still_open >= self._config.limits.connections // 2:
            self._services.metrics.peer_refused("too-many")
            transport.abort()
        else:
            self._without_certificate.add(transport)

    def _refused(self, ip: str, cause: str, reason: str) -> None:
        self._services.metrics.peer_refused(cause)
        if cause == "untrusted":
            log.warning("connection refused: its certificate is not one of a trusted host", peer_ip=ip, reason=reason)
        else:
            log.info("connection ended before it was secured", peer_ip=ip, reason=reason)

    def _note_request(self, request: web.Request) -> None:
        if request.transport is not None:
            self._awake.add(request.transport)

    def _end_if_silent(self, transport: asyncio.BaseTransport) -> None:
        if transport not in self._awake:
            transport.close()

    # --- the UNIX socket

    async def _open_unix(self) -> asyncio.Server:
        path = self._config.socket_path
        _remove_stale(path)
        server = self._runner.server
        assert server is not None
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # Nobody may connect before the mode and the group are right: the socket is made for root alone first.
            before = os.umask(0o177)
            try:
                listening.bind(str(path))
            finally:
                os.umask(before)
            with contextlib.suppress(KeyError):
                os.chown(path, -1, grp.getgrnam(self._config.socket_group).gr_gid)
                path.chmod(0o660)
            return await asyncio.get_running_loop().create_unix_server(server, sock=listening, backlog=BACKLOG)
        except OSError as error:
            listening.close()
            raise HostError("listen", f"{path}: {error}", "check run_dir in agent.toml") from error

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _bind(address: str) -> socket.socket:
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise HostError("listen", f"{address}: {error.strerror}", "is another agent running? see `listen`") from error
    listening.setblocking(False)
    return listening


def _remove_stale(path: Path) -> None:
    """Remove the socket of an agent that is dead. Raises HostError `listen` if one answers, or it is no socket."""
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise HostError("listen", f"{path} is there and is no socket", "remove it, or change run_dir in agent.toml")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # somebody listens there and is busy
        except OSError as error:
            raise HostError("listen", f"{path}: {error}", "is another agent running?") from error
    raise HostError("listen", f"another agent answers at {path}", "stop it first")
