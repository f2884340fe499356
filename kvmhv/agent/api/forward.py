"""`/v1/hosts/{host}/...`: the agent forwards a request to the same path of a host that it trusts.

Bodies stream both ways and are never held whole; the console's WebSocket is passed on message by message. A request is
forwarded once: the other host refuses to send it further.
"""

import asyncio
import contextlib
from pathlib import Path

import aiohttp
from aiohttp import WSMsgType, web

from kvmhv.agent.api.access import CALLER_HEADER, Caller, Kind
from kvmhv.drivers.peer import Peer
from kvmhv.errors import Refused
from kvmhv.model import TrustedHost

ANSWER_S = 3700.0
"""Longest silence of the other agent: a `vm stop` may wait an hour for the guest."""
PASSED_ON = ("Content-Type", "Content-Length", "Accept")
PASSED_BACK = ("Content-Type", "Content-Length", "Cache-Control")
MESSAGE_BYTES = 64 * 1024
HEARTBEAT_S = 20.0


class Forwarder:
    """Forwards requests to trusted hosts; one for this very host goes back to its own socket."""

    def __init__(self, own_name: str, socket_path: Path, peer: Peer) -> None:
        self._own_name = own_name
        self._socket_path = socket_path
        self._peer = peer

    async def forward(self, request: web.Request, caller: Caller) -> web.StreamResponse:
        """Forward one request. Raises CallerError `host-unknown`, PeerUnreachable, Refused."""
        if caller.kind is Kind.HOST:
            raise Refused(
                "forward-chain",
                f"{self._own_name} does not forward what another host forwarded",
                "ask the host itself, or one that trusts it",
                host=self._own_name,
            )
        name = request.match_info["host"]
        path = f"/v1/{request.match_info['rest']}"
        if name == self._own_name:
            connector = aiohttp.UnixConnector(path=str(self._socket_path), force_close=True)
            session = aiohttp.ClientSession(connector=connector, auto_decompress=False)
            async with session:
                return await self._pass(request, caller, session, f"http://{self._own_name}{path}", None)
        target = self._peer.trusted(name)
        async with self._peer.session(target) as session:
            return await self._pass(request, caller, session, f"https://{target.address}{path}", target)

    async def _pass(
        self,
        request: web.Request,
        caller: Caller,
        session: aiohttp.ClientSession,
        url: str,
        target: TrustedHost | None,
    ) -> web.StreamResponse:
        headers = {name: request.headers[name] for name in PASSED_ON if name in request.headers}
        headers[CALLER_HEADER] = str(caller)
        translated = self._peer.translated(target) if target is not None else contextlib.nullcontext()
        if request.headers.get("Upgrade", "").lower() == "websocket":
            async with translated:
                upstream = await session.ws_connect(
                    url,
                    params=request.query,
                    headers={CALLER_HEADER: str(caller)},
                    heartbeat=HEARTBEAT_S,
                    max_msg_size=MESSAGE_BYTES,
                    decode_text=False,
                )
            return await _bridge(request, upstream)
        async with translated:
            answer = await session.request(
                request.method,
                url,
                params=request.query,
                headers=headers,
                data=request.content if request.can_read_body else None,
                timeout=aiohttp.ClientTimeout(None, sock_connect=session.timeout.sock_connect, sock_read=ANSWER_S),
                allow_redirects=False,
            )
        async with answer:
            return await _pass_back(request, answer)


async def _pass_back(request: web.Request, answer: aiohttp.ClientResponse) -> web.StreamResponse:
    response = web.StreamResponse(
        status=answer.status,
        headers={name: answer.headers[name] for name in PASSED_BACK if name in answer.headers},
    )
    await response.prepare(request)
    try:
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
    except (OSError, aiohttp.ClientError) as error:
        # Either end has gone. Half an answer may be out: only the end of the connection can tell.
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionAbortedError(str(error)) from error
    return response


async def _bridge(request: web.Request, upstream: "aiohttp.ClientWebSocketResponse[bool]") -> web.WebSocketResponse:
    client = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=MESSAGE_BYTES, decode_text=False)
    await client.prepare(request)
    back = asyncio.create_task(_copy(upstream, client))
    try:
        await _copy(client, upstream)
    finally:
        back.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await back
        await upstream.close()
        await client.close()
    return client


async def _copy(
    source: "web.WebSocketResponse | aiohttp.ClientWebSocketResponse[bool]",
    target: "web.WebSocketResponse | aiohttp.ClientWebSocketResponse[bool]",
) -> None:
    """Pass messages on until either side ends, then end the other."""
    with contextlib.suppress(OSError, RuntimeError, aiohttp.ClientError):
        async for message in source:
            if message.type not in (WSMsgType.BINARY, WSMsgType.TEXT):
                break
            await target.send_bytes(message.data)
    await target.close()
