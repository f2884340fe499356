"""What of a VM can be changed while it is defined (`kvmhv vm set`): what its guest sees, only while it is stopped."""

import msgspec

from kvmhv.agent.vm_claims import Claims
from kvmhv.agent.vm_records import VmRecords
from kvmhv.core import probe
from kvmhv.errors import CallerError
from kvmhv.model import Vm
from kvmhv.ports import Hypervisor


class VmSettings:
    """Changes of VMs' records."""

    def __init__(self, records: VmRecords, claims: Claims, hypervisor: Hypervisor) -> None:
        self._records = records
        self._claims = claims
        self._hypervisor = hypervisor

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

    async def set_free_page_reporting(self, name: str, on: bool) -> Vm:
        """Set whether a stopped VM's balloon has the feature from its next start on; on disk when it returns.

        Raises CallerError `vm-unknown`, `vm-running`, `vm-busy`; Refused `vm-in-move`.
        """
        async with self._claims.operation(name, "set"):
            record = self._records.named(name)
            if (await self._hypervisor.state(record.vm.id)).process:
                raise CallerError(
                    "vm-running",
                    f"VM {name} is running, and its guest knows what its balloon can do",
                    f"`kvmhv vm stop {name}` first",
                    http_status=409,
                )
            vm = msgspec.structs.replace(record.vm, free_page_reporting=on)
            self._records.put(msgspec.structs.replace(record, vm=vm))
        return vm
