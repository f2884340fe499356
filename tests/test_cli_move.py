"""`vm check`, `vm move` and `move` against a scripted agent, and the console over a socket pair."""

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from kvmhv.cli import console, watch, websocket
from kvmhv.cli.address import Address
from kvmhv.cli.connection import Agent, AgentGone
from kvmhv.cli.main import main
from kvmhv.cli.progress import Silent
from kvmhv.errors import CallerError, Incompatible
from kvmhv.model import ErrorBody, Finding, Mode, Outcome, Pass, Phase, PhaseTime, QueuePlace, Severity, Switchover
from tests.cli_agent import Raw, ScriptedAgent, events, report, scripted_agent

Run = Callable[..., tuple[int, str, str]]

PASS = Pass(
    number=1,
    sent_bytes=1024**2,
    remaining_bytes=0,
    dirty_bytes_per_second=0.0,
    bytes_per_second=1024.0**2,
    seconds=1.0,
)
RUNNING = report(phase=Phase.MEMORY)
DONE = report(
    outcome=Outcome.DONE,
    mode=Mode.SHARED_NOTHING,
    phase=Phase.CLEANUP,
    phases=tuple(PhaseTime(phase=phase, seconds=0.5) for phase in Phase),
    passes=(PASS,),
    switchover=Switchover(reason="threshold", pass_number=1),
    blackout_ms=41.5,
    blackout_uncertainty_ms=1.5,
    memory_bytes=1024**2,
    progress=1.0,
    ended_at=1012.0,
)
FAILED = report(
    outcome=Outcome.FAILED,
    reason="host2: no memory",
    error=ErrorBody(code="memory-full", message="host2: no memory", todo="free some", host="host2", exit_status=1),
)
EVENTS = f"/v1/moves/{DONE.id}/events"


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedAgent]:
    monkeypatch.setenv("KVMHV_SOCKET", str(tmp_path / "agent.sock"))
    monkeypatch.delenv("KVMHV_HOST", raising=False)
    monkeypatch.setattr(watch, "RETRY_S", 0.0)
    with scripted_agent(tmp_path / "agent.sock") as running:
        running.on("POST", "/v1/vms/web01/move", report())
        running.on("GET", "/v1/moves", [DONE])
        yield running


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_move_ends_with_the_contracts_object(agent: ScriptedAgent, run: Run) -> None:
    agent.on("GET", EVENTS, lambda _: events(RUNNING, DONE))
    status, out, err = run("vm", "move", "web01", "--to", "host2", "--include-storage", "--json")
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 1
    found = json.loads(out)
    assert {key: found[key] for key in ("id", "vm", "source", "target", "mode", "outcome", "reason")} == {
        "id": DONE.id,
        "vm": "web01",
        "source": "host1",
        "target": "host2",
        "mode": "shared-nothing",
        "outcome": "done",
        "reason": None,
    }
    assert found["phases"][0] == {"phase": "setup", "seconds": 0.5}
    assert (
        found["passes"][0].items()
        >= {
            "number": 1,
            "sent_bytes": 1024**2,
            "remaining_bytes": 0,
            "dirty_bytes_per_second": 0.0,
            "seconds": 1.0,
        }.items()
    )
    assert found["switchover"].items() >= {"reason": "threshold", "pass": 1}.items()
    assert (found["blackout_ms"], found["memory_bytes"], found["disk_bytes"]) == (41.5, 1024**2, 0)


def test_a_move_that_waits_for_a_slot_says_for_what(agent: ScriptedAgent, run: Run) -> None:
    place = QueuePlace(place=2, until=RUNNING.started_at + 600, reason="host2 is full", setting="migration.moves_in")
    waiting = msgspec.structs.replace(RUNNING, phase=Phase.SETUP, phases=(), passes=(), queue=place)
    first = msgspec.structs.replace(waiting, queue=msgspec.structs.replace(place, place=1))
    agent.on("GET", EVENTS, lambda _: events(waiting, waiting, first, RUNNING, DONE))
    status, out, _ = run("vm", "move", "web01", "--to", "host2", "--queue", "10")
    assert status == 0
    assert agent.requests[0].json()["queue_s"] == 600
    lines = [line for line in out.splitlines() if "in the queue" in line]
    assert [line.split(" in the queue")[0] for line in lines] == ["number 2", "number 1"]
    assert all(line.endswith("at most: host2 is full") for line in lines)
    assert out.index("number 1") < out.index("phase memory")
    agent.on("GET", "/v1/moves", [waiting])
    assert " queued " in run("move", "list")[1]
    assert "waits for a slot" in run("move", "show", RUNNING.id)[1]


def test_a_move_in_plain_lines(agent: ScriptedAgent, run: Run) -> None:
    agent.on("GET", EVENTS, lambda _: events(RUNNING, DONE))
    status, out, _ = run(
        *("vm", "move", "web01", "--to", "host2", "--max-passes", "3", "--threshold", "1M", "--bandwidth", "8mbit"),
        *("--storage", "fast"),
    )
    assert status == 0
    assert agent.requests[0].json() == {
        "vm": "web01",
        "target": "host2",
        "storage": "fast",
        "max_passes": 3,
        "threshold_bytes": 1024**2,
        "bandwidth_bytes_per_s": 1_000_000,
    }
    for text in ("phase memory\npass 1: sent 1 MiB", "blackout    41.5 ms (± 1.5 ms)", "threshold, after pass 1"):
        assert text in out


def test_no_wait(agent: ScriptedAgent, run: Run) -> None:
    status, out, _ = run("vm", "move", "web01", "--to", "host2", "--no-wait", "--json")
    assert (status, json.loads(out)["outcome"]) == (0, "running")
    assert not agent.asked("GET", EVENTS)


def test_a_failed_move(agent: ScriptedAgent, run: Run) -> None:
    agent.on("GET", EVENTS, lambda _: events(RUNNING, FAILED))
    status, out, err = run("vm", "move", "web01", "--to", "host2", "--json")
    assert (status, json.loads(out)["outcome"]) == (1, "failed")
    assert err == "error: host2: no memory [memory-full] (host2)\nwhat to do: free some\n"


def test_a_refused_move_has_the_refusals_status(agent: ScriptedAgent, run: Run) -> None:
    def refuse(_request: object) -> object:
        raise CallerError("move-to-itself", "web01 is there already", "name another host")

    agent.on("POST", "/v1/vms/web01/move", refuse)
    assert run("vm", "move", "web01", "--to", "host1")[0] == 2


def test_check_and_dry_run(agent: ScriptedAgent, run: Run) -> None:
    error = Finding(id="switch-missing", severity=Severity.ERROR, object="nic0", host="host2", text="no", todo="add")
    warning = Finding(id="cpu-slow", severity=Severity.WARNING, object="web01", host="host2", text="slow", todo="-")
    agent.on("POST", "/v1/vms/web01/check", {"findings": [warning], "plan": None})
    assert run("vm", "check", "web01", "--to", "host2")[0] == 0
    agent.on("POST", "/v1/vms/web01/check", {"findings": [warning, error], "plan": None})
    for command in (("vm", "check"), ("vm", "move", "--dry-run")):
        status, out, _ = run(*command, "web01", "--to", "host2")
        assert status == Incompatible.exit_status
        assert out.index("switch-missing") < out.index("cpu-slow")
    assert len(json.loads(run("vm", "check", "web01", "--to", "host2", "--json")[1])["findings"]) == 2
    assert not agent.asked("POST", "/v1/vms/web01/move")


def test_ids_may_be_shortened(agent: ScriptedAgent, run: Run) -> None:
    assert run("move", "show", DONE.id[:3])[0] == 0
    agent.on("GET", "/v1/moves", [DONE, report(id=DONE.id[:3] + "ffff")])
    status, _, err = run("move", "show", DONE.id[:3])
    assert (status, "[move-ambiguous]" in err) == (2, True)
    assert run("move", "show", DONE.id)[0] == 0


def test_the_agent_may_restart_meanwhile(agent: ScriptedAgent, run: Run) -> None:
    def streams() -> Iterator[object]:
        yield events(RUNNING)
        yield ConnectionError()
        yield events(RUNNING, DONE)

    script = streams()

    def answer(_request: object) -> object:
        found = next(script)
        if isinstance(found, Exception):
            raise found
        return found

    agent.on("GET", EVENTS, answer)
    assert run("move", "watch", DONE.id)[0] == 0
    assert len(agent.asked("GET", EVENTS)) == 3


def test_an_agent_that_stays_away_is_given_up(tmp_path: Path) -> None:
    clock = iter(range(0, 1000, 10))
    waited: list[float] = []
    nobody = Agent(Address(host=None, socket=tmp_path / "none.sock"))
    with pytest.raises(AgentGone) as caught:
        list(watch.follow(nobody, "abc", now=lambda: float(next(clock)), wait=waited.append))
    assert caught.value.code == "agent-lost"
    assert "kvmhv move watch abc" in caught.value.todo
    assert 1 < len(waited) < 10


class Interrupting(Silent):
    """Presses Ctrl-C at the given reports."""

    def __init__(self, *presses: int) -> None:
        self.shown = 0
        self.said: list[str] = []
        self._presses = presses

    def show(self, report: object) -> None:
        self.shown += 1
        if self.shown in self._presses:
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.said.append(text)


def test_ctrl_c_cancels_and_waits_for_the_answer(agent: ScriptedAgent) -> None:
    cancelled = report(outcome=Outcome.CANCELLED)
    agent.on("POST", f"/v1/moves/{DONE.id}/cancel", report(outcome=Outcome.CANCELLED))
    cancels = f"/v1/moves/{DONE.id}/cancel"
    agent.on("GET", EVENTS, lambda _: events(RUNNING, cancelled if agent.asked("POST", cancels) else RUNNING))
    view = Interrupting(2)
    found = watch.until_end(Agent(Address(host=None, socket=agent.socket)), DONE.id, view, cancel_on_interrupt=True)
    assert found.outcome is Outcome.CANCELLED
    assert len(agent.asked("POST", cancels)) == 1
    assert view.said == ["cancelling the move; press Ctrl-C again to leave it as it is"]


def test_a_cancel_that_comes_too_late_is_told(agent: ScriptedAgent) -> None:
    def refuse(_request: object) -> object:
        raise CallerError("cancel-late", "the target runs it already", http_status=409)

    agent.on("POST", f"/v1/moves/{DONE.id}/cancel", refuse)
    agent.on("GET", EVENTS, lambda _: events(RUNNING, DONE))
    view = Interrupting(1)
    found = watch.until_end(Agent(Address(host=None, socket=agent.socket)), DONE.id, view, cancel_on_interrupt=True)
    assert found.outcome is Outcome.DONE
    assert view.said[1] == "the target runs it already [cancel-late]"


@pytest.mark.parametrize(("presses", "cancels"), [((1, 2), 1), ((1,), 0)])
def test_the_last_ctrl_c_leaves_the_move_alone(agent: ScriptedAgent, presses: tuple[int, ...], cancels: int) -> None:
    agent.on("POST", f"/v1/moves/{DONE.id}/cancel", report(outcome=Outcome.CANCELLED))
    agent.on("GET", EVENTS, lambda _: events(RUNNING))
    view = Interrupting(*presses)
    with pytest.raises(KeyboardInterrupt):
        watch.until_end(
            Agent(Address(host=None, socket=agent.socket)), DONE.id, view, cancel_on_interrupt=bool(cancels)
        )
    assert view.said[-1] == f"move {DONE.id} goes on; see it with: kvmhv move watch {DONE.id}"
    assert len(agent.asked("POST", f"/v1/moves/{DONE.id}/cancel")) == cancels


@pytest.mark.parametrize(
    ("outcome", "status"),
    [(Outcome.CANCELLED, 0), (Outcome.RUNNING, 0), (Outcome.DONE, 1), (Outcome.NEEDS_OPERATOR, 5)],
)
def test_move_cancel_says_how_it_ended(agent: ScriptedAgent, run: Run, outcome: Outcome, status: int) -> None:
    agent.on("POST", f"/v1/moves/{DONE.id}/cancel", report(outcome=outcome))
    found, out, err = run("move", "cancel", DONE.id[:4], "--json")
    assert (found, json.loads(out)["outcome"]) == (status, outcome)
    assert ("[cancel-late]" in err) == (status != 0)


def test_an_error_in_the_stream_is_raised(agent: ScriptedAgent, run: Run) -> None:
    body = ErrorBody(code="move-lost", message="its record is gone", todo="-", exit_status=2)
    agent.on("GET", EVENTS, lambda _: Raw(200, iter([b"event: error\ndata: " + msgspec.json.encode(body) + b"\n\n"])))
    status, _, err = run("move", "watch", DONE.id)
    assert (status, "[move-lost]" in err) == (2, True)


# --- the console --------------------------------------------------------------------------------------------------


def test_the_console_copies_both_ways_and_ends_with_the_console() -> None:
    ours, theirs = socket.socketpair()
    source, typing = os.pipe()
    shown, sink = os.pipe()
    with ours, theirs:
        os.write(typing, b"ls\n")
        os.close(typing)
        theirs.sendall(b"\x89\x02hi" + b"\x82\x05login" + b"\x88\x00")
        console.attach(ours, source, sink)
        ours.close()
        sent = b"".join(iter(lambda: theirs.recv(4096), b""))
    for descriptor in (source, sink):
        os.close(descriptor)
    with os.fdopen(shown, "rb") as output:
        assert output.read() == b"login"
    assert sent[:2] in (b"\x82\x83", b"\x8a\x82"), "what was typed, or the answer to the ping"
    assert websocket.PONG in {byte & 0x0F for byte in sent}


def test_the_console_ends_when_nobody_reads() -> None:
    ours, theirs = socket.socketpair()
    source, typing = os.pipe()
    shown, sink = os.pipe()
    os.close(shown)
    with ours, theirs:
        theirs.sendall(b"\x82\x05login")
        console.attach(ours, source, sink)
    for descriptor in (source, typing, sink):
        os.close(descriptor)


def test_ctrl_bracket_leaves_a_terminal() -> None:
    ours, theirs = socket.socketpair()
    terminal, keyboard = os.openpty()[::-1]
    with ours, theirs:
        with console.raw_terminal(terminal):
            os.write(keyboard, b"exit\x1d")
            console.attach(ours, terminal, terminal)
        ours.close()
        sent = b"".join(iter(lambda: theirs.recv(4096), b""))
    os.close(terminal)
    os.close(keyboard)
    assert (sent[0], sent[1]) == (0x82, 0x84)
    assert sent[10] == 0x88, "it says that it leaves"
