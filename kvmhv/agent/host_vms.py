"""All VMs of this host: kvmhv's own (vms.py), and those that another program runs (ports.Runtime), by one set of verbs.

A name means the own VM first; a VM of the other program can be named by its id too. What only kvmhv's own VMs have
(creation, removal, the serial console) is said to be the other program's work.
"""

import re
from pathlib import Path

import msgspec

from kvmhv.agent.vm_records import damaged_rows
from kvmhv.agent.vms import Vms
from kvmhv.config import Config
from kvmhv.drivers.storage.storage import Storage
from kvmhv.errors import CallerError
from kvmhv.model import VM_NAME_PATTERN, Disk, Layer, Location, Vm, VmDetails, VmSpec, VmState, VmSummary
from kvmhv.ports import Runtime


class HostVms:
    """What the API and moves know of VMs."""

    def __init__(self, config: Config, own: Vms, runtime: Runtime, storage: Storage) -> None:
        self._config = config
        self.own = own
        self.runtime = runtime
        self._storage = storage

    # --- for operators

    async def create(self, spec: VmSpec) -> VmDetails:
        """Define a VM of kvmhv's own, as Vms.create does. Raises CallerError `vm-exists` for a runtime's name too."""
        if any(vm.name == spec.name for vm in self.runtime.vms()):
            text = f"{self.runtime.name} has a VM {spec.name} here"
            raise CallerError("vm-exists", text, "choose another name", http_status=409)
        return await self.own.create(spec)

    async def start(self, name: str, *, take_over: bool = False) -> VmDetails:
        """Start a VM; no error if it runs. Raises as Vms.start, HostError `libvirt`, `libvirt-silent`."""
        other = self._other(name)
        if other is None:
            return await self.own.start(name, take_over=take_over)
        async with self.own.claims.operation(other.name, "start"):
            await self.runtime.start(other.id)
        return await self._details(other)

    async def stop(self, name: str, *, force: bool, timeout_s: float | None) -> VmDetails:
        """Stop a VM: by its power button, then by force. No error if it is not running. Raises as start()."""
        other = self._other(name)
        if other is None:
            return await self.own.stop(name, force=force, timeout_s=timeout_s)
        async with self.own.claims.operation(other.name, "stop"):
            grace_s = self._config.limits.stop_grace_s if timeout_s is None else timeout_s
            if (await self.runtime.state(other.id)).process and not force and grace_s > 0:
                await self.runtime.power_button(other.id)
                await self.runtime.wait_off(other.id, grace_s)
            await self.runtime.kill(other.id)
        return await self._details(other)

    async def remove(self, name: str, *, keep_disks: bool) -> None:
        """Remove a stopped VM of kvmhv's own. Raises as Vms.remove; CallerError `vm-of-runtime`."""
        self._own_only(name, "undefine it there")
        await self.own.remove(name, keep_disks=keep_disks)

    async def list(self) -> tuple[VmSummary, ...]:
        """Return every VM by name, those too whose record is damaged."""
        damaged = damaged_rows(self.own.records.read()[1], self._config.name)
        found = (*await self.own.list(), *damaged, *self.runtime.vms())
        return tuple(sorted(found, key=lambda vm: (vm.name, vm.runtime)))

    async def show(self, name: str) -> VmDetails:
        """Return one VM. Raises CallerError `vm-unknown`, HostError `libvirt-silent`."""
        other = self._other(name)
        return await self.own.show(name) if other is None else await self._details(other)

    async def console_socket(self, name: str) -> Path:
        """Return the UNIX socket of a running VM's serial console. Raises as Vms does; CallerError `vm-of-runtime`."""
        self._own_only(name, "use its own console")
        return await self.own.console_socket(name)

    # --- for moves

    async def vm(self, name: str) -> Vm:
        """Return a VM's definition as it is now. Raises CallerError `vm-unknown`, HostError `libvirt-silent`."""
        other = self._other(name)
        if other is None:
            return self.own.vm(name)
        if re.fullmatch(VM_NAME_PATTERN, other.name) is None:
            text = f"the name {other.name!r} cannot be a VM's for kvmhv"
            todo = "letters, digits, dot, underscore and dash, 63 at most: rename it"
            raise CallerError("name-invalid", text, todo)
        return _placed(await self.runtime.vm(other.id), await self._storage.locations())

    def own_vm(self, name: str, todo: str) -> Vm:
        """Return a VM of kvmhv's own. Raises CallerError `vm-unknown`, `vm-of-runtime` with `todo`."""
        self._own_only(name, todo)
        return self.own.vm(name)

    # ---

    def _other(self, name: str) -> VmSummary | None:
        if any(vm.name == name for vm in self.own.defined()):
            return None
        return next((vm for vm in self.runtime.vms() if name in (vm.name, vm.id)), None)

    def _own_only(self, name: str, todo: str) -> None:
        if self._other(name) is not None:
            text = f"{name} belongs to {self.runtime.name}"
            raise CallerError("vm-of-runtime", text, f"{todo} ({self.runtime.name}'s tools)", http_status=409)

    async def _details(self, other: VmSummary) -> VmDetails:
        vm = _placed(await self.runtime.vm(other.id), await self._storage.locations())
        state = await self.runtime.state(other.id)
        return VmDetails(
            vm=vm,
            state=VmState(state.status),
            host=self._config.name,
            pid=state.pid,
            accel=state.accel,
            qemu_version=state.qemu_version or None,
            started_at=None,
            move=self.own.claims.move_of(vm.name),
            console=None,
        )


def _placed(vm: Vm, locations: tuple[Location, ...]) -> Vm:
    """Return the VM with its disks in the host's locations, where they lie in one."""
    disks = tuple(_in_location(disk, locations) for disk in vm.disks)
    return msgspec.structs.replace(vm, disks=disks)


def _in_location(disk: Disk, locations: tuple[Location, ...]) -> Disk:
    return msgspec.structs.replace(disk, layers=tuple(_layer(layer, locations) for layer in disk.layers))


def _layer(layer: Layer, locations: tuple[Location, ...]) -> Layer:
    path = Path(layer.path)
    inside = [one for one in locations if one.path and path.is_relative_to(one.path)]
    if not inside:
        return layer
    deepest = max(inside, key=lambda one: len(Path(one.path).parts))
    return msgspec.structs.replace(layer, location=deepest.name, path=str(path.relative_to(deepest.path)))
