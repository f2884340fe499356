"""Ask another host for its inventory, without a move: `vm check` and `vm move --dry-run`."""

import asyncio

from kvmhv.agent.link import CONNECT_S, Link
from kvmhv.errors import KvmhvError, PeerUnreachable
from kvmhv.messages import Answer, AnyMessage, Enquire
from kvmhv.model import Inventory, MoveRequest, Vm
from kvmhv.ports import Clock, Peer
from kvmhv.wire.session import Hello


async def enquire(peer: Peer, clock: Clock, hello: Hello, vm: Vm, request: MoveRequest, timeout_s: float) -> Inventory:
    """Return the target's inventory for this VM; nothing is allocated there.

    Raises what Peer.connect raises, PeerBroke, and PeerUnreachable `peer-silent` after `timeout_s`.
    """
    answer: asyncio.Future[Inventory] = asyncio.get_running_loop().create_future()

    def lost(error: KvmhvError) -> None:
        if not answer.done():
            answer.set_exception(error)

    def heard(message: AnyMessage) -> None:
        if isinstance(message, Answer) and not answer.done():
            answer.set_result(message.inventory)

    link = Link(hello, clock, lambda: link.send(Enquire(vm=vm, request=request)), lost, heard)
    connection = await peer.connect(request.target, CONNECT_S)
    serving = asyncio.create_task(link.serve(connection))
    try:
        async with asyncio.timeout(timeout_s):
            return await answer
    except TimeoutError:
        text = f"{request.target} did not answer within {timeout_s:g} s"
        raise PeerUnreachable("peer-silent", text, f"see its agent's log on {request.target}") from None
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
