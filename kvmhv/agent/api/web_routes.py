"""The live page: its files, its cookie, and the stream of what it shows. It can only read."""

import asyncio
import contextlib
from pathlib import Path

import msgspec
from aiohttp import web

import kvmhv
from kvmhv.agent.api.access import Access, Kind
from kvmhv.agent.api.other_hosts import VIEW_PATH
from kvmhv.agent.api.route import Call, Route
from kvmhv.agent.api.services import Services
from kvmhv.agent.web.sessions import COOKIE, LASTS_S
from kvmhv.agent.web.view import HostLine, Page, View, slim
from kvmhv.errors import CallerError, Refused
from kvmhv.model import Outcome, Phase, Struct

FILES = Path(__file__).parent.parent / "web"
LOOK_S = 0.5
BLACKOUT_WAIT_S = 0.05
BLACKOUT_WAITS = 40
"""So often the page lets a blackout pass; one that takes longer is to be seen."""
HEARTBEAT_LOOKS = 10
"""So many looks without a change, then a comment, so that a dead reader is noticed."""

GUARDS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


class Login(Struct, frozen=True, kw_only=True):
    """Who wants to see the page shows a token, once."""

    token: str


def own_view(api: Services) -> View:
    """Return what this host shows; asks nobody and waits for nothing."""
    settings = api.settings.current
    return View(
        host=api.config.name,
        version=kvmhv.__version__,
        enabled=settings.enabled,
        slots_out=settings.moves_out,
        slots_in=settings.moves_in,
        vms=api.vm_states.summaries(),
        moves=tuple(slim(report) for report in api.running_moves()),
        queued=tuple(slim(report) for report in api.queued_moves.reports()),
        last=tuple(slim(report) for report in api.recent_moves()),
    )


async def view(api: Services, call: Call) -> View:
    """Answer GET /v1/view: for the page of a host that trusts this one."""
    return own_view(api)


async def file(api: Services, call: Call) -> web.Response:
    """Answer GET / and the page's other files."""
    name = {"/": "page.html"}.get(call.request.path, call.request.path.rpartition("/")[2])
    content = await asyncio.to_thread((FILES / name).read_bytes)
    kind = KINDS[name.rpartition(".")[2]]
    return web.Response(body=content, content_type=kind, charset="utf-8", headers=GUARDS)


async def login(api: Services, call: Call) -> web.Response:
    """Answer POST /web/session: a cookie for a token."""
    if call.request.content_type != "application/json" or call.request.headers.get("Sec-Fetch-Site") == "cross-site":
        raise CallerError("request-invalid", "the page itself asks for this", "open the page", http_status=415)
    body: Login = call.body
    value = api.sessions.open(body.token.strip())
    if value is None:
        text = "this token is not valid here"
        todo = "make one on this host: kvmhv host token create NAME"
        raise Refused("not-authorised", text, todo, host=api.config.name, http_status=401)
    response = web.Response(status=204)
    response.set_cookie(
        COOKIE, value, max_age=LASTS_S, path="/", httponly=True, samesite="Strict", secure=_secure(call.request)
    )
    return response


async def logout(api: Services, call: Call) -> web.Response:
    """Answer DELETE /web/session: forget the cookie."""
    response = web.Response(status=204)
    response.del_cookie(COOKIE, path="/", httponly=True, samesite="Strict", secure=_secure(call.request))
    return response


def _secure(request: web.Request) -> bool:
    return request.transport is not None and request.transport.get_extra_info("ssl_object") is not None


async def page_data(api: Services, call: Call) -> Page:
    """Answer GET /web/page: what the page shows now."""
    return _page(api, call)


def _page(api: Services, call: Call) -> Page:
    own = HostLine(name=api.config.name, address=api.config.advertise, own=True, view=own_view(api))
    return Page(hosts=(own, *api.other_hosts.lines()), by_cookie=call.caller.kind is Kind.PAGE)


def _in_blackout(api: Services) -> bool:
    """Whether a guest stands still: the page can wait, the guest's users cannot."""
    return any(move.phase is Phase.STATE and move.outcome is Outcome.RUNNING for move in api.running_moves())


async def live(api: Services, call: Call) -> web.StreamResponse:
    """Answer GET /web/live: what the page shows, each time that it changes; ends when the cookie does."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
    await response.prepare(call.request)
    before, quiet, waited = b"", 0, 0
    cookie = call.request.cookies.get(COOKIE, "")
    with contextlib.suppress(ConnectionError):
        while call.caller.kind is not Kind.PAGE or api.sessions.name_of(cookie) is not None:
            if waited < BLACKOUT_WAITS and _in_blackout(api):
                waited += 1
                await asyncio.sleep(BLACKOUT_WAIT_S)
                continue
            waited = 0
            now = msgspec.json.encode(_page(api, call))
            quiet = quiet + 1 if now == before else 0
            if quiet == 0:
                await response.write(b"event: page\ndata: " + now + b"\n\n")
            elif quiet % HEARTBEAT_LOOKS == 0:
                await response.write(b": still there\n\n")
            before = now
            await asyncio.sleep(LOOK_S)
    return response


def _file_route(path: str, kind: str) -> Route:
    doc = "The live page." if path == "/" else "A file of the live page."
    return Route(method="GET", path=path, doc=doc, handler=file, access=Access.OPEN, media=kind)


WEB_ROUTES = (
    _file_route("/", "text/html"),
    _file_route("/web/page.css", "text/css"),
    _file_route("/web/page.js", "text/javascript"),
    _file_route("/web/plot.js", "text/javascript"),
    Route(
        method="POST",
        path="/web/session",
        doc="Show a token once and get the live page's cookie, which opens nothing else.",
        handler=login,
        access=Access.OPEN,
        request=Login,
    ),
    Route(
        method="DELETE",
        path="/web/session",
        doc="Give the live page's cookie back.",
        handler=logout,
        access=Access.OPEN,
    ),
    Route(
        method="GET",
        path="/web/page",
        doc="What the live page shows now.",
        handler=page_data,
        access=Access.PAGE,
        response=Page,
    ),
    Route(
        method="GET",
        path="/web/live",
        doc="What the live page shows, as server-sent events.",
        handler=live,
        access=Access.PAGE,
        media="text/event-stream",
    ),
    Route(
        method="GET",
        path=VIEW_PATH,
        doc="This host as the live page of another host shows it.",
        handler=view,
        response=View,
    ),
)
