"""One thing at a time for each VM: an operation of an operator, or a move, never both."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from kvmhv.errors import CallerError, Refused
from kvmhv.model import Struct, Vm


class Claim(Struct, frozen=True, kw_only=True):
    """A VM's name belongs to a move; `arriving`: the VM that comes with it and is not defined here yet."""

    move_id: str
    arriving: Vm | None = None


class Claims:
    """Who works on which VM, by the VM's name. In memory: after a restart the moves claim their VMs again."""

    def __init__(self) -> None:
        self._claims: dict[str, Claim] = {}
        self._operations: dict[str, str] = {}
        self._ended = asyncio.Condition()

    def claim(self, name: str, move_id: str, arriving: Vm | None) -> None:
        """Give the VM to a move; repeatable. Raises Refused `vm-in-move`, CallerError `vm-busy`."""
        self.refuse_taken(name, move_id)
        self._claims[name] = Claim(move_id=move_id, arriving=arriving)

    def refuse_taken(self, name: str, move_id: str = "") -> None:
        """Raise what claim() does if the VM is not free for this move (empty: for any)."""
        held = self._claims.get(name)
        if held is not None and held.move_id != move_id:
            raise self._in_move(name, held)
        if name in self._operations:
            raise self._busy(name)

    def release(self, name: str, move_id: str) -> None:
        """Take the VM back from the move; no error if the move does not have it."""
        held = self._claims.get(name)
        if held is not None and held.move_id == move_id:
            del self._claims[name]

    def move_of(self, name: str) -> str | None:
        """Id of the move that has the VM."""
        held = self._claims.get(name)
        return held.move_id if held else None

    def arriving(self) -> tuple[Vm, ...]:
        """VMs that moves bring to this host."""
        return tuple(claim.arriving for claim in self._claims.values() if claim.arriving is not None)

    def names(self) -> frozenset[str]:
        """Names that moves hold."""
        return frozenset(self._claims)

    def operation_on(self, name: str) -> str | None:
        """What runs on the VM now: `create`, `start`, `stop`, `remove`."""
        return self._operations.get(name)

    @asynccontextmanager
    async def operation(self, name: str, what: str) -> AsyncIterator[None]:
        """Hold the VM for an operation; a second one is refused at once, so nothing queues up.

        Raises Refused `vm-in-move`, CallerError `vm-busy`.
        """
        if name in self._claims:
            raise self._in_move(name, self._claims[name])
        if name in self._operations:
            raise self._busy(name)
        self._operations[name] = what
        try:
            yield
        finally:
            del self._operations[name]
            async with self._ended:
                self._ended.notify_all()

    async def wait_idle(self, name: str) -> None:
        """Return when no operation runs on the VM; each has deadlines of its own."""
        async with self._ended:
            await self._ended.wait_for(lambda: name not in self._operations)

    def _in_move(self, name: str, claim: Claim) -> Refused:
        return Refused(
            "vm-in-move",
            f"VM {name} is in move {claim.move_id}",
            f"wait for it (`kvmhv move watch {claim.move_id}`) or cancel it",
            http_status=409,
        )

    def _busy(self, name: str) -> CallerError:
        return CallerError(
            "vm-busy", f"VM {name}: a {self._operations[name]} is under way", "wait for its end", http_status=409
        )
