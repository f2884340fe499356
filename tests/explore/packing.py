"""Worlds as numbers: what a host does next is worked out once for all worlds that look the same from there.

A host's next steps depend on itself, on what it can reach of the other host (`_seen`), and on three flags. So a world
is a number, and most of what follows from it is looked up.
"""

from collections.abc import Callable, Iterator

from tests.explore.transitions import Bounds, Next, Transitions
from tests.explore.world import LOST, Host, World

MARK = -9
"""Stands in the other host's inbox for what is in it."""
BITS = 24
LOW = (1 << BITS) - 1
LINK, CRASHED, MOVE = 1, 2, 4
FLAGS = 7
Steps = tuple[tuple[int, int, int], ...]
"""Each step: what the host becomes, what is done to the other one, the flags."""


class Packing(Transitions):
    """Worlds by number, and what may follow them: `calmly` if all goes well, `in_time` if nothing does, `badly`."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self._numbers: dict[Host, int] = {}
        self._hosts: list[Host] = []
        self._seen: list[int] = []
        """How each host looks from the other one: also a host's number."""
        self._state: list[bool] = []
        self._kept: list[bool] = []
        self._changes: dict[tuple[Host, Host], int] = {}
        self._done_to: list[tuple[Host, Host]] = []
        self._changed: dict[int, int] = {}
        self._calm: dict[int, Steps] = {}
        self._late: dict[int, Steps] = {}
        self._bad: dict[int, Steps] = {}

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
            link=bool(flags & LINK),
            crashed=bool(flags & CRASHED),
            move=flags // MOVE,
        )

    def _number(self, host: Host) -> int:
        number = self._numbers.get(host)
        if number is None:
            number = self._numbers[host] = len(self._hosts)
            self._hosts.append(host)
            self._seen.append(-1)
            self._state.append(host.state >= 0)
            self._kept.append(host.durable >= 0)
            self._seen[number] = self._number(_as_seen(host))
        return number

    # --- what follows

    def calmly(self, packed: int) -> list[int]:
        """Return the worlds that follow if nothing breaks and no timer goes off."""
        one, two, flags = packed >> BITS + 3, packed >> 3 & LOW, packed & FLAGS
        found = self._both(self._calm, self.healthy_of, one, two, flags)
        if not flags & LINK:
            here, there = self._hosts[one], self._hosts[two]
            listen = here.agent and there.agent and not here.inbox and not there.inbox
            if listen and (self._state[one] or self._state[two]):
                found.append(self.pack(self.connect(self._world(here, there, flags))))
        return found

    def in_time(self, packed: int) -> list[int]:
        """Return the worlds that follow if a timer goes off."""
        one, two, flags = packed >> BITS + 3, packed >> 3 & LOW, packed & FLAGS
        return self._both(self._late, self.timers_of, one, two, flags)

    def badly(self, packed: int) -> list[int]:
        """Return the worlds that follow if something breaks."""
        one, two, flags = packed >> BITS + 3, packed >> 3 & LOW, packed & FLAGS
        if not (self._state[one] or self._state[two] or self._kept[one] or self._kept[two]):
            return []  # nothing is left that could go wrong
        found = self._both(self._bad, self.faults_of, one, two, flags)
        if flags & LINK and "cut" in self.bounds.kinds:
            found.append(self.pack(self.cut(self.unpack(packed))))
        return found

    def has_ended(self, packed: int) -> bool:
        """Whether neither host has an open move."""
        return not (self._state[packed >> BITS + 3] or self._state[packed >> 3 & LOW])

    def _both(
        self,
        known: dict[int, Steps],
        steps_of: Callable[[World, int], Iterator[Next]],
        one: int,
        two: int,
        flags: int,
    ) -> list[int]:
        seen, changed = self._seen, self._changed
        key = (one << BITS | seen[two]) << 4 | flags << 1
        steps = known.get(key)
        if steps is None:
            steps = known[key] = self._steps(steps_of, one, seen[two], flags, 0)
        found = []
        for host, change, after in steps:
            other = changed.get(two << BITS | change) if change else two
            if other is None:
                other = self._change(two, change)
            found.append((host << BITS | other) << 3 | after)
        key = (two << BITS | seen[one]) << 4 | flags << 1 | 1
        steps = known.get(key)
        if steps is None:
            steps = known[key] = self._steps(steps_of, two, seen[one], flags, 1)
        for host, change, after in steps:
            other = changed.get(one << BITS | change) if change else one
            if other is None:
                other = self._change(one, change)
            found.append((other << BITS | host) << 3 | after)
        return found

    def _steps(
        self, steps_of: Callable[[World, int], Iterator[Next]], mine: int, seen: int, flags: int, index: int
    ) -> Steps:
        """Work out what a host does in a world in which the other one is as it is seen."""
        here, there = self._hosts[mine], self._hosts[seen]
        world = self._world(here, there, flags) if index == 0 else self._world(there, here, flags)
        found = {}
        for _, after in steps_of(world, index):
            number = self._number(after.hosts[index])
            change = self._change_number(there, after.hosts[1 - index])
            found[number, change, LINK * after.link + CRASHED * after.crashed + MOVE * after.move] = None
        return tuple(found)

    def _change_number(self, before: Host, after: Host) -> int:
        """Return what was done to the other host, 0 for nothing."""
        if before == after:
            return 0
        number = self._changes.get((before, after))
        if number is None:
            self._done_to.append((before, after))
            number = self._changes[before, after] = len(self._done_to)
        return number

    def _change(self, number: int, change: int) -> int:
        """Do to a host what was done to it as it was seen."""
        host = self._hosts[number]
        _, after = self._done_to[change - 1]
        said = after.inbox
        if host.state < 0 or not host.agent:  # nobody there minds that the connection is lost
            said = tuple(one for one in said if one != LOST)
        inbox = host.inbox + said[1:] if said[:1] == (MARK,) else said
        done = self._number(host._replace(qemu=after.qemu, disk=after.disk, inbox=inbox))
        self._changed[number << BITS | change] = done
        return done


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
