"""Probes: what may be asked, the questions over a real network stack, and when an answer counts."""

import asyncio
import socket
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from kvmhv.agent.answer_gap import AnswerGap
from kvmhv.core import first_frame, probe
from kvmhv.drivers.host import HostClock
from kvmhv.drivers.probes import NetworkProbes
from kvmhv.errors import CallerError
from kvmhv.model import BlackoutStep, Outcome, Probe, ProbeKind
from tests.cli_agent import report

PING = Probe(kind=ProbeKind.PING, address="10.0.0.5")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ping:10.0.0.5", "ping:10.0.0.5"),
        ("ping:fd00::0:5", "ping:fd00::5"),
        ("tcp:10.0.0.5:22", "tcp:10.0.0.5:22"),
        ("tcp:[fd00::5]:22", "tcp:[fd00::5]:22"),
        ("http://10.0.0.5", "http://10.0.0.5:80/"),
        ("http://[fd00::5]:8080/health?deep=1", "http://[fd00::5]:8080/health?deep=1"),
    ],
)
def test_what_may_be_asked(text: str, shown: str) -> None:
    assert str(probe.parse(text)) == shown
    assert probe.parse(shown) == probe.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "ping", "ping:", "ping:web01", "ping:10.0.0.500", "ping:10.0.0.5:1", "tcp:10.0.0.5", "tcp:10.0.0.5:0",
        "tcp:10.0.0.5:65536", "tcp:fd00::5:22", "tcp:web01:22", "http://web01/", "http://10.0.0.5/a b",
        "http://10.0.0.5/\r\nX: y", "https://10.0.0.5/", f"http://10.0.0.5/{'a' * 400}",
    ],
)  # fmt: skip
def test_what_may_not(text: str) -> None:
    with pytest.raises(CallerError) as caught:
        probe.parse(text)
    assert caught.value.code == "probe-invalid"


# --- the questions


async def answer_after(
    probes: NetworkProbes, asked: Probe, begin: Callable[[], Awaitable[None]]
) -> tuple[float, float]:
    """(when the guest began to answer, when it was seen to), in ms of one clock."""
    asking = asyncio.create_task(probes.first_answer_ms(asked, 20.0))
    await asyncio.sleep(0.1)
    assert not asking.done()
    begun_ms = HostClock().monotonic_ms()
    await begin()
    seen_ms = await asking
    assert seen_ms is not None
    return begun_ms, seen_ms


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
async def test_ping(ip: str) -> None:
    probes = NetworkProbes(HostClock())
    before_ms = HostClock().monotonic_ms()
    answered_ms = await probes.first_answer_ms(Probe(kind=ProbeKind.PING, address=ip), 10.0)
    assert answered_ms is not None
    assert before_ms - 1 <= answered_ms <= HostClock().monotonic_ms()


async def test_nobody_is_there() -> None:
    probes = NetworkProbes(HostClock())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        for kind, address in (
            (ProbeKind.PING, "240.0.0.1"),
            (ProbeKind.TCP, "127.0.0.1"),
            (ProbeKind.HTTP, "127.0.0.1"),
        ):
            asked = Probe(kind=kind, address=address, port=taken.getsockname()[1], path="/")
            assert await probes.first_answer_ms(asked, 0.2) is None, asked


async def test_tcp_and_http_are_asked_until_somebody_answers() -> None:
    probes = NetworkProbes(HostClock())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    servers: list[asyncio.Server] = []
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(b"HTTP/1.1 503 Busy\r\n\r\n")
        await writer.drain()
        writer.close()

    async def begin() -> None:
        servers.append(await asyncio.start_server(serve, "127.0.0.1", port))

    for kind in (ProbeKind.TCP, ProbeKind.HTTP):
        asked_of = Probe(kind=kind, address="127.0.0.1", port=port, path="/health")
        begun_ms, seen_ms = await answer_after(probes, asked_of, begin)
        assert seen_ms >= begun_ms
        servers[-1].close()
        await servers[-1].wait_closed()
    assert b"GET /health HTTP/1.1\r\n" in asked


async def test_a_port_that_takes_connections_and_says_nothing_is_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        asked = Probe(kind=ProbeKind.HTTP, address="127.0.0.1", port=silent.getsockname()[1], path="/")
        assert await NetworkProbes(HostClock()).first_answer_ms(asked, 0.3) is None


# --- when an answer counts


class Asked:
    """ports.Probes: each call is a question whose answer the test gives."""

    def __init__(self) -> None:
        self.questions: list[asyncio.Future[float | None]] = []

    async def first_answer_ms(self, probe: Probe, timeout_s: float) -> float | None:
        self.questions.append(asyncio.get_running_loop().create_future())
        return await self.questions[-1]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_is_asked_while_the_guest_runs_here_is_no_answer() -> None:
    asked, answers, silences = Asked(), list[float](), list[str]()
    gap = AnswerGap(asked, PING)
    gap.on_answer, gap.on_silence = answers.append, silences.append
    gap.prepare()
    await settle()
    gap.stopped()
    await settle()
    assert asked.questions[0].cancelled()
    asked.questions[1].set_result(1234.0)
    await gap.close(let_it_ask=True)
    assert (answers, gap.answered_ms, silences) == ([1234.0], 1234.0, [])


async def test_a_guest_that_is_silent_before_is_told_of_once_asked_again() -> None:
    asked, silences = Asked(), list[str]()
    gap = AnswerGap(asked, PING)
    gap.on_silence = silences.append
    gap.prepare()
    await settle()
    asked.questions[0].set_result(None)
    await settle()
    assert silences == ["ping:10.0.0.5"]
    await gap.close(let_it_ask=True)


async def test_a_guest_that_goes_on_here_is_asked_no_more() -> None:
    asked, answers = Asked(), list[float]()
    gap = AnswerGap(asked, PING)
    gap.on_answer = answers.append
    gap.prepare()
    gap.stopped()
    await settle()
    gap.resumed()
    async with asyncio.timeout(5):
        await gap.close(let_it_ask=True)
    assert answers == []
    assert gap.answered_ms is None


async def test_without_a_probe_nothing_is_asked() -> None:
    asked = Asked()
    gap = AnswerGap(asked, None)
    gap.prepare()
    gap.stopped()
    await settle()
    await gap.close(let_it_ask=True)
    assert asked.questions == []


def test_an_answer_that_comes_after_the_end_completes_the_record() -> None:
    running = BlackoutStep(name="running", host="host2", at_ms=80.0)
    done = msgspec.structs.replace(report(outcome=Outcome.DONE), blackout_ms=80.0, blackout_steps=(running,))
    amended = first_frame.answered(done, 95.0)
    assert amended.answer_gap_ms == 95.0
    assert [one.name for one in amended.blackout_steps] == ["running", "first-answer"]
    assert first_frame.answered(amended, 99.0) is amended
    assert first_frame.answered(done, None) is done
