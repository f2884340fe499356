"""Taps, bridges and addresses of this host over netlink (pyroute2), and MPTCP. Implements ports.Network, MigrationWays.

A switch is a Linux bridge; the driver attaches taps to bridges and never makes or changes one. Each call opens its own
netlink socket in a thread, so nothing of it lives in the event loop.
"""

import asyncio
import contextlib
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pyroute2 import MPTCP, IPRoute, NetlinkError

from kvmhv.config import Config
from kvmhv.errors import CallerError, HostError

TAP_PREFIX = "kv"
INTERFACE_NAME_MAX = 15
"""Linux: IFNAMSIZ is 16 with its final zero (netdevice(7))."""

MPTCP_ENABLED = Path("/proc/sys/net/mptcp/enabled")
OWN_NUMBERS = range(224, 240)
"""Endpoints with these numbers are kvmhv's: the kernel gives others the lowest free one."""
WAYS_MAX = 8
"""The kernel's own bound."""
SIGNAL = 1
"""MPTCP_PM_ADDR_FLAG_SIGNAL of linux/mptcp.h: tell the other end."""
GLOBAL_SCOPE = 0
"""rtnetlink(7): addresses that are valid beyond their own link."""

Result = TypeVar("Result")


class LinuxNetwork:
    """The host's network, as far as VMs and their moves need it."""

    def __init__(self, config: Config) -> None:
        """Remember which bridges are allowed."""
        self._allowed = config.switches
        self._timeout_s = config.waits.netlink_s

    async def switches(self) -> tuple[str, ...]:
        """Names of the bridges that VMs may be attached to: those of `switches` that exist, or every bridge."""
        return await _call(lambda ip: tuple(sorted(self._bridges(ip))), self._timeout_s)

    async def add_tap(self, tap: str, switch: str) -> None:
        """Make a tap with the switch's MTU, attach it, set it up; one that is there already is put right.

        Raises CallerError `switch-missing` (no such bridge here, or not allowed), HostError `network`; then there is no
        new tap.
        """
        _check_name(tap)
        await _call(lambda ip: self._add_tap(ip, tap, switch), self._timeout_s)

    async def remove_tap(self, tap: str) -> None:
        """Remove the tap; no error if it is gone."""
        _check_name(tap)
        await _call(lambda ip: _remove(ip, tap), self._timeout_s)

    async def taps(self) -> tuple[str, ...]:
        """Names of all taps that kvmhv made (they start with `kv`)."""
        return await _call(_taps, self._timeout_s)

    async def addresses(self) -> tuple[tuple[str, int], ...]:
        """(ip, prefix length) of every address that other hosts can reach: loopback and link-local ones left out."""
        return await _call(_addresses, self._timeout_s)

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


class MptcpWays:
    """Connections of moves that take several networks: the target's kernel tells the source's of its other addresses.

    The source needs no address of its own for that: the way to the other address is the way to its network. QEMU
    listens at one address, so the kernel listens at the others, at a port of the range that is open for moves (the
    highest ones first, QEMU takes the lowest): which connection a new way belongs to says its token, not its port.
    What an agent that ended in the middle has left is known by its number, and goes at the start of the next one; the
    limits that it raised stay raised.
    """

    def __init__(self, config: Config) -> None:
        """Remember which ports may be used."""
        self._ports = config.migration_ports
        self._timeout_s = config.waits.netlink_s
        self._announced: dict[str, tuple[str, ...]] = {}
        """By move."""
        self._limits: tuple[int, int] | None = None
        """What they were before the first move: ways of a connection, addresses that are taken from the other end."""
        self._lock = asyncio.Lock()

    async def possible(self) -> bool:
        """Whether this host's kernel has MPTCP, and it is on."""
        return _has_mptcp()

    async def sweep(self) -> None:
        """At the agent's start: remove what an earlier agent left announced."""
        if await self.possible():
            with contextlib.suppress(HostError):
                await _mptcp(lambda mptcp: _announce(mptcp, set(), self._ports), self._timeout_s)

    async def open(self, move_id: str, announced: tuple[str, ...]) -> None:
        """Raise the limits and announce addresses. Raises HostError `network`."""
        async with self._lock:
            self._announced[move_id] = announced
            wanted = self._wanted()
            before = await _mptcp(_raise_limits, self._timeout_s)
            if self._limits is None:
                self._limits = before
            await _mptcp(lambda mptcp: _announce(mptcp, wanted, self._ports), self._timeout_s)

    async def close(self, move_id: str) -> None:
        """Take an announcement back that no other move needs; after the last one the limits are what they were."""
        async with self._lock:
            if self._announced.pop(move_id, None) is None:
                return
            wanted, limits = self._wanted(), self._limits
            with contextlib.suppress(HostError):
                await _mptcp(lambda mptcp: _announce(mptcp, wanted, self._ports), self._timeout_s)
                if not self._announced and limits is not None:
                    await _mptcp(
                        lambda mptcp: mptcp.limits("set", subflows=limits[0], add_addr_accepted=limits[1]),
                        self._timeout_s,
                    )
                    self._limits = None

    def _wanted(self) -> set[str]:
        return {ip for announced in self._announced.values() for ip in announced}


def _has_mptcp() -> bool:
    try:
        return MPTCP_ENABLED.read_text().strip() == "1"
    except OSError:
        return False


def _raise_limits(mptcp: Any) -> tuple[int, int]:
    """Return what the limits were."""
    (now,) = mptcp.limits("show")
    ways, taken = now.get_attr("MPTCP_PM_ATTR_SUBFLOWS"), now.get_attr("MPTCP_PM_ATTR_RCV_ADD_ADDRS")
    mptcp.limits("set", subflows=max(ways, WAYS_MAX), add_addr_accepted=max(taken, WAYS_MAX))
    return ways, taken


def _announce(mptcp: Any, wanted: set[str], ports: tuple[int, int]) -> None:
    """Let the addresses that kvmhv announces be exactly these; the operator's own endpoints stay as they are."""
    ours: dict[int, str] = {}
    for message in mptcp.endpoint("show"):
        endpoint = message.get_attr("MPTCP_PM_ATTR_ADDR")
        number = endpoint.get_attr("MPTCP_PM_ADDR_ATTR_ID")
        if number in OWN_NUMBERS:
            ip = endpoint.get_attr("MPTCP_PM_ADDR_ATTR_ADDR4") or endpoint.get_attr("MPTCP_PM_ADDR_ATTR_ADDR6")
            ours[number] = ip
    for number, ip in ours.items():
        if ip not in wanted:
            mptcp.endpoint("del", id=number, **_as_address(ip))
    free = (number for number in OWN_NUMBERS if number not in ours)
    for ip in sorted(wanted - set(ours.values())):
        _announce_one(mptcp, ip, next(free), ports)


def _announce_one(mptcp: Any, ip: str, number: int, ports: tuple[int, int]) -> None:
    for port in range(ports[1], ports[0] - 1, -1):
        try:
            mptcp.endpoint("add", id=number, flags=SIGNAL, port=port, **_as_address(ip))
        except NetlinkError as error:
            if error.code != errno.EADDRINUSE:
                raise
        else:
            return
    raise OSError(errno.EADDRINUSE, f"no port of {ports[0]}-{ports[1]} is free on {ip}")


def _as_address(ip: str) -> dict[str, str]:
    return {"addr6" if ":" in ip else "addr4": ip}


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


async def _call(action: Callable[[IPRoute], Result], timeout_s: float) -> Result:
    """Run an action with a netlink socket in a thread. Raises HostError `network`."""

    def work() -> Result:
        with IPRoute() as ip:
            return action(ip)

    return await _in_thread(work, timeout_s)


async def _mptcp(action: Callable[[Any], Result], timeout_s: float) -> Result:
    """Run an action with a netlink socket for MPTCP in a thread. Raises HostError `network`."""

    def work() -> Result:
        with MPTCP() as mptcp:
            return action(mptcp)

    return await _in_thread(work, timeout_s)


async def _in_thread(work: Callable[[], Result], timeout_s: float) -> Result:
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.to_thread(work)
    except TimeoutError:
        raise HostError("network", f"netlink does not answer in {timeout_s:g} s", "see dmesg") from None
    except (NetlinkError, OSError, IndexError) as error:
        raise HostError("network", f"the host's network: {error}", "are tun and bridge there, is this root?") from error
