"""What a storage move will do: which disks go, and where each of their layers will lie.

A disk keeps its chain, as in a move to another host: every layer is copied, the VM's own in its directory at the new
place. A LUN holds one image, so a disk with backing files cannot go to one.
"""

import msgspec

from kvmhv.core import plan
from kvmhv.errors import CallerError, HostError
from kvmhv.model import Disk, DiskCopy, Layer, Location, LocationKind, StorageMoveRequest, Vm


def make(
    vm: Vm, request: StorageMoveRequest, locations: tuple[Location, ...], used_bytes: dict[str, int]
) -> tuple[Vm, tuple[DiskCopy, ...]]:
    """Return the VM as it will be defined, and each disk's way. `used_bytes`: allocated bytes by disk.

    Raises CallerError `disk-unknown`, `location-unknown`, `disk-there`, `disk-spec-invalid`, `disk-chain`; HostError
    `location-silent`, `location-full`.
    """
    location = _location(request.location, locations)
    going = _going(vm, request, location)
    if request.lun is not None and (not _has_luns(location) or len(going) > 1):
        raise CallerError("disk-spec-invalid", "--lun goes with one disk and a location of kind iscsi", "name the disk")
    copies = []
    for disk in going:
        layers = _on_lun(disk, location, request) if _has_luns(location) else plan.own_layers(vm, disk, location.name)
        copy = DiskCopy(
            disk=disk.name,
            size_bytes=disk.size_bytes,
            used_bytes=used_bytes.get(disk.name, 0),
            source_layers=disk.layers,
            target_layers=layers,
        )
        copies.append(copy)
    needed = sum(copy.used_bytes for copy in copies)
    if not _has_luns(location) and needed > location.free_bytes:
        text = f"location {location.name!r} has {location.free_bytes} bytes free, the disks hold {needed}"
        raise HostError("location-full", text, "make room, or choose another location")
    moved = {copy.disk: copy.target_layers for copy in copies}
    disks = tuple(msgspec.structs.replace(disk, layers=moved.get(disk.name, disk.layers)) for disk in vm.disks)
    return msgspec.structs.replace(vm, disks=disks), tuple(copies)


def _location(name: str, locations: tuple[Location, ...]) -> Location:
    for location in locations:
        if location.name == name:
            if location.silent:
                text = f"location {name!r} does not answer"
                raise HostError("location-silent", text, "is its server up, and the network to it?")
            return location
    known = ", ".join(location.name for location in locations)
    raise CallerError("location-unknown", f"this host has no location {name!r}", f"it has: {known}", http_status=404)


def _has_luns(location: Location) -> bool:
    return location.kind == LocationKind.ISCSI


def _going(vm: Vm, request: StorageMoveRequest, location: Location) -> list[Disk]:
    unknown = sorted(set(request.disks) - {disk.name for disk in vm.disks})
    if unknown or not vm.disks:
        text = f"{vm.name} has no {', '.join(unknown) or 'disk'}"
        todo = f"it has: {', '.join(disk.name for disk in vm.disks)}" if vm.disks else "there is nothing to move"
        raise CallerError("disk-unknown", text, todo, http_status=404)
    asked = [disk for disk in vm.disks if not request.disks or disk.name in request.disks]
    there = [disk.name for disk in asked if _is_there(disk, location, request)]
    going = [disk for disk in asked if disk.name not in there]
    if not going or (request.disks and there):
        text = f"{', '.join(there)} of {vm.name} on location {location.name!r} already"
        raise CallerError("disk-there", text, "see `kvmhv vm show`", http_status=409)
    return going


def _is_there(disk: Disk, location: Location, request: StorageMoveRequest) -> bool:
    top = disk.layers[0]
    return top.location == location.name and (request.lun is None or top.path == str(request.lun))


def _on_lun(disk: Disk, location: Location, request: StorageMoveRequest) -> tuple[Layer, ...]:
    if request.lun is None:
        text = f"location {location.name!r} is an iSCSI target: its disks are LUNs"
        raise CallerError("disk-spec-invalid", text, "say which: --disk disk0 --lun 2")
    if len(disk.layers) > 1:
        text = f"{disk.name} has {len(disk.layers)} layers, and a LUN holds one image"
        raise CallerError("disk-chain", text, "copy it into one image first, or choose a location of another kind")
    return (msgspec.structs.replace(disk.layers[0], location=location.name, path=str(request.lun)),)
