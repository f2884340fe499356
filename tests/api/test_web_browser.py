"""The live page in a real browser: sign in by keyboard, a move as it goes, its end, sign out, light and dark."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmhv.model import (
    DiskCopy,
    DiskFormat,
    DiskSaving,
    ErrorBody,
    Estimate,
    Layer,
    Mode,
    Outcome,
    Pass,
    Phase,
    QueuePlace,
    Switchover,
)
from tests.browser import Browser, browser

pytestmark = pytest.mark.timeout(180)

MIB = 1024**2
ENTER, TAB = "\ue007", "\ue004"
ESTIMATE = Estimate(
    seconds_low=8, seconds_likely=12.5, seconds_high=75, passes=10, switchover="pass-limit", blackout_ms=2400
)

SAVING = DiskSaving(
    disk="disk0",
    size_bytes=1024 * MIB,
    sent_bytes=100 * MIB,
    base_bytes=600 * MIB,
    unallocated_bytes=300 * MIB,
    zero_bytes=24 * MIB,
)
COUNTED_BY_NOBODY = DiskSaving(
    disk="disk1", size_bytes=64 * MIB, sent_bytes=None, base_bytes=0, unallocated_bytes=0, zero_bytes=None
)


def one_pass(number: int) -> Pass:
    return Pass(
        number=number,
        sent_bytes=100 * MIB,
        remaining_bytes=90 * MIB,
        dirty_bytes_per_second=45.0 * MIB,
        bytes_per_second=50.0 * MIB,
        seconds=2.0,
    )


async def test_the_page_in_a_browser(make_host: Any, move_report: Any, tmp_path: Path) -> None:
    host = await make_host("host1")
    async with host.local() as local, local.post("/v1/host/tokens", json={"name": "wall"}) as response:
        token = (await response.json())["token"]
    running = msgspec.structs.replace(
        move_report("m1"),
        vm="web01",
        source="host1",
        target="host2",
        outcome=Outcome.RUNNING,
        mode=Mode.SHARED_STORAGE,
        phase=Phase.MEMORY,
        passes=(one_pass(1),),
        progress=0.25,
        remaining_bytes=90 * MIB,
        throughput_bytes_per_s=50.0 * MIB,
        dirty_bytes_per_s=45.0 * MIB,
        estimate=ESTIMATE,
        ended_at=None,
    )
    loop = asyncio.get_running_loop()

    def change(*reports: Any) -> None:
        """What the host shows from now on; the agent lives in another thread than the browser."""
        loop.call_soon_threadsafe(lambda: host.moves.reports.__setitem__(slice(None), list(reports)))

    place = QueuePlace(place=1, until=1700000000.0, reason="host2 has 2 incoming moves and allows 2")
    waiting = msgspec.structs.replace(running, id="m3", vm="web03", phase=Phase.SETUP, passes=(), queue=place)
    host.services.queued_moves.waiting = (waiting,)
    saved = (SAVING, COUNTED_BY_NOBODY)
    ended = msgspec.structs.replace(running, id="m4", outcome=Outcome.DONE, ended_at=9.0, savings=saved)
    there = msgspec.structs.replace(ended, direction="in", network_gap_ms=210.0, savings=())
    host.moves.ended = [ended, there]
    await asyncio.to_thread(_look, f"https://{host.address}/", token, running, change, tmp_path)


def _look(url: str, token: str, running: Any, change: Any, tmp_path: Path) -> None:
    with browser() as window:
        window.size(1100, 1000)
        window.open(url)
        _sign_in(window, token)
        assert window.run("return location.href") == url, "no token in a URL"
        cookie = next(one for one in window.cookies() if one["name"] == "kvmhv_page")
        assert (cookie["httpOnly"], cookie["sameSite"], cookie["secure"]) == (True, "Strict", True)
        assert window.run("return document.cookie") == ""
        assert window.wait("return document.getElementById('state').textContent") == "live"
        _a_move(window, running, change, tmp_path)
        _read_aloud(window, running, change)
        _saved(window)
        _keyboard(window)
        window.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
        complaints = [one for one in window.complaints() if "401" not in one]
        assert complaints == []
        window.run("document.getElementById('logout').click()")
        window.wait("return !document.getElementById('login').hidden")
        assert window.cookies() == []
    with browser("--blink-settings=preferredColorScheme=0") as dark:
        dark.open(url)
        assert dark.run("return getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
        dark.size(1100, 1000)
        _sign_in(dark, token)
        dark.wait("return document.querySelectorAll('#saved tr').length === 2")
        dark.run("document.getElementById('saved').scrollIntoView()")
        dark.screenshot(tmp_path / "dark.png")


def _sign_in(window: Browser, token: str) -> None:
    window.wait("return !document.getElementById('login').hidden && document.activeElement.id === 'token'")
    window.type("kvmhv_wrong" + ENTER)
    window.wait("return document.getElementById('login-problem').textContent.includes('not valid')")
    window.type(token + ENTER)
    window.wait("return !document.getElementById('page').hidden")
    assert window.run("return document.getElementById('token').value") == ""


def _a_move(window: Browser, running: Any, change: Any, tmp_path: Path) -> None:
    change(running)
    text = window.wait("return document.querySelector('.move')?.innerText")
    for word in ("web01", "host1 → host2", "memory, 25 %", "about 13 s", "50 MiB/s", "2400 ms", "the pass limit"):
        assert word in text, text
    later = msgspec.structs.replace(running, passes=(*running.passes, one_pass(2)), progress=0.5)
    change(later)
    window.wait("return document.querySelector('.move .f-pass').textContent === '3'")
    assert window.run("return document.querySelector('.move .saved').hidden"), "no disk travels"
    change(msgspec.structs.replace(later, savings=(SAVING, COUNTED_BY_NOBODY), memory_zero_bytes=166 * MIB))
    text = window.wait("return document.querySelector('.move .saved').innerText")
    why = "600 MiB: the target has the base, 300 MiB: never stored, 24 MiB: zeros"
    assert text.splitlines() == [
        f"disk0: 924 MiB of 1 GiB did not have to be sent ({why})",
        "memory: 166 MiB did not have to be sent (166 MiB: pages of zeros)",
    ]
    window.screenshot(tmp_path / "saved.png")
    bar = "return document.querySelector('[role=progressbar]').getAttribute('aria-valuenow')"
    assert window.run(bar) == "50"
    before = window.run("return document.querySelector('.move path.left').getAttribute('d')")
    change(msgspec.structs.replace(later, remaining_bytes=40 * MIB))
    window.wait("return document.querySelector('.move path.left').getAttribute('d') !== arguments[0]", before)
    change(
        msgspec.structs.replace(
            later, phase=Phase.STATE, estimate=None, switchover=Switchover(reason="pass-limit", pass_number=2)
        )
    )
    window.wait("return document.getElementById('told').lastChild?.textContent === 'web01: state phase'")
    _a_move_that_stands(window, later, change)
    change()
    window.wait("return !document.querySelector('.move') && !document.getElementById('no-moves').hidden")


def _a_move_that_stands(window: Browser, later: Any, change: Any) -> None:
    """It says what to do, on a small screen too, and the plot has followed the screen's width."""
    wide = window.run("return document.querySelector('.move svg').getAttribute('viewBox')")
    window.size(390, 900)
    window.wait("return document.querySelector('.move svg').getAttribute('viewBox') !== arguments[0]", wide)
    error = ErrorBody(code="handover-unknown", message="x", todo="bring host2 back", host="host1")
    change(msgspec.structs.replace(later, outcome=Outcome.NEEDS_OPERATOR, estimate=None, reason="unknown", error=error))
    window.wait("return document.getElementById('told').lastChild?.textContent === 'web01: needs the operator'")
    text = window.run("return document.querySelector('.move').innerText")
    assert "unknown. What to do: bring host2 back" in text, text
    window.wait("return document.documentElement.scrollWidth <= 390")
    window.size(1100, 1000)


def _read_aloud(window: Browser, running: Any, change: Any) -> None:
    """What a screen reader is given: everything has a name, headings leave no level out, nothing is said twice."""
    layers = {
        name: (Layer(location=name, path="db01/disk0.qcow2", format=DiskFormat.QCOW2),) for name in ("default", "nfs")
    }
    disk = DiskCopy(
        disk="disk0", size_bytes=MIB, used_bytes=MIB, source_layers=layers["default"], target_layers=layers["nfs"]
    )
    alone = msgspec.structs.replace(
        running,
        id="m2",
        vm="db01",
        target="host1",
        direction="here",
        mode=Mode.STORAGE,
        phase=Phase.STORAGE,
        passes=(),
        disks=(disk,),
    )
    change(running, alone)
    window.wait("return document.querySelectorAll('.move').length === 2")
    change(*(msgspec.structs.replace(one, remaining_bytes=MIB, storage_copied_bytes=1) for one in (running, alone)))
    window.wait("return document.querySelectorAll('.move svg g').length === 2")
    said = "return [...document.getElementById('told').children].map((one) => one.textContent)"
    assert {"web01: memory phase", "db01: storage phase"} <= set(window.run(said)), "each is said, also both at once"
    text = window.run("return document.querySelectorAll('.move')[1].innerText")
    assert "Dirtied" not in text, "a guest whose disks move alone is not sent"
    seen = window.accessible()
    levels = [node["level"] for node in seen if node["role"] == "heading"]
    assert levels[0] == 1
    assert all(later <= earlier + 1 for earlier, later in itertools.pairwise(levels)), levels
    named = {
        "progressbar",
        "button",
        "link",
        "region",
        "group",
        "image",
        "columnheader",
        "rowheader",
        "list",
        "article",
    }
    assert [node for node in seen if node["role"] in named and not node["name"]] == []
    names = [node["name"] for node in seen]
    assert any("host2 has 2 incoming moves and allows 2" in name for name in names), "what waits for a slot says why"
    for name in ("web01, host1 to host2", "db01, host1/default to host1/nfs", "Progress of web01", "Progress of db01"):
        assert names.count(name) == 1, names
    change()


def _saved(window: Browser) -> None:
    """What an ended move did not have to send: its source knows it, its network gap is known by its target."""
    rows = "return [...document.querySelectorAll('#last tr')]"
    cells = rows + ".map((one) => [...one.children].map((cell) => cell.textContent))"
    (last,) = window.run(cells)
    assert (last[5], last[8]) == ("210 ms", "924 MiB"), last
    whole, unknown = window.run(cells.replace("#last", "#saved"))
    assert whole[1:5] == ["disk0", "1 GiB", "100 MiB", "924 MiB"]
    assert whole[5] == "600 MiB: the target has the base, 300 MiB: never stored, 24 MiB: zeros"
    assert unknown[1:6] == ["disk1", "64 MiB", "-", "0 B", "-"]


def _keyboard(window: Browser) -> None:
    """Everything that can be used is reached by Tab and shows that it has the focus."""
    window.run("document.activeElement.blur()")
    seen = []
    for _ in range(8):
        window.type(TAB)
        seen.append(window.run("const one = document.activeElement; return one.className || one.id"))
    assert {"skip", "logout", "scroll"} <= set(seen), seen
    window.run("document.getElementById('logout').focus()")
    assert window.run("return document.querySelector(':focus-visible') !== null")
    names = window.run(
        "return [...document.querySelectorAll('[role=region],[role=img],[role=progressbar],section,input')].map("
        "(one) => one.getAttribute('aria-label') || one.getAttribute('aria-labelledby') || one.labels?.length || "
        "one.querySelector('title') !== null)"
    )
    assert all(names), "everything has a name for screen readers"
