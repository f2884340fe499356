"""Routes of the host's events: the kept ones, and those to come."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from kvmhv.agent.api.route import Call, Query, Route
from kvmhv.agent.api.services import Services
from kvmhv.errors import CallerError
from kvmhv.model import Event

HEARTBEAT_S = 5.0
LAST_ID_HEADER = "Last-Event-ID"
NUMBER_MAX = 2**53
SHOWN = 200


async def list_events(api: Services, call: Call) -> tuple[Event, ...]:
    """Answer GET /v1/events."""
    most = _number(call.text("limit"))
    return api.events.list(_number(call.text("after")) or 0, SHOWN if most is None else most)


async def follow(api: Services, call: Call) -> web.StreamResponse:
    """Answer GET /v1/events/stream: without end."""
    after = _number(call.request.headers.get(LAST_ID_HEADER) or call.text("after"))
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(call.request)
    with contextlib.suppress(ConnectionError):
        async for part in parts(api.events.follow(after), HEARTBEAT_S):
            await response.write(part)
    return response


async def parts(events: AsyncIterator[Event], heartbeat_s: float) -> AsyncIterator[bytes]:
    """Turn events into server-sent events; a comment when nothing happens, so that a dead reader is noticed."""
    waiting: asyncio.Task[Event] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({waiting}, timeout=heartbeat_s)
            if not done:
                yield b": still there\n\n"
                continue
            event, waiting = waiting.result(), None
            yield b"id: %d\nevent: event\ndata: " % event.number + msgspec.json.encode(event) + b"\n\n"
    finally:
        if waiting is not None:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def _number(text: str | None) -> int | None:
    """Return a number of a query. Raises CallerError `request-invalid`."""
    if text is None or text == "":
        return None
    if not (text.isascii() and text.isdigit() and int(text) <= NUMBER_MAX):
        raise CallerError("request-invalid", f"{text[:40]!r} is no number of an event")
    return int(text)


AFTER = Query(name="after", doc="Only events whose number is higher.", type="integer")

EVENT_ROUTES = (
    Route(
        method="GET",
        path="/v1/events",
        doc="What happened to this host's moves, the newest last; with Hyper-V's number where it has one.",
        handler=list_events,
        response=tuple[Event, ...],
        query=(AFTER, Query(name="limit", doc=f"At most so many, the newest ({SHOWN}).", type="integer")),
    ),
    Route(
        method="GET",
        path="/v1/events/stream",
        doc="Events as they happen, as server-sent events without end; `after` or Last-Event-ID: from there on.",
        handler=follow,
        media="text/event-stream",
        query=(AFTER,),
    ),
)
