"""Moves that wait for a slot: whose turn it is, what is kept of them, and how they leave the queue."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from kvmhv.agent.chronicle import Chronicle
from kvmhv.agent.metrics import Metrics
from kvmhv.agent.move_queue import MoveQueue
from kvmhv.agent.settings import Settings
from kvmhv.config import from_data
from kvmhv.core import move_queue
from kvmhv.core.admission import Load, Promise
from kvmhv.core.move_queue import ASK_AGAIN_MS, Queued
from kvmhv.drivers.database import Database
from kvmhv.errors import CallerError, PeerUnreachable, Refused
from kvmhv.model import Asked, HostSettings, MoveReport, MoveRequest, Outcome, Refusal, Vm
from kvmhv.wire.session import SOURCE
from tests.cli_agent import report
from tests.test_events import Memory, made

ON = HostSettings(enabled=True)
IDLE = Load(moves_out=0, moves_in=0, storage_copies=0)
FULL_TARGET = Refusal(code="limit-reached", host="host2", setting="migration.moves_in", text="host2 is full")
NO_COPIES = msgspec.structs.replace(FULL_TARGET, setting="migration.storage_copies")


def queued(name: str, target: str = "host2", *, with_storage: bool = False, refusal: Refusal | None = None) -> Queued:
    return Queued(move_id=name, target=target, with_storage=with_storage, refusal=refusal)


def turns(*queue: Queued, load: Load = IDLE, settings: HostSettings = ON, now_ms: float = 0.0) -> list[str]:
    seen = move_queue.look(settings, "host1", load, queue, now_ms)
    assert [one.move_id for one in seen] == [one.move_id for one in queue]
    return [one.move_id for one in seen if one.trying]


def test_the_first_goes_first_and_only_as_many_as_there_are_slots() -> None:
    three = queued("a", "host2"), queued("b", "host3"), queued("c", "host4")
    assert turns(*three) == ["a", "b"]
    assert turns(*three, load=Load(moves_out=1, moves_in=0, storage_copies=0)) == ["a"]
    assert turns(*three, load=Load(moves_out=2, moves_in=0, storage_copies=0)) == []


def test_what_it_waits_for_is_said() -> None:
    full = Load(moves_out=2, moves_in=0, storage_copies=0)
    (one,) = move_queue.look(ON, "host1", full, [queued("a")], 0)
    assert one.refusal is not None
    assert move_queue.reason(one, "host1") == "moves_out"
    assert move_queue.reason(queued("a", refusal=FULL_TARGET), "host1") == "target_moves_in"
    assert move_queue.reason(queued("a", refusal=NO_COPIES), "host1") == "target_storage_copies"
    assert move_queue.reason(queued("a"), "host1") == "other"


def test_a_full_target_is_asked_again_later_and_holds_up_nobody_who_goes_elsewhere() -> None:
    tried = move_queue.refused(msgspec.structs.replace(queued("a"), trying=True), FULL_TARGET, 1000.0)
    assert turns(tried, queued("b"), queued("c", "host3"), now_ms=2000.0) == ["c"]
    seen = move_queue.look(ON, "host1", IDLE, (tried, queued("b")), 2000.0)
    assert seen[1].refusal == FULL_TARGET, "who stands behind it waits for the same"
    assert turns(tried, queued("b"), now_ms=1000.0 + ASK_AGAIN_MS) == ["a"]


def test_one_that_waits_for_a_copy_at_its_target_holds_up_only_those_with_disks() -> None:
    tried = move_queue.refused(queued("a", with_storage=True), NO_COPIES, 0.0)
    assert turns(tried, queued("b", with_storage=True), queued("c")) == ["c"]


def test_one_that_needs_a_copy_here_lets_those_without_disks_go() -> None:
    copying = Load(moves_out=0, moves_in=0, storage_copies=2)
    assert turns(queued("a", with_storage=True), queued("b"), load=copying) == ["b"]


def test_one_that_is_being_begun_is_not_begun_twice() -> None:
    assert turns(msgspec.structs.replace(queued("a"), trying=True), queued("b")) == ["a"]
    (now,) = move_queue.look(ON, "host1", IDLE, [msgspec.structs.replace(queued("a"), trying=True)], 0)
    assert now.refusal is None


def test_a_promised_slot_is_a_slot() -> None:
    promises = [
        Promise(out=True, with_storage=True, until_ms=1.0),
        Promise(out=False, with_storage=False, until_ms=1.0),
    ]
    assert IDLE.plus(promises) == Load(moves_out=1, moves_in=1, storage_copies=1)
    assert IDLE.plus([]) == IDLE


# --- the agent's queue


class Clock:
    now_s = 1000.0

    def monotonic_ms(self) -> float:
        return self.now_s * 1000

    def wall_s(self) -> float:
        return self.now_s


class Open:
    """The open moves of a host."""

    def __init__(self) -> None:
        self.moves_out = 0
        self.promises: set[str] = set()
        self.known: set[str] = set()

    def load(self, but: str = "") -> Load:
        return Load(moves_out=self.moves_out + len(self.promises - {but}), moves_in=0, storage_copies=0)

    def promise(self, move_id: str, *, out: bool, with_storage: bool, for_s: float) -> None:
        assert out
        self.promises.add(move_id)

    def withdraw(self, move_id: str) -> None:
        self.promises.discard(move_id)

    def any(self, move_id: str) -> object | None:
        return self if move_id in self.known else None

    @property
    def ended(self) -> asyncio.Event:
        done = asyncio.Event()
        done.set()
        return done


class Stage:
    """A queue over a real database, and what its moves meet."""

    def __init__(self, directory: Path, limit: int = 100) -> None:
        config = from_data({"name": "host1", "limits": {"queued_moves": limit}}, "test")
        self.database = Database(directory / "kvmhv.sqlite", directory / "journal", 100)
        settings = Settings(self.database, config)
        settings.change({"migration.enabled": "true", "migration.moves_out": "1"})
        self.clock, self.open = Clock(), Open()
        self.answers: list[Refusal | Exception | None] = []
        self.begun: list[str] = []
        self.log = made(Memory())
        self.queue = MoveQueue(
            config=config,
            settings=settings,
            records=self.database,
            journal=self.database,
            clock=self.clock,
            open_moves=self.open,  # type: ignore[arg-type]
            chronicle=Chronicle(Metrics("1", "host1"), self.log),
        )
        self.queue.serve_with(self._ask, self._begin)

    async def _ask(self, request: MoveRequest, move_id: str) -> Refusal | None:
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _begin(self, request: MoveRequest, asked: Asked, move_id: str, queued_s: float) -> MoveReport:
        self.begun.append(request.vm)
        self.open.known.add(move_id)
        return report(id=move_id)

    def join(self, vm: str, minutes: float = 10) -> str:
        request = MoveRequest(vm=vm, target="host2", queue_s=minutes * 60)
        asked = Asked(who="root", authentication="local")
        return self.queue.join(Vm(id=f"id-{vm}", name=vm, memory_bytes=1, cpus=1), request, asked).id

    async def until(self, what: str, condition: object) -> None:
        async with asyncio.timeout(10):
            while not condition():  # type: ignore[operator]
                self.queue._wake.set()
                await asyncio.sleep(0.01)

    def record(self, move_id: str) -> MoveReport:
        records = (msgspec.json.decode(one, type=MoveReport) for one in self.database.reports())
        return next(one for one in records if one.id == move_id)


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage(tmp_path)


async def test_a_move_waits_for_the_slot_and_begins_with_it(stage: Stage) -> None:
    stage.open.moves_out = 1
    serving = asyncio.create_task(stage.queue.keep())
    first, second = stage.join("web01"), stage.join("web02")
    await stage.until("it is known why", lambda: stage.queue.lengths()["moves_out"] == 2)
    (one, two) = stage.queue.reports()
    assert (one.id, two.id) == (first, second)
    assert one.outcome is Outcome.RUNNING
    assert one.queue is not None and two.queue is not None
    assert (one.queue.place, two.queue.place, one.queue.setting) == (1, 2, "migration.moves_out")
    stage.open.moves_out = 0
    await stage.until("the first has begun", lambda: not stage.queue.holds(first))
    assert stage.begun[0] == "web01"
    assert stage.database.reports() == (), "it has not ended"
    serving.cancel()


async def test_what_says_no_only_for_now_leaves_the_move_where_it_was(stage: Stage) -> None:
    stage.answers = [FULL_TARGET, PeerUnreachable("peer-silent", "silence", host="host2")]
    serving = asyncio.create_task(stage.queue.keep())
    move_id = stage.join("web01")
    await stage.until("host2 has said no", lambda: stage.queue.lengths()["target_moves_in"] == 1)
    assert stage.open.promises == set(), "while it waits it holds no slot"
    stage.clock.now_s += ASK_AGAIN_MS / 1000
    await stage.until("host2 is silent", lambda: stage.queue.lengths()["other"] == 1)
    stage.clock.now_s += ASK_AGAIN_MS / 1000
    await stage.until("it has begun", lambda: not stage.queue.holds(move_id))
    await stage.until("its entry is gone", lambda: stage.database.all("queue") == ())
    assert stage.database.reports() == (), "it has not ended"
    serving.cancel()


async def test_what_will_never_do_ends_it_with_a_record(stage: Stage) -> None:
    stage.answers = [CallerError("vm-unknown", "there is no VM web01")]
    serving = asyncio.create_task(stage.queue.keep())
    move_id = stage.join("web01")
    await stage.until("it has ended", lambda: not stage.queue.holds(move_id))
    ended = stage.record(move_id)
    assert (ended.outcome, ended.error and ended.error.code) == (Outcome.FAILED, "vm-unknown")
    assert [event.kind for event in stage.log.list()] == ["move-queued", "move-failed"]
    serving.cancel()


async def test_its_time_is_over_some_day(stage: Stage) -> None:
    stage.open.moves_out = 1
    serving = asyncio.create_task(stage.queue.keep())
    move_id = stage.join("web01", minutes=1)
    await stage.until("it waits", lambda: stage.queue.lengths()["moves_out"] == 1)
    stage.clock.now_s += 60
    await stage.until("it has ended", lambda: not stage.queue.holds(move_id))
    ended = stage.record(move_id)
    assert ended.error is not None
    assert (ended.error.code, ended.error.exit_status) == ("queue-time-over", 4)
    assert "migration.moves_out" in ended.error.todo
    assert ended.queued_seconds == 60
    assert (ended.queue, stage.database.all("queue")) == (None, ())
    serving.cancel()


async def test_it_can_be_cancelled(stage: Stage) -> None:
    move_id = stage.join("web01")
    await stage.queue.cancel(move_id, Asked(who="root", authentication="local"))
    ended = stage.record(move_id)
    assert (ended.outcome, ended.error and ended.error.exit_status) == (Outcome.CANCELLED, 6)
    assert stage.queue.reports() == ()
    await stage.queue.cancel(move_id, Asked(who="root", authentication="local"))


async def test_a_new_agent_goes_on_with_the_queue(stage: Stage, tmp_path: Path) -> None:
    ids = [stage.join(f"web0{number}") for number in range(1, 5)]
    stage.database.end(ids[1], SOURCE, msgspec.json.encode(report(id=ids[1], outcome=Outcome.DONE)))
    stage.database.close()
    later = Stage(tmp_path)
    later.open.known = {ids[2]}
    later.clock.now_s = 1300.0
    later.database.put("queue", "000000000005", b"{")
    later.queue.recover()
    assert [one.id for one in later.queue.reports()] == [ids[0], ids[3]], "the others have begun"
    assert len(later.database.all("queue")) == 3, "one is damaged"
    assert later.join("web09") == later.queue.reports()[-1].id
    assert later.queue.reports()[0].queued_seconds == 300


def test_a_vm_waits_once_and_the_queue_has_an_end(tmp_path: Path) -> None:
    stage = Stage(tmp_path, limit=1)
    stage.join("web01")
    stage.queue.refuse_second("web02")
    with pytest.raises(Refused, match="waits in the queue"):
        stage.queue.refuse_second("web01")
    with pytest.raises(Refused) as refused:
        stage.join("web02")
    assert refused.value.code == "queue-full"
