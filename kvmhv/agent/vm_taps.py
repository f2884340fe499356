"""A VM's taps on this host."""

import hashlib

from kvmhv.model import Vm
from kvmhv.ports import Network


class VmTaps:
    """Makes and removes a VM's taps over ports.Network; can be repeated."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def names(self, vm: Vm) -> dict[str, str]:
        """Name of each nic's tap: `kv`, 10 digits that follow from the VM's id, the nic's slot (Linux allows 15)."""
        digest = hashlib.sha256(vm.id.encode()).hexdigest()[:10]
        return {nic.name: f"kv{digest}{nic.pci_slot:02x}" for nic in vm.nics}

    async def ensure(self, vm: Vm) -> dict[str, str]:
        """Make the VM's taps on their switches; after an error those that it made are gone again."""
        names = self.names(vm)
        there = await self._network.taps() if names else ()
        made: list[str] = []
        try:
            for nic in vm.nics:
                if names[nic.name] not in there:
                    made.append(names[nic.name])
                await self._network.add_tap(names[nic.name], nic.switch)
        except BaseException:
            for tap in made:
                await self._network.remove_tap(tap)
            raise
        return names

    async def drop(self, vm: Vm) -> None:
        """Remove the VM's taps; no error if they are gone."""
        for tap in self.names(vm).values():
            await self._network.remove_tap(tap)
