"""Storage moves as operators ask for them: planned, admitted, begun. How they run and end is the other moves' way."""

import uuid

import structlog

from kvmhv.agent import events
from kvmhv.agent.events import Events
from kvmhv.agent.host_vms import HostVms
from kvmhv.agent.open_moves import OpenMoves
from kvmhv.agent.settings import Settings
from kvmhv.config import Config
from kvmhv.core import admission, storage_plan
from kvmhv.core.storage_state import StorageState
from kvmhv.errors import HostError, KvmhvError, Refused
from kvmhv.model import Asked, MoveReport, StorageMoveRequest, Vm
from kvmhv.ports import Clock, Disks, Hypervisor, Journal

log = structlog.get_logger(__name__)


class StorageMoves:
    """The API calls it."""

    def __init__(
        self,
        *,
        config: Config,
        settings: Settings,
        vms: HostVms,
        hypervisor: Hypervisor,
        disks: Disks,
        journal: Journal,
        clock: Clock,
        open_moves: OpenMoves,
        log_of_events: Events,
    ) -> None:
        self._config = config
        self._settings = settings
        self._vms = vms
        self._hypervisor = hypervisor
        self._disks = disks
        self._journal = journal
        self._clock = clock
        self._open = open_moves
        self._events = log_of_events

    async def start(self, request: StorageMoveRequest, asked: Asked) -> MoveReport:
        """Begin to move a VM's disks; returns when it is admitted. Nothing is made before.

        Raises CallerError `vm-unknown`, `vm-of-runtime`, `vm-busy`, and as core/storage_plan.make; Refused
        `limit-reached`, `vm-in-move`; HostError `location-silent`, `location-full`, `qemu-hangs`. It is an event
        either way.
        """
        try:
            report = await self._start(request, asked)
        except KvmhvError as error:
            self._events.add(events.storage_move_refused(request.vm, request.location, asked, error))
            raise
        self._events.add(events.storage_move_asked(report, asked))
        return report

    async def _start(self, request: StorageMoveRequest, asked: Asked) -> MoveReport:
        vm = self._vms.own_vm(request.vm, "move its disks with `virsh blockcopy`")
        settings, host = self._settings.current, self._config.name
        refusal = admission.admit_storage(settings, host, self._open.load())
        if refusal is not None:
            todo = f"wait, or: kvmhv host set {refusal.setting}=..."
            raise Refused(refusal.code, refusal.text, todo, host=host)
        move_id = str(uuid.uuid4())
        self._vms.own.claim(vm.name, move_id)
        try:
            vm = self._vms.own.vm(vm.name)
            seen = await self._hypervisor.state(vm.id)
            if seen.process and not seen.answers:
                raise HostError("qemu-hangs", f"the QEMU of {vm.name} does not answer", "end the VM's QEMU by hand")
            used = await self._used_bytes(vm, request)
            target_vm, copies = storage_plan.make(vm, request, await self._disks.locations(), used)
            asked_for = request.bandwidth_bytes_per_s
            state = StorageState(
                move_id=move_id,
                host=host,
                vm=vm,
                target_vm=target_vm,
                copies=copies,
                running=seen.process,
                bandwidth_bytes_per_s=settings.bandwidth_bytes_per_s if asked_for is None else asked_for,
                timeouts=self._config.timeouts,
                started_wall_s=self._clock.wall_s(),
                volatile_id=self._journal.volatile_id,
                asked=asked,
                total_bytes=sum(copy.used_bytes for copy in copies),
            )
        except BaseException:
            self._vms.own.release(vm.name, move_id)
            raise
        log.info("storage move asked for", move=move_id, vm=vm.name, location=request.location, caller=str(asked))
        return self._open.move_storage(state).report()

    async def _used_bytes(self, vm: Vm, request: StorageMoveRequest) -> dict[str, int]:
        used = {}
        for disk in vm.disks:
            if not request.disks or disk.name in request.disks:
                used[disk.name] = sum([await self._disks.used_bytes(layer) for layer in disk.layers])
        return used
