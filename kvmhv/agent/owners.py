"""Keeps the ownership records beside disks that other hosts see; core/ownership.py says what may stand in them.

Before a move the source writes that the VM is moving; the target sees that very record before it opens the disk. Who
runs the VM when the move is over settles the record, in the background and again and again until the storage takes it:
nothing waits for it, for while it says "moving" no host starts the VM.
"""

import asyncio
from collections.abc import Callable, Collection
from functools import partial

import structlog

from kvmhv.core import ownership
from kvmhv.core.ownership import Owner
from kvmhv.drivers.host import boot_id
from kvmhv.drivers.storage.storage import Storage
from kvmhv.drivers.storage.volumes import Volume
from kvmhv.errors import HostError, KvmhvError, Refused
from kvmhv.model import Disk, Epoch, Layer, Vm

log = structlog.get_logger(__name__)

TRIES = 5
"""Swaps that another host came before; more often is not chance."""
AGAIN_S = 5.0

Change = Callable[[Owner | None, str], Owner | None]
"""Makes the new record of what was found, for a disk's place; None: leave it. May raise KvmhvError."""


class Owners:
    """The records of this host's VMs."""

    def __init__(self, host: str, host_id: str, storage: Storage) -> None:
        self._host = host
        self._host_id = host_id
        self._storage = storage
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """End what runs in the background."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def claim(self, vm: Vm, *, take_over: bool) -> None:
        """Own the VM's shared disks before it is started here.

        Raises Refused `vm-owned-elsewhere`, `vm-moving`, `vm-copy-stale`, `disk-owned`, `owner-unreadable`; HostError
        as Storage.ask. Then no record was changed, but for disks before the one that is refused.
        """
        mine = ownership.claimed(vm, self._host, self._host_id, boot_id())

        def change(found: Owner | None, place: str) -> Owner:
            refusal = ownership.may_claim(found, vm, self._host_id, place)
            if refusal is not None and not take_over:
                todo = (
                    f"stop it there, or, only if that host is surely dead and stays so: "
                    f"`kvmhv vm start {vm.name} --take-over`"
                )
                raise Refused(refusal.code, refusal.text, todo, http_status=409)
            if refusal is not None:
                log.warning("ownership taken over", vm=vm.name, was=refusal.text)
            return mine

        if take_over:
            for disk, volume in self._disks(vm):
                layer = disk.layers[0]
                await self._storage.ask(layer.location, partial(volume.break_lock, volume.owner_record(layer.path)))
        await self._change(vm, change, mends=take_over)

    async def claim_to_remove(self, vm: Vm) -> None:
        """Own the VM's shared disks before they are deleted here, so that no host starts it meanwhile.

        Raises as claim().
        """
        mine = ownership.claimed(vm, self._host, self._host_id, boot_id())

        def change(found: Owner | None, place: str) -> Owner | None:
            refusal = ownership.may_delete(found, vm, self._host_id, place)
            if refusal is not None:
                todo = f"`kvmhv vm remove {vm.name} --keep-disks` forgets this host's copy and leaves the disks alone"
                raise Refused(refusal.code, refusal.text, todo, http_status=409)
            return None if found is None else mine

        for disk, _ in self._disks(vm):
            try:
                await self._change(vm, change, {disk.name})
            except HostError as error:  # a full share takes no record, and what is deleted makes room
                if error.code != "location-full":
                    raise

    async def take(self, layer: Layer, vm_id: str, vm_name: str, epoch: Epoch) -> None:
        """Own a LUN that nobody owns, before anything is written to it: of two hosts exactly one does.

        Raises Refused `disk-owned`, `owner-unreadable`; HostError as Storage.ask.
        """
        mine = Owner(
            vm_id=vm_id,
            vm=vm_name,
            host=self._host,
            host_id=self._host_id,
            boot_id=boot_id(),
            epoch=epoch,
            held=False,
        )

        def change(found: Owner | None, place: str) -> Owner:
            if found is not None:
                refusal = ownership.belongs(found, place)
                raise Refused(refusal.code, refusal.text, "take another LUN, or remove that VM", http_status=409)
            return mine

        volume = self._storage.volume(layer.location)
        assert volume is not None, "LUNs are seen by every host"
        await self._change_one(layer, volume, change, mends=False)

    async def let_go(self, vm: Vm) -> None:
        """The VM was stopped here: it may be started on any host. A storage that does not answer is only logged."""

        def change(found: Owner | None, _place: str) -> Owner | None:
            return ownership.let_go(found, vm, self._host, self._host_id, boot_id())

        try:
            await self._change(vm, change)
        except KvmhvError as error:
            log.warning("ownership not let go", vm=vm.name, error=str(error))

    async def begin_move(self, vm: Vm, target: str) -> None:
        """Write that the VM is about to move. Raises Refused `vm-owned-elsewhere`, HostError as Storage.ask."""

        def change(found: Owner | None, place: str) -> Owner:
            made = ownership.moving(found, vm, self._host, self._host_id, boot_id(), target)
            if made is None:
                text = f"{place}: its ownership record names {found.host if found else 'nobody'}, not {self._host}"
                raise Refused("vm-owned-elsewhere", text, "see which of the hosts runs it", http_status=409)
            return made

        await self._change(vm, change)

    async def expect(self, vm: Vm, source: str, names: Collection[str]) -> None:
        """Target: see the source's record beside these disks, before QEMU opens them. Raises HostError `not-shared`."""

        def change(found: Owner | None, place: str) -> None:
            wrong = ownership.expects(found, vm, source, self._host)
            if wrong is not None:
                text = f"{place} on {self._host} is not what {source} runs {vm.name} from: {wrong}"
                raise HostError("not-shared", text, "see that both hosts use the same server and share")

        await self._change(vm, change, names)

    def settle_soon(self, vm: Vm, still: Callable[[], bool]) -> None:
        """Write that this host runs the VM, as soon as the storage takes it and for as long as `still` says so."""
        if not self._disks(vm):
            return
        old = self._tasks.get(vm.id)
        if old is not None:
            old.cancel()
        task = asyncio.create_task(self._settle(vm, still), name=f"ownership of {vm.name}")
        self._tasks[vm.id] = task
        task.add_done_callback(lambda done: self._tasks.pop(vm.id) if self._tasks.get(vm.id) is done else None)

    # ---

    async def _settle(self, vm: Vm, still: Callable[[], bool]) -> None:
        told = False

        def change(found: Owner | None, _place: str) -> Owner | None:
            return ownership.settled(found, vm, self._host, self._host_id, boot_id()) if still() else None

        while still():
            # What was given up because a share was silent may still be done when it answers again.
            quiet = all(self._storage.is_quiet(disk.layers[0].location) for disk, _ in self._disks(vm))
            try:
                await self._change(vm, change, mends=True)
            except KvmhvError as error:
                if not told:
                    log.warning("ownership not settled yet", vm=vm.name, error=str(error))
                told = True
            else:
                if quiet:
                    return
            await asyncio.sleep(AGAIN_S)

    def _disks(self, vm: Vm, names: Collection[str] | None = None) -> list[tuple[Disk, Volume]]:
        found = []
        for disk in vm.disks:
            volume = self._storage.volume(disk.layers[0].location)
            if volume is not None and (names is None or disk.name in names):
                found.append((disk, volume))
        return found

    async def _change(
        self, vm: Vm, change: Change, names: Collection[str] | None = None, *, mends: bool = False
    ) -> None:
        """Change the record beside each of the disks; `mends`: also one that cannot be read."""
        lock = self._locks.setdefault(vm.id, asyncio.Lock())
        async with lock:
            for disk, volume in self._disks(vm, names):
                await self._change_one(disk.layers[0], volume, change, mends=mends)

    async def _change_one(self, layer: Layer, volume: Volume, change: Change, *, mends: bool) -> None:
        name, place = volume.owner_record(layer.path), f"{layer.location}/{layer.path}"
        for _ in range(TRIES):
            old = await self._storage.ask(layer.location, lambda: volume.read_record(name))
            found = None if old is None else ownership.decode(old)
            if old is not None and found is None and not mends:
                # Not the same as none: it may name a host that runs the VM.
                text = f"{place}: its ownership record cannot be read, so nobody can tell which host runs the VM"
                todo = "see on every host that it does not run, then `kvmhv vm start NAME --take-over`"
                raise Refused("owner-unreadable", text, todo, http_status=409)
            new = change(found, place)
            if new is None:
                return
            # Also if it says so already: the swap waits for one that another host, or an earlier call, has begun.
            swap = partial(volume.swap_record, name, old, ownership.encode(new))
            if await self._storage.ask(layer.location, swap):
                return
        text = f"{place}: its ownership record is changed by other hosts again and again"
        raise HostError("ownership-contended", text, "see which hosts try to start this VM")
