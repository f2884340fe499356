"""The target's side of libvirt's own move. Blocking but for the images: each runs in a thread (connection.py)."""

import asyncio
import contextlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

from kvmhv.drivers.libvirt.definition import Needs, domain_of, needs_of, paths_of
from kvmhv.errors import HostError
from kvmhv.model import MIB, Accel, Finding, Severity, Vm


def findings(
    connection: Any, host: str, vm: Vm, copied: Collection[str], image_dirs: Collection[Path]
) -> tuple[Finding, ...]:
    """Return what on this host speaks against a domain that is to arrive with copies of these disks."""
    needs = needs_of(domain_of(vm).xml)
    found = (
        *_names(connection, vm),
        *_hypervisor(connection, vm, needs),
        *_networks(connection, needs),
        *_files(needs),
        *_room(vm, copied, image_dirs),
    )
    return tuple(msgspec.structs.replace(one, host=host, text=f"{host}: {one.text}") for one in found)


def _against(id_: str, about: str, text: str, todo: str) -> Finding:
    return Finding(id=id_, severity=Severity.ERROR, object=about, host="", text=text, todo=todo)


def _names(connection: Any, vm: Vm) -> Iterator[Finding]:
    for domain in connection.listAllDomains():
        if domain.UUIDString() == vm.id:
            todo = f"if it is an old copy: `virsh undefine {vm.name}`"
            yield _against("id-taken", vm.name, "libvirt has a domain with this UUID already", todo)
        elif domain.name() == vm.name:
            yield _against(
                "name-taken", vm.name, f"libvirt has another domain named {vm.name}", "rename one of the two"
            )


def _hypervisor(connection: Any, vm: Vm, needs: Needs) -> Iterator[Finding]:
    root = ElementTree.fromstring(connection.getCapabilities())  # noqa: S314 - libvirt wrote it
    arch = next((one for one in root.iterfind("guest/arch") if one.get("name") == needs.arch), None)
    kind = "kvm" if needs.accel is Accel.KVM else "qemu"
    if arch is None or all(one.get("type") != kind for one in arch.iterfind("domain")):
        text = f"libvirt cannot run {needs.arch} guests with {kind}"
        yield _against("accelerator-differs", vm.name, text, "see `virsh capabilities` there")
        return
    machines = {one.text for one in arch.iter("machine")} | {one.get("canonical") for one in arch.iter("machine")}
    if needs.machine not in machines:
        text = f"its QEMU has no machine type {needs.machine}"
        yield _against("machine-missing", vm.name, text, "install a QEMU there that has it")
    elif needs.cpu_xml is not None and needs.accel is Accel.KVM:
        result = connection.compareHypervisorCPU(None, needs.arch, needs.machine, kind, needs.cpu_xml, 0)
        if result <= 0:
            text = "its CPU lacks features that the guest was given"
            todo = "give the domain a CPU model that both hosts have (`virsh hypervisor-cpu-baseline`)"
            yield _against("cpu-features-missing", vm.name, text, todo)


def _networks(connection: Any, needs: Needs) -> Iterator[Finding]:
    for bridge in needs.bridges:
        if not Path("/sys/class/net", bridge).exists():
            text = f"there is no bridge named {bridge}"
            yield _against("switch-missing", bridge, text, f"make a bridge named {bridge} there")
    active = (
        {network.name() for network in connection.listAllNetworks() if network.isActive()} if needs.networks else ()
    )
    for network in needs.networks:
        if network not in active:
            text = f"libvirt has no active network {network}"
            yield _against("switch-missing", network, text, f"`virsh net-start {network}` there")


def _files(needs: Needs) -> Iterator[Finding]:
    for path in needs.files:
        if not Path(path).exists():
            text = f"there is no {path}, which the domain reads"
            yield _against("file-missing", path, text, "put the same file there, or eject the medium")


def image_dirs(connection: Any, configured: Collection[str]) -> tuple[Path, ...]:
    """Return the directories in which images of arriving disks may be made."""
    found = [Path(one) for one in configured]
    with contextlib.suppress(Exception):  # a libvirt without the storage driver has no pools
        for pool in connection.listAllStoragePools():
            path = ElementTree.fromstring(pool.XMLDesc(0)).findtext("target/path")  # noqa: S314 - libvirt wrote it
            found += [Path(path)] if path else []
    return tuple(found)


def may_be_made(path: Path, dirs: Collection[Path]) -> bool:
    """Whether an image of an arriving disk may be made here: another host names the path, so not everywhere."""
    return path.is_absolute() and ".." not in path.parts and any(path.is_relative_to(one) for one in dirs)


def _room(vm: Vm, copied: Collection[str], image_dirs: Collection[Path]) -> Iterator[Finding]:
    needed: dict[Path, int] = {}
    for path, size_bytes in _images(vm, copied):
        directory = path.parent
        if not may_be_made(path, image_dirs):
            text = f"{directory} is no place for images of arriving disks"
            todo = "make it a storage pool of libvirt there, or name it in libvirt.image_dirs of agent.toml"
            yield _against("image-dir-unknown", str(path), text, todo)
        elif not directory.is_dir():
            yield _against("location-missing", str(path), f"there is no directory {directory}", "make it there")
        elif path.exists():
            text = f"there is a file {path} already, where a disk would be copied to"
            yield _against("file-exists", str(path), text, "remove it there if it is an old copy")
        else:
            needed[directory] = needed.get(directory, 0) + size_bytes
    for directory, size_bytes in needed.items():
        there = os.statvfs(directory)
        free = there.f_bavail * there.f_frsize
        if size_bytes > free:
            text = f"{directory} has {free // MIB} MiB free, the disks may need {size_bytes // MIB} MiB"
            yield _against("disk-space-short", str(directory), text, "free space there")


def _images(vm: Vm, names: Collection[str]) -> list[tuple[Path, int]]:
    return [(path_of(vm, disk.name), disk.size_bytes) for disk in vm.disks if disk.name in names]


def path_of(vm: Vm, name: str) -> Path:
    """Return the file of a disk's top layer; it is the same on every host. Raises HostError `libvirt-xml`."""
    chain = paths_of(domain_of(vm).xml).get(name, ())
    if not chain:
        raise HostError("libvirt-xml", f"the definition of {vm.name} has no disk {name}", "see `virsh dumpxml`")
    return Path(chain[0])


async def make_images(vm: Vm, names: Collection[str], image_dirs: Collection[Path], timeout_s: float) -> None:
    """Make the empty images of these disks; all or nothing, never over a file."""
    made: list[Path] = []
    try:
        for disk in vm.disks:
            if disk.name in names:
                path = path_of(vm, disk.name)
                if not may_be_made(path, image_dirs):
                    text = f"{path.parent} is no place for images of arriving disks"
                    raise HostError("image-dir-unknown", text, "name it in libvirt.image_dirs of agent.toml")
                if path.exists():
                    raise HostError("file-exists", f"there is a file {path} already", "remove it if it is an old copy")
                made.append(path)
                await _make(path, disk.layers[0].format.value, disk.size_bytes, timeout_s)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise


async def _make(path: Path, kind: str, size_bytes: int, timeout_s: float) -> None:
    arguments = ("create", "-q", "-f", kind, str(path), str(size_bytes))
    process = await asyncio.create_subprocess_exec("qemu-img", *arguments, stderr=asyncio.subprocess.PIPE)
    try:
        async with asyncio.timeout(timeout_s):
            _, said = await process.communicate()
    except TimeoutError:
        process.kill()
        raise HostError("storage", f"{path}: qemu-img did not end in time", "does the file system answer?") from None
    if process.returncode:
        raise HostError("storage", f"{path}: {said.decode(errors='replace').strip()}", "see the directory there")


def used_paths(connection: Any) -> frozenset[str]:
    """Return the images that domains here use."""
    used: set[str] = set()
    for domain in connection.listAllDomains():
        with contextlib.suppress(Exception):  # a domain that goes just now uses nothing
            used.update(path for chain in paths_of(domain.XMLDesc(0)).values() for path in chain)
    return frozenset(used)


def remove_images(vm: Vm, names: Collection[str], used: frozenset[str]) -> tuple[str, ...]:
    """Delete the images of these disks; returns those that stay because a domain uses them."""
    stay = []
    for path, _ in _images(vm, names):
        if str(path) in used:
            stay.append(str(path))
        else:
            path.unlink(missing_ok=True)
    return tuple(stay)


def adopt(domain: Any, vm: Vm) -> None:
    """Let the domain start with this host if it did with the source."""
    if domain_of(vm).persistent and domain_of(vm).autostart:
        domain.setAutostart(1)


def forget(library: Any, domain: Any) -> None:
    """End a copy and its definition; the firmware's variables go with it, its disks stay."""
    if domain.isActive():
        domain.destroy()
    with contextlib.suppress(library.libvirtError):  # a transient domain is gone already
        domain.undefineFlags(library.VIR_DOMAIN_UNDEFINE_NVRAM | library.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)
