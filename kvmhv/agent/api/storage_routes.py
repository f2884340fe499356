"""Routes of the host's locations. A password comes in with `add` and never goes out."""

from kvmhv.agent.api.route import Call, Route
from kvmhv.agent.api.services import Services
from kvmhv.model import LocationReport, LocationSpec, Struct


class LocationRequest(Struct, frozen=True, kw_only=True):
    """A new location; `secret`: the password of `user`, or the CHAP secret."""

    spec: LocationSpec
    secret: str | None = None


async def list_locations(api: Services, call: Call) -> tuple[LocationReport, ...]:
    """Answer GET /v1/storage."""
    return await api.locations.list()


async def add(api: Services, call: Call) -> LocationReport:
    """Answer POST /v1/storage."""
    body: LocationRequest = call.body
    return await api.locations.add(body.spec, body.secret)


async def show(api: Services, call: Call) -> LocationReport:
    """Answer GET /v1/storage/{name}."""
    return await api.locations.show(call.path("name"))


async def check(api: Services, call: Call) -> LocationReport:
    """Answer POST /v1/storage/{name}/check."""
    return await api.locations.check(call.path("name"))


async def remove(api: Services, call: Call) -> None:
    """Answer DELETE /v1/storage/{name}."""
    await api.locations.remove(call.path("name"))


STORAGE_ROUTES = (
    Route(
        method="GET",
        path="/v1/storage",
        doc="The host's locations: places for disks.",
        handler=list_locations,
        response=tuple[LocationReport, ...],
    ),
    Route(
        method="POST",
        path="/v1/storage",
        doc="Add a location; it is reached, written and read before it is kept.",
        handler=add,
        request=LocationRequest,
        response=LocationReport,
        status=201,
    ),
    Route(method="GET", path="/v1/storage/{name}", doc="One location.", handler=show, response=LocationReport),
    Route(
        method="POST",
        path="/v1/storage/{name}/check",
        doc="Write to, read and clear a location now; problems are in the answer.",
        handler=check,
        response=LocationReport,
    ),
    Route(method="DELETE", path="/v1/storage/{name}", doc="Remove a location; its content stays.", handler=remove),
)
