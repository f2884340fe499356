"""QEMUs that end without being asked: the guest that switches itself off, the crash, the end that no agent saw."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from kvmhv.agent.vm_claims import Claims
from kvmhv.agent.vm_records import VmRecord, VmRecords
from kvmhv.agent.vm_taps import VmTaps
from kvmhv.drivers.host import boot_id
from kvmhv.errors import CallerError, KvmhvError, Refused
from kvmhv.model import Struct, Vm
from kvmhv.ports import Hypervisor, QemuEvent

log = structlog.get_logger()


class End(Struct, frozen=True, kw_only=True):
    """Why a QEMU ended."""

    guest_off: bool
    """The guest switched itself off: no crash."""
    reason: str


class VmEnds:
    """Listens to the hypervisor, and records each end that nobody asked for."""

    def __init__(
        self,
        records: VmRecords,
        hypervisor: Hypervisor,
        claims: Claims,
        taps: VmTaps,
        let_go: Callable[[Vm], Awaitable[None]],
    ) -> None:
        """`let_go` gives a VM's shared disks up, so that any host may start it."""
        self._records = records
        self._hypervisor = hypervisor
        self._claims = claims
        self._taps = taps
        self._let_go = let_go
        self._said: dict[str, End] = {}
        """What the last events of a QEMU said, until it is recorded."""
        self._tasks: set[asyncio.Task[None]] = set()
        hypervisor.on_event(self._on_event)

    async def close(self) -> None:
        """End what runs in the background."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def of(self, record: VmRecord) -> End:
        """Why the VM's last QEMU ended, as far as it is known."""
        unseen = "its QEMU ended while no agent was there to see it"
        if record.boot_id != boot_id():
            unseen = "the host was restarted"
        return self._said.get(record.vm.id, End(guest_off=False, reason=unseen))

    def forget(self, vm_id: str) -> None:
        """Drop what was said of the VM's last end: it was asked for, or is over."""
        self._said.pop(vm_id, None)

    def settle_soon(self, vm_id: str) -> None:
        """Settle in the background, after what runs on the VM now."""
        task = asyncio.get_running_loop().create_task(self.settle(vm_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def settle(self, vm_id: str) -> None:
        """Record why a VM's process has ended and remove its taps; nothing if it runs or a move has it."""
        try:
            record = self._records.get(vm_id)
        except KvmhvError as error:  # damaged: nothing of it can be kept
            log.warning("vm end not recorded", vm=vm_id, reason=str(error))
            return
        if record is None:
            self.forget(vm_id)
            return
        name = record.vm.name
        if self._claims.move_of(name) is not None:
            return  # the move's release() comes here again
        try:
            await self._claims.wait_idle(name)
            async with self._claims.operation(name, "clean-up"):
                record = self._records.get(vm_id)
                if record is not None and not (await self._hypervisor.state(vm_id)).process:
                    await self._record_end(record)
        except (CallerError, Refused) as error:  # whoever works on it now looks at the process itself
            log.debug("vm end not recorded", vm=name, reason=str(error))
        except KvmhvError as error:
            log.warning("vm end not recorded", vm=name, reason=str(error))

    def _on_event(self, event: QemuEvent) -> None:
        if event.name == "GONE":
            self._said[event.vm_id] = _end(event.data)
            self.settle_soon(event.vm_id)

    async def _record_end(self, record: VmRecord) -> None:
        guest_off = False
        if record.should_run and record.exit_reason is None:
            end = self.of(record)
            guest_off = end.guest_off
            self._records.put(msgspec.structs.replace(record, should_run=not end.guest_off, exit_reason=end.reason))
            log.info("vm ended", vm=record.vm.name, crashed=not end.guest_off, reason=end.reason)
        self.forget(record.vm.id)
        await self._hypervisor.kill(record.vm.id)  # it is gone; what it left in its directory goes too
        await self._taps.drop(record.vm)
        if guest_off:
            await self._let_go(record.vm)


def _end(gone: dict[str, object]) -> End:
    """Read GONE: `reason` for people; `shutdown` is QEMU's last SHUTDOWN event."""
    shutdown = gone.get("shutdown")
    guest_off = isinstance(shutdown, dict) and shutdown.get("guest") is True
    return End(guest_off=guest_off, reason=str(gone.get("reason") or "its QEMU ended by itself"))
