"""Which disks an offer may name. A trusted host does not choose freely what this host opens.

Disks that are copied are made here, and never over what is there (vm_disks). A disk that stays where it is has to lie
at locations that the source has shown to see as well (sharing), and beside it stands the record of this very move
(owners). No disk is another VM's, whatever is written anywhere.
"""

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from kvmhv.agent.vm_disks import VmDisks
from kvmhv.errors import KvmhvError, Refused
from kvmhv.model import Plan, Vm
from kvmhv.places import DiskPlace


def check(plan: Plan, disks: VmDisks, others: Iterable[Vm], shown: Collection[str]) -> None:
    """Target: let the disks of an offer in, or say why not; no storage is touched.

    `others`: the VMs of this host, also those that arrive; `shown`: the locations that the source has shown to see.
    Raises Refused `disk-in-use`, `not-shared`; CallerError `location-unknown`, `path-invalid`. Disks of another
    program's VM are that program's to open.
    """
    vm = plan.target_vm
    if vm.runtime:
        return
    taken = {place: (other.name, depth) for other in others for place, depth in _places(disks, other)}
    for place, depth in _placed(disks, vm):
        name, depth_there = taken.get(place, ("", 0))
        if name and (depth == 0 or depth_there == 0):
            raise Refused("disk-in-use", f"{place} belongs to the VM {name}", "copy the disks", http_status=409)
    copied = {copy.disk for copy in plan.disk_copies}
    for disk in vm.disks:
        for layer in disk.layers:
            if disk.name not in copied and layer.location not in shown:
                text = f"nothing proves that {disk.name} of {vm.name} ({layer.location}/{layer.path}) is the same here"
                raise Refused("not-shared", text, "move it again, or with its disks (--include-storage)")


def _places(disks: VmDisks, other: Vm) -> Iterator[tuple[DiskPlace, int]]:
    """As `_placed`, of a VM whose location may be gone."""
    with contextlib.suppress(KvmhvError):
        yield from _placed(disks, other)


def _placed(disks: VmDisks, vm: Vm) -> Iterator[tuple[DiskPlace, int]]:
    """Return each layer's place, spelt in one way, and how deep it lies."""
    for places in disks.places(vm).values():
        for depth, place in enumerate(places):
            yield Path(os.path.normpath(place)) if isinstance(place, Path) else place, depth
