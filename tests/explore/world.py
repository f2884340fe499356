"""Two hosts and the network between them, small enough to be explored: what the machines' effects do, what may fail.

Everything is immutable; a transition makes another world. Truth that no machine can see (which copy is the newest,
which disk) stands in the hosts' `fresh` and `disk` and is what the invariants are about.
"""

from typing import Any, NamedTuple, TypeVar

_make = tuple.__new__
Tuple = TypeVar("Tuple", bound=type[tuple[Any, ...]])


def quick(kind: Tuple) -> Tuple:
    """Give a NamedTuple a _replace that takes half the time: an exploration does little else."""
    index = {name: number for number, name in enumerate(kind._fields)}  # type: ignore[attr-defined]

    def replace(one: tuple[Any, ...], /, **changes: Any) -> Any:
        values = list(one)
        for name, value in changes.items():
            values[index[name]] = value
        return _make(kind, values)

    kind._replace = replace  # type: ignore[attr-defined]
    return kind


LOST, CONNECTED = -1, -2
"""Marks in an inbox: the connection broke, a connection stands."""


class Violation(AssertionError):
    """An invariant does not hold."""


@quick
class Qemu(NamedTuple):
    """A QEMU process with the VM's copy."""

    status: str
    """`running`, `paused`, `finish` (QEMU paused it by itself and resumes it by itself), `inmigrate`."""
    migration: str = ""
    fresh: bool = False
    """The memory in it is the newest: nothing ran elsewhere since."""
    mirrors: bool = False
    ran: bool = False
    passes: int = 0
    """Passes whose beginning it has told."""
    follow: bool = False
    """Post-copy: its pages are to go over after the switchover."""
    awaits: bool = False
    """Post-copy: it waits on a new address for the pages that it lacks."""


@quick
class Host(NamedTuple):
    """A host: what is on its disk, what a reboot takes away, what its agent's death takes away."""

    # durable
    durable: int = -1
    """Newest state in the durable journal."""
    ended: tuple[int, ...] = ()
    """The report of each move that ended here, -1 where it has not."""
    defined: bool = False
    disk: str = ""
    """`good`: every acknowledged write is there; `stale`; empty: no file."""
    # gone with the host
    up: bool = True
    boot: int = 0
    """1: the host has rebooted since the move began."""
    volatile: int = -1
    """Newest state in the volatile journal, if that is newer than the durable one."""
    qemu: Qemu | None = None
    exported: bool = False
    # gone with the agent
    agent: bool = True
    state: int = -1
    """State of the open move's runner."""
    doing: tuple[int, ...] = ()
    timers: frozenset[str] = frozenset()
    events: tuple[int, ...] = ()
    inbox: tuple[int, ...] = ()

    def without_agent(self) -> "Host":
        """The same host when its agent has died."""
        return self._replace(agent=False, state=-1, doing=(), timers=frozenset(), events=(), inbox=())

    def without_power(self) -> "Host":
        """The same host when it has lost its power."""
        return self.without_agent()._replace(up=False, boot=1, volatile=-1, qemu=None, exported=False)


@quick
class World(NamedTuple):
    """Hosts are numbers 0 and 1; move 0 goes 0 -> 1, move 1 goes back."""

    hosts: tuple[Host, Host]
    link: bool = True
    shared: bool = False
    """Both hosts see the same disks."""
    post_copy: bool = False
    """The guest dirties memory faster than it travels, and its pages may follow it."""
    move: int = 0
    crashed: bool = False
    """A QEMU or a host has died: the VM may be stopped."""

    def at(self, index: int, host: Host) -> "World":
        """The same world with another host."""
        hosts = (host, self.hosts[1]) if index == 0 else (self.hosts[0], host)
        return _make(World, (hosts, *self[1:]))

    @property
    def source(self) -> int:
        """Number of the move's source."""
        return self.move


def run_guest(world: World, index: int) -> World:
    """Let the guest of this host run; the other copy is old from now on."""
    host, other = world.hosts[index], world.hosts[1 - index]
    qemu = host.qemu
    if qemu is None:
        raise Violation("cont without a process")
    if other.qemu is not None and other.qemu.status == "running":
        raise Violation("two running copies")
    if not qemu.fresh:
        raise Violation("a stale copy resumes")
    if host.disk != "good":
        raise Violation(f"a copy runs on a disk that is {host.disk or 'gone'}")
    world = world.at(index, host._replace(qemu=qemu._replace(status="running", ran=True)))
    if other.qemu is not None:
        other = other._replace(qemu=other.qemu._replace(fresh=False))
    if other.disk and not qemu.mirrors and not world.shared:
        other = other._replace(disk="stale")
    return world.at(1 - index, other)
