"""The OpenAPI 3.1 description, generated from the table of routes."""

import re
from typing import Any

import msgspec

from kvmhv.agent.api.access import Access
from kvmhv.agent.api.route import Route
from kvmhv.agent.web.sessions import COOKIE
from kvmhv.model import ErrorBody

REF = "#/components/schemas/{name}"

DESCRIPTION = (
    "kvmhv's agent. Each path under /v1/ is also there as /v1/hosts/{host}/...: the agent forwards it to the /v1/... "
    "of a host that it trusts. Requests with unknown fields are refused. Errors are an ErrorBody with a stable code."
)

WHO = {
    Access.API: "The local socket, trusted hosts, bearer tokens.",
    Access.PEER: "Trusted hosts only.",
    Access.METRICS: "The local socket, trusted hosts, bearer tokens, and the configured subnets.",
    Access.PAGE: "The local socket, trusted hosts, bearer tokens, and who has signed in to the live page.",
    Access.OPEN: "Everybody who reaches the port.",
}

SECURITY: dict[Access, list[dict[str, list[str]]]] = {
    Access.API: [{"token": []}, {"trustedHost": []}],
    Access.PEER: [{"trustedHost": []}],
    Access.METRICS: [{"token": []}, {"trustedHost": []}, {}],
    Access.PAGE: [{"token": []}, {"trustedHost": []}, {"page": []}],
    Access.OPEN: [],
}


def document(routes: tuple[Route, ...], version: str) -> dict[str, Any]:
    """Return the whole description."""
    kinds: dict[str, Any] = {}
    for route in routes:
        for kind in (route.request, route.response):
            if kind is not None:
                kinds[str(kind)] = kind
    kinds[str(ErrorBody)] = ErrorBody
    schemas, components = msgspec.json.schema_components(list(kinds.values()), schema_hook=_anything, ref_template=REF)
    schema_of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, schema_of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvmhv", "version": version, "description": DESCRIPTION, "license": {"name": "MIT"}},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"},
                "page": {"type": "apiKey", "in": "cookie", "name": COOKIE, "description": "The live page's cookie."},
                "trustedHost": {"type": "mutualTLS", "description": "The certificate of a host that is trusted."},
            },
        },
    }


def _anything(kind: type) -> dict[str, Any]:
    if kind is object:  # a value of any kind: the settings' values
        return {"description": "A boolean, a number, a text or a list of texts."}
    raise NotImplementedError(kind)


def _operation(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(route),
        "summary": route.doc,
        "description": WHO[route.access],
        "tags": [route.path.split("/")[2] if route.path.startswith("/v1/") else "machines"],
        "security": SECURITY[route.access],
        "parameters": _parameters(route),
        "responses": {
            str(route.status if _has_answer(route) else 204): _answer(route, schema_of),
            "default": {
                "description": "What went wrong.",
                "content": {"application/json": {"schema": schema_of[str(ErrorBody)]}},
            },
        },
    }
    if route.upload:
        operation["requestBody"] = {"required": True, "content": {"application/octet-stream": {}}}
    elif route.request is not None:
        operation["requestBody"] = {
            "required": not route.body_optional,
            "content": {"application/json": {"schema": schema_of[str(route.request)]}},
        }
    return operation


def _operation_id(route: Route) -> str:
    words = [word for word in re.split(r"[^A-Za-z0-9]+", route.path) if word not in ("", "v1")]
    return "_".join((route.method.lower(), *words))


def _parameters(route: Route) -> list[dict[str, Any]]:
    named: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"\{(\w+)\}", route.path)
    ]
    named += [
        {"name": query.name, "in": "query", "description": query.doc, "schema": {"type": query.type}}
        for query in route.query
    ]
    return named


def _has_answer(route: Route) -> bool:
    return route.response is not None or route.media is not None or route.status == 101


def _answer(route: Route, schema_of: dict[str, Any]) -> dict[str, Any]:
    if route.response is not None:
        return {
            "description": "Done.",
            "content": {"application/json": {"schema": schema_of[str(route.response)]}},
        }
    if route.media is not None:
        return {"description": "Done.", "content": {route.media: {}}}
    return {"description": "A WebSocket." if route.status == 101 else "Done, nothing to say."}
