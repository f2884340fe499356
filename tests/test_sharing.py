"""agent/sharing.py: what hosts write to prove that they share storage goes again, also when an agent dies over it."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest

from kvmhv.agent.sharing import PREFIX, TRIES, Sharing
from kvmhv.config import Waits
from kvmhv.drivers.database import Database
from kvmhv.drivers.storage.storage import Storage
from kvmhv.drivers.storage.volumes import DirectoryVolume
from kvmhv.errors import HostError
from kvmhv.messages import Nonce
from kvmhv.model import Disk, DiskFormat, Layer, Vm
from tests.sim import examples

LAYER = Layer(location="share", path="web01/disk0.raw", format=DiskFormat.RAW)
VM = Vm(
    id="id-1",
    name="web01",
    memory_bytes=1,
    cpus=1,
    disks=(Disk(name="disk0", size_bytes=1, layers=(LAYER,), pci_slot=8),),
)


class OneShare:
    """A storage with one directory that both hosts see; it answers or does not."""

    def __init__(self, root: Path) -> None:
        self._volume = DirectoryVolume(root, Waits())
        self.answers = True

    def volume(self, location: str) -> DirectoryVolume | None:
        return self._volume if location == "share" else None

    async def ask(self, location: str, question: Callable[[], object]) -> object:
        if not self.answers:
            raise HostError("location-silent", "it does not answer")
        return question()


class Host:
    """One host's side of the proof; `restart` is what a killed agent leaves to the next one."""

    def __init__(self, directory: Path, share: Path) -> None:
        self.storage = OneShare(share)
        self._database = Database(directory / "kvmhv.sqlite", directory / "volatile", 10)
        self.restart()

    def restart(self) -> None:
        self.sharing = Sharing(cast(Storage, self.storage), self._database, 30.0)

    def close(self) -> None:
        self._database.close()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    (tmp_path / "share").mkdir()
    return tmp_path / "share"


@pytest.fixture
def hosts(tmp_path: Path, share: Path) -> Iterator[tuple[Host, Host]]:
    pair = Host(tmp_path / "host1", share), Host(tmp_path / "host2", share)
    yield pair
    for host in pair:
        host.close()


def within(share: Path) -> list[Path]:
    return list(share.iterdir())


def precious_in(share: Path) -> Path:
    file = share / ".kvmhv-proof-of-somebody-else"
    file.write_text("precious")
    return file


async def swept(host: Host) -> None:
    """A new agent starts, and does what it has to."""
    host.restart()
    host.sharing.recover()
    for _ in range(10):  # in the background
        await asyncio.sleep(0)
    await host.sharing.close()


async def test_what_both_see_is_proven_and_nothing_is_left(hosts: tuple[Host, Host], share: Path) -> None:
    source, target = (host.sharing for host in hosts)
    challenge = await source.challenge(VM)
    proofs = await target.prove(VM, challenge.nonces, "host1")
    assert len(within(share)) == 2
    here = await source.conclude(examples.inventory("host1"), VM, challenge, proofs)
    assert (here.proven_shared, here.not_shared) == (("share",), {})
    await source.withdraw(challenge, proofs)
    assert within(share) == []
    target.forget_later(proofs)
    await target.close()
    for host in hosts:
        await swept(host)
    assert within(share) == []


async def test_agents_that_die_over_it_leave_nothing_beyond_their_next_start(
    hosts: tuple[Host, Host], share: Path
) -> None:
    source, target = hosts
    challenge = await source.sharing.challenge(VM)
    await target.sharing.prove(VM, challenge.nonces, "host1")
    precious = precious_in(share)
    assert len(within(share)) == 3
    target.storage.answers = False
    await swept(target)
    assert len(within(share)) == 3
    target.storage.answers = True
    await swept(target)
    assert len(within(share)) == 2
    await swept(source)
    assert within(share) == [precious]


async def test_a_nonce_whose_place_is_taken_is_written_to_another(
    hosts: tuple[Host, Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    volume = hosts[0].storage.volume("share")
    assert volume is not None
    swap, refused = volume.swap_record, []

    def full(name: str, old: bytes | None, new: bytes | None) -> bool:
        if len(refused) < TRIES - 1:
            refused.append(name)
            return False
        return swap(name, old, new)

    monkeypatch.setattr(volume, "swap_record", full)
    challenge = await hosts[0].sharing.challenge(VM)
    assert [nonce.name in refused for nonce in challenge.nonces] == [False]
    await hosts[0].sharing.withdraw(challenge)
    refused.clear()
    monkeypatch.setattr(volume, "swap_record", lambda *_swap: False)
    assert set((await hosts[0].sharing.challenge(VM)).failed) == {"share"}


async def test_a_location_is_shown_by_what_others_have_written_there(hosts: tuple[Host, Host], share: Path) -> None:
    source, target = (host.sharing for host in hosts)
    told = await target.prove(VM, (Nonce(location="share", name=f"{PREFIX}guess"),), "mallory")
    again = await target.prove(VM, (Nonce(location="share", name=told[0].name),), "mallory")
    assert again[0].read, "it is there"
    assert target.shown("mallory") == frozenset(), "it is the target's own"
    challenge = await source.challenge(VM)
    await target.prove(VM, challenge.nonces, "host1")
    assert (target.shown("host1"), target.shown("mallory")) == ({"share"}, frozenset())
    for proofs in (told, again):
        target.forget_later(proofs)
    await target.close()
