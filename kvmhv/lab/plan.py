"""Names, addresses and links of a lab. Pure: nothing here touches the machine.

Labs do not see each other, so all of them use the same addresses: network k is 10.77.k.0/24, host number n has .10+n.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import msgspec

from kvmhv.errors import CallerError

DEFAULT_HOSTS = ("host1", "host2", "client")
DEFAULT_SUITE = "trixie"
SUITES = ("trixie", "bookworm", "libvirt")
AGENT_HOSTS = ("host1", "host2")
STORAGE_HOST = "storage"
STORAGE_TREE = "storage"
"""The file server's name, and the tree that only it stands on (tree.py): no other host needs its packages."""
LIBVIRT_TREE = "libvirt"
"""The default suite with libvirt beside kvmhv: only the benchmark's hosts stand on it."""
NETWORKS = ("management", "migration", "lan")
SWITCH = "switch"
UPLINK = "lan-uplink"
MAX_HOSTS = 32

_LAB_NAME = re.compile(r"[a-z][a-z0-9-]{0,19}")
_HOST_NAME = re.compile(r"[a-z][a-z0-9]{0,9}")
_RATE = re.compile(r"([1-9][0-9]{0,5})(kbit|mbit|gbit)")
_RATE_UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
# One millisecond at full speed, and never less than the largest packet that a veth hands over in one piece.
_MIN_BURST_BYTES = 64 * 1024


class NetworkPlan(msgspec.Struct, frozen=True):
    """One network of the lab; `rate` is tc's notation (`400mbit`), None where nothing shapes it."""

    name: str
    subnet: str
    rate: str | None = None


class HostPlan(msgspec.Struct, frozen=True):
    """One host: its Debian suite, its address in each network, and whether an agent runs on it."""

    name: str
    suite: str
    addresses: dict[str, str]
    machine_id: str
    agent: bool


class LabPlan(msgspec.Struct, frozen=True):
    """A whole lab as it is meant to be."""

    name: str
    hosts: tuple[HostPlan, ...]
    networks: tuple[NetworkPlan, ...]

    def host(self, name: str) -> HostPlan:
        """Return the host of that name; CallerError `lab-host-unknown` where there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in self.hosts)
        raise CallerError("lab-host-unknown", f"lab {self.name!r} has no host {name!r}", f"its hosts are: {known}")

    def network(self, name: str) -> NetworkPlan:
        """Return the network of that name; CallerError `lab-network-unknown` where there is none."""
        for network in self.networks:
            if network.name == name:
                return network
        known = ", ".join(network.name for network in self.networks)
        raise CallerError(
            "lab-network-unknown", f"lab {self.name!r} has no network {name!r}", f"its networks are: {known}"
        )


def are_names(lab: str, host: str) -> bool:
    """Return whether these can be the names of a lab and of a host in it."""
    return bool(_LAB_NAME.fullmatch(lab) and _HOST_NAME.fullmatch(host))


def check_lab_name(name: str) -> str:
    """Return the name of a lab unchanged, or raise CallerError `lab-name` when it cannot be one."""
    if not _LAB_NAME.fullmatch(name):
        todo = "use 1 to 20 of a-z, 0-9 and '-', with a letter first"
        raise CallerError("lab-name", f"{name!r} cannot be the name of a lab", todo)
    return name


def make_plan(
    name: str,
    *,
    rate: str | None = None,
    suites: Mapping[str, str] | None = None,
    hosts: Sequence[str] = DEFAULT_HOSTS,
    agents: bool = True,
) -> LabPlan:
    """Return the plan of a lab; CallerError where a name, a suite or the rate cannot be used."""
    check_lab_name(name)
    if rate is not None:
        rate_bits_per_second(rate)
    suites = dict(suites or {})
    _check_hosts(hosts, suites)
    networks = tuple(
        NetworkPlan(network, f"10.77.{number}.0/24", rate if network == "migration" else None)
        for number, network in enumerate(NETWORKS, 1)
    )
    planned = tuple(
        HostPlan(
            name=host,
            suite=suites.get(host, DEFAULT_SUITE),
            addresses={network: f"10.77.{k}.{10 + number}" for k, network in enumerate(NETWORKS, 1)},
            machine_id=hashlib.sha256(f"kvmhv lab {name} {host}".encode()).hexdigest()[:32],
            agent=agents and host in AGENT_HOSTS,
        )
        for number, host in enumerate(hosts, 1)
    )
    return LabPlan(name, planned, networks)


def _check_hosts(hosts: Sequence[str], suites: Mapping[str, str]) -> None:
    for host in hosts:
        if not _HOST_NAME.fullmatch(host) or host == SWITCH:
            todo = "use 1 to 10 of a-z and 0-9, with a letter first ('switch' is taken)"
            raise CallerError("lab-host-name", f"{host!r} cannot be the name of a lab's host", todo)
    if len(set(hosts)) != len(hosts) or not 1 <= len(hosts) <= MAX_HOSTS:
        raise CallerError("lab-hosts", f"a lab has 1 to {MAX_HOSTS} hosts with different names")
    for host, suite in suites.items():
        if host not in hosts:
            raise CallerError("lab-host-unknown", f"a suite is given for {host!r}, which is not a host of the lab")
        if suite not in SUITES and (host, suite) != (STORAGE_HOST, STORAGE_TREE):
            raise CallerError("lab-suite", f"unknown suite {suite!r}", f"known suites: {', '.join(SUITES)}")


def rate_bits_per_second(rate: str) -> int:
    """Return the bits per second of `400mbit`; CallerError `lab-rate` for anything that is not such a rate."""
    match = _RATE.fullmatch(rate)
    if match is None:
        raise CallerError("lab-rate", f"{rate!r} is not a rate", "write it like 400mbit, 50000kbit or 10gbit")
    return int(match[1]) * _RATE_UNITS[match[2]]


def namespace(lab: str, place: str) -> str:
    """Return the name of the network namespace of a host, or of the lab's switch."""
    return f"kvmhv-{lab}-{place}"


def parse_namespace(name: str) -> tuple[str, str] | None:
    """Return (lab, place) of a namespace's name, None when it belongs to no lab.

    Names of hosts have no '-', so the last one ends the lab's name: `kvmhv-a-b-host1` belongs to lab `a-b` only.
    """
    head, _, place = name.rpartition("-")
    lab = head.removeprefix("kvmhv-")
    if lab == head or not _LAB_NAME.fullmatch(lab) or not _HOST_NAME.fullmatch(place):
        return None
    return lab, place


def port(host: str, network: str) -> str:
    """Return the name of the switch's port that a host's link to a network ends in (15 characters at most)."""
    return f"{host}-{network[:3]}"


def mac(plan: LabPlan, host: str, network: str) -> str:
    """Return the address of a host's interface: always the same, so a reboot leaves its peers' ARP tables right."""
    number = [planned.name for planned in plan.hosts].index(host) + 1
    return f"02:4b:56:00:{NETWORKS.index(network) + 1:02x}:{number:02x}"


def switch_lines(plan: LabPlan) -> list[str]:
    """Return the `ip` lines that make the bridges, for the switch's namespace."""
    lines = ["link set lo up"]
    for network in plan.networks:
        lines += [f"link add {network.name} type bridge mcast_snooping 0", f"link set {network.name} up"]
    return lines


def port_lines(plan: LabPlan, host: str) -> list[str]:
    """Return the `ip` lines that plug a host in, for the switch's namespace. The host's namespace must be there."""
    lines: list[str] = []
    for network in plan.networks:
        inside = UPLINK if network.name == "lan" else network.name
        address = "" if network.name == "lan" else f" address {mac(plan, host, network.name)}"
        outside = port(host, network.name)
        peer = f"{inside}{address} netns {namespace(plan.name, host)}"
        lines.append(f"link add {outside} type veth peer name {peer}")
        lines.append(f"link set {outside} master {network.name} up")
    return lines


def host_lines(plan: LabPlan, host: str) -> list[str]:
    """Return the `ip` lines for a host's namespace: its interfaces up, with addresses, and its switch `lan`."""
    lines = ["link set lo up"]
    lines.append(f"link add lan address {mac(plan, host, 'lan')} type bridge mcast_snooping 0")
    lines.append(f"link set {UPLINK} master lan up")
    for network, address in plan.host(host).addresses.items():
        lines += [f"address add {address}/24 dev {network}", f"link set {network} up"]
    return lines


def rate_lines(plan: LabPlan) -> list[str]:
    """Return the `tc` lines that give a host's sending side of each shaped network its rate."""
    lines: list[str] = []
    for network in plan.networks:
        if network.rate is not None:
            burst = max(_MIN_BURST_BYTES, rate_bits_per_second(network.rate) // 8000)
            lines.append(f"qdisc add dev {network.name} root tbf rate {network.rate} burst {burst} latency 50ms")
    return lines


def etc_hosts(plan: LabPlan) -> str:
    """Return /etc/hosts of every host: a name alone is the management address, `host1-lan` the one in that network."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    for host in plan.hosts:
        for network, address in host.addresses.items():
            names = f"{host.name} {host.name}-{network}" if network == "management" else f"{host.name}-{network}"
            lines.append(f"{address} {names}")
    return "\n".join(lines) + "\n"
