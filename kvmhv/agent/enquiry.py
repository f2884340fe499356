"""Ask both hosts about a VM, without a move: `vm check`, `vm move --dry-run`, the queue, a move's beginning."""

import asyncio
import contextlib
import uuid

import msgspec

from kvmhv.agent.inventory import Inventories
from kvmhv.agent.link import Link
from kvmhv.agent.sharing import Sharing
from kvmhv.config import Config
from kvmhv.core import performance, savings
from kvmhv.errors import CallerError, KvmhvError, MoveFailed, PeerUnreachable, Refused
from kvmhv.messages import Answer, AnyMessage, Enquire, Proof
from kvmhv.model import Inventory, MoveRequest, Refusal, Vm
from kvmhv.ports import Clock, Hypervisor, Peer
from kvmhv.wire.session import SOURCE, Hello


class Enquiry:
    """What this host and a target say of a VM that is to move."""

    def __init__(
        self,
        config: Config,
        hypervisor: Hypervisor,
        peer: Peer,
        clock: Clock,
        inventories: Inventories,
        sharing: Sharing,
    ) -> None:
        self._config = config
        self._hypervisor = hypervisor
        self._peer = peer
        self._clock = clock
        self._inventories = inventories
        self._sharing = sharing

    async def inventory_of(self, vm: Vm, request: MoveRequest, *, dirty_rate: bool) -> Inventory:
        """Return this host's inventory; an estimate waits for the dirty rate, a move does not."""
        if vm.runtime:
            return await self._inventories.make(running=vm)
        seen = await self._hypervisor.state(vm.id)
        pages = request.performance == performance.COMPRESSION
        return await self._inventories.make(running=vm if seen.process else None, dirty_rate=dirty_rate, pages=pages)

    async def prove(self, here: Inventory, vm: Vm, request: MoveRequest) -> tuple[Inventory, Inventory]:
        """Ask the target for its inventory, and prove what both hosts see (agent/sharing.py)."""
        challenge = await self._sharing.challenge(vm)
        proofs: tuple[Proof, ...] = ()
        question = Enquire(vm=vm, request=_only_asking(request), nonces=challenge.nonces, bases=savings.bases(here))
        try:
            answer = await self._ask(vm, question, str(uuid.uuid4()))
            proofs = answer.proofs
            return await self._sharing.conclude(here, vm, challenge, proofs), answer.inventory
        finally:
            await self._sharing.withdraw(challenge, proofs)

    async def proven(self, here: Inventory, vm: Vm, request: MoveRequest) -> Inventory:
        """Return this host's inventory with the proofs; a target that cannot be reached is the move's to tell."""
        if self._sharing.locations(vm):
            with contextlib.suppress(MoveFailed, CallerError, Refused):
                return (await self.prove(here, vm, request))[0]
        return here

    async def refusal(self, vm: Vm, request: MoveRequest, move_id: str = "") -> Refusal | None:
        """Return why the target's settings do not let the VM in now; raises as `enquire`.

        `move_id`: a move in the queue that is about to begin; the target keeps a slot for it for a moment.
        """
        question = Enquire(vm=vm, request=request if move_id else _only_asking(request))
        return (await self._ask(vm, question, move_id or str(uuid.uuid4()))).inventory.refusal

    async def _ask(self, vm: Vm, question: Enquire, move_id: str) -> Answer:
        hello = Hello(move_id=move_id, host=self._config.name, role=SOURCE, epoch=vm.epoch + 1)
        bounds = self._config.waits.peer_connect_s, self._config.timeouts.answer_s
        return await enquire(self._peer, self._clock, hello, question, *bounds)


def _only_asking(request: MoveRequest) -> MoveRequest:
    """Return a request for which no target keeps a slot."""
    return msgspec.structs.replace(request, queue_s=None)


async def enquire(
    peer: Peer, clock: Clock, hello: Hello, question: Enquire, connect_s: float, timeout_s: float
) -> Answer:
    """Return the target's answer about this VM; nothing is allocated there.

    Raises what Peer.connect raises, PeerBroke, and PeerUnreachable `peer-silent` after `timeout_s`.
    """
    answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def lost(error: KvmhvError) -> None:
        if not answer.done():
            answer.set_exception(error)

    def heard(message: AnyMessage) -> None:
        if isinstance(message, Answer) and not answer.done():
            answer.set_result(message)

    link = Link(hello, clock, connect_s, lambda: link.send(question), lost, heard)
    target = question.request.target
    connection = await peer.connect(target, connect_s)
    serving = asyncio.create_task(link.serve(connection))
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        text = f"{target} did not answer within {timeout_s:g} s"
        raise PeerUnreachable("peer-silent", text, f"see its agent's log on {target}") from None
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
