"""Proves, before a move, that both hosts see the same storage; a name and a server's address prove nothing.

The source writes a nonce at each location of the VM that other hosts may see, and asks. The target reads there what the
source has written, writes a nonce of its own beside it, and answers with both; the source reads that one. So each side
has read what the other had just written. The content of a nonce is never sent beside its name: who cannot read it
cannot answer. For LUNs each side also says what the LUN calls itself (VPD page 0x83): numbers may mean different LUNs.
"""

import asyncio
import contextlib
import hashlib
import secrets
import time
from collections.abc import Coroutine
from functools import partial

import msgspec

from kvmhv.drivers.storage.storage import Storage
from kvmhv.drivers.storage.volumes import Volume
from kvmhv.errors import HostError, KvmhvError
from kvmhv.messages import Nonce, Proof
from kvmhv.model import Inventory, Struct, Vm
from kvmhv.ports import Records

KIND = "proof"
PREFIX = ".kvmhv-proof-"
LOCATIONS_MAX = 16
TRIES = 5
SHOWN_S = 600.0
"""An offer follows what the source has shown within so long: the questions of one setup lie between."""
SHOWN_MAX = 1000


class Challenge(Struct, frozen=True, kw_only=True):
    """What the source has written: content by location."""

    nonces: tuple[Nonce, ...] = ()
    contents: dict[str, bytes] = msgspec.field(default_factory=dict)
    failed: dict[str, str] = msgspec.field(default_factory=dict)


class Sharing:
    """Both sides of the proof, on one host."""

    def __init__(self, storage: Storage, records: Records, kept_s: float) -> None:
        """`kept_s`: so long the source may take to read what the target has written; then the target removes it."""
        self._storage = storage
        self._records = records
        self._kept_s = kept_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._own: dict[str, bytes] = {}
        """What this host has written and not removed yet."""
        self._shown: dict[tuple[str, str], float] = {}
        """When a host has shown to see a location."""

    def locations(self, vm: Vm) -> tuple[str, ...]:
        """Return the VM's locations that other hosts may see."""
        used = {layer.location for disk in vm.disks for layer in disk.layers}
        return tuple(sorted(name for name in used if self._storage.volume(name) is not None))[:LOCATIONS_MAX]

    def recover(self) -> None:
        """After the agent's start: remove, in the background, the nonces that an earlier agent has left.

        What cannot be removed (its server is away) is tried again at the next start.
        """
        left = [key.split("/", 1) for key, _ in self._records.all(KIND)]
        if left:
            self._spawn(self._sweep([(location, name) for location, name in left]))

    async def _sweep(self, names: list[tuple[str, str]]) -> None:
        for location, name in names:
            await self._remove(location, name)

    # --- source

    async def challenge(self, vm: Vm) -> Challenge:
        """Write a nonce at each of the VM's locations; one that cannot be written is kept as failed."""
        nonces, contents, failed = [], {}, {}
        for location in self.locations(vm):
            try:
                name, content = await self._write(location)
            except KvmhvError as error:
                failed[location] = error.message
            else:
                nonces.append(Nonce(location=location, name=name))
                contents[location] = content
        return Challenge(nonces=tuple(nonces), contents=contents, failed=failed)

    async def conclude(self, here: Inventory, vm: Vm, challenge: Challenge, proofs: tuple[Proof, ...]) -> Inventory:
        """Read what the target has written; returns the inventory with what is proven, and what is not and why."""
        proven, not_shared = [], dict(challenge.failed)
        by_location = {proof.location: proof for proof in proofs}
        for location, content in challenge.contents.items():
            proof = by_location.get(location)
            why = "it says nothing of it" if proof is None else await self._wrong(vm, content, proof)
            if why:
                not_shared[location] = why
            else:
                proven.append(location)
        return msgspec.structs.replace(here, proven_shared=tuple(proven), not_shared=not_shared)

    async def withdraw(self, challenge: Challenge, proofs: tuple[Proof, ...] = ()) -> None:
        """Remove the nonces, the target's too where this side sees them."""
        names = [(nonce.location, nonce.name) for nonce in challenge.nonces]
        seen = (proof for proof in proofs if proof.name and proof.location in challenge.contents)
        names += [(proof.location, proof.name) for proof in seen]
        for location, name in names:
            await self._remove(location, name)

    async def _wrong(self, vm: Vm, content: bytes, proof: Proof) -> str:
        if proof.error:
            return proof.error
        if proof.read != content.hex():
            return "it does not see what this host has just written there"
        volume = self._volume(proof.location)
        try:
            found = await self._storage.ask(proof.location, lambda: volume.read_record(proof.name))
            if found is None or hashlib.sha256(found).hexdigest() != proof.digest:
                return "this host does not see what it has just written there"
            if await self._identities(vm, proof.location) != proof.identities:
                return "the same number means another LUN there"
        except KvmhvError as error:
            return error.message
        return ""

    # --- target

    async def prove(self, vm: Vm, nonces: tuple[Nonce, ...], source: str) -> tuple[Proof, ...]:
        """Read each nonce and write one of this host's own. `forget_later` goes with it."""
        return tuple(await asyncio.gather(*(self._prove(vm, nonce, source) for nonce in nonces[:LOCATIONS_MAX])))

    def shown(self, source: str) -> frozenset[str]:
        """Return the locations at which this host has lately read what the source had written."""
        since_s = time.monotonic() - SHOWN_S
        self._shown = {key: at_s for key, at_s in self._shown.items() if at_s >= since_s}
        return frozenset(location for host, location in self._shown if host == source)

    def forget_later(self, proofs: tuple[Proof, ...]) -> None:
        """Remove the nonces that `prove` wrote, after the source has had its time to read (and to remove) them."""
        if any(proof.name for proof in proofs):
            self._spawn(self._forget(proofs))

    async def close(self) -> None:
        """End what runs in the background."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work, name="proofs")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _forget(self, proofs: tuple[Proof, ...]) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(self._kept_s)
        for proof in proofs:
            if proof.name:
                await self._remove(proof.location, proof.name)

    async def _prove(self, vm: Vm, nonce: Nonce, source: str) -> Proof:
        if self._storage.volume(nonce.location) is None or not nonce.name.startswith(PREFIX) or "/" in nonce.name:
            return Proof(location=nonce.location, error="it has no location of that name that other hosts may see")
        volume = self._volume(nonce.location)
        try:
            read = await self._storage.ask(nonce.location, lambda: volume.read_record(nonce.name))
            its_own = read in self._own.values()  # the source may have that from this host: it shows nothing
            if read and not its_own and len(self._shown) < SHOWN_MAX:
                self._shown[source, nonce.location] = time.monotonic()
            name, content = await self._write(nonce.location)
            identities = await self._identities(vm, nonce.location)
        except KvmhvError as error:
            return Proof(location=nonce.location, error=error.message)
        return Proof(
            location=nonce.location,
            read=(read or b"").hex(),
            name=name,
            digest=hashlib.sha256(content).hexdigest(),
            identities=identities,
        )

    # ---

    def _volume(self, location: str) -> Volume:
        volume = self._storage.volume(location)
        assert volume is not None, "asked for of shareable locations only"
        return volume

    async def _write(self, location: str) -> tuple[str, bytes]:
        """Write a nonce and return its name and content; two names may mean the same block of a records LUN.

        It is noted before, so that an agent that dies leaves it only until the next one starts.
        """
        volume = self._volume(location)
        for _ in range(TRIES):
            name, content = PREFIX + secrets.token_hex(8), secrets.token_hex(16).encode()
            self._records.put(KIND, f"{location}/{name}", b"")
            self._own[f"{location}/{name}"] = content
            if await self._storage.ask(location, partial(volume.swap_record, name, None, content)):
                return name, content
            self._own.pop(f"{location}/{name}", None)
            self._records.delete(KIND, f"{location}/{name}")
        text = f"{location}: there is no room among its records"
        raise HostError("location-full", text, "does anything else write to its records LUN?")

    async def _remove(self, location: str, name: str) -> None:
        volume = self._storage.volume(location)
        with contextlib.suppress(KvmhvError):
            if volume is not None:  # else the location was removed meanwhile
                await self._storage.ask(location, partial(_remove_record, volume, name))
            self._records.delete(KIND, f"{location}/{name}")
            self._own.pop(f"{location}/{name}", None)

    async def _identities(self, vm: Vm, location: str) -> dict[str, str]:
        volume = self._volume(location)
        paths = {layer.path for disk in vm.disks for layer in disk.layers if layer.location == location}
        return await self._storage.ask(location, lambda: {path: volume.identity(path) for path in sorted(paths)})


def _remove_record(volume: Volume, name: str) -> None:
    content = volume.read_record(name)
    if content is not None:
        volume.swap_record(name, content, None)
