"""What libvirt's XML says of a domain. Pure: text in, records out.

The text is libvirt's of this host, or comes with a move from another one, which may mean harm: what cannot be read is
an HostError `libvirt-xml`.
"""

import contextlib
import re
from collections.abc import Iterator
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import msgspec

from kvmhv.errors import HostError
from kvmhv.model import OUTSIDE, Accel, Disk, DiskFormat, Layer, Nic, Struct, Vm

NAME = "libvirt"
READ_ONLY_DEVICES = ("cdrom", "floppy")
UNITS = {"b": 1, "bytes": 1, "KB": 1000, "k": 1024, "KiB": 1024, "MB": 10**6, "M": 1 << 20, "MiB": 1 << 20}
UNITS |= {"GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TB": 10**12, "T": 1 << 40, "TiB": 1 << 40}


class Domain(Struct, frozen=True, kw_only=True):
    """What of a domain its XML does not say, beside the XML: the content of Vm.definition."""

    xml: str
    persistent: bool
    autostart: bool


def vm_of(domain: Domain, sizes: dict[str, int]) -> Vm:
    """Return the domain as kvmhv's core sees it. `sizes`: virtual size by target device (`vda`).

    Only disks that the guest writes are disks here: what is read only or shared is no host's own. Raises HostError
    `libvirt-xml`.
    """
    root = _root(domain.xml)
    with _understood():
        return _vm(root, domain, sizes)


def _vm(root: Element, domain: Domain, sizes: dict[str, int]) -> Vm:
    return Vm(
        id=_text(root, "uuid"),
        name=_text(root, "name"),
        memory_bytes=_bytes(root.find("memory")),
        cpus=int(_text(root, "vcpu") or 1),
        machine=_type(root).get("machine", ""),
        cpu=_text(root, "cpu/model") or _attribute(root, "cpu", "mode") or "default",
        disks=tuple(disk for one in _named(root).values() if (disk := _disk(one, sizes)) is not None),
        nics=tuple(_nic(number, one) for number, one in enumerate(root.iterfind("devices/interface[mac]"))),
        runtime=NAME,
        definition=msgspec.json.encode(domain).decode(),
    )


def domain_of(vm: Vm) -> Domain:
    """Return what vm_of kept. Raises HostError `libvirt-xml`."""
    with _understood():
        return msgspec.json.decode(vm.definition, type=Domain)


class Needs(Struct, frozen=True, kw_only=True):
    """What the host of a domain must have."""

    accel: Accel
    arch: str
    machine: str
    cpu_xml: str | None
    bridges: tuple[str, ...]
    networks: tuple[str, ...]
    files: tuple[str, ...]
    """Files that are read and do not travel: media, kernel, firmware."""
    host_devices: int
    """Devices of the host that were given to the guest: those cannot move."""


def needs_of(xml: str) -> Needs:
    """Return what the domain needs, as its live XML says. Raises HostError `libvirt-xml`."""
    root = _root(xml)
    cpu = root.find("cpu")
    disks = [disk for disk in root.iterfind("devices/disk") if _is_read_only(disk)]
    media = [path for disk in disks if (path := _attribute(disk, "source", "file"))]
    boot = [text for name in ("os/kernel", "os/initrd", "os/loader") if (text := _text(root, name))]
    sources = root.findall("devices/interface/source")
    return Needs(
        accel=Accel.KVM if root.get("type") == "kvm" else Accel.TCG,
        arch=_type(root).get("arch", ""),
        machine=_type(root).get("machine", ""),
        cpu_xml=_as_text(cpu) if cpu is not None and cpu.find("model") is not None else None,
        bridges=tuple(one.get("bridge", "") for one in sources if one.get("bridge") and not one.get("network")),
        networks=tuple(one.get("network", "") for one in sources if one.get("network")),
        files=tuple(media + boot),
        host_devices=len(root.findall("devices/hostdev")),
    )


def paths_of(xml: str) -> dict[str, tuple[str, ...]]:
    """Return the files of every disk, its chain from the top, by target device; read-only ones too.

    Raises HostError `libvirt-xml`.
    """
    root = _root(xml)
    with _understood():
        return {name: _chain(disk) for name, disk in _named(root).items()}


def _named(root: Element) -> dict[str, Element]:
    """Return the disks by target device. Raises ValueError if two have the same."""
    found: dict[str, Element] = {}
    for disk in root.iterfind("devices/disk"):
        name = _attribute(disk, "target", "dev") or ""
        if found.setdefault(name, disk) is not disk:
            raise ValueError(f"two disks are {name!r}")
    return found


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    """Raise HostError `libvirt-xml` for what is no domain."""
    try:
        yield
    except (ElementTree.ParseError, msgspec.MsgspecError, ValueError, KeyError, RecursionError) as error:
        text = f"what libvirt says of a domain cannot be read: {str(error)[:200]}"
        raise HostError("libvirt-xml", text, "see `virsh dumpxml`; is libvirt newer than kvmhv?") from error


def _root(xml: str) -> Element:
    with _understood():
        if "<!" in xml.replace("<!--", "").replace("<![CDATA[", ""):  # nothing that libvirt writes, and it can grow
            raise ValueError("it declares entities")
        return ElementTree.fromstring(xml)  # noqa: S314 - without entities


def _as_text(element: Element) -> str:
    with _understood():
        return ElementTree.tostring(element, encoding="unicode")


def _disk(disk: Element, sizes: dict[str, int]) -> Disk | None:
    name, chain = _attribute(disk, "target", "dev"), _chain(disk)
    if name is None or not chain or _is_read_only(disk):
        return None
    formats = [_format(disk.find("driver"), "type")]
    formats += [_format(one.find("format"), "type") for one in disk.iter("backingStore")]
    layers = [Layer(location=OUTSIDE, path=path, format=kind) for path, kind in zip(chain, formats, strict=False)]
    return Disk(name=name, size_bytes=sizes.get(name, 0), layers=tuple(layers), pci_slot=0)


def _is_read_only(disk: Element) -> bool:
    marked = disk.find("readonly") is not None or disk.find("shareable") is not None
    return marked or disk.get("device") in READ_ONLY_DEVICES


def _chain(disk: Element) -> tuple[str, ...]:
    """Return the disk's files, top first; empty for what is no file or block device (a network disk is shared)."""
    found = []
    for one in (disk, *disk.iter("backingStore")):
        path = _attribute(one, "source", "file") or _attribute(one, "source", "dev")
        if path:
            found.append(path)
    return tuple(found)


def _nic(number: int, interface: Element) -> Nic:
    source = interface.find("source")
    of = dict(source.attrib) if source is not None else {}
    switch = next((of[key] for key in ("network", "bridge", "dev") if key in of), interface.get("type", ""))
    switch = re.sub(r"[\s/,:=]", "-", switch)[:15]
    return Nic(name=f"nic{number}", switch=switch, mac=_attribute(interface, "mac", "address") or "", pci_slot=0)


def _format(element: Element | None, name: str) -> DiskFormat:
    return DiskFormat.QCOW2 if element is not None and element.get(name) == "qcow2" else DiskFormat.RAW


def _type(root: Element) -> Element:
    found = root.find("os/type")
    return found if found is not None else Element("type")


def _bytes(element: Element | None) -> int:
    return int(element.text or 0) * UNITS[element.get("unit", "KiB")] if element is not None else 0


def _text(root: Element, path: str) -> str:
    return (root.findtext(path) or "").strip()


def _attribute(root: Element, path: str, name: str) -> str | None:
    found = root.find(path)
    return found.get(name) if found is not None else None
