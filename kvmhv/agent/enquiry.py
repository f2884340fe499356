"""Ask another host for its inventory, without a move: `vm check` and `vm move --dry-run`."""

import asyncio

from kvmhv.agent.link import CONNECT_S, Link
from kvmhv.errors import KvmhvError, PeerUnreachable
from kvmhv.messages import Answer, AnyMessage, Enquire
from kvmhv.ports import Clock, Peer
from kvmhv.wire.session import Hello


async def enquire(peer: Peer, clock: Clock, hello: Hello, question: Enquire, timeout_s: float) -> Answer:
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

    link = Link(hello, clock, lambda: link.send(question), lost, heard)
    target = question.request.target
    connection = await peer.connect(target, CONNECT_S)
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
