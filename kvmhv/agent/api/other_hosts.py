"""The views of the hosts that this one trusts, asked for while somebody looks at the live page and at no other time."""

import asyncio
import time

import aiohttp
import msgspec

from kvmhv.agent.web.view import HostLine, View
from kvmhv.drivers.auth.trust import Trust
from kvmhv.drivers.peer import Peer
from kvmhv.errors import KvmhvError
from kvmhv.model import TrustedHost

FRESH_S = 1.0
"""A view that is younger is not asked for again."""
ANSWER_S = 4.0
ANSWER_BYTES = 4 * 1024 * 1024
HOSTS_MAX = 20
"""So many trusted hosts are shown."""
VIEW_PATH = "/v1/view"


class OtherHosts:
    """Asks the trusted hosts, each at most once a second however many people look."""

    def __init__(self, trust: Trust, peer: Peer) -> None:
        self._trust = trust
        self._peer = peer
        self._lines: dict[str, HostLine] = {}
        self._asked_s = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    def lines(self) -> tuple[HostLine, ...]:
        """Return what is known of each host by now, and begin to ask again if that is old. Never waits."""
        known = self._trust.list()[:HOSTS_MAX]
        if (self._asking is None or self._asking.done()) and time.monotonic() - self._asked_s >= FRESH_S:
            self._asking = asyncio.create_task(self._ask_all(known))
        return tuple(self._lines.get(host.name, HostLine(name=host.name, address=host.address)) for host in known)

    async def close(self) -> None:
        """Ask no more."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    async def _ask_all(self, hosts: tuple[TrustedHost, ...]) -> None:
        lines = await asyncio.gather(*(self._ask(host) for host in hosts))
        self._lines = {line.name: line for line in lines}
        self._asked_s = time.monotonic()

    async def _ask(self, host: TrustedHost) -> HostLine:
        content = bytearray()
        try:
            async with (
                asyncio.timeout(ANSWER_S),
                self._peer.session(host) as session,
                session.get(f"https://{host.address}{VIEW_PATH}", allow_redirects=False) as answer,
            ):
                answer.raise_for_status()
                async for chunk in answer.content.iter_any():
                    content += chunk
                    if len(content) > ANSWER_BYTES:
                        return HostLine(name=host.name, address=host.address, problem="its answer is too long")
            return HostLine(name=host.name, address=host.address, view=msgspec.json.decode(content, type=View))
        except (TimeoutError, OSError, aiohttp.ClientError, msgspec.MsgspecError, KvmhvError) as error:
            said = "it does not answer" if isinstance(error, TimeoutError) else str(error)[:200]
            return HostLine(name=host.name, address=host.address, problem=said)
