"""The durable record of each VM of this host: its definition, and whether it should be running.

A record that is damaged is its own VM's trouble: the others are listed and work as ever, and it keeps its name and id.
"""

from collections.abc import Iterable

import msgspec

from kvmhv.errors import CallerError, HostError
from kvmhv.model import Name, Struct, Vm, VmState, VmSummary
from kvmhv.ports import Records

KIND = "vm"


class VmRecord(Struct, frozen=True, kw_only=True):
    """What this host knows of a VM beside its QEMU process."""

    vm: Vm
    should_run: bool = False
    """It was started, and nobody has asked for its end: without a process it has crashed."""
    boot_id: str = ""
    """The host's boot in which it was started last."""
    started_at: float | None = None
    exit_reason: str | None = None
    """Why its last QEMU ended, None if somebody asked for it."""


class Identity(Struct, frozen=True, kw_only=True):
    """How a VM is called; where its name cannot be read its id stands for it."""

    id: str
    name: str


class _VmNamed(Struct, frozen=True, kw_only=True):
    name: Name


class _Named(Struct, frozen=True, kw_only=True):
    vm: _VmNamed


class VmRecords:
    """VM records over ports.Records."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def all(self) -> tuple[VmRecord, ...]:
        """Every VM of this host whose record can be read, by name."""
        return self.read()[0]

    def read(self) -> tuple[tuple[VmRecord, ...], tuple[Identity, ...]]:
        """Every VM of this host whose record can be read, by name, and the others; each is read once."""
        records, damaged = [], []
        for key, value in self._records.all(KIND):
            record = _read(value)
            if record is None:
                damaged.append(Identity(id=key, name=_name_in(value) or key))
            else:
                records.append(record)
        return tuple(sorted(records, key=lambda record: record.vm.name)), tuple(damaged)

    def taken(self) -> tuple[Identity, ...]:
        """Id and name of every VM of this host: nobody else may have them here."""
        records, damaged = self.read()
        return (*(Identity(id=record.vm.id, name=record.vm.name) for record in records), *damaged)

    def named(self, name: str) -> VmRecord:
        """Return a VM's record. Raises CallerError `vm-unknown`, HostError `vm-record-damaged`."""
        records, damaged = self.read()
        for record in records:
            if record.vm.name == name:
                return record
        for one in damaged:
            if name in (one.name, one.id):
                raise _damaged(one.id)
        shown = name if len(name) <= 64 else f"{name[:64]}..."
        raise CallerError(
            "vm-unknown", f"there is no VM {shown!r} on this host", "see `kvmhv vm list`", http_status=404
        )

    def get(self, vm_id: str) -> VmRecord | None:
        """Return a VM's record by the VM's id, None if it is not defined here."""
        value = self._records.get(KIND, vm_id)
        return None if value is None else _decode(vm_id, value)

    def put(self, record: VmRecord) -> None:
        """Keep a record; on disk when it returns."""
        self._records.put(KIND, record.vm.id, msgspec.json.encode(record))

    def delete(self, vm_id: str) -> None:
        """Forget a VM; no error if it is not there."""
        self._records.delete(KIND, vm_id)


def damaged_rows(damaged: Iterable[Identity], host: str) -> tuple[VmSummary, ...]:
    """Return VMs whose record is damaged as `vm list` shows them."""
    return tuple(
        VmSummary(name=vm.name, id=vm.id, state=VmState.DAMAGED, host=host, memory_bytes=0, cpus=0) for vm in damaged
    )


def _decode(vm_id: str, value: bytes) -> VmRecord:
    record = _read(value)
    if record is None:
        raise _damaged(vm_id)
    return record


def _read(value: bytes) -> VmRecord | None:
    try:
        return msgspec.json.decode(value, type=VmRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _name_in(value: bytes) -> str | None:
    """Return the VM's name, if as much as that can be read."""
    try:
        return msgspec.json.decode(value, type=_Named).vm.name
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _damaged(vm_id: str) -> HostError:
    return HostError(
        "vm-record-damaged",
        f"the record of VM {vm_id} cannot be read",
        "if a newer kvmhv wrote it, install that again; else put state_dir back from a backup; see docs/errors.md",
    )
