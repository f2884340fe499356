"""This host's inventory for the check of one VM's move, made fresh for each question."""

from functools import partial

import msgspec

from kvmhv import __version__
from kvmhv.agent.bases import Bases
from kvmhv.agent.host_vms import HostVms
from kvmhv.agent.settings import Settings
from kvmhv.config import Config, parse_networks
from kvmhv.core import addresses
from kvmhv.drivers import host
from kvmhv.errors import HostError
from kvmhv.model import Address, Inventory, Location, Refusal, Sha256, Vm, VmFacts
from kvmhv.ports import Disks, Hypervisor, MigrationWays, Network


class Inventories:
    """Asks the drivers and puts the answers together."""

    def __init__(
        self,
        config: Config,
        host_id: str,
        settings: Settings,
        vms: HostVms,
        hypervisor: Hypervisor,
        disks: Disks,
        network: Network,
        ways: MigrationWays,
        bases: Bases,
    ) -> None:
        self._config = config
        self._host_id = host_id
        self._settings = settings
        self._vms, self._runtime = vms.own, vms.runtime
        self._hypervisor = hypervisor
        self._disks = disks
        self._network = network
        self._ways = ways
        self._bases = bases

    async def make(
        self,
        *,
        promised_bytes: int = 0,
        refusal: Refusal | None = None,
        running: Vm | None = None,
        dirty_rate: bool = False,
        pages: bool = False,
        arriving: Vm | None = None,
        with_storage: bool = False,
        bases: tuple[Sha256, ...] = (),
    ) -> Inventory:
        """Return the inventory; `promised_bytes` of memory belong to VMs that are arriving, `running` is to leave.

        `dirty_rate`: wait until that of `running` is sampled; `pages`: see how far its memory shrinks. `arriving`: the
        VM of another program that is to come, `with_storage` with copies of its disks that are not shared here.
        `bases`: contents of the disks of a VM that is to come.
        """
        facts: VmFacts | None = None
        locations = await self._disks.locations()
        if running is not None:
            _check_answers(running, locations)
        if running is not None and running.runtime:
            facts = await self._runtime.facts(running)
        elif running is not None:
            facts = await self._hypervisor.facts(running, dirty_rate=dirty_rate, pages=pages)
            known = await self._bases.of(running, partial(self._hypervisor.has_open, running.id))
            facts = msgspec.structs.replace(facts, bases=known)
        copied = _not_shared(arriving, locations) if arriving is not None and with_storage else ()
        other = await self._runtime.info(arriving, copied)
        taken = self._vms.records.taken()
        return Inventory(
            host=self._config.name,
            host_id=self._host_id,
            boot_id=host.boot_id(),
            kvmhv_version=__version__,
            qemu=await self._hypervisor.probe(),
            cpu_vendor=host.cpu_vendor(),
            memory_available_bytes=max(0, host.memory_available_bytes() - promised_bytes),
            cpus=host.cpu_count(),
            locations=locations,
            switches=await self._network.switches(),
            vm_names=tuple(vm.name for vm in taken),
            vm_ids=tuple(vm.id for vm in taken),
            migration_addresses=await self.migration_addresses(),
            mptcp=await self._ways.possible(),
            rdma=host.rdma_devices(),
            refusal=refusal,
            facts_of_vm=facts,
            bases=await self._bases.there(bases),
            runtimes={self._runtime.name: other} if other is not None else {},
        )

    async def migration_addresses(self) -> tuple[Address, ...]:
        """Return this host's addresses that its settings let migration use now."""
        settings = self._settings.current
        return addresses.usable(
            await self._network.addresses(), parse_networks(settings.networks), settings.use_any_network
        )


def _not_shared(vm: Vm, locations: tuple[Location, ...]) -> tuple[str, ...]:
    """Return the disks that would be copied: those that lie where no other host can see them."""
    shared = {location.name for location in locations if location.shared_id is not None}
    return tuple(disk.name for disk in vm.disks if any(layer.location not in shared for layer in disk.layers))


def _check_answers(vm: Vm, locations: tuple[Location, ...]) -> None:
    """Raise HostError `location-silent`: QEMU, asked for its disks now, would wait for them, and its guest with it."""
    used = {layer.location for disk in vm.disks for layer in disk.layers}
    silent = [location.name for location in locations if location.silent and location.name in used]
    if silent:
        text = f"{', '.join(silent)} does not answer, and {vm.name} has disks there"
        raise HostError("location-silent", text, "is its server up, and the network to it?")
