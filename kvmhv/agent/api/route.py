"""One route of the table: how it is reached, who may, what goes in and comes out; and the call that reaches it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from kvmhv.agent.api.access import Access, Caller, asked_by
from kvmhv.agent.api.services import Services
from kvmhv.errors import CallerError
from kvmhv.model import Asked

UPLOAD_IDLE_S = 60.0
"""No byte of an upload for so long: it is given up."""


@dataclass(frozen=True, kw_only=True)
class Query:
    """A parameter after the `?`."""

    name: str
    doc: str
    type: str = "string"


@dataclass(frozen=True)
class Call:
    """One request to a route, already let in."""

    request: web.Request
    caller: Caller
    body: Any = None
    """Decoded as the route's `request` type."""

    def path(self, name: str) -> str:
        """Return a part of the path."""
        return self.request.match_info[name]

    def text(self, name: str) -> str | None:
        """Return a query parameter, None if it is not there."""
        return self.request.query.get(name)

    def flag(self, name: str) -> bool:
        """Return a query parameter that is true or false. Raises CallerError `request-invalid`."""
        value = self.request.query.get(name, "false").lower()
        if value not in ("true", "false", "1", "0", ""):
            raise CallerError("request-invalid", f"{name}: {value!r} is not true or false")
        return value in ("true", "1", "")

    def asked(self) -> Asked:
        """Return who asks, for records."""
        return asked_by(self.caller, self.request)

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the uploaded bytes as they come. Raises CallerError `upload-broken` if they stop before the end."""
        content = self.request.content
        while True:
            try:
                async with asyncio.timeout(UPLOAD_IDLE_S):
                    chunk = await content.readany()
            except (OSError, TimeoutError, web.RequestPayloadError) as error:
                raise CallerError("upload-broken", "the upload ended early", "send the file again") from error
            if not chunk:
                return
            yield chunk


Handler = Callable[[Services, Call], Awaitable[object]]
"""Returns a value of the route's response type, None (204), or a finished web.StreamResponse."""


@dataclass(frozen=True, kw_only=True)
class Route:
    """A line of the table of routes."""

    method: str
    path: str
    doc: str
    handler: Handler
    access: Access = Access.API
    request: Any = None
    """Type of the JSON body; None: no JSON body."""
    body_optional: bool = False
    response: Any = None
    """Type of the JSON answer; None: no content, or `media`."""
    status: int = 200
    query: tuple[Query, ...] = ()
    upload: bool = False
    """The body is a file."""
    media: str | None = None
    """Content type of an answer that is not JSON."""


def decode(content: bytes, kind: Any) -> Any:
    """Decode a JSON body strictly. Raises CallerError `request-invalid` naming the field."""
    try:
        raw = msgspec.json.decode(content)
        value = msgspec.convert(raw, kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CallerError("request-invalid", f"the request's body: {error}", "see /openapi.json") from error
    unknown = next(_unknown_fields(value, raw, "$"), None)
    if unknown is not None:
        raise CallerError("request-invalid", f"the request's body: unknown field {unknown}", "see /openapi.json")
    return value


def _unknown_fields(value: Any, raw: Any, path: str) -> Iterator[str]:
    """Yield what stands in the raw JSON and was not taken over.

    The shared records ignore unknown fields, because an agent of a newer version may add some; a person who asks for
    something that does not exist must hear of it.
    """
    if isinstance(value, msgspec.Struct):
        fields = {field.encode_name: field.name for field in msgspec.structs.fields(value)}
        for key, item in raw.items():
            if key not in fields:
                yield f"{path}.{key}"
            else:
                yield from _unknown_fields(getattr(value, fields[key]), item, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for index, (entry, item) in enumerate(zip(value, raw, strict=True)):
            yield from _unknown_fields(entry, item, f"{path}[{index}]")
