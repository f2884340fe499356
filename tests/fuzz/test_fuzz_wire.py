"""What another agent may say: each frame is taken or refused with a known code; no order of words breaks a side."""

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmhv.core import facts, source, target
from kvmhv.core.source_state import SourceState
from kvmhv.core.target import TargetState
from kvmhv.errors import PeerBroke
from kvmhv.messages import (
    Answer,
    AnyMessage,
    Finished,
    Grant,
    MirrorsEnded,
    Offer,
    Owned,
    Ready,
    Running,
    ToSource,
    ToTarget,
)
from kvmhv.model import Outcome
from kvmhv.wire.session import SOURCE, TARGET, Hello, Pong, Say, Session, read_hello
from tests.fuzz import garble
from tests.sim import examples
from tests.test_wire import MESSAGES, hello

REFUSALS = {"protocol-frame", "protocol-order", "protocol-version"}
FRAMES = [json.loads(msgspec.json.encode(Say(message=message))) for message in MESSAGES]
FRAMES += [
    json.loads(msgspec.json.encode(frame)) for frame in (hello(TARGET), Pong(sent_ms=1.0, clock_ms=5.0), hello(SOURCE))
]
any_frame = st.sampled_from(FRAMES).flatmap(garble.frames)


@given(st.sampled_from((SOURCE, TARGET)), st.lists(any_frame, max_size=5), st.booleans())
@settings(max_examples=200)
def test_each_frame_is_taken_or_refused(role: str, frames: list[bytes], greeted: bool) -> None:
    session = Session(hello(role))
    if greeted:
        session.receive(msgspec.json.encode(hello(TARGET if role == SOURCE else SOURCE)), 0.0)
    for frame in frames:
        try:
            for event in session.receive(frame, 10.0):
                msgspec.json.decode(msgspec.json.encode(event), type=type(event))
        except PeerBroke as error:
            assert error.code in REFUSALS
            break
    assert all(len(reply) < 1000 for reply in session.replies())


@given(garble.frames(FRAMES[-1]))
def test_a_hello_is_read_or_refused(frame: bytes) -> None:
    try:
        said = read_hello(frame)
    except PeerBroke as error:
        assert error.code == "protocol-frame"
    else:
        assert isinstance(said, Hello)
        assert "/" not in said.move_id
        assert not said.move_id.startswith(".")


# --- every order of words -----------------------------------------------------------------------------------------


def _said(kinds: Any) -> list[AnyMessage]:
    return [message for message in MESSAGES if isinstance(message, kinds)]


@st.composite
def _words(draw: st.DrawFn, kinds: Any) -> AnyMessage:
    """A message that the wire lets through, about this epoch or another."""
    message = draw(st.sampled_from(_said(kinds)))
    if "epoch" in message.__struct_fields__:
        message = msgspec.structs.replace(message, epoch=draw(st.sampled_from((0, 1, 1, 1, 2))))
    for name in ("held", "sent", "ran"):
        if name in message.__struct_fields__:
            message = msgspec.structs.replace(message, **{name: draw(st.booleans())})
    return message


def _own(*kinds: Any) -> st.SearchStrategy[facts.Fact]:
    return st.sampled_from(kinds)


SOURCE_FACTS = (
    facts.Started(at_ms=1),
    facts.FilesUploaded(at_ms=1),
    facts.MirrorProgress(at_ms=1, copied_bytes=1, total_bytes=2),
    facts.MirrorsReady(at_ms=1, copied_bytes=2),
    facts.MirrorsFinished(at_ms=1),
    facts.PassStarted(at_ms=1, number=1, sent_bytes=0, remaining_bytes=9, total_bytes=9, dirty_bytes_per_s=0.0),
    facts.PassStarted(at_ms=1, number=2, sent_bytes=9, remaining_bytes=0, total_bytes=9, dirty_bytes_per_s=0.0),
    facts.MemoryProgress(at_ms=1, sent_bytes=1, remaining_bytes=1, total_bytes=9, dirty_bytes_per_s=0.0),
    facts.GuestStopped(at_ms=1, told_ms=0),
    facts.PreSwitchover(at_ms=1),
    facts.MemorySent(at_ms=1),
    facts.CopyEnded(at_ms=1),
    facts.CopyRemoved(at_ms=1),
)
EITHER = (
    facts.Undone(at_ms=1),
    facts.GuestRuns(at_ms=1, resumed_ms=1),
    facts.PeerConnected(at_ms=1),
    facts.PeerLost(at_ms=1, error=MESSAGES[-1].error),  # type: ignore[union-attr]
    facts.TimerFired(at_ms=1, name="step"),
    facts.TimerFired(at_ms=1, name="peer"),
)
TARGET_FACTS = (
    facts.Offered(at_ms=1),
    facts.IncomingReady(at_ms=1, address=_said(ToSource)[2].address),  # type: ignore[union-attr]
    facts.Unexported(at_ms=1),
    facts.MemorySent(at_ms=1),
    facts.Adopted(at_ms=1),
)


def _heard(kinds: Any) -> st.SearchStrategy[facts.Fact]:
    return _words(kinds).map(lambda message: facts.Received(at_ms=2, message=message))


def _message(kind: Any) -> facts.Fact:
    return facts.Received(at_ms=1, message=_said(kind)[0])


STRAIGHT_AT_SOURCE = (
    facts.PeerConnected(at_ms=1),
    facts.Started(at_ms=1),
    _message(Answer),
    _message(Ready),
    facts.MirrorsReady(at_ms=1, copied_bytes=2),
    *SOURCE_FACTS[5:7],
    facts.GuestStopped(at_ms=1, told_ms=0),
    facts.MirrorsFinished(at_ms=1),
    facts.PreSwitchover(at_ms=1),
    facts.MemorySent(at_ms=1),
    _message(Running),
    facts.CopyEnded(at_ms=1),
    _message(Owned),
    facts.CopyRemoved(at_ms=1),
)
STRAIGHT_AT_TARGET = (
    facts.PeerConnected(at_ms=1),
    *TARGET_FACTS[:2],
    _message(MirrorsEnded),
    *TARGET_FACTS[2:4],
    facts.Received(at_ms=1, message=Grant(epoch=1)),
    facts.GuestRuns(at_ms=1, resumed_ms=1),
    facts.Adopted(at_ms=1),
    _message(Finished),
)


def _life(straight: tuple[facts.Fact, ...], any_fact: st.SearchStrategy[facts.Fact]) -> Any:
    """A move that goes well for a while, and from then on anything."""
    begins = st.integers(0, len(straight)).map(lambda count: list(straight[:count]))
    return st.tuples(begins, st.lists(any_fact, max_size=25)).map(lambda parts: parts[0] + parts[1])


@given(_life(STRAIGHT_AT_SOURCE, st.one_of(_heard(ToSource), _own(*SOURCE_FACTS, *EITHER))))
@settings(max_examples=250)
def test_no_order_of_words_breaks_the_source(happened: list[facts.Fact]) -> None:
    """The source's own checks hold after each step, so it never runs what it gave away, and its state can be kept."""
    state = examples.source_state(examples.vm())
    for fact in happened:
        state, _ = source.step(state, fact)
    msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=SourceState)


@given(_life(STRAIGHT_AT_TARGET, st.one_of(_heard(ToTarget), _own(*TARGET_FACTS, *EITHER))))
@settings(max_examples=250)
def test_no_order_of_words_breaks_the_target(happened: list[facts.Fact]) -> None:
    offer = next(message for message in MESSAGES if isinstance(message, Offer))
    state = examples.target_state(examples.source_state(examples.vm()), offer)
    for fact in happened:
        state, _ = target.step(state, fact)
    msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=TargetState)


def test_the_straight_lives_end_well() -> None:
    """So that the lives above begin where they are meant to."""
    state = examples.source_state(examples.vm())
    for fact in STRAIGHT_AT_SOURCE:
        state, _ = source.step(state, fact)
    assert state.outcome is Outcome.DONE
    offer = next(message for message in MESSAGES if isinstance(message, Offer))
    other = examples.target_state(examples.source_state(examples.vm()), offer)
    for fact in STRAIGHT_AT_TARGET:
        other, _ = target.step(other, fact)
    assert other.outcome is Outcome.DONE
