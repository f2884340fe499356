"""The REST API on the local socket: routes, strictness, errors, streams."""

import asyncio
import grp
import json
import os
import re
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhv.agent.api.move_routes import paced
from kvmhv.agent.api.openapi import document
from kvmhv.agent.api.route import decode
from kvmhv.agent.api.routes import ROUTES
from kvmhv.errors import CallerError, HostError
from kvmhv.model import VmSpec


async def test_host_report(make_host: Any) -> None:
    host = await make_host("host1")
    async with host.local() as local, local.get("/v1/host") as response:
        body = await response.json()
    assert (response.status, body["name"], body["fingerprint"]) == (200, "host1", host.trust.fingerprint)
    assert body["qemu"] is None and body["accel_reason"] == "no QEMU here"
    assert body["settings"]["migration.moves_out"] == 2
    assert body["switches"] == ["lan"]


async def test_settings_change_all_or_none(make_host: Any) -> None:
    host = await make_host("host1")
    async with host.local() as local:
        changes = {"migration.enabled": "true", "migration.moves_in": "many"}
        async with local.patch("/v1/host/settings", json={"changes": changes}) as response:
            assert (response.status, (await response.json())["code"]) == (400, "setting-invalid")
        assert host.services.settings.current.enabled is False
        async with local.patch("/v1/host/settings", json={"changes": {"migration.enabled": "true"}}) as response:
            assert (await response.json())["settings"]["migration.enabled"] is True


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/v1/nothing", None, 404, "route-unknown"),
        ("GET", "/web/nothing", None, 404, "route-unknown"),
        ("DELETE", "/v1/host", None, 405, "method"),
        ("GET", "/v1/vms/web99", None, 404, "vm-unknown"),
        ("GET", "/v1/vms/boom", None, 500, "internal"),
        ("POST", "/v1/vms", b"{", 400, "request-invalid"),
        ("POST", "/v1/vms", b"\xff\xfe", 400, "request-invalid"),
        ("POST", "/v1/vms", b"", 400, "request-invalid"),
        ("POST", "/v1/vms", b"[" * 5000, 400, "request-invalid"),
        ("POST", "/v1/vms", b'{"name":"a","memory_bytes":1,"memroy":2}', 400, "request-invalid"),
        ("POST", "/v1/vms", b'{"name":"a","memory_bytes":1,"disks":[{"sice":1}]}', 400, "request-invalid"),
        ("POST", "/v1/vms", b'{"name":"a","memory_bytes":"1"}', 400, "request-invalid"),
        ("POST", "/v1/vms/web01/stop", b'{"timeout_s":-1}', 400, "request-invalid"),
        ("POST", "/v1/vms/web01/move", b'{"vm":"other","target":"host2"}', 400, "request-invalid"),
        ("POST", "/v1/vms/web01/move-storage", b'{"vm":"other","location":"nfs"}', 400, "request-invalid"),
        ("POST", "/v1/vms/web01/move-storage", b'{"vm":"web01","location":"nfs","lun":-1}', 400, "request-invalid"),
        ("DELETE", "/v1/vms/web01?keep_disks=perhaps", None, 400, "request-invalid"),
        ("PUT", "/v1/images/a/bios", b"x", 404, "image-part"),
        ("PUT", "/v1/images/a/disk?format=vmdk", b"x", 400, "request-invalid"),
        ("GET", "/v1/moves/m1", None, 404, "move-unknown"),
        ("GET", "/v1/moves/m1/events", None, 404, "move-unknown"),
        ("POST", "/v1/host/trust/join", b'{"code":"nonsense"}', 400, "code-invalid"),
        ("POST", "/v1/host/trust/invite", b'{"address":"0.0.0.0:6600"}', 400, "address-invalid"),
        ("POST", "/v1/host/trust/invite", b'{"address":"host1"}', 400, "address-invalid"),
        ("DELETE", "/v1/host/trust/host9", None, 404, "host-unknown"),
        ("DELETE", "/v1/host/tokens/none", None, 404, "token-unknown"),
        ("POST", "/v1/host/tokens", b'{"name":"a b"}', 400, "name-invalid"),
        ("GET", "/v1/hosts/host9/vms", None, 404, "host-unknown"),
        ("GET", "/peer/move", None, 403, "peer-untrusted"),
    ],
)
async def test_each_mistake_gets_one_clear_error(
    make_host: Any, method: str, path: str, body: bytes | None, status: int, code: str
) -> None:
    host = await make_host("host1")
    async with host.local() as local, local.request(method, path, data=body) as response:
        text = await response.text()
    error = json.loads(text)
    assert (response.status, error["code"]) == (status, code)
    assert set(error) == {"code", "message", "todo", "host", "exit_status", "findings"}
    assert "secret" not in text and "Traceback" not in text


async def test_a_body_over_the_bound_is_refused(make_host: Any) -> None:
    host = await make_host("host1", limits={"request_bytes": 4096})
    async with host.local() as local, local.post("/v1/vms", data=b" " * 5000) as response:
        assert (response.status, (await response.json())["code"]) == (413, "request-too-large")


async def test_vms(make_host: Any) -> None:
    host = await make_host("host1")
    async with host.local() as local:
        spec = {"name": "a", "memory_bytes": 1 << 20, "disks": [{"size_bytes": 512, "format": "raw"}]}
        async with local.post("/v1/vms", json=spec) as response:
            assert (response.status, (await response.json())["vm"]["name"]) == (201, "a")
        async with local.post("/v1/vms/a/start") as response:
            assert (response.status, (await response.json())["state"]) == (200, "running")
        async with local.post("/v1/vms/a/stop") as response:
            assert response.status == 200
        async with local.post("/v1/vms/a/stop", json={"force": True, "timeout_s": 3}) as response:
            assert response.status == 200
        async with local.delete("/v1/vms/a?keep_disks=true") as response:
            assert (response.status, await response.read()) == (204, b"")
        async with local.get("/v1/vms") as response:
            assert [vm["name"] for vm in await response.json()] == ["web01"]
    assert host.vms.calls[1:] == [("stop", "a", False, None), ("stop", "a", True, 3.0), ("remove", "a", True)]


async def test_an_upload_is_streamed(make_host: Any) -> None:
    host = await make_host("host1", limits={"request_bytes": 4096})
    content = bytes(range(256)) * 4096

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 65536):
            yield content[start : start + 65536]

    async with host.local() as local:
        for data in (content, chunks()):
            async with local.put("/v1/images/lin/kernel", data=data, params={"append": "quiet"}) as response:
                assert (await response.json())["kernel_bytes"] == len(content)
            assert host.images.stored == {"lin/kernel": content}
    assert host.images.options == {"append": "quiet", "format": None}


async def test_an_upload_that_breaks_off_is_no_image(make_host: Any) -> None:
    host = await make_host("host1")
    _, writer = await asyncio.open_unix_connection(host.config.socket_path)
    writer.write(b"PUT /v1/images/lin/kernel HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nonly this")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with host.local() as local, local.get("/v1/images") as response:
        assert response.status == 200
    assert host.images.stored == {}


async def test_console_passes_bytes_both_ways(make_host: Any, tmp_path: Path) -> None:
    host = await make_host("host1")

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"login: ")
        while data := await reader.read(100):
            writer.write(data.upper())
        writer.close()

    server = await asyncio.start_unix_server(echo, tmp_path / "console")
    host.vms.console = tmp_path / "console"
    async with host.local() as local, local.ws_connect("/v1/vms/web01/console") as terminal:
        assert await terminal.receive_bytes() == b"login: "
        await terminal.send_bytes(b"root\xff\n")
        assert await terminal.receive_bytes() == b"ROOT\xff\n"
        async with local.get("/v1/vms/web01/console") as second:
            assert (second.status, (await second.json())["code"]) == (409, "console-busy")
    # The same through the forwarder.
    async with host.local() as local, local.ws_connect("/v1/hosts/host1/vms/web01/console") as terminal:
        assert await terminal.receive_bytes() == b"login: "
        await terminal.send_bytes(b"x")
        assert await terminal.receive_bytes() == b"X"
    server.close()


async def test_console_that_nobody_serves(make_host: Any, tmp_path: Path) -> None:
    host = await make_host("host1")
    host.vms.console = tmp_path / "nothing"
    async with host.local() as local:
        with pytest.raises(aiohttp.WSServerHandshakeError):
            await local.ws_connect("/v1/vms/web01/console")


async def test_moves(make_host: Any, move_report: Any) -> None:
    host = await make_host("host1")
    host.moves.reports = [move_report("abc1"), move_report("abd2")]
    async with host.local() as local:
        request = {"vm": "web01", "target": "host2"}
        async with local.post("/v1/vms/web01/check", json=request) as response:
            assert await response.json() == {"findings": [], "plan": None, "refused": False}
        async with local.post("/v1/vms/web01/move", json=request) as response:
            assert (response.status, (await response.json())["id"]) == (202, "m1")
        disks = {"vm": "web01", "location": "nfs", "disks": ["disk0"]}
        async with local.post("/v1/vms/web01/move-storage", json=disks) as response:
            assert (response.status, (await response.json())["id"]) == (202, "s1")
        async with local.get("/v1/moves/abc") as response:
            assert (await response.json())["id"] == "abc1"
        async with local.post("/v1/moves/abd2/cancel") as response:
            assert (await response.json())["outcome"] == "cancelled"
    assert all(re.fullmatch(r"local uid \d+ \(pid \d+\)", caller) for caller in host.moves.callers)


async def test_events_end_with_the_ended_report(make_host: Any, move_report: Any) -> None:
    host = await make_host("host1")
    host.moves.reports = [move_report("abc1")]
    async with host.local() as local, local.get("/v1/hosts/host1/moves/a/events") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        events = [event for event in (await response.text()).split("\n\n") if event]
    assert all(event.startswith("event: move\ndata: ") for event in events)
    assert json.loads(events[-1].partition("data: ")[2])["outcome"] == "done"


async def test_the_doors_close_though_somebody_watches(make_host: Any, move_report: Any) -> None:
    host = await make_host("host1")
    host.moves.reports = [move_report("abc1")]

    async def watch(move_id: str) -> AsyncIterator[Any]:
        yield move_report("abc1")
        await asyncio.Event().wait()

    host.moves.watch = watch
    async with host.local() as local, local.get("/v1/moves/abc1/events") as response:
        assert (await response.content.readline()).startswith(b"event: move")
        async with asyncio.timeout(4):
            await host.listener.close()
        assert not host.config.socket_path.exists()
        with pytest.raises(aiohttp.ClientError):
            await response.read()


async def test_paced_skips_all_but_the_newest_and_beats(move_report: Any) -> None:
    go_on = asyncio.Event()

    async def reports() -> AsyncIterator[Any]:
        for number in range(100):
            yield move_report(f"m{number}")
        await go_on.wait()
        yield move_report("last")
        raise HostError("broken", "the watch broke")

    seen = []
    async for event in paced(reports(), 0.0, 0.01):
        seen.append(event)
        if event.startswith(b":"):
            go_on.set()
    assert seen[0].startswith(b"event: move") and b'"id":"m99"' in seen[0]
    assert seen[1] == b": still there\n\n"
    assert b'"id":"last"' in seen[-2]
    assert seen[-1].startswith(b'event: error\ndata: {"code":"broken"')


async def test_the_last_report_does_not_wait_for_its_interval(move_report: Any) -> None:
    async def reports() -> AsyncIterator[Any]:
        yield move_report("first")
        await asyncio.sleep(0)
        yield move_report("last")

    async with asyncio.timeout(10):
        seen = [event async for event in paced(reports(), 3600.0, 3600.0)]
    assert b'"id":"last"' in seen[-1]


async def test_openapi_has_every_route_and_resolves(make_host: Any) -> None:
    host = await make_host("host1")
    async with host.local() as local, local.get("/openapi.json") as response:
        text = await response.text()
    described = json.loads(text)
    assert described == json.loads(json.dumps(document(ROUTES, described["info"]["version"])))
    assert described["openapi"] == "3.1.0"
    for route in ROUTES:
        operation = described["paths"][route.path][route.method.lower()]
        named = {entry["name"] for entry in operation["parameters"] if entry["in"] == "path"}
        assert named == set(re.findall(r"\{(\w+)\}", route.path))
        assert ("requestBody" in operation) == (route.request is not None or route.upload)
        assert operation["responses"]
    ids = [operation["operationId"] for path in described["paths"].values() for operation in path.values()]
    assert len(ids) == len(set(ids)) == len(ROUTES)
    for reference in re.findall(r'"\$ref":\s*"#/([^"]+)"', text):
        found: Any = described
        for part in reference.split("/"):
            found = found[part]
        assert found
    served = {(route.method, route.resource.canonical) for route in _routes(host) if route.method != "HEAD"}
    assert served == {(route.method, route.path) for route in ROUTES} | {("*", "/v1/hosts/{host}/{rest}")}


def _routes(host: Any) -> list[Any]:
    return list(host.listener._runner.app.router.routes())


async def test_socket_is_roots_alone_without_the_group(make_host: Any) -> None:
    host = await make_host("host1")
    assert stat.S_IMODE(host.config.socket_path.stat().st_mode) == 0o600


async def test_socket_is_for_the_group_where_it_exists(make_host: Any) -> None:
    own = grp.getgrgid(os.getgid())
    host = await make_host("host1", socket_group=own.gr_name)
    found = host.config.socket_path.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, own.gr_gid)


async def test_socket_of_a_dead_agent_is_replaced_and_of_a_live_one_not(make_host: Any, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(run_dir / "agent.sock"))
    stale.close()
    host = await make_host("host1", run_dir=str(run_dir))
    async with host.local() as local, local.get("/v1/vms") as response:
        assert response.status == 200
    with pytest.raises(HostError, match="another agent"):
        await make_host("host2", run_dir=str(run_dir))
    async with host.local() as local, local.get("/v1/vms") as response:
        assert response.status == 200


async def test_what_is_no_socket_is_left_alone(make_host: Any, tmp_path: Path) -> None:
    (tmp_path / "agent.sock").write_text("precious")
    with pytest.raises(HostError, match="no socket"):
        await make_host("host1", run_dir=str(tmp_path))
    assert (tmp_path / "agent.sock").read_text() == "precious"


async def test_a_taken_port_is_one_clear_error(make_host: Any) -> None:
    host = await make_host("host1")
    with pytest.raises(HostError) as caught:
        await make_host("host2", listen=host.address)
    assert caught.value.code == "listen"


@given(st.binary(max_size=200) | st.from_regex(rb'\\{"name":"a","memory_bytes":[0-9]{1,40},"[a-z]{1,9}":.{0,40}\\}'))
def test_a_body_is_decoded_or_refused(content: bytes) -> None:
    try:
        assert isinstance(decode(content, VmSpec), VmSpec)
    except CallerError as error:
        assert error.code == "request-invalid"
