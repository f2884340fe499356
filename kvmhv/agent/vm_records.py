"""The durable record of each VM of this host: its definition, and whether it should be running."""

import msgspec

from kvmhv.errors import CallerError, HostError
from kvmhv.model import Struct, Vm
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


class VmRecords:
    """VM records over ports.Records."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def all(self) -> tuple[VmRecord, ...]:
        """Every VM of this host, by name."""
        found = [_decode(key, value) for key, value in self._records.all(KIND)]
        return tuple(sorted(found, key=lambda record: record.vm.name))

    def named(self, name: str) -> VmRecord:
        """Return a VM's record. Raises CallerError `vm-unknown`."""
        for record in self.all():
            if record.vm.name == name:
                return record
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


def _decode(vm_id: str, value: bytes) -> VmRecord:
    try:
        return msgspec.json.decode(value, type=VmRecord)
    except msgspec.MsgspecError as error:
        raise HostError(
            "database", f"the record of VM {vm_id} cannot be read: {error}", "was it written by a newer kvmhv?"
        ) from error
