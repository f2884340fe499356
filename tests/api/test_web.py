"""The live page over real sockets: its files, its cookie, what the cookie opens and what it does not."""

import asyncio
import json
import re
from typing import Any

import aiohttp
import msgspec

from kvmhv.agent.api.routes import ROUTES
from kvmhv.agent.web.sessions import LASTS_S
from kvmhv.model import Event, Outcome


async def make_token(host: Any, name: str = "wall") -> str:
    async with host.local() as local, local.post("/v1/host/tokens", json={"name": name}) as response:
        token: str = (await response.json())["token"]
        return token


async def sign_in(browser: aiohttp.ClientSession, token: str) -> str:
    """Return the Set-Cookie header."""
    async with browser.post("/web/session", json={"token": token}) as response:
        assert response.status == 204, await response.text()
        return response.headers["Set-Cookie"]


def cookie_of(set_cookie: str) -> dict[str, str]:
    return {"Cookie": set_cookie.partition(";")[0]}


async def test_the_files_are_there_for_everybody_and_load_nothing_from_outside(make_host: Any) -> None:
    host = await make_host("host1")
    async with host.remote() as stranger:
        for path, kind in (
            ("/", "text/html"),
            ("/web/page.css", "text/css"),
            ("/web/page.js", "text/javascript"),
            ("/web/plot.js", "text/javascript"),
        ):
            async with stranger.get(path) as response:
                assert (response.status, response.content_type) == (200, kind)
                policy = response.headers["Content-Security-Policy"]
                assert policy.startswith("default-src 'none'")
                assert "unsafe" not in policy
                assert "frame-ancestors 'none'" in policy
                text = await response.text()
                assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), path
        async with stranger.get("/web/sessions.py") as response:
            assert response.status == 404


async def test_a_token_once_then_a_cookie_that_only_reads_the_page(make_host: Any) -> None:
    host = await make_host("host1")
    token = await make_token(host)
    async with host.remote() as browser:
        async with browser.get("/web/page") as response:
            assert response.status == 401
        async with browser.post("/web/session", json={"token": "kvmhv_wrong"}) as response:
            assert (response.status, (await response.json())["code"]) == (401, "not-authorised")
            assert "Set-Cookie" not in response.headers
        set_cookie = await sign_in(browser, token)
        for word in ("HttpOnly", "SameSite=Strict", "Secure", f"Max-Age={LASTS_S}", "Path=/"):
            assert word in set_cookie
        assert token not in set_cookie
        cookie = cookie_of(set_cookie)
        async with browser.get("/web/page", headers=cookie) as response:
            page = await response.json()
            assert (response.status, page["by_cookie"], page["hosts"][0]["name"]) == (200, True, "host1")
        for route in ROUTES:
            if route.access in ("api", "peer", "metrics"):
                path = re.sub(r"\{\w+\}", "x", route.path)
                async with browser.request(route.method, path, headers=cookie) as response:
                    assert response.status in (401, 403), path
        async with browser.get("/v1/hosts/host1/vms", headers=cookie) as response:
            assert response.status == 401


async def test_a_cookie_dies_with_its_token_and_by_age_and_cannot_be_forged(make_host: Any) -> None:
    host = await make_host("host1")
    token = await make_token(host)
    sessions = host.services.sessions
    value = sessions.open(token)
    assert sessions.name_of(value) == "wall"
    name, ends, seal = value.split(":")
    for wrong in (
        "",
        "x",
        f"{name}:{int(ends) + 1}:{seal}",
        f"other:{ends}:{seal}",
        f"{name}:{ends}:",
        "ü" * 9,
        "a" * 999,
    ):
        assert sessions.name_of(wrong) is None, wrong
    await make_token(host, "other")
    assert sessions.name_of(f"other:{ends}:{seal}") is None
    host.services.tokens.revoke("wall")
    assert sessions.name_of(value) is None
    assert sessions.open(token) is None
    await make_token(host)
    assert sessions.name_of(value) is None, "another token of the same name"


async def test_other_sites_cannot_sign_anybody_in(make_host: Any) -> None:
    host = await make_host("host1")
    token = await make_token(host)
    async with host.remote() as browser:
        content = json.dumps({"token": token})
        async with browser.post("/web/session", data=content, headers={"Content-Type": "text/plain"}) as response:
            assert response.status == 415
        headers = {"Content-Type": "application/json", "Sec-Fetch-Site": "cross-site"}
        async with browser.post("/web/session", data=content, headers=headers) as response:
            assert response.status == 415


async def test_the_stream_tells_changes_and_ends_with_the_token(make_host: Any, move_report: Any) -> None:
    host = await make_host("host1")
    token = await make_token(host)
    async with host.remote() as browser:
        cookie = cookie_of(await sign_in(browser, token))
        async with browser.get("/web/live", headers=cookie) as response:
            assert response.content_type == "text/event-stream"
            first = await next_page(response)
            assert first["hosts"][0]["view"]["moves"] == []
            assert first["hosts"][0]["view"]["vms"][0]["name"] == "web01"
            host.moves.reports.append(msgspec.structs.replace(move_report("m1"), outcome=Outcome.RUNNING))
            second = await next_page(response)
            assert [move["id"] for move in second["hosts"][0]["view"]["moves"]] == ["m1"]
            host.services.tokens.revoke("wall")
            async with asyncio.timeout(10):
                assert await response.content.read() is not None


async def test_the_page_shows_trusted_hosts_and_says_which_do_not_answer(make_host: Any, befriend: Any) -> None:
    one, two = await make_host("host1"), await make_host("host2")
    await befriend(one, two)
    async with one.local() as browser:
        page = await page_with(browser, lambda hosts: len(hosts) == 2 and hosts[1]["view"])
        assert [(host["name"], host["own"]) for host in page["hosts"]] == [("host1", True), ("host2", False)]
        assert page["hosts"][1]["view"]["vms"][0]["name"] == "web01"
        assert page["by_cookie"] is False
        await two.listener.close()
        page = await page_with(browser, lambda hosts: hosts[1]["problem"])
        assert page["hosts"][1]["view"] is None
    await one.services.other_hosts.close()


async def page_with(browser: aiohttp.ClientSession, wanted: Any) -> dict[str, Any]:
    async with asyncio.timeout(20):
        while True:
            async with browser.get("/web/page") as response:
                page: dict[str, Any] = await response.json()
            if wanted(page["hosts"]):
                return page
            await asyncio.sleep(0.2)


async def next_page(response: aiohttp.ClientResponse) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while True:
            line = await response.content.readline()
            if line.startswith(b"data: "):
                page: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                return page


async def test_events_are_listed_and_followed(make_host: Any) -> None:
    host = await make_host("host1")
    log = host.services.events
    log.add(Event(number=0, at=0, host="", kind="one", text="first", hyperv=20418))
    async with host.local() as local:
        async with local.get("/v1/events") as response:
            assert [(it["number"], it["hyperv"]) for it in await response.json()] == [(1, 20418)]
        async with local.get("/v1/events?after=x") as response:
            assert (response.status, (await response.json())["code"]) == (400, "request-invalid")
        async with local.get("/v1/events/stream", headers={"Last-Event-ID": "0"}) as response:
            assert (await next_page(response))["text"] == "first"
            log.add(Event(number=0, at=0, host="", kind="two", text="second"))
            assert (await next_page(response))["text"] == "second"
