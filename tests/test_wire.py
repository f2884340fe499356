"""A session without I/O: what is accepted, what is refused and how, and clocks that are aligned."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmhv.core import plan
from kvmhv.core.source_state import report
from kvmhv.errors import PeerBroke
from kvmhv.messages import (
    Abort,
    Answer,
    AnyMessage,
    EndArrival,
    Enquire,
    FilesSent,
    FilesWanted,
    Finished,
    Grant,
    Look,
    MirrorsEnded,
    Offer,
    Owned,
    PagesDone,
    PagesEnd,
    PagesFrom,
    PagesHalted,
    Ready,
    Refused,
    Running,
    Seen,
    ToSource,
    ToTarget,
    Unknown,
)
from kvmhv.model import ErrorBody, IncomingAddress, MoveRequest, Rule, Stay, Timeouts, Whereabouts
from kvmhv.wire.session import SOURCE, TARGET, VERSIONS, Frame, Greeted, Heard, Hello, Session, read_hello
from tests.sim import examples

VM = examples.vm()
REQUEST = MoveRequest(vm=VM.name, target="host2", include_storage=True)
HERE, THERE = examples.inventory("host1", running=VM), examples.inventory("host2", octet=2)
ERROR = ErrorBody(code="x", message="y", todo="z", host="host1")
PLAN = plan.make(VM, REQUEST, Rule(), Timeouts(), HERE, THERE)
MESSAGES: tuple[AnyMessage, ...] = (
    Enquire(vm=VM, request=REQUEST),
    Answer(inventory=THERE),
    Offer(epoch=1, plan=PLAN, psk_hex="00"),
    FilesWanted(),
    FilesSent(),
    Ready(epoch=1, address=IncomingAddress(memory_port=49152, disk_port=None)),
    MirrorsEnded(epoch=1, held=True),
    Grant(epoch=1, sent=False, ran=True),
    PagesHalted(epoch=1, attempt=1),
    PagesEnd(epoch=1),
    PagesFrom(epoch=1, attempt=1, address=IncomingAddress(memory_port=49154, disk_port=None)),
    PagesDone(epoch=1, error=ERROR),
    Look(epoch=1),
    EndArrival(epoch=1),
    Seen(epoch=1, there=Whereabouts(stay=Stay.PAUSED, ran=False)),
    Running(epoch=1, resumed_ms=1.5),
    Owned(epoch=1),
    Refused(epoch=1, error=ERROR),
    Abort(epoch=1, error=ERROR),
    Finished(epoch=1, report=report(examples.source_state(VM), 0)),
    Unknown(epoch=1, error=ERROR),
)


def hello(role: str = SOURCE, *, move_id: str = "move-1", versions: tuple[int, int] = VERSIONS) -> Hello:
    return Hello(move_id=move_id, host="host1" if role == SOURCE else "host2", role=role, epoch=1, versions=versions)


def greeted(role: str = SOURCE) -> Session:
    session = Session(hello(role))
    other = TARGET if role == SOURCE else SOURCE
    session.receive(Session(hello(other)).hello_frame(), 0)
    return session


def refused(session: Session, frame: bytes) -> str:
    with pytest.raises(PeerBroke) as caught:
        session.receive(frame, 0)
    return caught.value.code


def test_every_message_has_its_example_here() -> None:
    assert {type(message) for message in MESSAGES} == set(ToTarget.__args__) | set(ToSource.__args__)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_said_and_only_at_the_side_that_it_is_for(message: AnyMessage) -> None:
    role = TARGET if isinstance(message, ToTarget) else SOURCE
    frame = greeted(TARGET if role == SOURCE else SOURCE).frame(message)
    assert greeted(role).receive(frame, 0) == [Heard(message=message)]
    assert refused(greeted(TARGET if role == SOURCE else SOURCE), frame) == "protocol-order"


def test_hello_comes_first_and_once() -> None:
    source, target = Session(hello(SOURCE)), Session(hello(TARGET))
    assert refused(source, target.frame(Owned(epoch=1))) == "protocol-order"
    (event,) = source.receive(target.hello_frame(), 0)
    assert event == Greeted(hello=hello(TARGET), version=VERSIONS[1])
    assert refused(source, target.hello_frame()) == "protocol-order"


@pytest.mark.parametrize(
    "other",
    [hello(TARGET, move_id="move-2"), hello(SOURCE), msgspec.structs.replace(hello(TARGET), role="spectator")],
)
def test_another_move_or_the_wrong_part_in_it(other: Hello) -> None:
    assert refused(Session(hello(SOURCE)), Session(other).hello_frame()) == "protocol-order"


@pytest.mark.parametrize(
    ("versions", "spoken"),
    [
        ((VERSIONS[1], VERSIONS[1] + 1), VERSIONS[1]),
        ((VERSIONS[1] + 1, VERSIONS[1] + 2), None),
        ((VERSIONS[0] - 1, VERSIONS[0] - 1), None),
        ((VERSIONS[0] - 1, VERSIONS[0]), VERSIONS[0]),
    ],
)
def test_the_newest_version_that_both_speak(versions: tuple[int, int], spoken: int | None) -> None:
    frame = Session(hello(TARGET, versions=versions)).hello_frame()
    if spoken is None:
        assert refused(Session(hello(SOURCE)), frame) == "protocol-version"
    else:
        (event,) = Session(hello(SOURCE)).receive(frame, 0)
        assert isinstance(event, Greeted)
        assert event.version == spoken


def test_fields_of_a_newer_version_are_ignored() -> None:
    frame = msgspec.json.encode(
        {"frame": "Say", "later": 1, "message": {"type": "Owned", "epoch": 1, "another": [1, 2]}}
    )
    assert greeted(SOURCE).receive(frame, 0) == [Heard(message=Owned(epoch=1))]


def ping_pong(session: Session, *, sent_ms: float, took_ms: float, ahead_ms: float) -> None:
    """One ping that takes so long both ways together; the other clock reads it in the middle."""
    other = greeted(TARGET)
    other.receive(session.ping_frame(sent_ms), sent_ms + took_ms / 2 + ahead_ms)
    (reply,) = other.replies()
    assert other.replies() == []
    assert session.receive(reply, sent_ms + took_ms) == []


def test_clocks_are_aligned_by_the_quickest_ping() -> None:
    session = greeted(SOURCE)
    ping_pong(session, sent_ms=0, took_ms=50, ahead_ms=1007)
    ping_pong(session, sent_ms=100, took_ms=2, ahead_ms=1000)
    ping_pong(session, sent_ms=200, took_ms=30, ahead_ms=990)
    assert session.clock is not None
    assert (session.clock.ahead_ms, session.clock.round_trip_ms) == (1000, 2)
    (heard,) = session.receive(session.frame(Running(epoch=1, resumed_ms=1300)), 310)
    assert heard == Heard(message=Running(epoch=1, resumed_ms=300, uncertainty_ms=1))


def test_without_a_ping_the_time_is_left_as_it_is() -> None:
    session = greeted(SOURCE)
    assert session.receive(session.frame(Running(epoch=1, resumed_ms=5)), 0) == [
        Heard(message=Running(epoch=1, resumed_ms=5))
    ]


def test_an_answer_to_a_ping_that_was_not_sent() -> None:
    frame = msgspec.json.encode({"frame": "Pong", "sent_ms": 100.0, "clock_ms": 0.0})
    assert refused(greeted(SOURCE), frame) == "protocol-order"


@given(st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_garbage_is_refused_with_a_documented_error(frame: bytes) -> None:
    for session in (Session(hello(SOURCE)), greeted(SOURCE)):
        assert refused(session, frame) in ("protocol-frame", "protocol-order")
    with pytest.raises(PeerBroke):
        read_hello(frame)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
TYPES = [kind.__name__ for kind in (*ToTarget.__args__, *ToSource.__args__)]


@given(
    st.fixed_dictionaries(
        {"frame": st.sampled_from([kind.__name__ for kind in Frame.__subclasses__()])},
        optional={
            "message": st.fixed_dictionaries({"type": st.sampled_from(TYPES)}, optional={"epoch": JSON, "error": JSON})
            | JSON,
            "sent_ms": JSON,
            "clock_ms": JSON,
            "versions": JSON,
            "move_id": JSON,
            "host": JSON,
            "role": JSON,
            "epoch": JSON,
        },
    ),
    st.sampled_from([SOURCE, TARGET]),
)
def test_forged_frames_are_accepted_or_refused_with_a_documented_error(frame: dict[str, object], role: str) -> None:
    for session in (greeted(role), Session(hello(role))):
        try:
            session.receive(msgspec.json.encode(frame), 0)
        except PeerBroke as broke:
            assert broke.code in ("protocol-frame", "protocol-order", "protocol-version")


def test_deep_nesting_is_no_way_in() -> None:
    frame = b'{"frame":"Say","message":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert refused(greeted(SOURCE), frame) == "protocol-frame"


def test_names_are_bounded() -> None:
    frame = msgspec.json.encode(
        {"frame": "Hello", "move_id": "m" * 300, "host": "host2", "role": TARGET, "epoch": 1, "versions": [1, 1]}
    )
    assert refused(Session(hello(SOURCE)), frame) == "protocol-frame"


def test_the_first_hello_of_an_unknown_move() -> None:
    assert read_hello(Session(hello(TARGET)).hello_frame()) == hello(TARGET)
    with pytest.raises(PeerBroke):
        read_hello(Session(hello(TARGET)).frame(Owned(epoch=1)))


def test_a_word_of_another_move_is_no_word_of_this_one() -> None:
    """A move that failed and the next one of the same VM have the same epoch."""
    earlier, mine = Session(hello(TARGET, move_id="move-0")), Session(hello(SOURCE))
    mine.receive(Session(hello(TARGET)).hello_frame(), 0)
    with pytest.raises(PeerBroke, match="move-0") as caught:
        mine.receive(earlier.frame(Refused(epoch=1, error=ERROR)), 0)
    assert caught.value.code == "protocol-order"
    from_an_older_agent = msgspec.json.encode({"frame": "Say", "message": Refused(epoch=1, error=ERROR)})
    assert mine.receive(from_an_older_agent, 0) == [Heard(message=Refused(epoch=1, error=ERROR))]
