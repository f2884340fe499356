"""Worlds as numbers: what a host does next is worked out once for all worlds that look the same from there.

A host's next steps depend on itself, on what it can reach of the other host (`_seen`), and on three flags. So a world
is a number, and what follows from many worlds is looked up at once.
"""

from collections.abc import Callable, Iterator

import numpy as np

from tests.explore.tables import Column, Numbers, Table, spread
from tests.explore.transitions import Bounds, Next, Transitions, connected, cut_off
from tests.explore.world import LOST, Host, World

MARK = -9
"""Stands in the other host's inbox for what is in it."""
BITS = 24
LOW = (1 << BITS) - 1
LINK, CRASHED, MOVE = 1, 2, 4
FLAGS = 7
Edges = tuple[Numbers, Numbers]
"""Steps: the position of the world that it begins in, and the world that follows."""


class Steps:
    """What a host does in worlds that look the same to it: what it becomes, what is done to the other, the flags."""

    def __init__(self, work_out: Callable[[int], set[tuple[int, int, int]]]) -> None:
        self._work_out = work_out
        self._rows = Table(self._add)
        self._first, self._count = Column(), Column()
        self._columns = Column(), Column(), Column()

    def _add(self, key: int) -> int:
        steps = self._work_out(key)
        self._first.extend((len(self._columns[0]),))
        self._count.extend((len(steps),))
        for column, values in zip(self._columns, zip(*steps, strict=True), strict=False):
            column.extend(values)
        return len(self._first) - 1

    def of(self, keys: Numbers) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Return the position of the key, and the three parts, of each step of these keys."""
        rows = self._rows.of(keys)
        count = self._count.array[rows]
        steps = spread(self._first.array[rows], count)
        host, change, flags = (column.array[steps] for column in self._columns)
        return np.repeat(np.arange(keys.size), count), host, change, flags


class Packing(Transitions):
    """Worlds by number, and what may follow them: `calmly` if all goes well, `in_time` if nothing does, `badly`."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self._numbers: dict[Host, int] = {}
        self._hosts: list[Host] = []
        self._seen = Column()
        """How each host looks from the other one: also a host's number."""
        self._state, self._open, self._listens = Column(), Column(), Column()
        """Whether a host has a move that runs; one that runs or is in its journal; an agent that has heard all."""
        self._changes: dict[tuple[Host, Host], int] = {}
        self._done_to: list[tuple[Host, Host]] = []
        self._changed = Table(self._change)
        self._connected = Table(lambda number: self._number(connected(self._hosts[number])))
        self._cut_off = Table(lambda number: self._number(cut_off(self._hosts[number])))
        self._calm = Steps(lambda key: self._steps(self.healthy_of, key))
        self._bad = Steps(lambda key: self._steps(self.faults_of, key))

    # --- numbers

    def pack(self, world: World) -> int:
        """Return the number of a world."""
        flags = LINK * world.link + CRASHED * world.crashed + MOVE * world.move
        one, two = world.hosts
        return (self._number(one) << BITS | self._number(two)) << 3 | flags

    def unpack(self, packed: int) -> World:
        """Return a world by its number."""
        return self._world(self._hosts[packed >> BITS + 3], self._hosts[packed >> 3 & LOW], packed & FLAGS)

    def _world(self, one: Host, two: Host, flags: int) -> World:
        return World(
            hosts=(one, two),
            shared=not self.bounds.disks,
            post_copy=self.bounds.post_copy,
            link=bool(flags & LINK),
            crashed=bool(flags & CRASHED),
            move=flags // MOVE,
        )

    def _number(self, host: Host) -> int:
        number = self._numbers.get(host)
        if number is None:
            seen_as = _as_seen(host)
            seen = len(self._hosts) if seen_as == host else self._number(seen_as)
            number = self._numbers[host] = len(self._hosts)
            self._hosts.append(host)
            self._seen.extend((seen,))
            self._state.extend((host.state >= 0,))
            self._open.extend((host.state >= 0 or host.durable >= 0,))
            self._listens.extend((host.agent and not host.inbox,))
        return number

    # --- what follows

    def calmly(self, worlds: Numbers) -> Edges:
        """Return what follows if nothing breaks and no timer goes off."""
        one, two, flags = worlds >> BITS + 3, worlds >> 3 & LOW, worlds & FLAGS
        state, listens = self._state.array, self._listens.array
        meets = (flags & LINK == 0) & (listens[one] & listens[two] & (state[one] | state[two]) == 1)
        at = np.flatnonzero(meets)
        both = self._connected.of(one[at]) << BITS | self._connected.of(two[at])
        return self._both(self._calm, one, two, flags, (at, both << 3 | flags[at] | LINK))

    def in_time(self, packed: int) -> list[int]:
        """Return the worlds that follow if a timer goes off."""
        world = self.unpack(packed)
        return [self.pack(after) for index in (0, 1) for _, after in self.timers_of(world, index)]

    def badly(self, worlds: Numbers) -> Edges:
        """Return what follows if something breaks; nothing where nothing is left that could go wrong."""
        one, two, flags = worlds >> BITS + 3, worlds >> 3 & LOW, worlds & FLAGS
        still = np.flatnonzero(self._open.array[one] | self._open.array[two])
        one, two, flags = one[still], two[still], flags[still]
        at = np.flatnonzero(flags & LINK if "cut" in self.bounds.kinds else flags & 0)
        both = self._cut_off.of(one[at]) << BITS | self._cut_off.of(two[at])
        found, after = self._both(self._bad, one, two, flags, (at, both << 3 | flags[at] & ~LINK))
        return still[found], after

    def has_ended(self, packed: int) -> bool:
        """Whether neither host has an open move."""
        return self._hosts[packed >> BITS + 3].state < 0 and self._hosts[packed >> 3 & LOW].state < 0

    def _both(self, steps: Steps, one: Numbers, two: Numbers, flags: Numbers, joint: Edges) -> Edges:
        """Return what each host does, and what befalls both."""
        found = [joint]
        for index, (mine, other) in enumerate(((one, two), (two, one))):
            keys = (mine << BITS | self._seen.array[other]) << 4 | flags << 1 | index
            at, becomes, change, after = steps.of(keys)
            others = other[at]
            touched = np.flatnonzero(change)
            others[touched] = self._changed.of(others[touched] << BITS | change[touched])
            hosts = others << BITS | becomes if index else becomes << BITS | others
            found.append((at, hosts << 3 | after))
        return np.concatenate([at for at, _ in found]), np.concatenate([after for _, after in found])

    def _steps(self, steps_of: Callable[[World, int], Iterator[Next]], key: int) -> set[tuple[int, int, int]]:
        """Work out what a host does in a world in which the other one is as it is seen."""
        index = key & 1
        here, there = self._hosts[key >> BITS + 4], self._hosts[key >> 4 & LOW]
        hosts = (there, here) if index else (here, there)
        found = set()
        for _, after in steps_of(self._world(*hosts, key >> 1 & FLAGS), index):
            number = self._number(after.hosts[index])
            change = self._change_number(there, after.hosts[1 - index])
            found.add((number, change, LINK * after.link + CRASHED * after.crashed + MOVE * after.move))
        return found

    def _change_number(self, before: Host, after: Host) -> int:
        """Return what was done to the other host, 0 for nothing."""
        if before is after or before == after:
            return 0
        number = self._changes.get((before, after))
        if number is None:
            self._done_to.append((before, after))
            number = self._changes[before, after] = len(self._done_to)
        return number

    def _change(self, key: int) -> int:
        """Do to a host what was done to it as it was seen."""
        host = self._hosts[key >> BITS]
        _, after = self._done_to[(key & LOW) - 1]
        said = after.inbox
        if host.state < 0 or not host.agent:  # nobody there minds that the connection is lost
            said = tuple(one for one in said if one != LOST)
        inbox = host.inbox + said[1:] if said[:1] == (MARK,) else said
        return self._number(host._replace(qemu=after.qemu, disk=after.disk, inbox=inbox))


def _as_seen(host: Host) -> Host:
    """What the other host's steps can depend on, and change."""
    return Host(
        defined=host.defined,
        disk=host.disk,
        qemu=host.qemu,
        exported=host.exported,
        state=0,
        inbox=(MARK,),
    )
