"""The aiohttp application, made from the table of routes: let in, decode, answer, and never show a traceback."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog
from aiohttp import web

from kvmhv.agent.api.access import Access, Caller, Gate, Kind, asked_by
from kvmhv.agent.api.forward import Forwarder
from kvmhv.agent.api.route import Call, Route, decode
from kvmhv.agent.api.routes import ROUTES
from kvmhv.agent.api.services import Services
from kvmhv.errors import CallerError, KvmhvError, Refused

STARTED = web.RequestKey("started", bool)
CALLER = web.RequestKey("caller", Caller)
BODY_S = 30.0
"""A JSON body has arrived after so long, or the request is given up."""
FORWARD_PATH = "/v1/hosts/{host}/{rest:.*}"

log = structlog.get_logger()

WebHandler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(services: Services, on_request: Callable[[web.Request], None]) -> web.Application:
    """Return the application. `on_request` hears of every request first (the listener ends silent connections)."""
    gate = Gate(services.trusting.trust, services.tokens, services.sessions, services.config.metrics_subnets)

    @web.middleware
    async def outermost(request: web.Request, handler: WebHandler) -> web.StreamResponse:
        on_request(request)
        request[CALLER] = caller = gate.identify(request)
        response = await _answer_errors(request, handler, services.config.name)
        if caller.kind is Kind.NOBODY:
            response.force_close()  # strangers do not keep connections
        return response

    app = web.Application(
        client_max_size=services.config.limits.request_bytes,
        middlewares=[outermost],
        handler_args={"access_log": None},
    )
    app.on_response_prepare.append(_note_started)
    for route in ROUTES:
        app.router.add_route(route.method, route.path, _handler(route, services, gate))
    forwarder = Forwarder(services.trusting.trust.own_name, services.config.socket_path, services.trusting.peer)

    async def forward(request: web.Request) -> web.StreamResponse:
        caller = request[CALLER]
        gate.check(caller, Access.API)
        _note(request, caller)
        return await forwarder.forward(request, caller)

    app.router.add_route("*", FORWARD_PATH, forward)
    return app


def error_response(error: KvmhvError, own_name: str) -> web.Response:
    """Return an error as the API shows it; one that names no host happened on this one."""
    headers = {"WWW-Authenticate": "Bearer"} if error.http_status == 401 else None
    body = error.body()
    if body.host is None:
        body = msgspec.structs.replace(body, host=own_name)
    return _json(body, error.http_status, headers)


def _handler(route: Route, services: Services, gate: Gate) -> WebHandler:
    async def handle(request: web.Request) -> web.StreamResponse:
        caller = request[CALLER]
        try:
            gate.check(caller, route.access)
        except Refused as error:
            services.metrics.peer_refused("unauthorised")
            log.warning("request refused", caller=str(caller), path=request.path[:200], error=error.code)
            raise
        _note(request, caller)
        body = await _body(route, request) if route.request is not None else None
        result = await route.handler(services, Call(request, caller, body))
        if isinstance(result, web.StreamResponse):
            return result
        if result is None:
            return web.Response(status=204)
        return _json(result, route.status)

    return handle


async def _body(route: Route, request: web.Request) -> object:
    try:
        async with asyncio.timeout(BODY_S):
            content = await request.read()
    except TimeoutError as error:
        raise CallerError("request-invalid", "the request's body did not arrive", http_status=408) from error
    if not content and route.body_optional:
        content = b"{}"
    return decode(content, route.request)


def _json(value: object, status: int, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json", headers=headers
    )


async def _answer_errors(request: web.Request, handler: WebHandler, own_name: str) -> web.StreamResponse:
    try:
        return await handler(request)
    except KvmhvError as error:
        failure: KvmhvError = error
    except web.HTTPRequestEntityTooLarge:
        failure = CallerError("request-too-large", "the request's body is too large", http_status=413)
    except web.HTTPNotFound:
        failure = CallerError(
            "route-unknown", f"there is no {request.path[:200]}", "see /openapi.json", http_status=404
        )
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        failure = CallerError("method", f"{request.method} is not for this path", f"try {allowed}", http_status=405)
    except web.HTTPException as error:
        failure = CallerError("http", f"{error.status} {error.reason}", http_status=error.status)
    except ConnectionError:
        raise
    except Exception:
        log.exception("a request failed in an unforeseen way", method=request.method, path=request.path[:200])
        failure = KvmhvError("internal", "the agent made a mistake; its log has the details", "please report it")
    if request.get(STARTED):
        # Half an answer is out: an error cannot follow it, only the end of the connection tells.
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionAbortedError(failure.code)
    return error_response(failure, own_name)


async def _note_started(request: web.Request, response: web.StreamResponse) -> None:
    request[STARTED] = True


def _note(request: web.Request, caller: Caller) -> None:
    say = log.debug if request.method == "GET" else log.info
    _, collection, rest = request.path[:200].partition("/moves/")
    move = {"move": rest.partition("/")[0]} if collection else {}
    say("request", method=request.method, path=request.path[:200], caller=str(asked_by(caller, request)), **move)
