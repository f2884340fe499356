"""One seed's world: a VM moves there and back between two hosts, a swarm of faults; then all heals and it must end."""

from collections.abc import Callable
from functools import partial

import msgspec

from kvmhv.core import bounds
from kvmhv.core import effects as ef
from kvmhv.core.handover import HandoverViolation
from kvmhv.core.source_state import SourceState
from kvmhv.core.target_state import TargetState
from kvmhv.messages import Abort, AnyMessage, Grant, Owned, Refused, Running
from kvmhv.model import DirectKernel, MoveReport, Outcome, Rule, Timeouts, Vm
from kvmhv.wire.session import SOURCE, TARGET, VERSIONS, Hello
from tests.sim import examples, pages
from tests.sim.acts import ERROR
from tests.sim.agent import LOST, Agent, AgentDied, End
from tests.sim.journal import Journal
from tests.sim.kernel import Kernel
from tests.sim.ledger import Ledger, Single
from tests.sim.machine import MIB, Broken, Image, Machine, Qemu, Truth

HOSTS = ("host1", "host2")
FAULTS_END_MS = 20_000.0
TIGHT_FAULTS_END_MS = 60_000.0
"""Longer than any move may take in such a world."""
HEALED_FOR_MS = 2 * 3600e3
KINDS = (
    "agent",
    "host",
    "both",
    "qemu",
    "cut",
    "boundary-agent",
    "boundary-host",
    "boundary-both",
    "boundary-replay",
    "boundary-forge",
    "fail",
    "cancel",
    "hang",
    "disk",
    "clock",
    "upgrade",
    "replay",
    "forge",
)
PLANNED = tuple(kind for kind in KINDS if kind != "fail" and not kind.startswith("boundary-"))
BOUNDARY_KINDS = tuple(kind for kind in KINDS if kind.startswith("boundary-"))
VERSIONS_OF_OTHERS = ((1, 1), (0, 1), (1, 2), (2, 3))
"""What agents of other versions speak; the last one has nothing in common with this one."""
POST_COPY = 3
"""Of seven seeds, the one whose guest dirties memory faster than it travels, and whose pages may follow it."""
STRANGER = "host3"
"""A host that is trusted, and has no part in these moves."""
FRAMES_KEPT = 200


class World:
    """Build it, then run() it; it raises Broken (or what kvmhv raises) where a promise does not hold."""

    def __init__(
        self, seed: int, *, single: Single | None = None, faultless: bool = False, verbose: bool = False
    ) -> None:
        self.seed = seed
        self.verbose = verbose
        self._faults: dict[str, Callable[[str], None]] = {
            "agent": self._agent_dies,
            "host": self._host_dies,
            "both": self._both_die,
            "qemu": self._qemu_dies,
            "cut": self._is_cut,
            "cancel": self._cancel,
            "hang": self._hangs,
            "disk": self._disk_breaks,
            "clock": self._clock_jumps,
            "upgrade": self._is_upgraded,
            "replay": self._replays,
            "forge": self._forges,
        }
        self.kernel = Kernel(seed if single is None else f"{seed}", verbose=verbose)
        self.truth = Truth(owner=HOSTS[0])
        self.ledger = Ledger()
        self.ends: set[End] = set()
        self.queues: dict[int, list[ef.Effect]] = {}
        self.single = single
        rng = self.kernel.rng
        self._swarm = frozenset(() if single or faultless else (kind for kind in KINDS if rng.random() < 0.25))
        self._boundary_risk = rng.choice((0.002, 0.01, 0.03))
        self._latency_ms = rng.choice((0.2, 2.0, 30.0))
        self._cut = 0
        self._healed = False
        self._moves_left = 2
        self._frames: list[tuple[str, bytes]] = []
        self._ends_made = 0
        self.timeouts = examples.TIGHT if seed % 4 == 2 else Timeouts()
        self.post_copy = seed % 7 == POST_COPY
        self.pages_told: set[str] = set()
        """Moves of which the operator heard that pages do not come: the source, which sees whether they go, says it."""
        self.shares = rng.random() < 0.25
        self.moving = self._vm()
        self.machines = {name: Machine(name, self.kernel, self.truth) for name in HOSTS}
        self.journals = {name: Journal() for name in HOSTS}
        self.agents: dict[str, Agent | None] = dict.fromkeys(HOSTS)
        for name in HOSTS:
            machine = self.machines[name]
            machine.other = self.machines[HOSTS[1] if name == HOSTS[0] else HOSTS[0]]
            machine.network_up = self.network_up
            machine.blackout_s = bounds.blackout_s(self.timeouts)
            machine.event = self._qemu_said
        first = self.machines[HOSTS[0]]
        first.qemu = Qemu(first, "running", dirty_bytes_per_s=rng.choice((0.0, 1e6, 50e6, 600e6)))
        first.qemu.ran = True
        first.image = Image(0, 0, shared=self.shares, lock=first.name)
        first.defined, first.taps, first.kernel_files = 0, True, self.moving.kernel is not None
        for name in HOSTS:
            self.start_agent(name)

    def _vm(self) -> Vm:
        moving = examples.vm()
        if self.kernel.rng.random() < 0.3:
            moving = msgspec.structs.replace(moving, kernel=DirectKernel(kernel_sha256="0" * 64, kernel_bytes=1))
        return msgspec.structs.replace(moving, memory_bytes=self.kernel.rng.choice((64, 256)) * MIB)

    # --- what the hosts ask of it

    def network_up(self) -> bool:
        """Whether the hosts reach each other."""
        return self._cut == 0 and all(machine.up for machine in self.machines.values())

    def latency_ms(self) -> float:
        """How long a frame is on its way."""
        return self.kernel.rng.uniform(0.05, 1.0) * self._latency_ms

    def octet(self, machine: Machine) -> int:
        """Last part of the host's address."""
        return HOSTS.index(machine.name) + 1

    def next_end(self) -> int:
        """Number the ends of connections: sets of them have no order that a replay could rely on."""
        self._ends_made += 1
        return self._ends_made

    def note_frame(self, to: str, frame: bytes) -> None:
        """Keep what was said, for who wants to say it again."""
        if self._swarm & {"replay", "boundary-replay"} and len(self._frames) < FRAMES_KEPT:
            self._frames.append((to, frame))

    def _qemu_said(self, qemu: Qemu, name: str, data: dict[str, int]) -> None:
        agent = self.agents[qemu.host.name]
        if agent is not None and agent.alive:
            agent.qemu_said(name, data)

    def boundary(self, agent: Agent, what: object) -> None:
        """An agent is between two effects."""
        self.ledger.boundaries += 1
        if self._healed:
            return
        if self.single is not None:
            if self.ledger.boundaries == self.single.boundary:
                text = what if isinstance(what, str) else f"before {type(what).__name__}"
                self.kernel.tell("FAULT", f"{self.single.kind} of {self.single.host}; {agent.machine.name} is {text}")
                if self.single.kind in ("agent", "host", "both"):
                    self.fault(self.single.kind, self.single.host)
                elif self.single.kind == "fail":  # `fails` breaks the effect
                    self.ledger.fault("fail")
                else:  # an agent notices it after the effects that it is at
                    self.kernel.after(0, partial(self.fault, self.single.kind, self.single.host))
            return
        if not self._swarm or self.kernel.rng.random() > self._boundary_risk:
            return
        kind = self.kernel.rng.choice(BOUNDARY_KINDS)
        if kind in ("boundary-replay", "boundary-forge") and kind in self._swarm:
            self.kernel.after(0, partial(self.fault, kind.removeprefix("boundary-"), agent.machine.name))
        elif kind in self._swarm:
            self.fault(kind.removeprefix("boundary-"), agent.machine.name)

    def fails(self, agent: Agent, effect: ef.Effect) -> bool:
        """Whether this effect breaks."""
        if self.single is not None and self.single.kind == "fail":
            return self.ledger.boundaries == self.single.boundary
        if self._healed or "fail" not in self._swarm:
            return False
        if self.kernel.rng.random() > 0.02:
            return False
        self.ledger.fault("fail")
        self.kernel.tell("FAULT", f"{type(effect).__name__} fails on {agent.machine.name}")
        return True

    # --- faults

    def fault(self, kind: str, name: str) -> None:
        """Let something break, and plan its repair."""
        self.ledger.fault(kind)
        self.kernel.tell("FAULT", f"{kind} {name}")
        self._faults[kind](name)

    def _agent_dies(self, name: str) -> None:
        agent = self.agents[name]
        if agent is not None and agent.alive:
            agent.die()
            self.kernel.after(self.kernel.some_ms(100, 8000), lambda: self.start_agent(name))

    def _host_dies(self, name: str) -> None:
        machine, agent = self.machines[name], self.agents[name]
        if not machine.up:
            return
        self.truth.stopped_by_fault |= self.truth.owner == name or bool(machine.qemu)
        if agent is not None:
            agent.die()
        machine.lose_power()
        self.journals[name].volatile.clear()
        self.kernel.after(self.kernel.some_ms(2000, 60_000), lambda: self.boot(name))

    def _both_die(self, name: str) -> None:
        self._host_dies(name)
        other = self.machines[name].other.name
        self.kernel.after(self.kernel.rng.choice((0.0, 1.0, 50.0)), lambda: self._host_dies(other))

    def _qemu_dies(self, name: str) -> None:
        if self.machines[name].qemu is not None:
            self.truth.stopped_by_fault = True
            self.machines[name].kill_qemu()

    def _is_cut(self, name: str) -> None:
        self._cut += 1
        for end in self.all_ends():
            if end.alive and self.kernel.rng.random() < 0.5:
                self.kernel.after(self.kernel.some_ms(0, 15_000), end.close)
        self.kernel.after(self.kernel.rng.choice((50.0, 2000.0, 40_000.0)), self._mend)

    def _hangs(self, name: str) -> None:
        qemu = self.machines[name].qemu
        if qemu is not None:
            qemu.hangs = True
            self.kernel.after(self.kernel.some_ms(100, 40_000), lambda: setattr(qemu, "hangs", False))

    def _disk_breaks(self, name: str) -> None:
        machine = self.machines[name]
        machine.disk_broken = True
        self.kernel.after(self.kernel.some_ms(100, 30_000), lambda: setattr(machine, "disk_broken", False))

    def _clock_jumps(self, name: str) -> None:
        self.machines[name].wall_offset_s += self.kernel.rng.choice((-86_400.0, -3600.0, -1.0, 1.0, 3600.0, 86_400.0))

    def _is_upgraded(self, name: str) -> None:
        """Another version of the agent takes over; sometimes one that keeps its journal in an older form."""
        agent = self.agents[name]
        if agent is not None and agent.alive:
            agent.die()
            if self.kernel.rng.random() < 0.5:
                self.journals[name].age()
            versions = self.kernel.rng.choice(VERSIONS_OF_OTHERS)
            self.kernel.after(self.kernel.some_ms(100, 3000), lambda: self.start_agent(name, versions))

    def _replays(self, name: str) -> None:
        """A frame that was said before, in any of the moves, is said again on a connection that stands now."""
        frames = [frame for to, frame in self._frames if to == name]
        ends = [end for end in self._ends_of(name) if end.peer is not None]
        if frames and ends:
            self.kernel.rng.choice(ends).receive(self.kernel.rng.choice(frames))

    def _forges(self, name: str) -> None:
        """A trusted host that has no part in the move speaks in the name of the one that has."""
        agent = self.agents[name]
        if agent is None or not agent.alive or not agent.runners:
            return
        runner = self.kernel.rng.choice(list(agent.runners.values()))
        epoch, other = runner.state.hold.epoch, self.machines[name].other.name
        role = SOURCE if runner.role == TARGET else TARGET
        claims = self.kernel.rng.choice((other, STRANGER))
        visited = End(agent, Hello(move_id=runner.state.move_id, host=name, role=runner.role, epoch=epoch))
        stranger = End(agent, Hello(move_id=runner.state.move_id, host=claims, role=role, epoch=epoch))
        visited.other, stranger.speaker = stranger, STRANGER
        words: tuple[AnyMessage, ...] = (Grant(epoch=epoch), Abort(epoch=epoch, error=LOST))
        if role == TARGET:
            words = (Running(epoch=epoch, resumed_ms=0.0), Owned(epoch=epoch), Refused(epoch=epoch, error=LOST))
        visited.receive(stranger.session.hello_frame())
        visited.receive(stranger.session.frame(self.kernel.rng.choice(words)))
        visited.close()

    def _ends_of(self, name: str) -> list[End]:
        return [end for end in self.all_ends() if end.alive and end.agent is self.agents[name] and end.agent.alive]

    def _mend(self) -> None:
        """The network is whole again; connections from before it are dead."""
        if not self._cut:
            return
        self._cut -= 1
        for end in self.all_ends():
            end.close()

    def all_ends(self) -> list[End]:
        """Every end of a connection that was ever made, in the order of their making."""
        return sorted(self.ends, key=lambda end: end.number)

    def _cancel(self, name: str) -> None:
        from kvmhv.core import facts  # noqa: PLC0415 - nothing else here speaks in facts

        for agent in self.agents.values():
            for runner in tuple(agent.runners.values()) if agent and agent.alive else ():
                if isinstance(runner.state, SourceState):
                    with agent.guarded():
                        runner.put(facts.CancelRequested(at_ms=agent.machine.clock_ms, caller="a test"))

    def boot(self, name: str) -> None:
        """A host comes up again, and its agent with it."""
        machine = self.machines[name]
        if not machine.up:
            machine.up, machine.booted_ms = True, self.kernel.now_ms
            self.kernel.tell(name, "boots")
            self.start_agent(name)

    def start_agent(self, name: str, versions: tuple[int, int] = VERSIONS) -> None:
        """Start the host's agent, if none lives."""
        machine, old = self.machines[name], self.agents[name]
        if not machine.up or (old is not None and old.alive):
            return
        agent = Agent(self, machine, self.journals[name], f"{name}-{machine.boot}", versions)
        self.agents[name] = agent
        agent.start()

    def _plan_faults(self) -> None:
        rng = self.kernel.rng
        for kind in (one for one in PLANNED if one in self._swarm):
            for _ in range(rng.randint(1, 2)):
                name = rng.choice(HOSTS)
                at_ms = rng.uniform(0, FAULTS_END_MS) ** rng.choice((1, 0.8))
                self.kernel.after(at_ms, partial(self.fault, kind, name))

    # --- the run

    def run(self) -> Ledger:
        """Run to the end."""
        self._plan_faults()
        self._next_move()
        try:
            heal_ms = FAULTS_END_MS if self.timeouts == Timeouts() else TIGHT_FAULTS_END_MS
            while self.kernel.now_ms < heal_ms and self.kernel.step(heal_ms):
                self._next_move()
            self._heal()
            limit_ms = self.kernel.now_ms + HEALED_FOR_MS
            while self._open() or self._next_move():
                if not self.kernel.step(limit_ms):
                    break
            self._settle()
        except (Broken, HandoverViolation, AssertionError, AgentDied) as error:
            replay = f"replay: python -m tests.sim --seed {self.seed} --verbose"
            raise Broken(f"{type(error).__name__}: {error}\n  {replay}") from error
        return self.ledger

    def _heal(self) -> None:
        self._healed = True
        self.kernel.tell("HEAL", "no faults from here on")
        for name in HOSTS:
            machine = self.machines[name]
            if machine.qemu is not None and machine.qemu.migration != "device":
                machine.qemu.hangs = False
        while self._cut:
            self._mend()
        for name in HOSTS:
            self.machines[name].disk_broken = False
            self.boot(name)
            agent = self.agents[name]
            if agent is not None and agent.versions != VERSIONS:
                agent.die()
            self.start_agent(name)

    def _open(self) -> bool:
        return any(journal.durable for journal in self.journals.values()) or any(
            agent.runners for agent in self.agents.values() if agent
        )

    def _next_move(self) -> bool:
        if not self._moves_left or self._open():
            return False
        here = self.machines[self.truth.owner]
        agent = self.agents[here.name]
        if (
            agent is None
            or not agent.alive
            or here.defined is None
            or here.qemu is None
            or here.qemu.status != "running"
        ):
            return False
        if here.other.defined is not None:
            return False
        self._moves_left -= 1
        number = self.ledger.moves
        moving = msgspec.structs.replace(self.moving, epoch=here.defined)
        state = examples.source_state(
            moving,
            source=here.name,
            target=here.other.name,
            move_id=f"move-{number}",
            volatile_id=f"{here.name}-{here.boot}",
            used_bytes=moving.memory_bytes,
            shares=self.shares,
            timeouts=self.timeouts,
            rule=Rule(max_passes=2, post_copy=True) if self.post_copy else None,
        )
        state = msgspec.structs.replace(state, started_wall_s=here.wall_s)
        here.qemu.migration, here.qemu.sent_bytes = "", 0
        here.qemu.dirty_bytes_per_s = self.kernel.rng.choice((0.0, 1e6, 50e6, 600e6))
        if self.post_copy:
            here.qemu.dirty_bytes_per_s = 600e6
        if agent.leave(state) is None:
            return False
        self.ledger.moves += 1
        return True

    # --- the end

    def _settle(self) -> None:
        if self._open():
            self._check_standing()
            self.ledger.stood_still += 1
            return
        for number in range(self.ledger.moves):
            self._check_agreement(f"move-{number}")
        owners = [machine for machine in self.machines.values() if machine.defined is not None]
        if len(owners) != 1:
            raise Broken(f"the VM is defined on {[owner.name for owner in owners]}")
        owner = owners[0]
        self._check_left(owner)
        if owner.image is None or owner.image.flushed != self.truth.acknowledged:
            raise Broken(f"writes are missing on {owner.name}: {owner.image}, {self.truth.acknowledged} acknowledged")
        if owner.qemu is None and not self.truth.stopped_by_fault:
            raise Broken("the VM is lost")
        if owner.qemu is not None and owner.qemu.migration in pages.MISSING:
            raise Broken("the guest waits for pages for ever")
        if owner.qemu is not None and owner.qemu.status != "running":
            raise Broken(f"the VM stands still: {owner.qemu.status}")

    def _check_left(self, owner: Machine) -> None:
        other = owner.other
        left = {
            "process": other.qemu,
            "disk": other.image and not (other.half_undone and self._told(other)),
            "tap": other.taps,
            "file": other.kernel_files,
            "claims": any(agent.claims for agent in self.agents.values() if agent),
            "volatile journal": any(journal.volatile for journal in self.journals.values()),
            "mirror": owner.qemu and (owner.qemu.mirrors or owner.qemu.migration in ("active", "pre-switchover")),
        }
        found = [name for name, one in left.items() if one]
        if found:
            raise Broken(f"left behind: {found}")
        if (self.moving.kernel is not None) != owner.kernel_files:
            raise Broken("the VM's kernel files are not where the VM is")

    def _told(self, machine: Machine) -> bool:
        """Whether a report of this host warns of what could not be taken back."""
        reports = (self.journals[machine.name].ended(f"move-{number}") for number in range(self.ledger.moves))
        return any(ERROR.message in report.warnings for report in reports if report is not None)

    def _check_agreement(self, move_id: str) -> None:
        reports: list[MoveReport] = [
            report for journal in self.journals.values() if (report := journal.ended(move_id)) is not None
        ]
        if not reports:
            return  # its agent died before the first journal entry: it never began
        if len({report.outcome is Outcome.DONE for report in reports}) > 1:
            raise Broken(f"the hosts do not agree on {move_id}")
        for report in reports:
            self._check_figures(report)
        outcome = str(reports[0].outcome)
        self.ledger.outcomes[outcome] = self.ledger.outcomes.get(outcome, 0) + 1

    def _check_figures(self, report: MoveReport) -> None:
        """Whatever the clocks did, no figure is nonsense."""
        times = [one.seconds for one in (*report.phases, *report.passes)]
        times += [step.at_ms for step in report.blackout_steps]
        if min(times, default=0.0) < 0 or not 0 <= report.progress <= 1:
            raise Broken(f"a report tells nonsense: {report}")

    def _check_standing(self) -> None:
        """Only a granted source and a target that cannot tell may stand still (handover.py, 5)."""
        states = [runner.state for agent in self.agents.values() if agent for runner in agent.runners.values()]
        steps = {type(state).__name__: str(state.step) for state in states}
        if steps != {SourceState.__name__: "granted", TargetState.__name__: "standing"} or any(
            state.outcome is not Outcome.NEEDS_OPERATOR for state in states
        ):
            raise Broken(f"it does not end: {steps}")
