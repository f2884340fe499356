"""The host's events: numbered, kept, bounded, told to who listens; and what a move's end says."""

import asyncio

import msgspec
import pytest

from kvmhv.agent import events
from kvmhv.agent.events import Events
from kvmhv.errors import Refused
from kvmhv.model import Asked, Event, Mode, MoveReport, Outcome, Pass, Phase, PhaseTime, Switchover

REPORT = MoveReport(
    id="m1",
    vm="web01",
    vm_id="id-1",
    source="host1",
    target="host2",
    direction="out",
    mode=Mode.SHARED_NOTHING,
    outcome=Outcome.DONE,
    reason=None,
    error=None,
    phase=Phase.CLEANUP,
    phases=(PhaseTime(phase=Phase.MEMORY, seconds=3.25), PhaseTime(phase=Phase.STATE, seconds=0.1)),
    passes=(
        Pass(number=1, sent_bytes=9, remaining_bytes=8, dirty_bytes_per_second=1, bytes_per_second=2, seconds=3),
        Pass(number=2, sent_bytes=9, remaining_bytes=8, dirty_bytes_per_second=1, bytes_per_second=2, seconds=3),
    ),
    switchover=Switchover(reason="threshold", pass_number=2, remaining_bytes=8192),
    blackout_ms=87.4,
    blackout_uncertainty_ms=0.5,
    memory_bytes=9,
    disk_bytes=0,
    findings=(),
    progress=1.0,
    remaining_bytes=0,
    storage_total_bytes=0,
    storage_copied_bytes=0,
    warnings=(),
    started_at=1.0,
    ended_at=9.0,
)
ASKED = Asked(who="ops", authentication="token", address="10.0.0.9")


class Memory:
    """ports.Records in memory."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, str], bytes] = {}

    def put(self, kind: str, key: str, value: bytes) -> None:
        self.kept[kind, key] = value

    def get(self, kind: str, key: str) -> bytes | None:
        return self.kept.get((kind, key))

    def all(self, kind: str) -> tuple[tuple[str, bytes], ...]:
        return tuple((key, value) for (of, key), value in sorted(self.kept.items()) if of == kind)

    def delete(self, kind: str, key: str) -> None:
        self.kept.pop((kind, key), None)


class Clock:
    def monotonic_ms(self) -> float:
        return 0.0

    def wall_s(self) -> float:
        return 1700000000.0


def made(records: Memory, kept: int = 2000) -> Events:
    return Events(records, Clock(), "host1", kept)


def note(text: str) -> Event:
    return Event(number=0, at=0, host="", kind="test", text=text)


def test_events_survive_and_go_on_counting() -> None:
    records = Memory()
    made(records).add(note("one"), note("two"))
    again = made(records)
    again.add(note("three"))
    assert [(event.number, event.text, event.host) for event in again.list()] == [
        (1, "one", "host1"),
        (2, "two", "host1"),
        (3, "three", "host1"),
    ]
    assert [event.text for event in again.list(after=1)] == ["two", "three"]
    assert [event.text for event in again.list(most=1)] == ["three"]


def test_what_is_kept_is_bounded_on_disk_too() -> None:
    records = Memory()
    log = made(records, kept=5)
    for number in range(20):
        log.add(note(f"{number}a"), note(f"{number}b"))
        assert len(log.list()) <= 6
        assert len(records.kept) <= 3
    assert [event.number for event in made(records, kept=5).list()] == [35, 36, 37, 38, 39, 40]


async def test_followers_hear_of_what_comes() -> None:
    log = made(Memory())
    log.add(note("before"))
    heard: list[str] = []

    async def listen(after: int | None) -> None:
        nonlocal heard
        async for event in log.follow(after):  # without end: nothing to gather
            heard += [event.text]

    tasks = [asyncio.create_task(listen(None)), asyncio.create_task(listen(0))]
    await asyncio.sleep(0)
    log.add(note("now"))
    for _ in range(5):
        await asyncio.sleep(0)
    assert sorted(heard) == ["before", "now", "now"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def numbers(report: MoveReport) -> list[int | None]:
    return [event.hyperv for event in events.move_ended(report)]


def test_a_good_end_has_hyperv_s_numbers() -> None:
    assert numbers(REPORT) == [22508, 22509, 20415, 20418]
    assert [event.text for event in events.move_ended(REPORT)] == [
        "the brownout lasted 3.25 s, 2 passes",
        "the blackout lasted 0.087 s, 2 dirty pages",
        "the move finished with a blackout of 0.087 s",
        "web01 moved from host1 to host2",
    ]
    assert numbers(msgspec.structs.replace(REPORT, direction="in")) == [20418]
    assert numbers(msgspec.structs.replace(REPORT, blackout_ms=63100.0)) == [22508, 22509, 20417, 20418]


def test_other_ends() -> None:
    error = Refused("limit-reached", "host2 takes 2 moves at a time").body()
    refused = msgspec.structs.replace(REPORT, outcome=Outcome.FAILED, error=error, reason=error.message)
    assert numbers(refused) == [21501]
    assert "host2 takes 2 moves" in events.move_ended(refused)[0].text
    failed = msgspec.structs.replace(refused, error=msgspec.structs.replace(error, code="peer-lost"))
    assert numbers(failed) == [21502]
    cancelled = msgspec.structs.replace(REPORT, outcome=Outcome.CANCELLED, reason="cancelled by ops")
    assert [(event.kind, event.hyperv) for event in events.move_ended(cancelled)] == [("move-cancelled", None)]


def test_who_asked_is_told() -> None:
    asked = events.move_asked(REPORT, ASKED)
    assert (asked.asked, asked.text) == (ASKED, "token ops at 10.0.0.9 asked to move web01 from host1 to host2")
    refused = events.move_refused("web01", "host2", ASKED, Refused("limit-reached", "2 moves go out already"))
    assert (refused.hyperv, refused.asked) == (21501, ASKED)
    assert events.move_refused("a", "b", ASKED, Refused("vm-in-move", "no")).hyperv is None


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        (Asked(who="uid 0 (pid 7)", authentication="local"), "local uid 0 (pid 7)"),
        (ASKED, "token ops at 10.0.0.9"),
        (
            Asked(who="local uid 0 (pid 7)", authentication="host", address="10.0.0.2", via="host2"),
            "local uid 0 (pid 7) via host host2 at 10.0.0.2",
        ),
    ],
)
def test_who_asked_in_words(asked: Asked, text: str) -> None:
    assert str(asked) == text
