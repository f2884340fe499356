"""Every interleaving of a handover with up to so many faults: is each world safe, and does each run of it end?

Worlds are explored by the number of their faults, so none is visited again with more of them. Those that a fault does
not part are gone through depth first, and a world that follows from itself is a run that never ends. Where nothing
happens any more, time passes: the timers go off, in every order. So every run ends in which nothing breaks any more.
"""

from collections import deque
from itertools import pairwise

from kvmhv.core.handover import HandoverViolation
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.model import Outcome
from tests.explore import acts
from tests.explore.packing import Packing
from tests.explore.transitions import HOSTS, Bounds
from tests.explore.world import Violation, World

LONGEST_RUN = 200
"""No run that ends comes near it."""
TOLD_WORLDS = 60
"""How much of a run that never ends is shown."""


class Found(Exception):
    """An invariant was broken; the text is the trace, which is only searched for when somebody wants to read it."""

    def __init__(self, explorer: "Explorer", way: list[int], end: str) -> None:
        self._explorer, self._way, self._end = explorer, way, end

    def __str__(self) -> str:
        return self._explorer.told(self._way, self._end)


class Explorer(Packing):
    """Explores one set of bounds."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self.visited: set[int] = set()
        self.by_faults: list[int] = []
        """How many worlds need so many faults."""
        self.ways_back: set[int] = set()
        """How the way back begins, whatever the first move went through."""
        self.standing = 0
        self.ends: dict[str, int] = {}

    # --- exploring

    def explore(self) -> int:
        """Visit every world; raises Found with a trace. Returns how many there are."""
        begins = [self.begin()]
        for faults in range(self.bounds.faults + 1):
            before = len(self.visited)
            begins = self._explore_level(begins, last=faults == self.bounds.faults)
            self.by_faults.append(len(self.visited) - before)
        return len(self.visited)

    def begin(self) -> int:
        """Return the world in which the move that is explored begins."""
        first = self.pack(self.first())
        if self.bounds.move == 0:
            return first
        self._explore_level([first], last=True)
        (back,) = self.ways_back
        self.visited.clear()
        return back

    def _explore_level(self, begins: list[int], *, last: bool) -> list[int]:
        """Visit what follows without another fault; returns what follows with one."""
        visited, following, badly = self.visited, self.following, self.badly
        broken: set[int] = set()
        under_way: set[int] = set()
        stack = begins
        while stack:
            world = stack.pop()
            if world < 0:  # all that follows from it has been visited
                under_way.discard(~world)
                continue
            if world in visited:
                continue
            visited.add(world)
            under_way.add(world)
            stack.append(~world)
            try:
                for after in following(world):
                    if after not in visited:
                        stack.append(after)
                    elif after in under_way:
                        raise Violation("it never ends")
                if len(under_way) > LONGEST_RUN:
                    raise Violation("it goes on and on")
                if not last:
                    broken.update(badly(world))
            except (AssertionError, HandoverViolation) as error:
                way = [~one for one in stack if one < 0]
                raise Found(self, way, f"{type(error).__name__}: {error}") from error
        return [world for world in broken if world not in visited]

    def following(self, packed: int) -> list[int]:
        """Return what follows from a world without another fault; checks the world if that is nothing."""
        found = self.calmly(packed)
        if found:
            return found
        world = self.unpack(packed)
        if self.has_ended(packed):
            self._check_end(world)
            qemu = world.hosts[1 - world.source].qemu
            if world.move == 0 and qemu is not None and qemu.status == "running":
                self.ways_back.add(self.pack(self.move_back(world)))
            return []
        found = self.in_time(packed)
        if not found:
            self._check_standing(world)
        return found

    # --- telling

    def told(self, way: list[int], end: str) -> str:
        """Return how it came to this, with the fewest faults and steps; of a run that never ends, its last worlds."""
        shortest = self._shortest(last=len(self.by_faults)) or way[-TOLD_WORLDS:]
        lines = [self.show(self.unpack(shortest[0]))]
        for before, after in pairwise(shortest):
            lines.append(f"  {self._label(before, after)}\n      {self.show(self.unpack(after))}")
        return "\n".join([*lines, end])

    def _shortest(self, last: int) -> list[int]:
        """Return the shortest way to a world from which a step breaks an invariant; empty if there is none."""
        first = self.begin()
        parents: dict[int, int | None] = {first: None}
        levels = [deque([first]), *(deque[int]() for _ in range(last))]
        for faults, level in enumerate(levels):
            while level:
                world = level.popleft()
                try:
                    found = [(after, level) for after in self.following(world)]
                    if faults < last:
                        found += [(after, levels[faults + 1]) for after in self.badly(world)]
                except (AssertionError, HandoverViolation):
                    way: list[int] = []
                    at: int | None = world
                    while at is not None:
                        way.append(at)
                        at = parents[at]
                    return way[::-1]
                for after, there in found:
                    if after not in parents:
                        parents[after] = world
                        there.append(after)
        return []

    def _label(self, before: int, after: int) -> str:
        """Return what leads from a world to another one."""
        world = self.unpack(before)
        for steps_of in (self.healthy_of, self.timers_of, self.faults_of):
            for index in (0, 1):
                for label, found in steps_of(world, index):
                    if self.pack(found) == after:
                        return label
        return "they connect" if self.unpack(after).link else "CUT"

    def show(self, world: World) -> str:
        """Return a world in one line."""
        return " | ".join(self._show_host(world, index) for index in (0, 1))

    def _show_host(self, world: World, index: int) -> str:
        host = world.hosts[index]
        if not host.up:
            return f"{HOSTS[index]} is down, disk={host.disk}"
        words = [HOSTS[index]]
        if host.state >= 0:
            state = self.memory.states.values[host.state]
            words.append(f"{'S' if isinstance(state, SourceState) else 'T'}:{state.step}/{state.hold.right}")
        words.append("" if host.agent else "(no agent)")
        if host.qemu:
            words.append(
                f"qemu={host.qemu.status},{host.qemu.migration},{'fresh' if host.qemu.fresh else 'old'}"
                + (",mirrors" if host.qemu.mirrors else "")
            )
        words.append(f"disk={host.disk}" if host.disk else "")
        words.append("defined" if host.defined else "")
        words.extend(type(self.memory.effects.values[one]).__name__ for one in host.doing)
        words.extend(f"<{self._word(one)}" for one in host.inbox)
        return " ".join(word for word in words if word)

    # --- where it ends

    def _check_standing(self, world: World) -> None:
        """Only this may stand still: announced, granted, and the target's host died before it said whether it ran."""
        states = [self.memory.states.values[host.state] if host.state >= 0 else None for host in world.hosts]
        here, there = states[world.source], states[1 - world.source]
        allowed = (
            isinstance(here, SourceState)
            and here.step == "granted"
            and self.memory.states.values[world.hosts[world.source].durable].hold.announced
            and not (here.hold.copy_lost and not here.planned().disk_copies and not here.memory_sent)
            and isinstance(there, TargetState)
            and there.step == "standing"
            and here.outcome is there.outcome is Outcome.NEEDS_OPERATOR
        )
        if not allowed:
            raise Violation("it stands still and nobody can say why")
        self.standing += 1

    def _check_end(self, world: World) -> None:
        """Both sides have ended: they agree, one host has the VM with its newest disk, nothing else is left."""
        here, there = world.hosts[world.source], world.hosts[1 - world.source]
        reports = [
            self.memory.reports.values[host.ended[world.move]] for host in (here, there) if host.ended[world.move] >= 0
        ]
        done = {report.outcome is Outcome.DONE for report in reports}
        if len(done) != 1 or here.ended[world.move] < 0 or there.ended[world.move] < 0:
            raise Violation("the two sides do not agree on the end")
        owner, other = (there, here) if done == {True} else (here, there)
        if not owner.defined or other.defined:
            raise Violation("the VM is not defined on exactly the host that has it")
        if owner.disk != "good":
            raise Violation(f"the VM is left with a disk that is {owner.disk or 'gone'}")
        if other.qemu is not None or other.exported or other.disk:
            raise Violation("something is left on the other host")
        if owner.qemu is None and not world.crashed:
            raise Violation("the VM is lost")
        if owner.qemu is not None and owner.qemu.status != "running":
            raise Violation("the VM stands still after the end")
        if owner.qemu is not None and (owner.qemu.mirrors or owner.qemu.migration in acts.ACTIVE):
            raise Violation("the source still copies after the end")
        outcome = reports[0].outcome
        self.ends[str(outcome)] = self.ends.get(str(outcome), 0) + 1
