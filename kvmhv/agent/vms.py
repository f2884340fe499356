"""The VMs of this host: their records, their QEMU processes, and what of both is shown.

The process is the truth of what runs; the record says what should run. Whatever fails midway leaves nothing: no tap, no
file, no record.
"""

import asyncio
import os
import time
import uuid
from collections.abc import Collection
from pathlib import Path

import msgspec

from kvmhv.agent.bases import Bases
from kvmhv.agent.images import Images
from kvmhv.agent.kernel_files import KernelFiles
from kvmhv.agent.owners import Owners
from kvmhv.agent.vm_claims import Claims
from kvmhv.agent.vm_disks import ImageDisks, VmDisks
from kvmhv.agent.vm_ends import VmEnds
from kvmhv.agent.vm_records import VmRecord, VmRecords
from kvmhv.agent.vm_settings import VmSettings
from kvmhv.agent.vm_taps import VmTaps
from kvmhv.config import Config
from kvmhv.core import vm_spec
from kvmhv.drivers.host import boot_id, cpu_count
from kvmhv.errors import CallerError, KvmhvError, Refused
from kvmhv.model import DirectKernel, Layer, Vm, VmDetails, VmSpec, VmState, VmSummary
from kvmhv.places import DiskPlace
from kvmhv.ports import Hypervisor, Network, Records, RunState

SHOWN = {"running": VmState.RUNNING, "inmigrate": VmState.INCOMING}


class Vms:
    """Create, start, stop, remove, show; and what moves need of a host's VMs."""

    def __init__(
        self,
        config: Config,
        records: Records,
        hypervisor: Hypervisor,
        disks: ImageDisks,
        network: Network,
        images: Images,
        owners: Owners | None,
        bases: Bases,
    ) -> None:
        self._config = config
        self._records = self.records = VmRecords(records)
        self._hypervisor = hypervisor
        self._locations = disks
        self._disks = self.disks = VmDisks(records, disks, images, owners, bases)
        self._network = network
        self._images = images
        self.kernels = KernelFiles(config.state_path, self._records, images)
        self._claims = self.claims = Claims()
        self.settings = VmSettings(self._records, self._claims, hypervisor)
        self._taps = VmTaps(network)
        self._ends = VmEnds(self._records, hypervisor, self._claims, self._taps, self._disks.let_go)

    # --- an agent's life

    async def recover(self) -> None:
        """After the agent's start, when the moves have claimed their VMs: bring records in line with what runs.

        A VM whose QEMU has ended meanwhile is recorded as crashed; half-made creates and uploads are undone.
        """
        await self._images.recover()
        for vm_id in await self._disks.recover():
            await self.kernels.remove(vm_id)
        known = await self._hypervisor.known()
        for record in self._records.all():
            if record.vm.id in known:
                self._disks.settle_owner(record.vm)
                if not record.should_run and not self._claims.move_of(record.vm.name):  # started, and not recorded
                    self._records.put(msgspec.structs.replace(record, should_run=True, exit_reason=None))
            else:
                await self._ends.settle(record.vm.id)

    async def close(self) -> None:
        """End what runs in the background; VMs run on."""
        await self._ends.close()

    # --- for operators

    async def create(self, spec: VmSpec) -> VmDetails:
        """Define a VM and make its disks; after any error nothing is left.

        Raises CallerError as core/vm_spec.check does, `disk-invalid`, `disk-in-use`, `disk-format-needed`,
        `image-unknown`; Refused `vm-limit`; HostError `file-exists`, `location-full`, `qemu-missing`.
        """
        vm_spec.check_name(spec.name)
        async with self._claims.operation(spec.name, "create"):
            defined = len(self._records.taken())
            if defined >= self._config.limits.vms:
                raise Refused("vm-limit", f"this host has {defined} VMs, its limit (limits.vms)", "remove one")
            if spec.image is not None:
                spec = vm_spec.with_image(spec, self._images.get(spec.image))
            facts = await self._facts()
            vm_spec.check(spec, facts)
            vm_id = str(uuid.uuid4())
            try:
                disks = await self._disks.make_from_spec(vm_id, spec)
                kernel = await self._kernel(vm_id, spec)
                vm = vm_spec.build(spec, vm_id, facts, disks, kernel)
                self._records.put(VmRecord(vm=vm))
            except BaseException:
                await self._undo_create(vm_id)
                raise
            self._disks.keep(vm_id)
        return await self.show(spec.name)

    async def start(self, name: str, *, take_over: bool = False) -> VmDetails:
        """Start a VM, or let one go on that stands still after a disk error; no error if it runs.

        After an error it is as it was, without taps. `take_over`: also if a host that is surely dead owns its disks.
        Raises CallerError `vm-unknown`, `vm-paused`; Refused as Owners.claim; HostError `qemu-start`, `disk-missing`.
        """
        async with self._claims.operation(name, "start"):
            record = self._records.named(name)
            state = await self._hypervisor.state(record.vm.id)
            if not state.process:
                await self._start(record, take_over=take_over)
            elif state.status == "io-error":  # QEMU itself stopped it; a move would have the claim
                await self._disks.claim(record.vm, take_over=take_over)
                await self._hypervisor.cont(record.vm.id)
            elif _shown(state) is not VmState.RUNNING:
                raise CallerError(
                    "vm-paused",
                    f"the QEMU of VM {name} does not run the guest: {state.status or 'it does not answer'}",
                    f"`kvmhv vm stop {name} --force`, then start it",
                    http_status=409,
                )
        return await self.show(name)

    async def stop(self, name: str, *, force: bool, timeout_s: float | None) -> VmDetails:
        """Press the power button, and end QEMU if the guest is not off in time (None: limits.stop_grace_s).

        `force`: end QEMU at once, also while another stop waits for the guest. `exit_reason` says which way it
        went. No error if the VM is not running.
        """
        if force and self._claims.operation_on(name) == "stop":
            await self._hypervisor.kill(self._records.named(name).vm.id)
            await self._claims.wait_idle(name)
            return await self.show(name)
        async with self._claims.operation(name, "stop"):
            record = self._records.named(name)
            state = await self._hypervisor.state(record.vm.id)
            if state.process:
                # first the record: from here on its end is no crash
                record = msgspec.structs.replace(record, should_run=False, exit_reason=None)
                self._records.put(record)
                grace_s = self._config.limits.stop_grace_s if timeout_s is None else timeout_s
                reason = await self._end(record.vm.id, state, 0.0 if force else grace_s)
                self._records.put(msgspec.structs.replace(record, exit_reason=reason))
            elif record.should_run:
                self._records.put(msgspec.structs.replace(record, should_run=False))
            self._ends.forget(record.vm.id)
            await self.drop_taps(record.vm)
            await self._disks.let_go(record.vm)
        return await self.show(name)

    async def remove(self, name: str, *, keep_disks: bool) -> None:
        """Forget a stopped VM with its kernel files, and delete its own disks unless they are to be kept.

        Raises CallerError `vm-running`; Refused as Owners.claim_to_remove. Can be repeated after an error.
        """
        async with self._claims.operation(name, "remove"):
            record = self._records.named(name)
            if (await self._hypervisor.state(record.vm.id)).process:
                raise CallerError(
                    "vm-running", f"VM {name} is running", f"`kvmhv vm stop {name}` first", http_status=409
                )
            await self._hypervisor.kill(record.vm.id)
            await self.drop_taps(record.vm)
            if not keep_disks:
                await self._disks.claim_to_remove(record.vm)
                await self._disks.remove(record.vm, None)
            await self.forget(record.vm.id)

    async def list(self) -> tuple[VmSummary, ...]:
        """Return every VM of this host by name, also those that are arriving."""
        shown = await asyncio.gather(*(self._details(record) for record in self._shown_records()))
        return tuple(_summary(one) for one in shown)

    async def show(self, name: str) -> VmDetails:
        """Return one VM. Raises CallerError `vm-unknown`."""
        for record in self._shown_records():
            if record.vm.name == name:
                return await self._details(record)
        return await self._details(self._records.named(name))  # raises

    async def console_socket(self, name: str) -> Path:
        """Return the UNIX socket of a running VM's serial console. Raises CallerError `vm-stopped`."""
        record = self._records.named(name)
        if not (await self._hypervisor.state(record.vm.id)).process:
            raise CallerError("vm-stopped", f"VM {name} is not running", f"`kvmhv vm start {name}`", http_status=409)
        return self._hypervisor.console_socket(record.vm.id)

    # --- for moves; all of these can be repeated

    def claim(self, name: str, move_id: str, arriving: Vm | None = None) -> None:
        """Give the VM's name to a move: until release, start, stop and remove are refused, and GONE is no crash.

        `arriving`: the VM that the move brings; it is shown as incoming until define(). Raises Refused `vm-in-move`
        if another move has it, CallerError `vm-busy` while an operation runs on it.
        """
        self._claims.claim(name, move_id, arriving)

    def release(self, name: str, move_id: str) -> None:
        """End the claim; if the VM's QEMU is gone by now without being asked, the VM is recorded as crashed."""
        self._claims.release(name, move_id)
        for record in self._records.all():
            if record.vm.name == name:
                self._ends.settle_soon(record.vm.id)

    async def define(self, vm: Vm, *, running: bool = True) -> None:
        """Make an arrived VM this host's own, on disk when it returns; the files made for it are its own then.

        Raises CallerError `vm-exists` if another VM has its name.
        """
        if any(other.name == vm.name and other.id != vm.id for other in self._records.taken()):
            raise CallerError("vm-exists", f"there is another VM {vm.name!r} here", "rename one", http_status=409)
        before = self._records.get(vm.id)
        started_at = before.started_at if before is not None and before.should_run else time.time()
        self._records.put(
            VmRecord(vm=vm, should_run=running, boot_id=boot_id(), started_at=started_at if running else None)
        )
        self._disks.keep(vm.id)

    async def forget(self, vm_id: str) -> None:
        """Drop the VM's record and its kernel files; its disks stay, so remove_disks() comes first."""
        await self.kernels.remove(vm_id)
        self._records.delete(vm_id)
        self._ends.forget(vm_id)

    def vm(self, name: str) -> Vm:
        """Return a VM's definition. Raises CallerError `vm-unknown`."""
        return self._records.named(name).vm

    def defined(self) -> tuple[Vm, ...]:
        """Every VM that is defined here."""
        return tuple(record.vm for record in self._records.all())

    def bases(self) -> tuple[tuple[Layer, int], ...]:
        """Return the lowest layer of each disk that has backing files, with its virtual size."""
        disks = (disk for vm in self.defined() for disk in vm.disks if len(disk.layers) > 1)
        return tuple((disk.layers[-1], disk.layers[-1].size_bytes or disk.size_bytes) for disk in disks)

    def disk_paths(self, vm: Vm) -> dict[str, tuple[DiskPlace, ...]]:
        """Where each disk's layers are, top first. Raises CallerError `location-unknown` or `path-invalid`."""
        return self._disks.places(vm)

    async def ensure_taps(self, vm: Vm) -> dict[str, str]:
        """Make the VM's taps on their switches; after an error those that it made are gone again."""
        return await self._taps.ensure(vm)

    async def drop_taps(self, vm: Vm) -> None:
        """Remove the VM's taps."""
        await self._taps.drop(vm)

    async def remove_disks(self, vm: Vm, names: Collection[str] | None = None) -> None:
        """Delete what VmDisks.make_empty made, or, of a defined VM, its own layers of these disks (None: of all)."""
        await self._disks.remove(vm, names)

    # ---

    async def _start(self, record: VmRecord, *, take_over: bool) -> None:
        vm = record.vm
        await self._disks.claim(vm, take_over=take_over)
        taps = await self.ensure_taps(vm)
        try:
            await self._hypervisor.start(vm, self.disk_paths(vm), taps, self.kernels.paths(vm))
            self._ends.forget(vm.id)
            self._records.put(
                VmRecord(vm=vm, should_run=True, boot_id=boot_id(), started_at=time.time(), exit_reason=None)
            )
        except BaseException:
            try:
                await self._hypervisor.kill(vm.id)
            finally:
                await self.drop_taps(vm)
            raise

    async def _end(self, vm_id: str, state: RunState, grace_s: float) -> str:
        """End the process, by the guest within the grace time if it can; returns how."""
        if grace_s > 0 and _shown(state) is VmState.RUNNING:
            try:
                await self._hypervisor.power_button(vm_id)
                if await self._hypervisor.wait_gone(vm_id, grace_s):
                    await self._hypervisor.kill(vm_id)  # it is gone; what it left in its directory goes too
                    return "stopped by the guest, on the power button"
                reason = f"stopped by force: the guest did not switch off within {grace_s:g} s of the power button"
            except KvmhvError as error:
                reason = f"stopped by force: {error}"
        else:
            reason = "stopped by force"
        await self._hypervisor.kill(vm_id)
        return reason

    async def _kernel(self, vm_id: str, spec: VmSpec) -> DirectKernel | None:
        kernel = None
        if spec.image is not None:
            kernel = await self._images.place_kernel(spec.image, self.kernels.directory(vm_id), spec.append)
        if kernel is None and spec.append is not None:
            raise CallerError("append-invalid", "there is no kernel to give a command line to", "use --image")
        return kernel

    async def _undo_create(self, vm_id: str) -> None:
        await self._disks.undo(vm_id)
        await self.kernels.remove(vm_id)

    async def _facts(self) -> vm_spec.HostFacts:
        qemu = await self._hypervisor.probe()
        vms = (*self.defined(), *self._claims.arriving())
        return vm_spec.HostFacts(
            host=self._config.name,
            cpus=cpu_count(),
            memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            machines=qemu.machines,
            cpu_models=tuple(qemu.cpu_models),
            switches=await self._network.switches(),
            locations=tuple(location.name for location in await self._locations.locations()),
            vm_names=(*(vm.name for vm in self._records.taken()), *self._claims.names()),
            macs=tuple(nic.mac for vm in vms for nic in vm.nics),
        )

    # --- what is shown

    def _shown_records(self) -> tuple[VmRecord, ...]:
        defined = self._records.all()
        ids = {record.vm.id for record in defined}
        arriving = (VmRecord(vm=vm) for vm in self._claims.arriving() if vm.id not in ids)
        return tuple(sorted((*defined, *arriving), key=lambda record: record.vm.name))

    async def _details(self, record: VmRecord) -> VmDetails:
        vm = record.vm
        state = await self._hypervisor.state(vm.id)
        reason = record.exit_reason
        if state.process:
            shown = _shown(state)
            reason = None if shown is VmState.RUNNING else state.status or "QEMU does not answer"
            operation = self._claims.operation_on(vm.name)
            shown = {"start": VmState.STARTING, "stop": VmState.STOPPING}.get(operation or "", shown)
        else:
            shown = self._without_process(record)
            if shown is VmState.CRASHED and reason is None:
                reason = self._ends.of(record).reason
        return VmDetails(
            vm=vm,
            state=shown,
            host=self._config.name,
            pid=state.pid,
            accel=state.accel,
            qemu_version=state.qemu_version or None,
            started_at=record.started_at if state.process else None,
            move=self._claims.move_of(vm.name),
            console=str(self._hypervisor.console_socket(vm.id)) if state.process else None,
            exit_reason=reason,
        )

    def _without_process(self, record: VmRecord) -> VmState:
        if self._records.get(record.vm.id) is None:
            return VmState.INCOMING
        if self._claims.operation_on(record.vm.name) == "start":
            return VmState.STARTING
        return VmState.CRASHED if record.should_run and not self._ends.of(record).guest_off else VmState.STOPPED


def _summary(one: VmDetails) -> VmSummary:
    vm = one.vm
    return VmSummary(name=vm.name, id=vm.id, state=one.state, host=one.host, memory_bytes=vm.memory_bytes, cpus=vm.cpus)


def _shown(state: RunState) -> VmState:
    return SHOWN.get(state.status, VmState.PAUSED)
