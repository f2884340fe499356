"""Taps, bridges and addresses of this host over netlink (pyroute2). Implements ports.Network.

A switch is a Linux bridge; the driver attaches taps to bridges and never makes or changes one. Each call opens its own
netlink socket in a thread, so nothing of it lives in the event loop.
"""

import asyncio
import errno
from collections.abc import Callable
from typing import Any, TypeVar

from pyroute2 import IPRoute, NetlinkError

from kvmhv.config import Config
from kvmhv.errors import CallerError, HostError

TAP_PREFIX = "kv"
INTERFACE_NAME_MAX = 15
"""Linux: IFNAMSIZ is 16 with its final zero (netdevice(7))."""

CALL_TIMEOUT_S = 10.0
GLOBAL_SCOPE = 0
"""rtnetlink(7): addresses that are valid beyond their own link."""

Result = TypeVar("Result")


class LinuxNetwork:
    """The host's network, as far as VMs and their moves need it."""

    def __init__(self, config: Config) -> None:
        """Remember which bridges are allowed."""
        self._allowed = config.switches

    async def switches(self) -> tuple[str, ...]:
        """Names of the bridges that VMs may be attached to: those of `switches` that exist, or every bridge."""
        return await _call(lambda ip: tuple(sorted(self._bridges(ip))))

    async def add_tap(self, tap: str, switch: str) -> None:
        """Make a tap with the switch's MTU, attach it, set it up; one that is there already is put right.

        Raises CallerError `switch-missing` (no such bridge here, or not allowed), HostError `network`; then there is no
        new tap.
        """
        _check_name(tap)
        await _call(lambda ip: self._add_tap(ip, tap, switch))

    async def remove_tap(self, tap: str) -> None:
        """Remove the tap; no error if it is gone."""
        _check_name(tap)
        await _call(lambda ip: _remove(ip, tap))

    async def taps(self) -> tuple[str, ...]:
        """Names of all taps that kvmhv made (they start with `kv`)."""
        return await _call(_taps)

    async def addresses(self) -> tuple[tuple[str, int], ...]:
        """(ip, prefix length) of every address that other hosts can reach: loopback and link-local ones left out."""
        return await _call(_addresses)

    def _bridges(self, ip: IPRoute) -> dict[str, Any]:
        found = {link.get_attr("IFLA_IFNAME"): link for link in ip.get_links(kind="bridge") if _kind(link) == "bridge"}
        return {name: link for name, link in found.items() if not self._allowed or name in self._allowed}

    def _add_tap(self, ip: IPRoute, tap: str, switch: str) -> None:
        bridge = self._bridges(ip).get(switch)
        if bridge is None:
            raise CallerError(
                "switch-missing",
                f"there is no switch {switch} on this host",
                "make the bridge, or allow it with `switches` in agent.toml",
            )
        made = not ip.link_lookup(ifname=tap)
        if made:
            ip.link("add", ifname=tap, kind="tuntap", mode="tap")
        try:
            index = ip.link_lookup(ifname=tap)[0]
            ip.link("set", index=index, master=bridge["index"], mtu=bridge.get_attr("IFLA_MTU"), state="up")
        except (NetlinkError, IndexError):
            if made:
                _remove(ip, tap)
            raise


def _check_name(tap: str) -> None:
    if not tap.startswith(TAP_PREFIX) or not len(TAP_PREFIX) < len(tap) <= INTERFACE_NAME_MAX:
        raise HostError("network", f"{tap!r} is no tap of kvmhv", "this is a mistake of kvmhv: please report it")


def _kind(link: Any) -> str | None:
    info = link.get_attr("IFLA_LINKINFO")
    return info.get_attr("IFLA_INFO_KIND") if info is not None else None


def _remove(ip: IPRoute, tap: str) -> None:
    for index in ip.link_lookup(ifname=tap):
        try:
            ip.link("del", index=index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise


def _taps(ip: IPRoute) -> tuple[str, ...]:
    names = [link.get_attr("IFLA_IFNAME") for link in ip.get_links() if _kind(link) == "tun"]
    return tuple(sorted(name for name in names if name.startswith(TAP_PREFIX)))


def _addresses(ip: IPRoute) -> tuple[tuple[str, int], ...]:
    found = set()
    for address in ip.get_addr():
        # On a point-to-point link IFA_ADDRESS is the other end, so IFA_LOCAL counts where there is one.
        text = address.get_attr("IFA_LOCAL") or address.get_attr("IFA_ADDRESS")
        if text and address["scope"] == GLOBAL_SCOPE:
            found.add((str(text), int(address["prefixlen"])))
    return tuple(sorted(found))


async def _call(action: Callable[[IPRoute], Result]) -> Result:
    """Run an action with a netlink socket in a thread. Raises HostError `network`."""

    def work() -> Result:
        with IPRoute() as ip:
            return action(ip)

    try:
        async with asyncio.timeout(CALL_TIMEOUT_S):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise HostError("network", f"netlink does not answer in {CALL_TIMEOUT_S:g} s", "see dmesg") from None
    except (NetlinkError, OSError, IndexError) as error:
        raise HostError("network", f"the host's network: {error}", "are tun and bridge there, is this root?") from error
