"""What a move leaves beside its record, each once; and the journal's stop watch."""

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from kvmhv.agent.chronicle import RECENT, Chronicle
from kvmhv.agent.events import move_refused_in
from kvmhv.agent.metrics import Metrics, Snapshot
from kvmhv.agent.timed_journal import TimedJournal
from kvmhv.errors import Refused
from kvmhv.model import HostSettings, Outcome
from tests.cli_agent import report
from tests.test_events import Memory, made

DONE = msgspec.structs.replace(report(outcome=Outcome.DONE), direction="in", blackout_ms=80.0)


def count(metrics: Metrics, name: str) -> float:
    text = metrics.render(Snapshot(vms=(), moves=(), settings=HostSettings())).decode()
    return sum(
        sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    )


def test_a_gap_is_counted_once_whenever_it_comes() -> None:
    early, late = Metrics("1", "a"), Metrics("1", "b")
    with_gap = msgspec.structs.replace(DONE, network_gap_ms=95.0)
    log = made(Memory())
    Chronicle(early, log).ended(with_gap)
    assert [event.kind for event in log.list()] == ["move-done", "network-gap"]
    chronicle = Chronicle(late, log)
    chronicle.ended(DONE)
    chronicle.network_gap(with_gap)
    for metrics in (early, late):
        assert count(metrics, "kvmhv_migration_network_gap_seconds_count") == 1
        assert count(metrics, "kvmhv_migrations_total") == 1
    assert chronicle.recent() == (with_gap,)


def test_an_answer_to_the_probe_is_the_source_s_and_counted_once_whenever_it_comes() -> None:
    early, late = Metrics("1", "a"), Metrics("1", "b")
    leaving = msgspec.structs.replace(DONE, direction="out")
    answered = msgspec.structs.replace(leaving, answer_gap_ms=99.0)
    log = made(Memory())
    Chronicle(early, log).ended(answered)
    assert [event.kind for event in log.list()].count("answer-gap") == 1
    chronicle = Chronicle(late, log)
    chronicle.ended(leaving)
    chronicle.answer_gap(answered)
    for metrics in (early, late):
        assert count(metrics, "kvmhv_migration_answer_gap_seconds_count") == 1
    assert chronicle.recent() == (answered,)
    at_target = Metrics("1", "c")
    Chronicle(at_target, log).ended(msgspec.structs.replace(answered, direction="in"))
    assert count(at_target, "kvmhv_migration_answer_gap_seconds_count") == 0


def test_a_move_that_was_not_admitted_is_told_and_counted() -> None:
    metrics, log = Metrics("1", "a"), made(Memory())
    error = Refused("limit-reached", "host2 has 2 incoming moves and allows 2")
    Chronicle(metrics, log).refused("in", error, move_refused_in("host1", "web01", error))
    assert count(metrics, "kvmhv_migrations_refused_total") == 1
    assert count(metrics, "kvmhv_migrations_total") == 0
    assert [(event.kind, event.hyperv) for event in log.list()] == [("move-refused", 21501)]


def test_the_same_trouble_is_told_once() -> None:
    log = made(Memory())
    chronicle = Chronicle(Metrics("1", "a"), log)
    stuck = msgspec.structs.replace(DONE, outcome=Outcome.NEEDS_OPERATOR, reason="the other host is silent")
    chronicle.need_operator(stuck)
    chronicle.need_operator(stuck)
    chronicle.need_operator(msgspec.structs.replace(stuck, reason="the disk is full"))
    assert [event.text for event in log.list()] == ["the other host is silent", "the disk is full"]
    chronicle.ended(DONE)
    chronicle.need_operator(stuck)
    assert [event.kind for event in log.list()][-1] == "needs-operator"


def test_the_last_moves_are_at_hand_after_a_restart() -> None:
    kept = [msgspec.json.encode(msgspec.structs.replace(DONE, id=str(number))) for number in range(50)]
    recent = Chronicle(Metrics("1", "a"), made(Memory()), kept).recent()
    assert [one.id for one in recent] == [str(number) for number in range(49, 49 - RECENT, -1)]


class Journal:
    volatile_id = "v"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def write(self, move_id: str, role: str, state: bytes, *, durable: bool) -> None:
        self.calls.append(f"write {move_id} {role} {durable}")

    def load(self) -> tuple[tuple[str, str, bytes], ...]:
        return (("m", "source", b"s"),)

    def end(self, move_id: str, role: str, report: bytes) -> None:
        self.calls.append(f"end {move_id} {role}")

    def reports(self) -> tuple[bytes, ...]:
        return (b"r",)


def test_the_journal_is_timed_and_otherwise_untouched() -> None:
    inner, heard = Journal(), list[tuple[bool, float]]()
    timed = TimedJournal(inner, lambda durable, seconds: heard.append((durable, seconds)))
    timed.write("m", "source", b"s", durable=False)
    timed.end("m", "source", b"r")
    assert inner.calls == ["write m source False", "end m source"]
    assert [durable for durable, _ in heard] == [False, True]
    assert all(0 <= seconds < 1 for _, seconds in heard)
    assert (timed.load(), timed.reports(), timed.volatile_id) == (inner.load(), inner.reports(), "v")
