"""Routes of moves: check, start (to another host, of disks on this one), list, watch, cancel."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
from aiohttp import web

from kvmhv.agent.api.route import Call, Route
from kvmhv.agent.api.services import CheckReport, Services
from kvmhv.core.resolve import Choice, RunAt
from kvmhv.errors import CallerError, KvmhvError
from kvmhv.model import MoveReport, MoveRequest, StorageMoveRequest, Struct

EVENT_INTERVAL_S = 0.1
"""Reports that come faster are skipped but for the newest; the last one is never skipped."""
HEARTBEAT_S = 5.0


async def check(api: Services, call: Call) -> CheckReport:
    """Answer POST /v1/vms/{name}/check."""
    return await api.moves.check(_request(call))


async def start(api: Services, call: Call) -> MoveReport:
    """Answer POST /v1/vms/{name}/move."""
    return await api.moves.start(_request(call), call.asked())


async def start_storage(api: Services, call: Call) -> MoveReport:
    """Answer POST /v1/vms/{name}/move-storage."""
    body: StorageMoveRequest = call.body
    if body.vm != call.path("name"):
        raise CallerError("request-invalid", f"the path names VM {call.path('name')!r}, the body {body.vm!r}")
    return await api.storage_moves.start(body, call.asked())


async def list_moves(api: Services, call: Call) -> tuple[MoveReport | msgspec.Raw, ...]:
    """Answer GET /v1/moves."""
    return await api.moves.list()


async def show(api: Services, call: Call) -> MoveReport:
    """Answer GET /v1/moves/{id}."""
    return await api.moves.show(call.path("id"))


async def cancel(api: Services, call: Call) -> MoveReport:
    """Answer POST /v1/moves/{id}/cancel."""
    return await api.moves.cancel(call.path("id"), call.asked())


class Decision(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the operator decides about a move that stands still."""

    run_at: RunAt


async def choices(api: Services, call: Call) -> tuple[Choice, ...]:
    """Answer GET /v1/moves/{id}/choices."""
    return await api.moves.choices(call.path("id"))


async def resolve(api: Services, call: Call) -> MoveReport:
    """Answer POST /v1/moves/{id}/resolve."""
    decision: Decision = call.body
    return await api.moves.resolve(call.path("id"), decision.run_at, call.asked())


async def events(api: Services, call: Call) -> web.StreamResponse:
    """Answer GET /v1/moves/{id}/events: a MoveReport for each change, until the move has ended."""
    known = await api.moves.show(call.path("id"))  # an unknown one is a 404, not a broken stream
    reports = api.moves.watch(known.id)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(call.request)
    with contextlib.suppress(ConnectionError):  # the watcher went away: nothing to tell anybody
        async for event in paced(reports, EVENT_INTERVAL_S, HEARTBEAT_S):
            await response.write(event)
        await response.write_eof()
    return response


async def paced(reports: AsyncIterator[MoveReport], interval_s: float, heartbeat_s: float) -> AsyncIterator[bytes]:
    """Turn reports into server-sent events: the newest at most once per interval, a comment when nothing happens.

    Ends with the last report, which does not wait for its interval; an error of the source becomes an event `error`.
    """
    newest: MoveReport | None = None
    failure: KvmhvError | None = None
    fresh = asyncio.Event()

    async def read() -> None:
        nonlocal newest, failure
        try:
            async for report in reports:
                newest = report
                fresh.set()
        except KvmhvError as error:
            failure = error

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: fresh.set())
    try:
        ended = False
        while not ended:
            try:
                async with asyncio.timeout(heartbeat_s):
                    await fresh.wait()
            except TimeoutError:
                yield b": still there\n\n"
                continue
            ended = reader.done()
            fresh.clear()
            report, newest = newest, None
            if report is not None:
                yield b"event: move\ndata: " + msgspec.json.encode(report) + b"\n\n"
            if not ended:
                await asyncio.wait({reader}, timeout=interval_s)  # the end is told at once
        if failure is not None:
            yield b"event: error\ndata: " + msgspec.json.encode(failure.body()) + b"\n\n"
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader


def _request(call: Call) -> MoveRequest:
    body: MoveRequest = call.body
    if body.vm != call.path("name"):
        raise CallerError("request-invalid", f"the path names VM {call.path('name')!r}, the body {body.vm!r}")
    return body


MOVE_ROUTES = (
    Route(
        method="POST",
        path="/v1/vms/{name}/check",
        doc="Check a move: all findings, and the plan. Changes nothing.",
        handler=check,
        request=MoveRequest,
        response=CheckReport,
    ),
    Route(
        method="POST",
        path="/v1/vms/{name}/move",
        doc="Begin a move.",
        handler=start,
        request=MoveRequest,
        response=MoveReport,
        status=202,
    ),
    Route(
        method="POST",
        path="/v1/vms/{name}/move-storage",
        doc="Begin to move a VM's disks to another location of this host; it runs on.",
        handler=start_storage,
        request=StorageMoveRequest,
        response=MoveReport,
        status=202,
    ),
    Route(
        method="GET",
        path="/v1/moves",
        doc="Moves that run and moves that ended, out and in.",
        handler=list_moves,
        response=tuple[MoveReport, ...],
    ),
    Route(
        method="GET",
        path="/v1/moves/{id}",
        doc="One move; a prefix of the id is enough.",
        handler=show,
        response=MoveReport,
    ),
    Route(
        method="POST",
        path="/v1/moves/{id}/cancel",
        doc="Ask a move to end; the answer says how it ended.",
        handler=cancel,
        response=MoveReport,
    ),
    Route(
        method="GET",
        path="/v1/moves/{id}/choices",
        doc="What an operator can decide about a move that stands still, each with its consequences.",
        handler=choices,
        response=tuple[Choice, ...],
    ),
    Route(
        method="POST",
        path="/v1/moves/{id}/resolve",
        doc="Decide a move that stands still; the operator's word stands for that of the side that is silent.",
        handler=resolve,
        request=Decision,
        response=MoveReport,
    ),
    Route(
        method="GET",
        path="/v1/moves/{id}/events",
        doc="Server-sent events `move`: a MoveReport for each change, ten a second at most, until the move has ended.",
        handler=events,
        media="text/event-stream",
    ),
)
