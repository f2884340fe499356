"""The one table of routes: the server and /openapi.json are both made from it."""

import msgspec
from aiohttp import web

import kvmhv
from kvmhv.agent.api import openapi
from kvmhv.agent.api.access import Access
from kvmhv.agent.api.event_routes import EVENT_ROUTES
from kvmhv.agent.api.host_routes import HOST_ROUTES
from kvmhv.agent.api.image_routes import IMAGE_ROUTES
from kvmhv.agent.api.move_routes import MOVE_ROUTES
from kvmhv.agent.api.peer_routes import PEER_ROUTES
from kvmhv.agent.api.route import Call, Route
from kvmhv.agent.api.services import Services
from kvmhv.agent.api.storage_routes import STORAGE_ROUTES
from kvmhv.agent.api.vm_routes import VM_ROUTES
from kvmhv.agent.api.web_routes import WEB_ROUTES


async def description(api: Services, call: Call) -> web.Response:
    """Answer GET /openapi.json."""
    document = openapi.document(ROUTES, kvmhv.__version__)
    return web.Response(body=msgspec.json.encode(document), content_type="application/json")


DESCRIPTION_ROUTE = Route(
    method="GET",
    path="/openapi.json",
    doc="This description.",
    handler=description,
    access=Access.OPEN,
    media="application/json",
)

PLACE_ROUTES = (*HOST_ROUTES, *STORAGE_ROUTES)
SEEING_ROUTES = (*EVENT_ROUTES, *WEB_ROUTES, DESCRIPTION_ROUTE)
ROUTES = (*PLACE_ROUTES, *IMAGE_ROUTES, *VM_ROUTES, *MOVE_ROUTES, *PEER_ROUTES, *SEEING_ROUTES)
