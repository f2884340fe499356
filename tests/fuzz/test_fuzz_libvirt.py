"""libvirt's XML of a domain, this host's or another one's: read, or `libvirt-xml`, in bounded time and memory."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhv.drivers.libvirt import arrival
from kvmhv.drivers.libvirt.definition import Domain, domain_of, needs_of, paths_of, vm_of
from kvmhv.errors import HostError
from kvmhv.messages import Enquire
from kvmhv.model import MIB, MoveRequest
from tests.fuzz import garble
from tests.test_libvirt_definition import VM, XML

SOON_S = 20.0
PARTS = re.split(r"(<[^>]*>|'[^']*')", XML)
PIECES = tuple(part for part in PARTS if part.strip())
TEXTS = (
    "'",
    "&amp;",
    "&#0;",
    "&x;",
    "<!-- -->",
    "<![CDATA[<disk/>]]>",
    "\x00",
    "\ud7ff",
    "\uff19",
    "1e3",
    *garble.TEXTS,
)


@st.composite
def documents(draw: st.DrawFn) -> str:
    """A domain with some of its parts replaced, left out, doubled or exchanged, or with spoilt bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(garble.spoilt(XML.encode())).decode(errors="replace")
    parts = list(PARTS)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(parts) - 1))
        other = draw(st.one_of(st.sampled_from(PIECES), st.sampled_from(TEXTS), st.text(max_size=10)))
        act = draw(st.sampled_from(("replace", "leave out", "double", "add")))
        parts[at] = {"replace": other, "leave out": "", "double": parts[at] * 2, "add": parts[at] + other}[act]
    return "".join(parts)


def _read(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except HostError as error:
        assert error.code == "libvirt-xml"
        assert error.message
        return None


def _look_at(xml: str) -> None:
    _read(lambda: needs_of(xml))
    for name, chain in (_read(lambda: paths_of(xml)) or {}).items():
        assert isinstance(name, str)
        assert all(chain)
    vm = _read(lambda: vm_of(Domain(xml=xml, persistent=True, autostart=False), {"vda": 4096}))
    if vm is None:
        return
    assert domain_of(vm).xml == xml
    for disk in vm.disks:
        assert _read(lambda disk=disk: arrival.path_of(vm, disk.name)) in (None, Path(disk.layers[0].path))
    asked = msgspec.json.encode(Enquire(vm=vm, request=MoveRequest(vm="web01", target="host2")))
    try:
        msgspec.json.decode(asked, type=Enquire)  # the border between two hosts
    except msgspec.ValidationError as error:
        assert str(error)


@given(documents())
@settings(max_examples=300 if settings.default.max_examples < 1000 else 4000)
def test_a_domain_is_read_or_refused(xml: str) -> None:
    _look_at(xml)


@given(st.one_of(garble.frames({"xml": XML, "persistent": True, "autostart": False}), st.text(max_size=30)))
@settings(max_examples=100)
def test_what_another_host_calls_a_definition_is_read_or_refused(definition: Any) -> None:
    text = definition.decode(errors="replace") if isinstance(definition, bytes) else definition
    vm = msgspec.structs.replace(VM, definition=text)
    _read(lambda: domain_of(vm))
    _read(lambda: arrival.path_of(vm, "vda"))


def _entities(levels: int) -> str:
    grown = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, levels))
    return f'<!DOCTYPE d [<!ENTITY a0 "laugh">{grown}]><domain><name>&a{levels - 1};</name></domain>'


HARMFUL = {
    "entities that grow": _entities(9),
    "few entities": _entities(2),
    "a file of the host": '<!DOCTYPE d [<!ENTITY a SYSTEM "file:///etc/passwd">]><domain><name>&a;</name></domain>',
    "deep": "<domain>" + "<a>" * 130_000 + "</a>" * 130_000 + "</domain>",
    "a deep CPU": "<domain><cpu><model/>" + "<a>" * 130_000 + "</a>" * 130_000 + "</cpu></domain>",
    "a deep chain": f"<domain><devices><disk><target dev='vda'/>{'<backingStore>' * 30_000}{'</backingStore>' * 30_000}"
    "</disk></devices></domain>",
    "a long number": f"<domain><memory>{'9' * 900_000}</memory></domain>",
    "many disks": f"<domain><devices>{'<disk><source file=q/></disk>' * 9000}</devices></domain>",
    "nothing": "",
}


@pytest.mark.parametrize("what", HARMFUL)
def test_what_means_harm_costs_little(what: str) -> None:
    assert len(HARMFUL[what]) <= MIB
    begun_s = time.monotonic()
    _look_at(HARMFUL[what])
    assert time.monotonic() - begun_s < SOON_S


@pytest.mark.parametrize("what", ["entities that grow", "few entities", "a file of the host"])
def test_entities_are_never_filled_in(what: str) -> None:
    with pytest.raises(HostError) as caught:
        needs_of(HARMFUL[what])
    assert caught.value.code == "libvirt-xml"
