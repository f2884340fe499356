"""What of a VM can be changed while it is defined: nothing that its guest sees (`kvmhv vm set`)."""

import msgspec

from kvmhv.agent.vm_claims import Claims
from kvmhv.agent.vm_records import VmRecords
from kvmhv.core import probe
from kvmhv.model import Vm


class VmSettings:
    """Changes of VMs' records."""

    def __init__(self, records: VmRecords, claims: Claims) -> None:
        self._records = records
        self._claims = claims

    async def set_probe(self, name: str, text: str | None) -> Vm:
        """Set what the source of the VM's moves asks its guest (None: nothing); on disk when it returns.

        Raises CallerError `vm-unknown`, `probe-invalid`, `vm-busy`; Refused `vm-in-move`.
        """
        wanted = None if text is None else probe.parse(text)
        async with self._claims.operation(name, "set"):
            record = self._records.named(name)
            vm = msgspec.structs.replace(record.vm, probe=wanted)
            self._records.put(msgspec.structs.replace(record, vm=vm))
        return vm
