"""Can a VM that another program runs (libvirt) go there? Its own findings at the target, and kvmhv's where they apply.

Each finding has a stable id; docs/errors.md has a paragraph for each.
"""

from collections.abc import Iterator

from kvmhv.core import checks, checks_post_copy
from kvmhv.core.blackout import THROTTLE
from kvmhv.core.performance import COMPRESSION
from kvmhv.model import OUTSIDE, Disk, Finding, Inventory, MoveRequest, Severity, Vm


def check(vm: Vm, request: MoveRequest, source: Inventory, target: Inventory) -> tuple[Finding, ...]:
    """Return all findings, errors first."""
    there = target.runtimes.get(vm.runtime)
    found = [
        *checks.guest(vm, source),
        *_runtimes(vm, source, target),
        *(there.findings if there else ()),
        *checks.memory(vm, target),
        *(finding for disk in vm.disks for finding in _disk(vm, disk, request, source, target)),
        *checks.channels(source, target),
        *_performance(vm, request, source),
        *_limit(vm, request, source),
        *checks_post_copy.findings(vm, request, source, target),
    ]
    return tuple(sorted(found, key=lambda finding: finding.severity != Severity.ERROR))


def _runtimes(vm: Vm, source: Inventory, target: Inventory) -> Iterator[Finding]:
    here, there = source.runtimes.get(vm.runtime), target.runtimes.get(vm.runtime)
    if there is None:
        yield _error(
            "runtime-missing",
            vm.name,
            target.host,
            f"{vm.runtime} runs {vm.name}, and on {target.host} there is none that kvmhv can reach",
            f"see kvmhv doctor on {target.host}",
        )
    elif here is not None and not (here.encrypts and there.encrypts):
        plain = target if here.encrypts else source
        yield _warning(
            "not-encrypted",
            vm.name,
            plain.host,
            f"the memory of {vm.name} will travel unencrypted: {vm.runtime} on {plain.host} has no certificates for it",
            "see docs/libvirt.md for the certificates",
        )


def _disk(vm: Vm, disk: Disk, request: MoveRequest, source: Inventory, target: Inventory) -> Iterator[Finding]:
    where = disk.layers[0].location
    if request.storage is not None:
        yield _error(
            "storage-fixed",
            disk.name,
            source.host,
            f"{vm.runtime}'s definition of {vm.name} names the path of {disk.name}: it cannot go to another place",
            "leave --storage out",
        )
    elif not checks.moves(disk, source, target, request):
        paths = {one.path for host in (source, target) for one in host.locations if one.name == where}
        if len(paths) > 1:
            yield _error(
                "location-elsewhere",
                disk.name,
                target.host,
                f"location {where} is {' and '.join(sorted(paths))} on the two hosts, and {vm.runtime}'s definition of "
                f"{vm.name} names the path of {disk.name}",
                "mount it at the same path on both",
            )
    elif not request.include_storage:
        yield _error(
            "disk-local",
            disk.name,
            source.host,
            f"{disk.name} of {vm.name} is not known to be on storage that both hosts share ({_path(disk)})",
            "move it too (--include-storage); or make its directory a shared location of both (kvmhv storage add)",
        )
    elif len(disk.layers) > 1:
        yield _error(
            "chain-not-copied",
            disk.name,
            source.host,
            f"{disk.name} of {vm.name} has a backing file, and {vm.runtime} cannot copy a chain",
            f"flatten it (virsh blockpull {vm.name} {disk.name}), or put it on storage that both hosts share",
        )


def _path(disk: Disk) -> str:
    layer = disk.layers[0]
    return layer.path if layer.location == OUTSIDE else f"{layer.location}/{layer.path}"


def _performance(vm: Vm, request: MoveRequest, source: Inventory) -> Iterator[Finding]:
    if request.performance == COMPRESSION:
        yield _warning(
            "compression-not-used",
            "performance",
            source.host,
            f"the memory of {vm.name} travels uncompressed: kvmhv does not compress what {vm.runtime} sends",
            "nothing, if that is fine",
        )


def _limit(vm: Vm, request: MoveRequest, source: Inventory) -> Iterator[Finding]:
    if request.on_overrun == THROTTLE:
        yield _warning(
            "throttle-not-used",
            vm.name,
            source.host,
            f"{vm.name} is not slowed down: {vm.runtime} cannot begin that in the middle of its move. If its blackout "
            "would be too long, the move is taken back",
            "nothing, if that is fine",
        )


def _error(id_: str, about: str, host: str, text: str, todo: str) -> Finding:
    return Finding(id=id_, severity=Severity.ERROR, object=about, host=host, text=text, todo=todo)


def _warning(id_: str, about: str, host: str, text: str, todo: str) -> Finding:
    return Finding(id=id_, severity=Severity.WARNING, object=about, host=host, text=text, todo=todo)
