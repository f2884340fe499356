"""The moves of this host as operators and other agents see them: admitted, watched, cancelled, answered for."""

import asyncio
import contextlib
import secrets
import uuid
from collections.abc import AsyncIterator

import msgspec
import structlog

from kvmhv.agent import arriving_disks, events, past_moves
from kvmhv.agent.api.services import CheckReport
from kvmhv.agent.chronicle import Chronicle
from kvmhv.agent.enquiry import Enquiry
from kvmhv.agent.host_vms import HostVms
from kvmhv.agent.inventory import Inventories
from kvmhv.agent.link import Link
from kvmhv.agent.move_queue import PROMISE_S, MoveQueue
from kvmhv.agent.open_moves import OpenMoves
from kvmhv.agent.owners import Owners
from kvmhv.agent.refusals import as_error, as_finding, refuse_hopeless
from kvmhv.agent.runner import Runner
from kvmhv.agent.settings import Settings, rule_of, with_option
from kvmhv.agent.sharing import Sharing
from kvmhv.agent.visit import Visit, first_hello
from kvmhv.config import Config
from kvmhv.core import admission, checks, checks_steered, facts, plan, resolve
from kvmhv.core.handover import SourceHold, TargetHold
from kvmhv.core.resolve import Choice, RunAt
from kvmhv.core.source_state import SourceState
from kvmhv.core.target import TargetState
from kvmhv.errors import CallerError, KvmhvError, PeerBroke, Refused
from kvmhv.messages import Answer, Enquire, Offer, Proof
from kvmhv.model import Asked, MoveReport, MoveRequest, Outcome, Refusal, Rule, Severity, Vm
from kvmhv.ports import Clock, Hypervisor, Journal, Peer, PeerConnection
from kvmhv.wire.session import SOURCE, TARGET, Hello

log = structlog.get_logger(__name__)

Written = list[Proof]
"""What a connection has made this host write for it."""

CANCEL_WAIT_S = 60.0
RESOLVE_WAIT_S = 20.0


class Moves:
    """The API calls it, and other agents' connections reach it."""

    def __init__(
        self,
        *,
        config: Config,
        settings: Settings,
        vms: HostVms,
        hypervisor: Hypervisor,
        peer: Peer,
        journal: Journal,
        clock: Clock,
        inventories: Inventories,
        sharing: Sharing,
        owners: Owners,
        open_moves: OpenMoves,
        queue: MoveQueue,
        chronicle: Chronicle,
    ) -> None:
        self._config = config
        self._settings = settings
        self._host_vms = vms
        self._vms = vms.own
        self._hypervisor = hypervisor
        self._peer = peer
        self._journal = journal
        self._shelf = past_moves.Shelf()
        self._clock = clock
        self._inventories = inventories
        self._enquiry = Enquiry(config, hypervisor, peer, clock, inventories, sharing)
        self._sharing = sharing
        self._owners = owners
        self._open = open_moves
        self._queue = queue
        queue.serve_with(self._ask, self._begin)
        self._chronicle = chronicle

    # --- for operators

    async def check(self, request: MoveRequest) -> CheckReport:
        """Check a move and plan it; changes nothing on either host."""
        vm = await self._checked_vm(request)
        request = with_option(self._settings.current, request)
        here = await self._enquiry.inventory_of(vm, request, dirty_rate=True)
        here, there = await self._enquiry.prove(here, vm, request)
        findings = (checks_steered.check if vm.runtime else checks.check)(vm, request, here, there)
        refusals = [self._admit_out(vm, request), there.refusal]
        findings = (*(as_finding(refusal) for refusal in refusals if refusal is not None), *findings)
        if any(finding.severity is Severity.ERROR for finding in findings):
            return CheckReport(findings=findings, refused=any(refusals))
        rule = rule_of(self._settings.current, request)
        past = self._experience(vm, request, rule)
        rates = past.throughput_bytes_per_s, past.link_bytes_per_s
        made = plan.make(vm, request, rule, self._config.timeouts, here, there, *rates)
        return CheckReport(findings=findings, plan=made)

    async def start(self, request: MoveRequest, asked: Asked) -> MoveReport:
        """Begin a move, or queue it if it may wait; returns when it is admitted here, or in the queue.

        Raises CallerError `vm-unknown`, `move-to-itself`, `host-unknown`, `passes-invalid`; Refused
        `migration-disabled`, `limit-reached`, `vm-in-move`; of one that may wait also `queue-full`, and what a check
        finds at once. Who asked and what came of it is an event either way.
        """
        try:
            self._queue.refuse_second(request.vm)
            if request.queue_s is None:
                return await self._begin(request, asked)
            return await self._enqueue(request, asked)
        except KvmhvError as error:
            self._chronicle.refused("out", error, events.move_refused(request.vm, request.target, asked, error))
            raise

    async def _enqueue(self, request: MoveRequest, asked: Asked) -> MoveReport:
        """What would keep the move from its end is said now, not when its turn has come."""
        vm = await self._checked_vm(request)
        refusals = self._admit_out(vm, request), await self._enquiry.refusal(vm, request)
        refuse_hopeless(refusals, (await self.check(request)).findings, request.target)
        self._queue.refuse_second(vm.name)  # another one may have come meanwhile
        self._vms.claims.refuse_taken(vm.name)
        return self._queue.join(vm, request, asked)

    async def _ask(self, request: MoveRequest, move_id: str) -> Refusal | None:
        """Return why the target does not let the VM in now; if it does, it keeps a slot for this move for a moment."""
        return await self._enquiry.refusal(await self._checked_vm(request), request, move_id)

    async def _begin(
        self, request: MoveRequest, asked: Asked, move_id: str = "", queued_s: float | None = None
    ) -> MoveReport:
        vm = await self._checked_vm(request)
        request = with_option(self._settings.current, request)
        rule = rule_of(self._settings.current, request)
        past = self._experience(vm, request, rule)
        move_id = move_id or str(uuid.uuid4())
        refusal = self._admit_out(vm, request, move_id)
        if refusal is not None:
            raise as_error(refusal)
        self._vms.claim(vm.name, move_id)
        with_storage = request.include_storage and bool(vm.disks)
        self._open.promise(move_id, out=True, with_storage=with_storage, for_s=PROMISE_S)
        try:
            state = SourceState(
                move_id=move_id,
                source=self._config.name,
                target=request.target,
                vm=vm,
                request=request,
                rule=rule,
                timeouts=self._config.timeouts,
                inventory=await self._enquiry.inventory_of(vm, request, dirty_rate=False),
                psk_hex=secrets.token_hex(32),
                hold=SourceHold(epoch=vm.epoch + 1, announced=False),
                started_wall_s=self._clock.wall_s(),
                volatile_id=self._journal.volatile_id,
                throughput_bytes_per_s=past.throughput_bytes_per_s,
                link_bytes_per_s=past.link_bytes_per_s,
                fixed_blackout_ms=past.fixed_blackout_ms,
                asked=asked,
                queued_s=queued_s,
            )
            inventory = await self._enquiry.proven(state.inventory, vm, request)
            state = msgspec.structs.replace(state, inventory=inventory)
            if not vm.runtime:
                await self._owners.begin_move(vm, request.target)
        except BaseException:
            self._open.withdraw(move_id)
            self._vms.release(vm.name, move_id)
            if not vm.runtime:
                self._vms.disks.settle_owner(vm)
            raise
        log.info("move asked for", move=move_id, vm=vm.name, target=request.target, caller=str(asked))
        report = self._open.leave(state).report()
        self._chronicle.tell(events.move_asked(report, asked))
        return report

    async def list(self) -> tuple[MoveReport | msgspec.Raw, ...]:
        """Return the moves that run and the ended ones that are kept (as JSON), the newest last."""
        return (*self._shelf.listed(self._journal.reports()), *self._open.reports(), *self._queue.reports())

    async def show(self, move_id: str) -> MoveReport:
        """Return one move by its id or an unambiguous prefix.

        Raises CallerError `move-unknown`, `move-ambiguous`.
        """
        open_ones = (*self._open.reports(), *self._queue.reports())
        running = [report for report in open_ones if report.id.startswith(move_id)]
        ended = past_moves.find(self._journal.reports(), move_id)
        found = {report.id: report for report in (*ended, *running)} if move_id else {}
        if not found:
            raise CallerError("move-unknown", f"there is no move {move_id!r}", "see `kvmhv move list`", http_status=404)
        if len(found) > 1:
            raise CallerError("move-ambiguous", f"{len(found)} moves begin with {move_id!r}", "give more of its id")
        return next(iter(found.values()))

    async def cancel(self, move_id: str, asked: Asked) -> MoveReport:
        """Ask a move to end, wait for its end, and return how it ended: cancelled, or too late.

        Raises Refused `cancel-at-source` on the target's agent, CallerError `move-ended`.
        """
        report = await self.show(move_id)
        if self._queue.holds(report.id):
            await self._queue.cancel(report.id, asked)
            report = await self.show(report.id)
            if report.outcome is not Outcome.RUNNING:
                return report
        runner = self._open.any(report.id)
        if runner is not None and runner.machine.role == TARGET:
            raise Refused(
                "cancel-at-source",
                "a move is cancelled at its source",
                f"kvmhv --host {report.source} move cancel {report.id}",
            )
        if runner is None:
            text = f"the move has ended ({report.outcome})"
            raise CallerError("move-ended", text, "there is nothing to cancel", http_status=409)
        runner.put(facts.CancelRequested(at_ms=self._clock.monotonic_ms(), caller=str(asked)))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CANCEL_WAIT_S):
                async for change in runner.changes():
                    report = change
        return report

    async def choices(self, move_id: str) -> tuple[Choice, ...]:
        """Return what an operator can decide about an open move on this host, each with its consequences."""
        return resolve.choices((await self._standing(move_id))[1])

    async def resolve(self, move_id: str, run_at: RunAt, asked: Asked) -> MoveReport:
        """Take the operator's word for that of the side that is silent.

        Raises CallerError `move-unknown`, `resolve-unneeded`, `resolve-impossible`.
        """
        runner, state = await self._standing(move_id)
        offered = {choice.run_at for choice in resolve.choices(state)}
        if run_at not in offered:
            known = ", ".join(sorted(offered))
            text = f"this move cannot be resolved by running the VM at the {run_at} from {self._config.name}"
            raise CallerError("resolve-impossible", text, f"the choices here are: {known}", http_status=409)
        log.warning("move resolved by the operator", move=state.move_id, run_at=str(run_at), caller=str(asked))
        if resolve.ends_copy(state, run_at):
            await self._hypervisor.kill(state.vm.id)
        for fact in resolve.words(state, run_at, self._clock.monotonic_ms(), str(asked)):
            runner.put(fact)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESOLVE_WAIT_S):
                await runner.ended.wait()
        return runner.report()

    async def _standing(self, move_id: str) -> tuple[Runner, SourceState | TargetState]:
        report = await self.show(move_id)
        runner = self._open.any(report.id)
        state = runner.state if runner is not None else None
        if runner is None or not isinstance(state, SourceState | TargetState) or not resolve.choices(state):
            text = f"the move {report.id} does not wait for an operator on {self._config.name} (it is {report.outcome})"
            todo = f"see `kvmhv move show` on {report.source} and {report.target}"
            raise CallerError("resolve-unneeded", text, todo, http_status=409)
        return runner, state

    async def watch(self, move_id: str) -> AsyncIterator[MoveReport]:
        """Yield the report now and after each change; ends after one whose outcome is not `running`."""
        report = await self.show(move_id)
        async for change in self._queue.changes(report.id):
            yield change
        runner = self._open.any(report.id)
        if runner is None:
            yield await self.show(report.id)
            return
        async for change in runner.changes():
            yield change

    # --- for other agents

    async def serve_peer(self, connection: PeerConnection) -> None:
        """Serve another agent's connection for one move; returns when it ends."""
        try:
            first_frame, hello = await first_hello(connection, self._config.waits.peer_connect_s)
            own_role = TARGET if hello.role == SOURCE else SOURCE
            runner = self._open.find(hello.move_id, own_role)
            other = None
            if runner is not None:
                other = runner.state.target if own_role == SOURCE else runner.state.source
            if hello.host != connection.peer_name or other not in (None, connection.peer_name):
                text = f"{connection.peer_name} spoke for {hello.host} in a move of {other or hello.host}"
                raise PeerBroke("protocol-order", text, host=connection.peer_name)
        except KvmhvError as error:
            log.warning("connection refused", peer=connection.peer_name, error=str(error))
            await connection.close()
            return
        if runner is not None and runner.link is not None:
            await runner.link.serve(connection, first_frame)
            return
        written: Written = []
        visit = Visit(
            connection,
            hello,
            self._config.name,
            self._clock,
            self._config.waits.peer_connect_s,
            past_moves.ended(self._journal.reports(), hello.move_id, connection.peer_name),
            lambda message: self._answer(connection, hello.move_id, message, written),
            lambda offer, link: self._accept(connection, hello, offer, link),
        )
        try:
            await visit.serve(first_frame)
        finally:
            self._sharing.forget_later(tuple(written))

    async def receive_file(self, peer_name: str, move_id: str, name: str, chunks: AsyncIterator[bytes]) -> None:
        """Keep a kernel file of an incoming VM. Raises as KernelFiles.keep()."""
        await self._vms.kernels.keep(self._open.receiving(move_id, peer_name), name, chunks)

    async def take_file(self, peer_name: str, move_id: str, name: str) -> bool:
        """Take a kernel file of an incoming VM from what this host has. Raises as KernelFiles.take()."""
        return await self._vms.kernels.take(self._open.receiving(move_id, peer_name), name)

    # --- as target

    async def _answer(self, connection: PeerConnection, move_id: str, message: Enquire, written: Written) -> Answer:
        written.extend(await self._sharing.prove(message.vm, message.nonces, connection.peer_name))
        with_storage = message.request.include_storage and bool(message.vm.disks)
        refusal = self._admit_in(connection, move_id, with_storage=with_storage)
        if refusal is None and message.request.queue_s is not None:
            self._open.promise(move_id, out=False, with_storage=with_storage, for_s=self._config.waits.slot_kept_s)
        inventory = await self._inventories.make(
            promised_bytes=self._open.promised_bytes(),
            refusal=refusal,
            arriving=message.vm if message.vm.runtime else None,
            with_storage=message.request.include_storage,
            bases=message.bases,
        )
        return Answer(inventory=inventory, proofs=tuple(written))

    async def _accept(self, connection: PeerConnection, hello: Hello, offer: Offer, link: Link) -> Runner | None:
        """Let an offer in, or raise why not; nothing is allocated before. None: it has come already, another way."""
        usable = await self._inventories.migration_addresses()
        reports, peer = self._journal.reports(), connection.peer_name
        if self._open.find(hello.move_id, TARGET) or past_moves.ended(reports, hello.move_id, peer):
            return None
        refusal = self._admit_in(connection, hello.move_id, with_storage=bool(offer.plan.disk_copies))
        refusal = refusal or admission.admit_addresses(offer.plan, self._config.name, connection.peer_name, usable)
        vm = offer.plan.target_vm
        if refusal is not None:
            error = as_error(refusal)
            self._chronicle.refused("in", error, events.move_refused_in(connection.peer_name, vm.name, error))
            raise error
        if offer.epoch != vm.epoch:
            raise PeerBroke("protocol-order", "the offer's epoch is not the VM's", host=connection.peer_name)
        here = {known.id for known in self._vms.records.taken()} | {coming.id for coming in self._vms.claims.arriving()}
        if vm.id in here:
            raise CallerError("id-taken", f"{self._config.name} has this VM already", host=self._config.name)
        others = (*self._vms.defined(), *self._vms.claims.arriving())
        arriving_disks.check(offer.plan, self._vms.disks, others, self._sharing.shown(peer))
        self._vms.claim(vm.name, hello.move_id, None if vm.runtime else vm)
        state = TargetState(
            move_id=hello.move_id,
            source=connection.peer_name,
            target=self._config.name,
            plan=offer.plan,
            psk_hex=offer.psk_hex,
            hold=TargetHold(epoch=offer.epoch),
            started_wall_s=self._clock.wall_s(),
            volatile_id=self._journal.volatile_id,
        )
        return self._open.arrive(state, link)

    def _admit_in(self, connection: PeerConnection, move_id: str, *, with_storage: bool) -> Refusal | None:
        return admission.admit_in(
            self._settings.current,
            self._config.name,
            self._open.load(but=move_id),
            source=connection.peer_name,
            source_ip=connection.peer_ip,
            with_storage=with_storage,
        )

    # --- as source

    async def _checked_vm(self, request: MoveRequest) -> Vm:
        vm = await self._host_vms.vm(request.vm)
        if request.target == self._config.name:
            text = f"{vm.name} is on {self._config.name} already"
            raise CallerError("move-to-itself", text, "name another host", host=self._config.name)
        self._peer.trusted(request.target)
        return vm

    def _experience(self, vm: Vm, request: MoveRequest, rule: Rule) -> past_moves.Experience:
        disks = request.include_storage and bool(vm.disks)
        return past_moves.experience(self._journal.reports(), request.target, disks=disks, rule=rule)

    def _admit_out(self, vm: Vm, request: MoveRequest, move_id: str = "") -> Refusal | None:
        with_storage = request.include_storage and bool(vm.disks)
        load = self._open.load(but=move_id)
        return admission.admit_out(self._settings.current, self._config.name, load, with_storage=with_storage)
