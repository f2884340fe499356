"""Every interleaving of a handover with up to so many faults: breadth first, so that a trace is a shortest one."""

from collections import deque

from kvmhv.core.handover import HandoverViolation
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.model import Outcome
from tests.explore import acts
from tests.explore.transitions import HOSTS, Bounds, Next, Transitions
from tests.explore.world import CONNECTED, LOST, Violation, World

HEAL_STEPS = 400


class Found(Exception):
    """An invariant was broken; the text is the trace."""


class Explorer(Transitions):
    """Explores one set of bounds."""

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self.spent: dict[World, list[tuple[int, int]]] = {}
        self.parents: dict[World, tuple[World, str] | None] = {}
        self.healed: set[World] = set()
        self.standing = 0
        self.ends: dict[str, int] = {}

    # --- exploring

    def explore(self) -> int:
        """Visit every world; raises Found with a shortest trace. Returns how many there are."""
        first = self.first()
        self.parents = {first: None}
        levels: list[deque[World]] = [deque() for _ in range(self.bounds.faults + self.bounds.slow + 1)]
        levels[0].append(first)
        for level in levels:
            while level:
                world = level.popleft()
                if self._explored_with_less(world):
                    continue
                try:
                    following = list(self.following(world))
                except (AssertionError, HandoverViolation) as error:
                    raise Found(self.trace(world, f"{type(error).__name__}: {error}")) from error
                for label, after in following:
                    if after not in self.parents:
                        self.parents[after] = (world, label)
                        levels[after.faults + after.slow].append(after)
                self._check_heals(world)
        return len(self.spent)

    def _explored_with_less(self, world: World) -> bool:
        """Whether this world was explored with no more faults and slow timers spent: then nothing new follows."""
        core = world._replace(faults=0, slow=0)
        spent = self.spent.setdefault(core, [])
        if any(faults <= world.faults and slow <= world.slow for faults, slow in spent):
            return True
        spent.append((world.faults, world.slow))
        return False

    def trace(self, world: World, end: str) -> str:
        """Return how this world came about."""
        lines = [end]
        at: World | None = world
        while at is not None:
            parent = self.parents.get(at)
            lines.append(f"  {parent[1] if parent else 'the memory phase'}\n      {self.show(at)}")
            at = parent[0] if parent else None
        return "\n".join(reversed(lines))

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

    def _word(self, number: int) -> str:
        return {LOST: "lost", CONNECTED: "connected"}.get(number) or type(self.memory.messages.values[number]).__name__

    # --- healing and the end

    def _check_heals(self, world: World) -> None:
        """Without another fault every move ends, or stands still where the rule says that it must."""
        path: list[tuple[World, str]] = []
        for _ in range(HEAL_STEPS):
            core = world._replace(faults=0, slow=0)
            if core in self.healed:
                break
            self.healed.add(core)
            move = world.move
            try:
                following = next((one for one in self.healthy(world) if one[1].move == move), None)
                if following is None:
                    if all(host.state < 0 for host in world.hosts):
                        self._check_end(world)
                        break
                    following = self._heal_by_timer(world)
                    if following is None:
                        self._check_standing(world)
                        break
            except (AssertionError, HandoverViolation) as error:
                raise Found(self._heal_trace(path, world, f"{type(error).__name__}: {error}")) from error
            path.append((world, following[0]))
            world = following[1]
        else:
            raise Found(self._heal_trace(path, world, "it never ends"))

    def _heal_by_timer(self, world: World) -> Next | None:
        for index in (0, 1):
            for name in sorted(world.hosts[index].timers):
                after = self._fire(world, index, name)
                if after.hosts != world.hosts:
                    return f"{HOSTS[index]}: timer {name}", after
        return None

    def _heal_trace(self, path: list[tuple[World, str]], world: World, end: str) -> str:
        start = path[0][0] if path else world
        lines = [self.trace(start, "--- from here on no fault")]
        lines.extend(
            f"  {label}\n      {self.show(after)}"
            for (_, label), after in zip(path, [*(one for one, _ in path[1:]), world], strict=True)
        )
        return "\n".join([*lines, end])

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
