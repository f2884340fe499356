"""Each route of the OpenAPI document with paths, queries, bodies made from it and garbled: never an unknown error."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhv.agent.api import openapi
from kvmhv.agent.api.routes import ROUTES
from kvmhv.config import from_data
from kvmhv.model import ErrorBody
from tests.api.conftest import compose
from tests.fuzz import garble

DOCUMENT = openapi.document(ROUTES, "0")
KNOWN = set(re.findall(r"^## `([a-z0-9-]+)`", (Path(__file__).parents[2] / "docs/errors.md").read_text(), re.MULTILINE))
OPERATIONS = sorted((path, method) for path, methods in DOCUMENT["paths"].items() for method in methods)
ENDS_ALONE = re.compile(r"(watch|follow|stream|live|events)")
"""A request that is answered for as long as somebody listens: its beginning is looked at."""


def _of(schema: dict[str, Any], depth: int = 0) -> st.SearchStrategy[Any]:
    """Values that a schema allows, or nearly."""
    if "$ref" in schema:
        return st.deferred(lambda: _of(DOCUMENT["components"]["schemas"][schema["$ref"].rpartition("/")[2]], depth + 1))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "anyOf" in schema:
        return st.one_of([_of(one, depth) for one in schema["anyOf"]])
    kind = schema.get("type")
    if kind == "object" and "properties" in schema:
        needed = {name: _of(schema["properties"][name], depth) for name in schema.get("required", [])}
        more = {name: _of(one, depth) for name, one in schema["properties"].items() if name not in needed}
        return st.fixed_dictionaries(needed, optional=more)
    if kind == "array":
        return st.lists(_of(schema["items"], depth), max_size=3) if "items" in schema else st.just([])
    return {
        "string": st.one_of(
            st.sampled_from(("web01", "host2", "10.0.0.1", "nic0", "1G")), st.sampled_from(garble.TEXTS)
        ),
        "integer": st.integers(0, 2**40),
        "number": st.floats(0, 1e9),
        "boolean": st.booleans(),
        "null": st.none(),
    }.get(str(kind), garble.junk)


@st.composite
def _request(draw: st.DrawFn) -> tuple[str, str, list[tuple[str, str]], bytes]:
    path, method = draw(st.sampled_from(OPERATIONS))
    operation = DOCUMENT["paths"][path][method]
    words = st.one_of(
        st.sampled_from(("web01", "m1", "boot", "lan")), st.sampled_from(garble.TEXTS), st.text(max_size=9)
    )
    query = []
    for parameter in operation["parameters"]:
        if parameter["in"] == "path":
            path = path.replace("{" + parameter["name"] + "}", quote(draw(words), safe="", errors="replace"))
        elif draw(st.booleans()):
            query.append((parameter["name"], draw(st.one_of(words, garble.junk.map(str)))))
    if draw(st.integers(0, 5)) == 0:
        query.append((draw(st.text(max_size=5)), draw(words)))
    content = operation.get("requestBody", {}).get("content", {})
    body = draw(st.binary(max_size=50)) if draw(st.integers(0, 9)) == 0 else b""
    if "application/json" in content:
        value = draw(_of(content["application/json"]["schema"]))
        body = draw(st.one_of(st.just(json.dumps(value).encode()), garble.frames(value)))
    query = [tuple(text.encode(errors="replace").decode() for text in pair) for pair in query]  # type: ignore[misc]
    return method.upper(), path, query, body


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[asyncio.Runner, aiohttp.ClientSession]]:
    """A whole API over its UNIX socket, in one loop for all requests."""
    root = tmp_path_factory.mktemp("rest")
    settings_of = {
        "name": "host1",
        "listen": "127.0.0.1:0",
        "advertise": "127.0.0.1:1",
        "socket_group": "no-such-group",
    }
    places = {"state_dir": str(root / "state"), "run_dir": str(root / "run")}
    with asyncio.Runner() as runner:
        host = runner.run(_started({**settings_of, **places}))
        session = runner.run(_session(host))
        yield runner, session
        runner.run(session.close())
        host.moves.serving_ends.set()
        runner.run(host.listener.close())
        host.database.close()
    structlog.reset_defaults()


async def _started(data: dict[str, object]) -> Any:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    host = compose(from_data(data, "test"))
    host.vms.console = Path("/nowhere/console.sock")
    await host.listener.start()
    return host


async def _session(host: Any) -> aiohttp.ClientSession:
    return host.local()  # type: ignore[no-any-return]


async def _ask(session: aiohttp.ClientSession, method: str, path: str, query: Any, body: bytes) -> tuple[int, bytes]:
    async with asyncio.timeout(20), session.request(method, path, params=query, data=body or None) as answer:
        stream = answer.status < 400 and (answer.content_type == "text/event-stream" or ENDS_ALONE.search(path))
        return answer.status, b"" if stream else await answer.read()


@given(_request())
@settings(max_examples=150 if settings.default.max_examples < 1000 else 3000)
def test_each_request_is_answered_or_refused(agent: Any, asked: tuple[str, str, Any, bytes]) -> None:
    runner, session = agent
    status, content = runner.run(_ask(session, *asked))
    if status < 400:
        return
    error = msgspec.json.decode(content, type=ErrorBody)
    assert error.code in KNOWN, error
    assert error.code != "internal", error
    assert len(content) < 20_000, "an answer that repeats what it was sent"


def test_every_operation_is_asked() -> None:
    assert len(OPERATIONS) > 40
