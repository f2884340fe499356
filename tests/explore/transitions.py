"""What may come next in a world: what the agents do, what QEMU does, what fails."""

from collections.abc import Iterator
from typing import NamedTuple

from kvmhv.core import effects as ef
from kvmhv.core import facts, recover, source, target
from kvmhv.core.facts import Fact
from kvmhv.core.source_state import SourceState
from kvmhv.messages import Answer, AnyMessage, Finished, Offer, Ready
from kvmhv.model import IncomingAddress, MoveReport, Rule
from tests.explore import acts
from tests.explore.memory import Memory
from tests.explore.world import CONNECTED, LOST, Host, Qemu, World
from tests.sim import examples

HOSTS = ("host1", "host2")
MUCH_BYTES = 1 << 36
"""So much memory that the first pass announces no switchover: it comes as a surprise."""
MOVES = 2
Next = tuple[str, World]


MEMORY_LINK = "memory"
"""Another kind of fault, of post-copy: the connection breaks over which the pages go."""
KINDS = frozenset({"kill", "qemu", "host", "cut", "dup", "reorder"})
"""What can break. `slow`, which is not among them: a timer that goes off although all is well, or a cancel."""


class Bounds(NamedTuple):
    """How much of the world is explored."""

    faults: int = 3
    disks: int = 1
    move: int = 0
    """0: from A to B; 1: the way back, as the first move leaves the hosts."""
    kinds: frozenset[str] = KINDS
    post_copy: bool = False


def connected(host: Host) -> Host:
    """Return a host when a connection stands."""
    return host._replace(inbox=(CONNECTED,))


def cut_off(host: Host) -> Host:
    """Return a host when its connection is lost with all that was on its way."""
    return host._replace(inbox=(LOST,) if host.agent and host.state >= 0 else ())


class Transitions:
    """The worlds that may follow a world, within bounds."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.memory = Memory()

    # --- the beginning

    def first(self) -> World:
        """Both machines in the memory phase of the first move, by the real steps."""
        moving = examples.vm(disks=self.bounds.disks)
        hosts = (
            Host(ended=(-1,) * MOVES, defined=True, disk="good", qemu=Qemu("running", fresh=True)),
            Host(ended=(-1,) * MOVES),
        )
        world = World(hosts=hosts, shared=not self.bounds.disks, post_copy=self.bounds.post_copy)
        return self._begin(world, moving)

    def _begin(self, world: World, moving: examples.Vm) -> World:
        """Take a move up to its memory phase, without faults."""
        here, there = world.source, 1 - world.source
        state = examples.source_state(
            moving,
            source=HOSTS[here],
            target=HOSTS[there],
            move_id=f"move-{world.move}",
            rule=Rule(max_passes=1, post_copy=True) if self.bounds.post_copy else None,
            volatile_id=self._volatile_id(world, here),
            used_bytes=MUCH_BYTES,
        )
        said: list[AnyMessage] = []

        def hear(fact: Fact) -> None:
            nonlocal state
            state, effects = source.step(state, fact)
            said.extend(effect.message for effect in effects if isinstance(effect, ef.Send))

        hear(facts.Started(at_ms=0))
        hear(facts.PeerConnected(at_ms=0))
        answer = Answer(inventory=examples.inventory(HOSTS[there], octet=there + 1))
        hear(facts.Received(at_ms=0, message=answer))
        offer = said[-1]
        assert isinstance(offer, Offer), state.findings
        taking = examples.target_state(state, offer, volatile_id=self._volatile_id(world, there))
        address = IncomingAddress(memory_port=49152, disk_port=49153 if self.bounds.disks else None)
        for fact in (facts.Offered(at_ms=0), facts.IncomingReady(at_ms=0, address=address)):
            taking, _ = target.step(taking, fact)
        hear(facts.Received(at_ms=0, message=Ready(epoch=offer.epoch, address=address)))
        if self.bounds.disks:
            hear(facts.MirrorsReady(at_ms=0, copied_bytes=1))
        copies = bool(self.bounds.disks)
        number = self.memory.states.number(state)
        qemu = world.hosts[here].qemu
        assert qemu is not None
        world = world.at(
            here,
            world.hosts[here]._replace(
                durable=number,
                state=number,
                timers=frozenset({"step", "idle"}),
                qemu=qemu._replace(migration="active", mirrors=copies, ran=False, passes=1),
                events=(self.memory.facts.number(acts.pass_started(1)),),
            ),
        )
        number = self.memory.states.number(taking)
        arriving = world.hosts[there]._replace(
            durable=number,
            state=number,
            timers=frozenset({"step"}),
            qemu=Qemu("inmigrate"),
            exported=copies,
            disk="good",
        )
        return world.at(there, arriving)._replace(link=True)

    def _volatile_id(self, world: World, index: int) -> str:
        return f"{HOSTS[index]}-{world.hosts[index].boot}"

    # --- transitions, of one host: of the other one they see no more than Packing.seen() leaves

    def healthy_of(self, world: World, index: int) -> Iterator[Next]:
        """Yield what this host, its agent and its QEMU do next in a healthy world, timers apart."""
        yield from self._answers(world, index)
        for what, after, hears, fact in acts.by_itself(world):
            if hears == index:
                yield what, self._event(after, index, fact)
        host = world.hosts[index]
        if not host.up:
            yield f"{HOSTS[index]} boots", world.at(index, host._replace(up=True))
        elif not host.agent:
            yield self._restart(world, index)

    def timers_of(self, world: World, index: int) -> Iterator[Next]:
        """Yield what its timers do, where they do anything."""
        for name in sorted(world.hosts[index].timers):
            after = self._fire(world, index, name)
            if after != world:
                yield f"{HOSTS[index]}: timer {name}", after

    def faults_of(self, world: World, index: int) -> Iterator[Next]:
        """Yield what may break on this host, or at its end of the connection."""
        kinds = self.bounds.kinds
        host, name = world.hosts[index], HOSTS[index]
        if host.agent and "kill" in kinds:
            yield f"KILL the agent of {name}", self._kill(world, index)
        if host.up and "host" in kinds:
            yield f"POWER of {name} fails", self._power_off(world, index)
        if host.up and not kinds.isdisjoint(("kill", "host")):
            yield from self._deaths_within(world, index)
        if host.qemu is not None and "qemu" in kinds:
            yield f"QEMU of {name} dies", self._qemu_dies(world, index)
        if host.qemu is not None and host.qemu.migration == acts.FOLLOW and MEMORY_LINK in kinds:
            halted = world.at(index, host._replace(qemu=host.qemu._replace(migration=acts.HALTED)))
            yield f"the pages' connection breaks at {name}", self._event(halted, index, facts.PagesStopped(at_ms=0))
        if "dup" in kinds and host.agent and host.inbox and host.inbox[0] >= 0:
            yield f"{name} hears {self._word(host.inbox[0])} twice", self._hear(world, index, host.inbox[0])
        if "reorder" in kinds and host.agent and len(host.inbox) > 1 and min(host.inbox[:2]) >= 0:
            first, second, *rest = host.inbox
            yield f"{name}: two messages change places", world.at(index, host._replace(inbox=(second, first, *rest)))
        if "slow" in kinds:
            yield from self.timers_of(world, index)
            if host.state >= 0 and isinstance(self.memory.states.values[host.state], SourceState):
                cancel = facts.CancelRequested(at_ms=0, caller="the operator")
                yield "somebody cancels", self._handle(world, index, cancel)

    # --- transitions of both hosts

    def cut(self, world: World) -> World:
        """The connection is lost with all that was on its way."""
        return world._replace(hosts=(cut_off(world.hosts[0]), cut_off(world.hosts[1])), link=False)

    def move_back(self, world: World) -> World:
        """The VM's way back begins; everything has ended, and it runs at the target."""
        moving = examples.vm(disks=self.bounds.disks, epoch=world.move + 1)
        hosts = tuple(host._replace(boot=0, ended=(0, -1)) for host in world.hosts)
        return self._begin(world._replace(hosts=(hosts[0], hosts[1]), move=world.move + 1, crashed=False), moving)

    # --- the hosts

    def _answers(self, world: World, index: int) -> Iterator[Next]:
        host = world.hosts[index]
        if not host.agent:
            return
        if host.inbox:
            after = world.at(index, host._replace(inbox=host.inbox[1:]))
            yield f"{HOSTS[index]} hears {self._word(host.inbox[0])}", self._hear(after, index, host.inbox[0])
        if host.events:
            after = world.at(index, host._replace(events=host.events[1:]))
            fact = self.memory.facts.values[host.events[0]]
            yield f"{HOSTS[index]} notices {type(fact).__name__}", self._handle(after, index, fact)
        for number in host.doing:
            if not acts.may_complete(self.memory, host, number):
                continue
            effect = self.memory.effects.values[number]
            rest = tuple(one for one in host.doing if one != number)
            after, fact = acts.complete(self.memory, world.at(index, host._replace(doing=rest)), index, effect)
            if fact is not None:
                after = self._handle(after, index, fact)
            yield f"{HOSTS[index]} did {type(effect).__name__}", after

    def _fire(self, world: World, index: int, name: str) -> World:
        host = world.hosts[index]
        world = world.at(index, host._replace(timers=host.timers - {name}))
        return self._handle(world, index, facts.TimerFired(at_ms=0, name=name))

    def _deaths_within(self, world: World, index: int) -> Iterator[Next]:
        """The agent, or the host, dies between two effects of what it would handle next, or with an effect done."""
        host = world.hosts[index]
        if not host.agent:
            found = self._recovered(world, index)
            if found is not None:
                yield from self._cut_short(*found, index, "in its recovery")
            return
        candidates: list[tuple[str, World, Fact]] = []
        if host.inbox:
            fact = self._heard(host.inbox[0])
            candidates.append((self._word(host.inbox[0]), world.at(index, host._replace(inbox=host.inbox[1:])), fact))
        if host.events:
            fact = self.memory.facts.values[host.events[0]]
            candidates.append((type(fact).__name__, world.at(index, host._replace(events=host.events[1:])), fact))
        for number in host.doing:
            if not acts.may_complete(self.memory, host, number):
                continue
            effect = self.memory.effects.values[number]
            rest = tuple(one for one in host.doing if one != number)
            after, done = acts.complete(self.memory, world.at(index, host._replace(doing=rest)), index, effect)
            yield from self._deaths(after, index, f"with {type(effect).__name__} done")
            if done is not None:
                candidates.append((type(effect).__name__, after, done))
        for label, after, fact in candidates:
            state = after.hosts[index].state
            if state >= 0:
                number, effects = self.memory.step(state, fact)
                stepped = after.at(index, after.hosts[index]._replace(state=number))
                yield from self._cut_short(stepped, effects, index, f"in {label}")

    def _cut_short(self, world: World, effects: tuple[int, ...], index: int, when: str) -> Iterator[Next]:
        for count, number in enumerate(effects[:-1], 1):
            world = acts.now(self.memory, world, index, self.memory.effects.values[number])
            yield from self._deaths(world, index, f"{when} after {count} effects")

    def _deaths(self, world: World, index: int, when: str) -> Iterator[Next]:
        if "kill" in self.bounds.kinds:
            yield f"KILL {HOSTS[index]} {when}", self._kill(world, index)
        if "host" in self.bounds.kinds:
            yield f"POWER of {HOSTS[index]} {when}", self._power_off(world, index)

    # --- faults

    def _kill(self, world: World, index: int) -> World:
        host = world.hosts[index]
        return self.cut(world.at(index, host.without_agent())) if world.link else world.at(index, host.without_agent())

    def _power_off(self, world: World, index: int) -> World:
        other = world.hosts[1 - index]
        host = world.hosts[index].without_power()
        if host.disk and other.qemu is not None and other.qemu.mirrors:
            host = host._replace(disk="stale")  # what the mirror wrote was not flushed
        world = world.at(index, host)._replace(crashed=True)
        return self.cut(world) if world.link else world

    def _qemu_dies(self, world: World, index: int) -> World:
        host, other = world.hosts[index], world.hosts[1 - index]
        if host.disk and other.qemu is not None and other.qemu.mirrors:
            host = host._replace(disk="stale")
        world = world.at(index, host._replace(qemu=None, exported=False))._replace(crashed=True)
        return self._event(world, index, facts.QemuGone(at_ms=0, error=acts.ERROR))

    # --- the agents

    def _event(self, world: World, index: int, fact: Fact) -> World:
        host = world.hosts[index]
        if not host.agent or host.state < 0:
            return world
        return world.at(index, host._replace(events=(*host.events, self.memory.facts.number(fact))))

    def _handle(self, world: World, index: int, fact: Fact) -> World:
        host = world.hosts[index]
        if host.state < 0:
            return world
        state, effects = self.memory.step(host.state, fact)
        world = world.at(index, host._replace(state=state))
        return self._perform(world, index, effects)

    def _perform(self, world: World, index: int, effects: tuple[int, ...]) -> World:
        for position, number in enumerate(effects):
            effect = self.memory.effects.values[number]
            if isinstance(effect, ef.Finish):  # the runner waits for a Cont that is on its way
                world = self._finish_cont(world, index)
            world = acts.now(self.memory, world, index, effect)
            if isinstance(effect, ef.Finish):
                assert position == len(effects) - 1, "something is wanted of a move that has ended"
        return world

    def _finish_cont(self, world: World, index: int) -> World:
        host = world.hosts[index]
        for number in host.doing:
            effect = self.memory.effects.values[number]
            if isinstance(effect, ef.Cont):
                world, _ = acts.complete(self.memory, world, index, effect)
        return world

    def _restart(self, world: World, index: int) -> Next:
        found = self._recovered(world, index)
        if found is None:
            return f"{HOSTS[index]}'s agent starts", world.at(index, world.hosts[index]._replace(agent=True))
        return f"{HOSTS[index]}'s agent takes the move up", self._perform(found[0], index, found[1])

    def _recovered(self, world: World, index: int) -> tuple[World, tuple[int, ...]] | None:
        """What a new agent makes of the journal, and what it is about to do; None: there is nothing in it."""
        host = world.hosts[index]._replace(agent=True)
        kept = host.volatile if host.volatile >= 0 else host.durable
        if kept < 0:
            return None
        state = self.memory.states.values[kept]
        qemu = host.qemu
        found = facts.Restarted(
            at_ms=0,
            process=qemu is not None,
            status=("paused" if qemu.status == "finish" else qemu.status) if qemu else "",
            migration=qemu.migration if qemu else "",
            rebooted=state.volatile_id != self._volatile_id(world, index),
        )
        number, effects = self.memory.recover(kept, found)
        return world.at(index, host._replace(state=number)), effects

    def _word(self, number: int) -> str:
        return {LOST: "lost", CONNECTED: "connected"}.get(number) or type(self.memory.messages.values[number]).__name__

    def _heard(self, number: int) -> Fact:
        if number == LOST:
            return facts.PeerLost(at_ms=0, error=acts.ERROR)
        if number == CONNECTED:
            return facts.PeerConnected(at_ms=0)
        return facts.Received(at_ms=0, message=self.memory.messages.values[number])

    def _hear(self, world: World, index: int, number: int) -> World:
        if world.hosts[index].state < 0:
            return self._visited(world, index, number)
        return self._handle(world, index, self._heard(number))

    def _visited(self, world: World, index: int, number: int) -> World:
        """A host that has no open state of the move is asked about it (agent/visit.py)."""
        if number == LOST:
            return world
        host = world.hosts[index]
        ended_number = host.ended[world.move]
        ended: MoveReport | None = self.memory.reports.values[ended_number] if ended_number >= 0 else None
        epoch = world.move + 1
        reply: AnyMessage | None = None
        if index == world.source:
            if number == CONNECTED:
                reply = recover.answer_as_source(ended, epoch, HOSTS[index])
        elif number != CONNECTED or ended is not None:
            message = self.memory.messages.values[number] if number >= 0 else None
            if not isinstance(message, Finished):
                reply = recover.answer_as_target(ended, epoch, HOSTS[index])
        if reply is None or not world.link:
            return world
        other = world.hosts[1 - index]
        return world.at(1 - index, other._replace(inbox=(*other.inbox, self.memory.messages.number(reply))))
