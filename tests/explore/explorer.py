"""Every interleaving of a handover with up to so many faults: is each world safe, and does each run of it end?

Worlds are explored by the number of their faults, so none is visited again with more of them. Those that a fault does
not part are gone through in rounds, all worlds that are as far from the fault at once. Where nothing happens any more,
time passes: the timers go off, in every order. A circle among them would be a run that never ends; there is none, so
every run ends in which nothing breaks any more.
"""

import contextlib
from itertools import pairwise

import numpy as np

from kvmhv.core.handover import HandoverViolation
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.model import Outcome
from tests.explore import acts
from tests.explore.packing import Edges, Packing
from tests.explore.tables import NONE, Numbers, among, merged, spread
from tests.explore.transitions import HOSTS, Bounds
from tests.explore.world import Violation, World

LONGEST_RUN = 200
"""No run that ends comes near it."""
TOLD_WORLDS = 60
"""How much of a run that never ends is shown."""


class Found(Exception):
    """An invariant was broken; the text is the trace, which is only searched for when somebody wants to read it."""

    def __init__(self, explorer: "Explorer", end: str) -> None:
        self._explorer, self._end = explorer, end

    def __str__(self) -> str:
        return self._explorer.told(self._end)


class NeverEnds(Violation):
    """These worlds follow from each other, and none of them comes to an end."""

    def __init__(self, run: list[int]) -> None:
        super().__init__("it never ends")
        self.run = run


class Explorer(Packing):
    """Explores one set of bounds."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self.visited = NONE
        """Sorted."""
        self.by_faults: list[int] = []
        """How many worlds need so many faults."""
        self.ways_back: set[int] = set()
        """How the way back begins, whatever the first move went through."""
        self.standing = 0
        self.ends: dict[str, int] = {}
        self._steps_taken: list[Edges] = []
        """From which world to which one, in the order in which they were found."""
        self._frontier = NONE
        self._run: list[int] = []

    # --- exploring

    def explore(self) -> int:
        """Visit every world; raises Found with a trace. Returns how many there are."""
        try:
            begins = np.array([self.begin()])
            for faults in range(self.bounds.faults + 1):
                level = self._explore_level(begins)
                self.by_faults.append(level.size)
                if faults < self.bounds.faults:
                    self._frontier = level
                    begins = self._new(level, *self.badly(level))
        except NeverEnds as error:
            self._run = error.run
            raise Found(self, f"Violation: {error}") from error
        except (AssertionError, HandoverViolation) as error:
            raise Found(self, f"{type(error).__name__}: {error}") from error
        return self.visited.size

    def begin(self) -> int:
        """Return the world in which the move that is explored begins."""
        first = self.pack(self.first())
        if self.bounds.move == 0:
            return first
        self._explore_level(np.array([first]))
        (back,) = self.ways_back
        self.visited = NONE
        self._steps_taken.clear()
        self.ends.clear()
        return back

    def _explore_level(self, begins: Numbers) -> Numbers:
        """Visit what follows without another fault; returns it, sorted."""
        level, before = NONE, len(self._steps_taken)
        frontier = begins
        for _ in range(LONGEST_RUN):
            self._frontier = frontier
            level = merged(level, frontier)
            new = self._new(frontier, *self._following(frontier))
            frontier = new[~among(level, new)]
            if not frontier.size:
                break
        else:
            raise Violation("it goes on and on")
        check_that_it_ends(level, self._steps_taken[before:])
        self.visited = merged(self.visited, level)
        return level

    def _new(self, worlds: Numbers, at: Numbers, after: Numbers) -> Numbers:
        """Keep these steps; returns where they lead that was not visited in an earlier level, sorted."""
        self._steps_taken.append((worlds[at], after))
        found = np.unique(after)
        return found[~among(self.visited, found)]

    def _following(self, worlds: Numbers) -> Edges:
        """Return what follows from worlds without another fault; checks those from which nothing does."""
        at, after = self.calmly(worlds)
        later = [
            (position, world)
            for position in np.flatnonzero(np.bincount(at, minlength=worlds.size) == 0).tolist()
            for world in self._after_calm(int(worlds[position]))
        ]
        if later:
            more = np.array(later, np.int64)
            at, after = np.concatenate((at, more[:, 0])), np.concatenate((after, more[:, 1]))
        return at, after

    def _after_calm(self, packed: int) -> list[int]:
        """Return what time brings where nothing happens any more; checks the world if that is nothing."""
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

    def told(self, end: str) -> str:
        """Return how it came to this, with the fewest faults; of a run that never ends, its last worlds."""
        if self._run:
            way = (self._way_to(self._run[0]) + self._run[1:])[-TOLD_WORLDS:]
        else:
            broken, end = self._broken(end)
            way = self._way_to(broken)
        lines = [self.show(self.unpack(way[0]))]
        for before, after in pairwise(way):
            lines.append(f"  {self._label(before, after)}\n      {self.show(self.unpack(after))}")
        return "\n".join([*lines, end])

    def _broken(self, end: str) -> tuple[int, str]:
        """Return the first world from which a step breaks an invariant, and which."""
        for world in self._frontier.tolist():
            try:
                self._following(np.array([world]))
                self.badly(np.array([world]))
            except (AssertionError, HandoverViolation) as error:
                return world, f"{type(error).__name__}: {error}"
        return int(self._frontier[0]), end

    def _way_to(self, world: int) -> list[int]:
        """Return the worlds that lead to one, by the step that found each first."""
        way = [world]
        found_by = len(self._steps_taken)
        while True:
            for number, (before, after) in enumerate(self._steps_taken[:found_by]):
                at = np.flatnonzero(after == way[-1])
                if at.size:
                    way.append(int(before[at[0]]))
                    found_by = number
                    break
            else:
                return way[::-1]

    def _label(self, before: int, after: int) -> str:
        """Return what leads from a world to another one."""
        world = self.unpack(before)
        for steps_of in (self.healthy_of, self.timers_of, self.faults_of):
            for index in (0, 1):
                with contextlib.suppress(AssertionError, HandoverViolation):  # another step breaks something, too
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
        if owner.qemu is not None and owner.qemu.migration in acts.MISSING:
            raise Violation("the guest waits for pages for ever")
        if owner.qemu is not None and (owner.qemu.mirrors or owner.qemu.migration in acts.ACTIVE):
            raise Violation("the source still copies after the end")
        outcome = reports[0].outcome
        self.ends[str(outcome)] = self.ends.get(str(outcome), 0) + 1


def check_that_it_ends(level: Numbers, steps: list[Edges]) -> None:
    """Raise NeverEnds if these steps lead from some worlds of a level round in a circle.

    The worlds from which all steps lead to an end are taken away, from the ends on: nothing may be left.
    """
    before = np.concatenate([one for one, _ in steps])
    after = np.concatenate([one for _, one in steps])
    within = among(level, after)
    before, after = np.searchsorted(level, before[within]), np.searchsorted(level, after[within])
    open_steps = np.bincount(before, minlength=level.size)
    count = np.bincount(after, minlength=level.size)
    first = np.cumsum(count) - count
    into = before[np.argsort(after, kind="stable")]
    ended = np.flatnonzero(open_steps == 0)
    while ended.size:
        taken = into[spread(first[ended], count[ended])]
        open_steps -= np.bincount(taken, minlength=level.size)
        open_steps[ended] = -1
        ended = np.unique(taken)
        ended = ended[open_steps[ended] == 0]
    left = np.flatnonzero(open_steps > 0)
    if left.size:
        endless = (open_steps[before] > 0) & (open_steps[after] > 0)
        onward = dict(zip(before[endless].tolist(), after[endless].tolist(), strict=True))
        run = [int(left[0])]
        while run.count(run[-1]) == 1:
            run.append(onward[run[-1]])
        raise NeverEnds([int(level[one]) for one in run])
