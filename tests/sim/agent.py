"""A simulated agent: the real machines, recovery, planner, admission and wire sessions, driven as agent/ drives them.

Journal, Send and timers are performed at once and in their order; everything else takes time and answers with a fact.
The agent may die before each effect, and before or after each act that takes time.
"""

from typing import TYPE_CHECKING

import msgspec

from kvmhv.core import admission, bounds, facts, recover, source, target
from kvmhv.core import effects as ef
from kvmhv.core.facts import Fact
from kvmhv.core.handover import TargetHold
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.errors import PeerBroke
from kvmhv.messages import (
    Abort,
    Answer,
    AnyMessage,
    Enquire,
    FilesSent,
    Finished,
    Grant,
    MirrorsEnded,
    Offer,
    Owned,
    Refused,
    Running,
    Unknown,
)
from kvmhv.model import ErrorBody, HostSettings, MoveReport, Outcome
from kvmhv.wire.session import SOURCE, TARGET, VERSIONS, Greeted, Heard, Hello, Session
from tests.sim import examples
from tests.sim.acts import perform
from tests.sim.journal import Journal
from tests.sim.machine import Broken, Machine, Qemu

if TYPE_CHECKING:
    from tests.sim.world import World

State = SourceState | TargetState
LATE = (Grant, Abort, MirrorsEnded, FilesSent)
HANDOVER = (Grant, Abort, MirrorsEnded, Finished, Running, Owned, Refused, Unknown)
"""Words whose repetition in another move would do harm."""
RETRY_MS = (200.0, 3000.0)
TARGET_ASKS_AFTER_MS = 5000.0
SETTINGS = HostSettings(enabled=True)
LOST = ErrorBody(code="peer-lost", message="the connection was lost", todo="")


class AgentDied(Exception):
    """The agent dies here; what it did so far stands."""


class End:
    """One side of a connection: a real session; frames go to the other side in their order."""

    def __init__(self, agent: "Agent", hello: Hello) -> None:
        self.agent = agent
        self.number = agent.world.next_end()
        self.session = Session(hello)
        self.other: End | None = None
        self.runner: Runner | None = None
        self.peer: Hello | None = None
        self.alive = True
        self.broken = False
        self._busy_until_ms = 0.0
        self.speaker = agent.machine.name
        """Whose key this end has proved to the other one."""

    def say(self, message: AnyMessage) -> None:
        """Send a message."""
        frame = self.session.frame(message)
        if isinstance(message, HANDOVER):
            self.agent.world.note_frame(self.agent.machine.other.name, frame)
        self.send(frame)

    def send(self, frame: bytes) -> None:
        """Put a frame on its way; in a network that is cut it is lost with the connection."""
        world, other = self.agent.world, self.other
        if not self.alive or other is None or self.broken:
            return
        if not world.network_up():  # nothing that is said later arrives either
            self.broken = True
            world.kernel.after(world.kernel.some_ms(10, 15_000), self.close)
            return
        arrives_ms = max(self._busy_until_ms, world.kernel.now_ms + world.latency_ms())
        self._busy_until_ms = arrives_ms
        world.kernel.at(arrives_ms, lambda: other.receive(frame))

    def receive(self, frame: bytes) -> None:
        """Take a frame in."""
        agent = self.agent
        if not self.alive or not agent.alive:
            return
        with agent.guarded():
            try:
                events = self.session.receive(frame, agent.machine.clock_ms)
            except PeerBroke as error:
                agent.tell(f"peer broke the protocol: {error}")
                self.close()
                return
            for event in events:
                if isinstance(event, Greeted):
                    self.peer = event.hello
                    agent.greeted(self, event.hello)
                elif isinstance(event, Heard):
                    agent.heard(self, event.message)
            for reply in self.session.replies():
                self.send(reply)

    def close(self) -> None:
        """End the connection; both sides notice, each at its time."""
        if not self.alive:
            return
        self.alive = False
        other, world = self.other, self.agent.world
        if self.runner is not None:
            self.runner.lost(self)
        if other is not None and other.alive:
            world.kernel.after(
                world.latency_ms() if world.network_up() else world.kernel.some_ms(10, 9000), other.close
            )


class Runner:
    """One open move on one host."""

    def __init__(self, agent: "Agent", state: State) -> None:
        self.agent = agent
        self.state = state
        self.role = SOURCE if isinstance(state, SourceState) else TARGET
        self.ends: list[End] = []
        self.timers: dict[str, int] = {}
        self.open = True
        self._timer_number = 0
        self._began_ms = agent.world.kernel.now_ms
        self._told = state.outcome is Outcome.NEEDS_OPERATOR

    @property
    def key(self) -> tuple[str, str]:
        """The journal's key."""
        return self.state.move_id, self.role

    def put(self, fact: Fact) -> None:
        """Handle a fact."""
        if not self.open or not self.agent.alive:
            return
        before = self.state
        machine = source.step if isinstance(before, SourceState) else target.step
        self.state, effects = machine(before, fact)  # type: ignore[operator]
        what = type(fact.message if isinstance(fact, facts.Received) else fact).__name__
        if self.agent.world.verbose:
            names = " ".join(type(effect).__name__ for effect in effects)
            self.agent.tell(f"{self.role} {before.step} + {what} -> {self.state.step}: {names}")
        self.perform_all(effects)

    def perform_all(self, effects: list[ef.Effect]) -> None:
        """Perform effects in their order."""
        for effect in effects:
            self.agent.boundary(effect)
            self._perform(effect)

    def _perform(self, effect: ef.Effect) -> None:
        agent = self.agent
        match effect:
            case ef.Journal(durable=durable):
                encoded = msgspec.msgpack.encode(self.state)
                agent.journal.write(self.key, encoded, durable=durable)
            case ef.Send(message=message):
                if self.ends:
                    self.ends[-1].say(message)
            case ef.SetTimer(name=name, after_s=after_s):
                self._timer_number += 1
                self.timers[name] = number = self._timer_number
                agent.world.kernel.after(after_s * 1000, lambda: self._fire(name, number))
            case ef.ClearTimer(name=name):
                self.timers.pop(name, None)
            case ef.NeedOperator(error=error):
                self._within_bound()
                self._told = agent.world.truth.excused = True
                if self.state.step == "serving":
                    agent.world.pages_told.add(self.state.move_id)
                agent.tell(f"needs the operator: {error.code}")
            case ef.Finish(report=report):
                self._finish(report)
            case _:
                perform(self, effect)

    def _fire(self, name: str, number: int) -> None:
        if self.timers.get(name) != number or not self.agent.alive:
            return
        del self.timers[name]
        with self.agent.guarded():
            self.put(facts.TimerFired(at_ms=self.agent.machine.clock_ms, name=name))

    def _finish(self, report: MoveReport) -> None:
        self._within_bound()
        report = msgspec.structs.replace(report, ended_at=self.agent.machine.wall_s)
        self.agent.journal.end(self.key, report)
        self.open = False
        self.agent.tell(f"{self.role} ends: {report.outcome} {report.reason or ''}")
        self.agent.ended(self)

    def _within_bound(self) -> None:
        """Whatever breaks, as long as its agent lives a side ends or tells the operator in time."""
        took_s = (self.agent.world.kernel.now_ms - self._began_ms) / 1000
        bound_s = bounds.move_s(self.agent.world.timeouts, 0.0, post_copy=self.agent.world.post_copy)
        told = self._told or self.state.move_id in self.agent.world.pages_told
        if not told and took_s > bound_s:
            raise Broken(f"{self.role} took {took_s:.1f} s until it ended or told, {bound_s:.1f} s are promised")

    # --- the link

    def connected(self, end: End) -> None:
        """A connection stands."""
        end.runner = self
        self.ends.append(end)
        self.put(facts.PeerConnected(at_ms=self.agent.machine.clock_ms))

    def lost(self, end: End) -> None:
        """A connection has ended, perhaps before it was greeted."""
        if end in self.ends:
            self.ends.remove(end)
            if self.ends:  # as agent/link.py: the last words may be lost
                with self.agent.guarded():
                    self.put(facts.PeerConnected(at_ms=self.agent.machine.clock_ms))
        if not self.ends:
            with self.agent.guarded():
                self.put(facts.PeerLost(at_ms=self.agent.machine.clock_ms, error=LOST))
            self.keep(RETRY_MS[0])

    def keep(self, after_ms: float) -> None:
        """Connect, and again when that fails."""
        self.agent.world.kernel.after(after_ms, lambda: self._connect(after_ms))

    def _connect(self, waited_ms: float) -> None:
        if not self.open or not self.agent.alive or self.ends:
            return
        if not self.agent.connect(self):
            if self.role == SOURCE:
                with self.agent.guarded():
                    self.put(facts.PeerLost(at_ms=self.agent.machine.clock_ms, error=LOST))
            self.keep(min(RETRY_MS[1], max(RETRY_MS[0], waited_ms * 2)))


class Agent:
    """One life of a host's agent."""

    def __init__(
        self,
        world: "World",
        machine: Machine,
        journal: Journal,
        volatile_id: str,
        versions: tuple[int, int] = VERSIONS,
    ) -> None:
        self.world = world
        self.versions = versions
        """Of the protocol, that this life of the agent speaks."""
        self.machine = machine
        self.journal = journal
        self.volatile_id = volatile_id
        self.alive = True
        self.runners: dict[tuple[str, str], Runner] = {}
        self.claims: dict[str, str] = {}

    def tell(self, text: str) -> None:
        """Note what happened here."""
        self.world.kernel.tell(self.machine.name, text)

    def guarded(self) -> "Guard":
        """Where the agent may die."""
        return Guard(self)

    def boundary(self, what: object) -> None:
        """Between two effects: the agent, or the host, may die here. Raises AgentDied."""
        self.world.boundary(self, what)
        if not self.alive:
            raise AgentDied

    # --- moves

    def start(self) -> None:
        """Take every open move up again."""
        self.world.truth.excused = True
        with self.guarded():
            for role, encoded in self.journal.load():
                kind: type[State] = SourceState if role == SOURCE else TargetState
                self._recover(msgspec.msgpack.decode(encoded, type=kind))
            self.machine.end_undoing()

    def _recover(self, state: State) -> None:
        qemu = self.machine.qemu
        found = facts.Restarted(
            at_ms=self.machine.clock_ms,
            process=qemu is not None,
            status=_status(qemu),
            migration=qemu.migration if qemu and not qemu.hangs else "",
            rebooted=state.volatile_id != self.volatile_id,
        )
        effects: list[ef.Effect]
        if isinstance(state, SourceState):
            state, effects = recover.recover_source(state, found)
        else:
            state, effects = recover.recover_target(state, found)
        runner = self._launch(state)
        self.tell(f"{runner.role} taken up again: {state.step}")
        runner.perform_all(effects)
        runner.keep(0.0 if runner.role == SOURCE else TARGET_ASKS_AFTER_MS)

    def _launch(self, state: State) -> Runner:
        runner = Runner(self, state)
        self.runners[runner.key] = runner
        self.claims[state.vm.name] = state.move_id
        return runner

    def leave(self, state: SourceState) -> Runner | None:
        """Begin a move out, if this host's settings let it."""
        if admission.admit_out(SETTINGS, self.machine.name, self.load(), with_storage=True) is not None:
            return None
        if state.vm.name in self.claims:
            return None
        runner = self._launch(state)
        with self.guarded():
            runner.put(facts.Started(at_ms=self.machine.clock_ms))
            runner.keep(0.0)
        return runner

    def load(self) -> admission.Load:
        """What this host has in hand."""
        out = sum(role == SOURCE for _, role in self.runners)
        return admission.Load(moves_out=out, moves_in=len(self.runners) - out, storage_copies=len(self.runners))

    def ended(self, runner: Runner) -> None:
        """Put a runner away, and end its connections once its last words have gone out."""
        self.runners.pop(runner.key, None)
        self.claims.pop(runner.state.vm.name, None)
        for end in runner.ends:
            end.runner = None
            self.world.kernel.after(50, end.close)
        runner.ends = []

    def qemu_said(self, name: str, data: dict[str, int]) -> None:
        """Hand an event to the moves of the VM."""
        from tests.sim.acts import hear  # noqa: PLC0415 - acts and agent know each other

        for runner in tuple(self.runners.values()):
            fact = hear(runner, name, data)
            if fact is not None:
                with self.guarded():
                    runner.put(fact)

    def die(self) -> None:
        """The process ends; the kernel closes its connections."""
        if not self.alive:
            return
        self.alive = False
        self.world.truth.excused = True
        self.tell("the agent is dead")
        for end in self.world.all_ends():
            if end.agent is self:
                end.runner = None
                end.close()

    # --- connections

    def connect(self, runner: Runner) -> bool:
        """Connect to the other agent about this move."""
        world = self.world
        there = world.agents[self.machine.other.name]
        if not world.network_up() or there is None or not there.alive:
            return False
        state = runner.state
        host = self.machine.name
        epoch = state.hold.epoch
        mine = End(
            self,
            Hello(versions=self.versions, move_id=state.move_id, host=host, role=runner.role, epoch=epoch),
        )
        role = TARGET if runner.role == SOURCE else SOURCE
        hello = Hello(versions=there.versions, move_id=state.move_id, host=there.machine.name, role=role, epoch=epoch)
        yours = End(there, hello)
        mine.other, yours.other = yours, mine
        mine.runner = runner
        world.ends.update((mine, yours))
        mine.send(mine.session.hello_frame())
        yours.send(yours.session.hello_frame())
        mine.send(mine.session.ping_frame(self.machine.clock_ms))
        return True

    def greeted(self, end: End, hello: Hello) -> None:
        """The other side's Hello: the runner takes the connection, or a visit begins (agent/moves.py, serve_peer)."""
        role = TARGET if hello.role == SOURCE else SOURCE
        runner = self.runners.get((hello.move_id, role))
        assert end.other is not None
        other = (runner.state.target if role == SOURCE else runner.state.source) if runner else hello.host
        if not hello.host == other == end.other.speaker:
            self.tell(f"{end.other.speaker} spoke for {hello.host} in a move of {other}")
            end.close()
            return
        if runner is not None:
            runner.connected(end)
            return
        end.runner = None
        ended = self.journal.ended(hello.move_id)
        if role == SOURCE:
            answer = recover.answer_as_source(ended, hello.epoch, self.machine.name)
            if answer is not None:
                end.say(answer)
        elif ended is not None:
            end.say(recover.answer_as_target(ended, hello.epoch, self.machine.name))

    def heard(self, end: End, message: AnyMessage) -> None:
        """A message, for the runner or in a visit (agent/visit.py)."""
        if end.runner is not None:
            end.runner.put(facts.Received(at_ms=self.machine.clock_ms, message=message))
            return
        assert end.peer is not None
        move_id, epoch = end.peer.move_id, end.peer.epoch
        ended = self.journal.ended(move_id)
        if isinstance(message, Enquire):
            refusal = self._admit_in()
            inventory = examples.inventory(self.machine.name, octet=self.world.octet(self.machine))
            inventory = examples.shared(inventory) if self.world.shares else inventory
            end.say(Answer(inventory=msgspec.structs.replace(inventory, refusal=refusal)))
        elif isinstance(message, Offer):
            self._take(end, message, ended)
        elif isinstance(message, LATE):
            end.say(recover.answer_as_target(ended, epoch, self.machine.name))

    def _admit_in(self) -> "admission.Refusal | None":
        return admission.admit_in(
            SETTINGS, self.machine.name, self.load(), source="other", source_ip="10.0.0.9", with_storage=True
        )

    def _take(self, end: End, offer: Offer, ended: MoveReport | None) -> None:
        assert end.peer is not None
        moving = offer.plan.target_vm
        if ended is not None or self._admit_in() or self.machine.defined is not None or moving.name in self.claims:
            error = ErrorBody(code="refused", message="not now", todo="")
            end.say(Refused(epoch=offer.epoch, error=error))
            return
        state = TargetState(
            move_id=end.peer.move_id,
            source=end.peer.host,
            target=self.machine.name,
            plan=offer.plan,
            psk_hex=offer.psk_hex,
            hold=TargetHold(epoch=offer.epoch),
            started_wall_s=self.machine.wall_s,
            volatile_id=self.volatile_id,
        )
        runner = self._launch(state)
        end.runner = runner
        runner.ends.append(end)
        runner.put(facts.Offered(at_ms=self.machine.clock_ms))


class Guard:
    """Ends the agent where it dies; a mistake of kvmhv goes on up."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, AgentDied)


def _status(qemu: Qemu | None) -> str:
    if qemu is None or qemu.hangs:
        return ""
    return "paused" if qemu.status == "finish" else qemu.status
