"""The moves that are open on this host: one runner each, launched by a request, an offer or the journal."""

import asyncio
from collections.abc import Callable, Coroutine

import msgspec
import structlog

from kvmhv.agent.answer_gap import AnswerGap
from kvmhv.agent.chronicle import Chronicle
from kvmhv.agent.leads import Leads
from kvmhv.agent.link import Link
from kvmhv.agent.network_gap import NetworkGap
from kvmhv.agent.runner import Runner, State
from kvmhv.agent.source_effects import SourceMachine
from kvmhv.agent.steered_effects import SteeredSource, SteeredTarget
from kvmhv.agent.storage_effects import STORAGE, StorageMachine
from kvmhv.agent.target_effects import TargetMachine
from kvmhv.agent.vms import Vms
from kvmhv.config import Config
from kvmhv.core import admission, facts, first_frame, recover, steered, steered_target, storage_move
from kvmhv.core.effects import Effect
from kvmhv.core.source_state import SourceState
from kvmhv.core.storage_state import StorageState
from kvmhv.core.target import TargetState, TargetStep
from kvmhv.errors import CallerError, HostError
from kvmhv.model import MoveReport, Outcome, Vm
from kvmhv.ports import Clock, Flows, Frames, Hypervisor, Journal, MigrationWays, Peer, Probes, QemuEvent, Runtime
from kvmhv.wire.session import SOURCE, TARGET, Hello

log = structlog.get_logger(__name__)

LAST_WORDS_S = 2.0


class OpenMoves:
    """Launches runners, hands them QEMU's events, and puts them away when they end."""

    def __init__(
        self,
        *,
        config: Config,
        vms: Vms,
        hypervisor: Hypervisor,
        runtime: Runtime,
        peer: Peer,
        journal: Journal,
        clock: Clock,
        frames: Frames,
        flows: Flows,
        probes: Probes,
        ways: MigrationWays,
        chronicle: Chronicle,
    ) -> None:
        self._limit = config.limits.move_facts
        self._waits = config.waits
        self._vms = vms
        self._hypervisor = hypervisor
        self._runtime = runtime
        self._peer = peer
        self._journal = journal
        self._clock = clock
        self._frames = frames
        self._flows = flows
        self._probes = probes
        self._ways = ways
        self._chronicle = chronicle
        self._runners: dict[tuple[str, str], Runner] = {}
        self._leads = Leads(hypervisor, clock)
        self._leads.on_held = self._held_back
        self._gaps: dict[str, NetworkGap] = {}
        self._leaving: dict[str, tuple[SourceMachine, AnswerGap]] = {}
        self._promises: dict[str, admission.Promise] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_slot: Callable[[], None] = lambda: None
        """Told when a move has ended and its slots are free."""
        hypervisor.on_event(self._on_event)
        runtime.on_event(self._on_event)

    def find(self, move_id: str, role: str) -> Runner | None:
        """Return the runner of an open move."""
        return self._runners.get((move_id, role))

    def receiving(self, move_id: str, peer_name: str) -> Vm:
        """Return the VM that a move of this peer waits for the files of. Raises CallerError `file-not-wanted`."""
        runner = self.find(move_id, TARGET)
        state = runner.state if runner else None
        if not isinstance(state, TargetState) or state.source != peer_name or state.step is not TargetStep.RECEIVING:
            raise CallerError("file-not-wanted", f"no move of {peer_name} waits for files here", http_status=409)
        return state.vm

    def any(self, move_id: str) -> Runner | None:
        """Return the runner of an open move, whatever this host's part in it is."""
        return next((found for role in (SOURCE, TARGET, STORAGE) if (found := self.find(move_id, role))), None)

    def reports(self) -> tuple[MoveReport, ...]:
        """Return how every open move stands."""
        return tuple(runner.report() for runner in self._runners.values())

    def promise(self, move_id: str, *, out: bool, with_storage: bool, for_s: float) -> None:
        """Keep a slot for a move that is about to begin, until it has, and for so long at most."""
        until_ms = self._clock.monotonic_ms() + for_s * 1000
        self._promises[move_id] = admission.Promise(out=out, with_storage=with_storage, until_ms=until_ms)

    def withdraw(self, move_id: str) -> None:
        """Keep no slot any more for a move that does not begin."""
        self._promises.pop(move_id, None)

    def load(self, but: str = "") -> admission.Load:
        """Return how many moves of each kind are open or have been promised a slot, without the promise to one."""
        now_ms = self._clock.monotonic_ms()
        self._promises = {key: it for key, it in self._promises.items() if it.until_ms > now_ms}
        return self._open_load().plus([it for key, it in self._promises.items() if key != but])

    def _open_load(self) -> admission.Load:
        states = [runner.state for runner in self._runners.values()]
        leaving = [state for state in states if isinstance(state, SourceState)]
        arriving = [state for state in states if isinstance(state, TargetState)]
        copying = sum(state.request.include_storage and bool(state.vm.disks) for state in leaving)
        copying += sum(bool(state.plan.disk_copies) for state in arriving)
        copying += len(self.changing_storage())
        return admission.Load(moves_out=len(leaving), moves_in=len(arriving), storage_copies=copying)

    def promised_bytes(self) -> int:
        """Return the memory of the VMs that are arriving."""
        states = (runner.state for runner in self._runners.values())
        return sum(state.plan.target_vm.memory_bytes for state in states if isinstance(state, TargetState))

    def moving(self) -> tuple[Vm, ...]:
        """Return the VMs that leave or arrive."""
        states = (runner.state for runner in self._runners.values())
        return tuple(state.vm for state in states if not isinstance(state, StorageState))

    def touched(self) -> tuple[Vm, ...]:
        """Return every VM that a move works on, as it will be."""
        return (*self.moving(), *self.changing_storage())

    def changing_storage(self) -> tuple[Vm, ...]:
        """Return the VMs whose disks change their location here, as they will be."""
        states = (runner.state for runner in self._runners.values())
        return tuple(state.target_vm for state in states if isinstance(state, StorageState))

    def leave(self, state: SourceState) -> Runner:
        """Begin a move out; the VM is claimed already."""
        runner = self._source_runner(state)
        self._launch(runner, [], facts.Started(at_ms=self._clock.monotonic_ms()))
        return runner

    def arrive(self, state: TargetState, link: Link) -> Runner:
        """Begin a move in, on the connection that brought its offer; the VM is claimed already."""
        runner = self._target_runner(state, link)
        self._launch(runner, [], facts.Offered(at_ms=self._clock.monotonic_ms()))
        return runner

    def move_storage(self, state: StorageState) -> Runner:
        """Begin to move disks on this host; the VM is claimed already."""
        runner = self._storage_runner(state)
        self._launch(runner, [], facts.Started(at_ms=self._clock.monotonic_ms()))
        return runner

    async def recover(self) -> None:
        """After a restart, before anybody is served: take every open move up again from the journal.

        Raises HostError `journal-damaged` for an entry that cannot be read: to go on without it could run a VM twice.
        """
        for move_id, role, encoded in self._journal.load():
            try:
                state = _decode(role, encoded)
            except (ValueError, RecursionError) as error:
                raise HostError(
                    "journal-damaged",
                    f"the journal's entry of the move {move_id} ({role}) cannot be read: {error}",
                    "if a newer kvmhv wrote it, install that again; else see docs/errors.md; VMs run on meanwhile",
                ) from error
            await self._recover(state)

    async def close(self) -> None:
        """Stop handling moves; their journals and QEMUs stay as they are for the next agent."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._leads.close()

    # ---

    async def _recover(self, state: State) -> None:
        if not isinstance(state, StorageState) and state.vm.runtime:
            self._recover_steered(state)
            return
        seen = await self._hypervisor.state(state.vm.id)
        found = facts.Restarted(
            at_ms=self._clock.monotonic_ms(),
            process=seen.process,
            status=seen.status,
            migration=seen.migration,
            ever_ran=seen.ever_ran,
            rebooted=state.volatile_id != self._journal.volatile_id,
        )
        log.info("move taken up again", move=state.move_id, step=str(state.step), process=seen.process)
        effects: list[Effect]
        if isinstance(state, SourceState):
            self._vms.claim(state.vm.name, state.move_id)
            state, effects = recover.recover_source(state, found)
            runner = self._source_runner(state)
        elif isinstance(state, StorageState):
            self._vms.claim(state.vm.name, state.move_id)
            state, effects = storage_move.recover(state, found)
            runner = self._storage_runner(state)
        else:
            self._vms.claim(state.vm.name, state.move_id, state.vm)
            state, effects = recover.recover_target(state, found)
            runner = self._target_runner(state, None)
        self._launch(runner, effects, None)

    def _recover_steered(self, state: SourceState | TargetState) -> None:
        """The program that runs the VM may be back later: the machines ask it as often as it takes."""
        log.info("move taken up again", move=state.move_id, step=str(state.step), runtime=state.vm.runtime)
        self._vms.claim(state.vm.name, state.move_id)
        effects: list[Effect]
        if isinstance(state, SourceState):
            state, effects = steered.recover(state, self._clock.monotonic_ms())
            runner = self._source_runner(state)
        else:
            state, effects = steered_target.recover(state)
            runner = self._target_runner(state, None)
        self._launch(runner, effects, None)

    def _source_runner(self, state: SourceState) -> Runner:
        machine: SteeredSource | SourceMachine
        if state.vm.runtime:
            machine = SteeredSource(state, self._runtime, self._clock)
        else:
            gap = AnswerGap(self._probes, state.vm.probe)
            services = self._hypervisor, self._vms, self._peer, self._clock, self._flows
            machine = SourceMachine(state, *services, gap, self._ways)
            self._leaving[state.move_id] = machine, gap
        runner = Runner(machine, state, self._clock, self._journal, self._limit, self._waits.cont_s)
        if not state.vm.runtime:
            runner.on_step = self._stepped
        machine.put = runner.put
        hello = Hello(move_id=state.move_id, host=state.source, role=SOURCE, epoch=state.hold.epoch)
        runner.link = self._link(hello, runner)
        return runner

    def _storage_runner(self, state: StorageState) -> Runner:
        machine = StorageMachine(state, self._hypervisor, self._vms, self._clock)
        runner = Runner(machine, state, self._clock, self._journal, self._limit, self._waits.cont_s)
        machine.put = runner.put
        return runner

    def _target_runner(self, state: TargetState, link: Link | None) -> Runner:
        machine: SteeredTarget | TargetMachine
        if state.vm.runtime:
            machine = SteeredTarget(state, self._runtime, self._clock)
        else:
            gap = NetworkGap(self._frames, state.vm, lambda after_ms: self._first_frame(runner, after_ms))
            self._gaps[state.move_id] = gap
            machine = TargetMachine(state, self._hypervisor, self._vms, self._clock, gap, self._ways)
        runner = Runner(machine, state, self._clock, self._journal, self._limit, self._waits.cont_s)
        hello = Hello(move_id=state.move_id, host=state.target, role=TARGET, epoch=state.hold.epoch)
        runner.link = link or self._link(hello, runner)
        return runner

    def _stepped(self, state: State) -> None:
        assert isinstance(state, SourceState)
        self._leads.note(state)

    def _held_back(self, move_id: str) -> None:
        runner = self.find(move_id, SOURCE)
        if runner is not None:
            runner.put(facts.HeldBack(at_ms=self._clock.monotonic_ms()))

    def _link(self, hello: Hello, runner: Runner) -> Link:
        connect_s = self._waits.peer_connect_s
        return Link(hello, self._clock, connect_s, runner.connected, runner.lost, runner.heard)

    def _first_frame(self, runner: Runner, after_resume_ms: float) -> None:
        runner.put(facts.FirstFrame(at_ms=self._clock.monotonic_ms(), after_resume_ms=after_resume_ms))

    def _launch(self, runner: Runner, effects: list[Effect], fact: facts.Fact | None) -> None:
        self._runners[runner.state.move_id, runner.machine.role] = runner
        self.withdraw(runner.state.move_id)
        runner.on_need_operator = self._chronicle.need_operator
        runner.on_end = lambda: self._ended(runner.state, runner.machine.role)
        if fact is not None:
            runner.put(fact)
        self._spawn(self._run(runner, effects), f"move {runner.state.move_id}")

    async def _run(self, runner: Runner, effects: list[Effect]) -> None:
        state = runner.state
        try:
            report = await self._run_linked(runner, effects) if runner.link else await runner.run(effects)
        except Exception:
            log.exception("the move's runner broke; its journal is kept", move=state.move_id)
            return
        log.info("move ended", move=report.id, vm=report.vm, outcome=str(report.outcome), reason=report.reason)
        self._chronicle.ended(report)
        if isinstance(runner.state, SourceState) and not state.vm.runtime:
            self._spawn(self._end_leaving(runner.state, report), f"answer gap of {state.move_id}")
        gap = self._gaps.pop(state.move_id, None) if isinstance(state, TargetState) else None
        if gap is not None:
            self._spawn(self._end_gap(gap, report), f"network gap of {state.move_id}")

    def _ended(self, state: State, role: str) -> None:
        """Let the VM go: its next move may begin while the last words of this one are still said."""
        self._runners.pop((state.move_id, role), None)
        self._leads.forget(state.move_id)
        self._vms.release(state.vm.name, state.move_id)
        if not state.vm.runtime:
            self._vms.disks.settle_owner(state.vm)
        self.on_slot()

    async def _run_linked(self, runner: Runner, effects: list[Effect]) -> MoveReport:
        """Run a move with another agent."""
        state, link = runner.state, runner.link
        assert link is not None
        leaving = isinstance(state, SourceState)
        other = state.target if leaving else state.source
        connecting = asyncio.create_task(link.keep(self._peer, other, 0.0 if leaving else self._waits.source_silent_s))
        try:
            report = await runner.run(effects)
            await link.drain(LAST_WORDS_S)
            return report
        finally:
            await self._ways.close(state.move_id)
            connecting.cancel()
            await asyncio.gather(connecting, return_exceptions=True)
            self._spawn(link.close(), f"last words of {state.move_id}")

    async def _end_leaving(self, state: SourceState, report: MoveReport) -> None:
        """A guest that answers its probe when its move is over: it goes into the record then."""
        machine, gap = self._leaving.pop(state.move_id)
        machine.close()
        await gap.close(let_it_ask=report.outcome is Outcome.DONE)
        if gap.answered_ms is not None and state.stopped_ms is not None:
            amended = first_frame.answered(report, gap.answered_ms - state.stopped_ms)
            if amended is not report:
                self._journal.end(report.id, SOURCE, msgspec.json.encode(amended))
                self._chronicle.answer_gap(amended)

    async def _end_gap(self, gap: NetworkGap, report: MoveReport) -> None:
        """The first frame of a VM that says little comes when its move is over: it goes into the record then."""
        await gap.close(let_it_look=report.outcome is Outcome.DONE)
        amended = first_frame.noted(report, gap.after_resume_ms)
        if amended is not report:
            self._journal.end(report.id, TARGET, msgspec.json.encode(amended))
            self._chronicle.network_gap(amended)

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_event(self, event: QemuEvent) -> None:
        for runner in self._runners.values():
            if runner.state.vm.id == event.vm_id:
                runner.put_event(event)


def _decode(role: str, encoded: bytes) -> State:
    if role == SOURCE:
        return msgspec.msgpack.decode(encoded, type=SourceState)
    if role == STORAGE:
        return msgspec.msgpack.decode(encoded, type=StorageState)
    return msgspec.msgpack.decode(encoded, type=TargetState)
