"""The lab's namespaces and links, made with iproute2: one `ip` for each namespace, its lines from plan.py."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Sequence

from kvmhv.errors import HostError
from kvmhv.lab import plan as plans
from kvmhv.lab.plan import LabPlan, namespace, parse_namespace
from kvmhv.lab.state import NETNS_DIR, held_locks

_IP_TIMEOUT_S = 30.0
_MNT_DETACH = 2


def _run(argv: Sequence[str], lines: Sequence[str] = ()) -> None:
    """Run a program. A command that is killed leaves it behind for a moment: with the lab's lock, so that who comes
    next does not meet it."""
    done = subprocess.run(
        argv,
        input="\n".join(lines) + "\n",
        text=True,
        capture_output=True,
        timeout=_IP_TIMEOUT_S,
        check=False,
        pass_fds=held_locks(),
    )
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        todo = "the lab needs root, iproute2, and a kernel with bridge, veth and tbf"
        raise HostError("lab-network", f"`{' '.join(argv)}` failed: {said}", todo)


def _ip(name: str, lines: Sequence[str]) -> None:
    _run(["ip", "-n", name, "-batch", "-"], lines)


def make_switch(plan: LabPlan) -> None:
    """Make the lab's switch: a namespace with one bridge for each network. HostError `lab-network` on failure."""
    name = namespace(plan.name, plans.SWITCH)
    _run(["ip", "netns", "add", name])
    _ip(name, plans.switch_lines(plan))


def plug(plan: LabPlan, host: str) -> None:
    """Make a host's namespace and plug it into every network. HostError `lab-network` on failure."""
    name = namespace(plan.name, host)
    _run(["ip", "netns", "add", name])
    _ip(namespace(plan.name, plans.SWITCH), plans.port_lines(plan, host))
    _ip(name, plans.host_lines(plan, host))
    if lines := plans.rate_lines(plan):
        _run(["tc", "-n", name, "-batch", "-"], lines)


def set_ports(plan: LabPlan, host: str, networks: Sequence[str], *, up: bool) -> None:
    """Pull a host's cables at the switch, or put them back. Its peers then hear nothing more from it."""
    word = "up" if up else "down"
    lines = [f"link set {plans.port(host, network)} {word}" for network in networks]
    _ip(namespace(plan.name, plans.SWITCH), lines)


def unplug(plan: LabPlan, host: str) -> None:
    """Remove a host's cables and its namespace; nothing may run in it any more.

    The kernel takes its time to empty a namespace that nobody uses, but the next boot needs the ports' names at once.
    """
    switch = namespace(plan.name, plans.SWITCH)
    listing = subprocess.run(
        ["ip", "-n", switch, "-j", "link"], capture_output=True, timeout=_IP_TIMEOUT_S, check=True
    ).stdout
    there = {link.get("ifname") for link in json.loads(listing)}
    ports = [plans.port(host, net.name) for net in plan.networks]
    _ip(switch, [f"link delete {port}" for port in ports if port in there])
    remove_namespace(namespace(plan.name, host))


def remove_namespace(name: str) -> None:
    """Remove a namespace and the links in it, also a dead file of that name; nothing may run in it any more."""
    path = NETNS_DIR / name
    if not path.exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(path), _MNT_DETACH) and ctypes.get_errno() not in {0, 22, 2}:
        raise HostError("lab-network", f"cannot unmount {path}: {os.strerror(ctypes.get_errno())}")
    path.unlink(missing_ok=True)


def namespaces_of(lab: str) -> list[str]:
    """Return the names of all namespaces of a lab that are there, whatever its state file says."""
    if not NETNS_DIR.is_dir():
        return []
    found = [entry.name for entry in NETNS_DIR.iterdir()]
    return sorted(name for name in found if (parsed := parse_namespace(name)) is not None and parsed[0] == lab)
