"""Routes between agents, and /metrics."""

from aiohttp import web

from kvmhv.agent.api.access import Access
from kvmhv.agent.api.route import Call, Route
from kvmhv.agent.api.services import Services
from kvmhv.agent.api.trusting import Introduction, Welcome
from kvmhv.agent.metrics import CONTENT_TYPE, Snapshot
from kvmhv.drivers.peer import (
    FILE_ROUTE,
    JOIN_ROUTE,
    MOVE_ROUTE,
    TRUST_ROUTE,
    FileTaken,
    TrustAnswer,
    TrustQuestion,
    WebSocketConnection,
    server_socket,
)


async def join(api: Services, call: Call) -> Welcome:
    """Answer a host that follows an invitation."""
    return api.trusting.accept(call.body, call.caller.ip)


async def is_trusted(api: Services, call: Call) -> TrustAnswer:
    """Answer a host that wonders why its connection died."""
    return api.trusting.answer(call.body, call.caller.ip)


async def move(api: Services, call: Call) -> web.WebSocketResponse:
    """Serve another agent's connection for one move."""
    socket = server_socket(api.config.limits.peer_frame_bytes)
    await socket.prepare(call.request)
    connection = WebSocketConnection(socket, call.caller.name)
    try:
        await api.moves.serve_peer(connection)
    finally:
        await connection.close()
    return socket


async def receive_file(api: Services, call: Call) -> None:
    """Keep a file of an incoming move."""
    await api.moves.receive_file(call.caller.name, call.path("move"), call.path("name"), call.chunks())


async def take_file(api: Services, call: Call) -> FileTaken:
    """Take a file of an incoming move from what this host has."""
    return FileTaken(taken=await api.moves.take_file(call.caller.name, call.path("move"), call.path("name")))


async def metrics(api: Services, call: Call) -> web.Response:
    """Answer GET /metrics."""
    snapshot = Snapshot(
        vms=api.vm_states.summaries(),
        moves=api.running_moves(),
        settings=api.settings.current,
        running_since=api.vm_states.running_since(),
        stalls=api.io_watch.all(),
        queued=api.queued_moves.lengths(),
    )
    return web.Response(body=api.metrics.render(snapshot), headers={"Content-Type": CONTENT_TYPE})


PEER_ROUTES = (
    Route(
        method="POST",
        path=JOIN_ROUTE,
        doc="A host follows an invitation and proves it (between agents).",
        handler=join,
        access=Access.OPEN,
        request=Introduction,
        response=Welcome,
    ),
    Route(
        method="POST",
        path=TRUST_ROUTE,
        doc="Does this host trust that certificate? (between agents)",
        handler=is_trusted,
        access=Access.OPEN,
        request=TrustQuestion,
        response=TrustAnswer,
    ),
    Route(
        method="GET",
        path=MOVE_ROUTE,
        doc="One move's connection as a WebSocket (between agents).",
        handler=move,
        access=Access.PEER,
        status=101,
    ),
    Route(
        method="POST",
        path=FILE_ROUTE,
        doc="Take a file that belongs to the VM of a move from what this host has (between agents).",
        handler=take_file,
        access=Access.PEER,
        response=FileTaken,
    ),
    Route(
        method="PUT",
        path=FILE_ROUTE,
        doc="Upload a file that belongs to the VM of a move (between agents).",
        handler=receive_file,
        access=Access.PEER,
        upload=True,
    ),
    Route(
        method="GET",
        path="/metrics",
        doc="Prometheus metrics.",
        handler=metrics,
        access=Access.METRICS,
        media="text/plain",
    ),
)
