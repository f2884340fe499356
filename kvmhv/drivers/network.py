"""Taps, bridges and addresses of this host, over netlink (pyroute2); implements ports.Network.

Each call opens a netlink socket of its own in a thread: calls are rare, and the event loop never waits for the kernel.
"""

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from kvmhv.config import Config
from kvmhv.errors import CallerError, HostError

TAP_PREFIX = "kv"
TIMEOUT_S = 10.0
LOOPBACK = "lo"
SYS_NET = Path("/sys/class/net")

Answer = TypeVar("Answer")


class LinuxNetwork:
    """Implements ports.Network on the network namespace that the agent runs in."""

    def __init__(self, config: Config) -> None:
        self._host = config.name
        self._allowed = config.switches

    async def switches(self) -> tuple[str, ...]:
        """Names of the bridges that VMs may be attached to, sorted."""
        return await self._do("list bridges", self._switches)

    async def add_tap(self, tap: str, switch: str) -> None:
        """Make a tap that outlives this process, attach it to the switch, set it up; may be repeated.

        Raises CallerError `switch-unknown`, HostError `network`; a tap that could not be attached is removed again.
        """
        if switch not in await self.switches():
            known = ", ".join(await self.switches()) or "none"
            text = f"{self._host} has no switch named {switch} (it has: {known})"
            raise CallerError("switch-unknown", text, f"make a bridge named {switch}", host=self._host)
        try:
            await self._do(f"make tap {tap} on {switch}", lambda: _add_tap(tap, switch))
        except HostError:
            with contextlib.suppress(HostError):
                await self.remove_tap(tap)
            raise

    async def remove_tap(self, tap: str) -> None:
        """Remove the tap; no error if it is gone."""
        await self._do(f"remove tap {tap}", lambda: _remove(tap))

    async def taps(self) -> tuple[str, ...]:
        """Names of all taps that kvmhv made."""
        return await self._do("list taps", _taps)

    async def addresses(self) -> tuple[tuple[str, int], ...]:
        """(ip, prefix length) of every address of the host, loopback left out."""
        return await self._do("list addresses", _addresses)

    def _switches(self) -> tuple[str, ...]:
        bridges = sorted(path.name for path in SYS_NET.iterdir() if (path / "bridge").is_dir())
        return tuple(name for name in bridges if not self._allowed or name in self._allowed)

    async def _do(self, what: str, work: Callable[[], Answer]) -> Answer:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await asyncio.to_thread(work)
        except TimeoutError:
            raise HostError("network", f"{what}: the kernel did not answer", "see dmesg", host=self._host) from None
        except (NetlinkError, OSError) as error:
            said = os.strerror(error.code) if isinstance(error, NetlinkError) else str(error)
            raise HostError("network", f"{what}: {said}", "see `ip link` on that host", host=self._host) from error


def _add_tap(tap: str, switch: str) -> None:
    with IPRoute() as kernel:
        bridge = kernel.link_lookup(ifname=switch)[0]
        if not kernel.link_lookup(ifname=tap):
            kernel.link("add", ifname=tap, kind="tuntap", mode="tap")
        index = kernel.link_lookup(ifname=tap)[0]
        kernel.link("set", index=index, master=bridge, state="up")


def _remove(tap: str) -> None:
    with IPRoute() as kernel:
        for index in kernel.link_lookup(ifname=tap):
            kernel.link("del", index=index)


def _taps() -> tuple[str, ...]:
    names = (path.name for path in SYS_NET.iterdir() if (path / "tun_flags").exists())
    return tuple(sorted(name for name in names if name.startswith(TAP_PREFIX)))


def _addresses() -> tuple[tuple[str, int], ...]:
    found = []
    with IPRoute() as kernel:
        loopbacks = set(kernel.link_lookup(ifname=LOOPBACK))
        for message in kernel.get_addr():
            ip = message.get_attr("IFA_ADDRESS")
            if message["index"] not in loopbacks and ip is not None:
                found.append((str(ip), int(message["prefixlen"])))
    return tuple(found)
