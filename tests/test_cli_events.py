"""`kvmhv events` against a scripted agent."""

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from kvmhv.cli import events, main
from kvmhv.model import ErrorBody, Event
from tests.cli_agent import Raw, Request, ScriptedAgent, scripted_agent

ONE = Event(number=7, at=1700000000.0, host="host1", kind="move-done", text="web01 moved", hyperv=20418, vm="web01")
ENOUGH = ErrorBody(code="enough", message="enough", todo="", exit_status=4)
"""How the test ends the stream that has no end."""
TWO = Event(number=8, at=1700000001.0, host="host1", kind="network-gap", text="the network gap was 0.1 s")


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedAgent]:
    monkeypatch.setenv("KVMHV_SOCKET", str(tmp_path / "agent.sock"))
    monkeypatch.delenv("KVMHV_HOST", raising=False)
    monkeypatch.setattr(events, "RETRY_S", 0.0)
    with scripted_agent(tmp_path / "agent.sock") as running:
        running.on("GET", "/v1/events", [ONE])
        yield running


def sse(event: Event) -> bytes:
    return f": still there\n\nid: {event.number}\nevent: event\ndata: ".encode() + msgspec.json.encode(event) + b"\n\n"


def test_the_kept_ones(agent: ScriptedAgent, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["events", "--after", "3", "--limit", "9"]) == 0
    shown = capsys.readouterr().out
    assert [cell for cell in ("7", "move-done", "20418", "web01 moved") if cell not in shown] == []
    assert agent.asked("GET", "/v1/events")[0].path == "/v1/events?limit=9&after=3"


def test_as_json(agent: ScriptedAgent, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--json", "events"]) == 0
    assert [event["hyperv"] for event in json.loads(capsys.readouterr().out)] == [20418]


def test_following_goes_on_where_it_was_when_the_agent_comes_back(
    agent: ScriptedAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    reached: list[str] = []

    def stream(request: Request) -> Raw:
        reached.append(request.path.partition("?")[2])
        parts = {1: [sse(TWO)], 3: [b"event: error\ndata: " + msgspec.json.encode(ENOUGH) + b"\n\n"]}
        return Raw(200, iter(parts.get(len(reached), [])))

    agent.on("GET", "/v1/events/stream", stream)
    assert main.main(["--json", "events", "--follow"]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["number"] for line in lines[:2]] == [7, 8]
    assert reached == ["after=7", "after=8", "after=8"]


def test_following_without_the_old_ones_begins_after_the_newest(
    agent: ScriptedAgent, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = b"event: error\ndata: " + msgspec.json.encode(ENOUGH) + b"\n\n"
    agent.on("GET", "/v1/events/stream", lambda request: Raw(200, iter([ends])))
    assert main.main(["events", "--follow", "--limit", "0"]) == 4
    assert capsys.readouterr().out == ""
    assert agent.asked("GET", "/v1/events/stream")[0].path.endswith("after=7")
