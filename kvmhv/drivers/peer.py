"""Connections to other agents: WebSockets, uploads and forwarded requests over mutual TLS 1.3.

With TLS 1.3 a client whose certificate is refused sees its handshake succeed and the connection die at its first read,
and whether the alert with the reason arrives before the reset is luck. So after such a death this side asks the other
agent outright, without a certificate, whether it trusts this host; the answer makes the error that a person can act on.
"""

import asyncio
import contextlib
import ipaddress
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import IO, Protocol

import aiohttp
import msgspec
from aiohttp import ClientWebSocketResponse, WSCloseCode, WSMsgType, web

from kvmhv.config import Waits
from kvmhv.errors import CallerError, HostError, KvmhvError, PeerBroke, PeerUnreachable, Refused, from_body
from kvmhv.model import ErrorBody, Struct, TrustedHost

HEARTBEAT_S = 4.0
"""A ping after so long a silence, half of it for the answer: a dead link is noticed within 6 s, from both sides."""
CLOSE_S = 2.0
ANSWER_MAX_BYTES = 64 * 1024
UPLOAD_CHUNK_BYTES = 256 * 1024

MOVE_ROUTE = "/peer/move"
FILE_ROUTE = "/peer/moves/{move}/files/{name}"
TRUST_ROUTE = "/peer/trust"
JOIN_ROUTE = "/peer/join"


class TrustQuestion(Struct, frozen=True, kw_only=True):
    """Asked without a certificate: do you trust the host of this name and fingerprint?"""

    name: str
    fingerprint: str


class TrustAnswer(Struct, frozen=True, kw_only=True):
    """The answer of the agent of `host`."""

    host: str
    trusted: bool


class FileTaken(Struct, frozen=True, kw_only=True):
    """Whether the target has taken a file from what it has, so that it need not be sent."""

    taken: bool


class Credentials(Protocol):
    """What this driver needs of the trust between hosts. Implemented by drivers/auth/trust."""

    @property
    def own_name(self) -> str:
        """Name of this host."""
        ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 of this host's certificate."""
        ...

    def find(self, host: str) -> TrustedHost | None:
        """Return the trusted host of this name or `host:port`."""
        ...

    def unknown(self, host: str) -> CallerError:
        """Return the error `host-unknown`."""
        ...

    def client_context(self, host: TrustedHost) -> ssl.SSLContext:
        """Return the TLS context for a connection to a trusted host."""
        ...

    def introduction_context(self, fingerprint: str) -> ssl.SSLContext:
        """Return the TLS context for a host known by its fingerprint only; this host shows no certificate."""
        ...


class WebSocketConnection:
    """ports.PeerConnection over a WebSocket, of either side."""

    def __init__(
        self,
        socket: ClientWebSocketResponse[bool] | web.WebSocketResponse,
        peer_name: str,
        session: aiohttp.ClientSession | None = None,
    ) -> None:
        """Take over an open socket; `session` (the connecting side's) is closed with it."""
        self._socket = socket
        self._session = session
        self.peer_name = peer_name
        self.peer_ip = _ip(socket.get_extra_info("peername"))

    async def send(self, frame: bytes) -> None:
        """Send a frame. Raises PeerUnreachable when the connection is gone."""
        try:
            await self._socket.send_bytes(frame)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            raise PeerUnreachable(
                "peer-lost",
                f"the connection to {self.peer_name} is gone",
                "see that its agent runs",
                host=self.peer_name,
            ) from error

    async def frames(self) -> AsyncIterator[bytes]:
        """Yield what arrives until the connection ends, however it ends. Raises PeerBroke for what is no frame."""
        while True:
            message = await self._socket.receive()
            if message.type is WSMsgType.BINARY:
                yield message.data
            elif message.type is WSMsgType.TEXT:
                raise await self._broke("sent text where a frame was due")
            elif message.type is WSMsgType.ERROR and isinstance(message.data, aiohttp.WebSocketError):
                raise await self._broke(f"sent what is no frame: {message.data}")
            elif self._socket.close_code == WSCloseCode.MESSAGE_TOO_BIG:
                raise await self._broke("sent a frame over the bound")
            elif message.type not in (WSMsgType.PING, WSMsgType.PONG):
                return

    async def close(self) -> None:
        """End the connection; no error if it has ended. Takes two seconds at most."""
        with contextlib.suppress(OSError, RuntimeError, aiohttp.ClientError):
            await self._socket.close()
        if self._session is not None:
            await self._session.close()

    async def _broke(self, what: str) -> PeerBroke:
        await self.close()
        return PeerBroke(
            "peer-protocol",
            f"the agent of {self.peer_name} {what}",
            "see that both agents are of the same version",
            host=self.peer_name,
        )


def server_socket(frame_bytes: int) -> web.WebSocketResponse:
    """Return the answering side's WebSocket, not yet prepared, with the same bounds as the connecting side's."""
    return web.WebSocketResponse(
        timeout=CLOSE_S, heartbeat=HEARTBEAT_S, compress=False, max_msg_size=frame_bytes, decode_text=False
    )


class Peer:
    """ports.Peer over aiohttp. asyncio sets TCP_NODELAY on every TCP connection, so small frames leave at once."""

    def __init__(self, credentials: Credentials, frame_bytes: int, waits: Waits) -> None:
        self._credentials = credentials
        self._waits = waits
        self._frame_bytes = frame_bytes

    def trusted(self, host: str) -> TrustedHost:
        """Return a trusted host by name or `host:port`. Raises CallerError `host-unknown`."""
        found = self._credentials.find(host)
        if found is None:
            raise self._credentials.unknown(host)
        return found

    async def connect(self, host: str, timeout_s: float) -> WebSocketConnection:
        """Connect to a trusted host's agent for one move.

        Raises CallerError `host-unknown` (not trusted here), PeerUnreachable, Refused `peer-untrusted` (it does not
        trust this host, or the address answers with another certificate).
        """
        target = self.trusted(host)
        session = self.session(target)
        try:
            async with self.translated(target), asyncio.timeout(timeout_s):
                socket = await session.ws_connect(
                    f"https://{target.address}{MOVE_ROUTE}",
                    heartbeat=HEARTBEAT_S,
                    timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_S),
                    max_msg_size=self._frame_bytes,
                    decode_text=False,
                )
        except BaseException:
            await session.close()
            raise
        return WebSocketConnection(socket, target.name, session)

    async def send_files(self, host: str, move_id: str, files: Mapping[str, Path], timeout_s: float) -> None:
        """Upload files that belong to the VM of a move, by name, to the target; not those that it has already.

        Raises as `connect`, the target's own error, HostError `file-unreadable`.
        """
        target = self.trusted(host)
        async with self.session(target) as session, self.translated(target), asyncio.timeout(timeout_s):
            for name, file in files.items():
                url = f"https://{target.address}{FILE_ROUTE.format(move=move_id, name=name)}"
                if not await _has(session, url, target.name):
                    await _upload(session, url, file, target.name)

    def session(self, target: TrustedHost) -> aiohttp.ClientSession:
        """Return a client session that reaches this host only, without a total deadline: the caller sets one."""
        return _session(self._credentials.client_context(target), self._waits.peer_connect_s)

    async def introduce(self, address: str, fingerprint: str, route: str, body: bytes, timeout_s: float) -> bytes:
        """POST JSON to an agent that is known by its certificate's fingerprint only; return its answer.

        Raises PeerUnreachable, Refused `peer-fingerprint` (another certificate), PeerBroke, the agent's own error.
        """
        context = self._credentials.introduction_context(fingerprint)
        try:
            async with _session(context, self._waits.peer_connect_s) as session:
                async with asyncio.timeout(timeout_s):
                    headers = {"Content-Type": "application/json"}
                    async with session.post(f"https://{address}{route}", data=body, headers=headers) as response:
                        await raise_for_body(response, address)
                        return await _bounded(response, address)
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError, ssl.SSLError) as error:
            raise Refused(
                "peer-fingerprint",
                f"the agent at {address} shows another certificate than expected",
                "make sure that the address leads to that host and to no other",
                host=self._credentials.own_name,
            ) from error
        except (OSError, TimeoutError, ValueError, aiohttp.ClientError) as error:
            raise _unreachable(address, address, error) from error

    @contextlib.asynccontextmanager
    async def translated(self, target: TrustedHost) -> AsyncIterator[None]:
        """Turn what aiohttp raises inside into PeerUnreachable, PeerBroke or Refused `peer-untrusted`."""
        try:
            yield
        except KvmhvError:
            raise
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            raise self._impostor(target) from error
        except (aiohttp.ClientConnectorError, TimeoutError, ValueError) as error:
            raise _unreachable(target.name, target.address, error) from error
        except aiohttp.WSServerHandshakeError as error:
            if error.status in (401, 403):
                raise self._untrusted(target) from error
            raise _unreachable(target.name, target.address, error) from error
        except (OSError, aiohttp.ClientError) as error:
            if await self._is_refused_by(target):
                raise self._untrusted(target) from error
            raise _unreachable(target.name, target.address, error) from error

    async def _is_refused_by(self, target: TrustedHost) -> bool:
        question = TrustQuestion(name=self._credentials.own_name, fingerprint=self._credentials.fingerprint)
        try:
            answer = await self.introduce(
                target.address, target.fingerprint, TRUST_ROUTE, msgspec.json.encode(question), self._waits.peer_ask_s
            )
            return not msgspec.json.decode(answer, type=TrustAnswer).trusted
        except (KvmhvError, msgspec.MsgspecError):
            return False

    def _untrusted(self, target: TrustedHost) -> Refused:
        own = self._credentials.own_name
        return Refused(
            "peer-untrusted",
            f"{target.name} does not trust {own} (certificate {self._credentials.fingerprint})",
            f"run `kvmhv host trust invite` on {target.name}, then `kvmhv host trust join CODE` on {own}",
            host=target.name,
        )

    def _impostor(self, target: TrustedHost) -> Refused:
        own = self._credentials.own_name
        return Refused(
            "peer-untrusted",
            f"{own} does not trust what answers at {target.address}: its certificate is not the one of {target.name}",
            f"if {target.name} was set up anew: `kvmhv host trust remove {target.name}` on {own}, then "
            f"`kvmhv host trust invite` on {target.name} and `kvmhv host trust join CODE` on {own}",
            host=own,
        )


async def raise_for_body(response: aiohttp.ClientResponse, host: str) -> None:
    """Raise the error that another agent answered with, if it did; PeerBroke if it is none of ours."""
    if response.status < 400:
        return
    content = await _bounded(response, host)
    try:
        body = msgspec.json.decode(content, type=ErrorBody)
    except msgspec.MsgspecError as error:
        raise PeerBroke(
            "peer-protocol", f"{host} answered with HTTP status {response.status}", "see its agent's log", host=host
        ) from error
    raise from_body(body)


async def _bounded(response: aiohttp.ClientResponse, host: str) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > ANSWER_MAX_BYTES:
            raise PeerBroke("peer-protocol", f"{host} answered with too many bytes", "see its agent's log", host=host)
    return bytes(content)


async def _has(session: aiohttp.ClientSession, url: str, host: str) -> bool:
    """Ask whether a file need not be sent. Only a clear yes is one: an older agent does not know the question."""
    async with session.post(url) as response:
        content = await _bounded(response, host)
    if response.status != 200:
        return False
    with contextlib.suppress(msgspec.MsgspecError):
        return msgspec.json.decode(content, type=FileTaken).taken
    return False


async def _upload(session: aiohttp.ClientSession, url: str, file: Path, host: str) -> None:
    try:
        # Before aiohttp's writer runs: that is cancelled at any moment, and would lose a file that it opens.
        stream = await asyncio.to_thread(file.open, "rb")
    except OSError as error:
        raise _unreadable(file, error) from error
    with stream:
        headers = {"Content-Length": str(os.fstat(stream.fileno()).st_size)}
        async with session.put(url, data=_chunks(file, stream), headers=headers) as response:
            await raise_for_body(response, host)


async def _chunks(file: Path, stream: IO[bytes]) -> AsyncIterator[bytes]:
    while True:
        try:
            chunk = await asyncio.to_thread(stream.read, UPLOAD_CHUNK_BYTES)
        except OSError as error:
            raise _unreadable(file, error) from error
        if not chunk:
            return
        yield chunk


def _session(context: ssl.SSLContext, connect_s: float) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(ssl=context, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_s),
        auto_decompress=False,
    )


def _unreadable(file: Path, error: OSError) -> HostError:
    return HostError("file-unreadable", f"{file}: {error.strerror}", "see that the file is there and can be read")


def _unreachable(name: str, address: str, error: BaseException) -> PeerUnreachable:
    reason = "no answer in time" if isinstance(error, TimeoutError) else str(error) or type(error).__name__
    where = name if name == address else f"{name} ({address})"
    return PeerUnreachable(
        "peer-unreachable",
        f"the agent of {where} cannot be reached: {reason}",
        "see that the host is up, its agent runs and nothing in the network blocks the port",
        host=name,
    )


def _ip(address: tuple[str, int] | None) -> str:
    """Return the IP of a socket address as the network has it: no scope, an IPv4 address not dressed up as IPv6."""
    if address is None:
        return ""
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return str(mapped or ip)
