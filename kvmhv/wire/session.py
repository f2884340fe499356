"""One connection between two agents about one move.

Each side says Hello first (which protocol versions it speaks, which move, who it is), then messages (kvmhv/messages.py)
as they come. Pings align the two hosts' monotonic clocks. A frame is one JSON object; anything that is not allowed here
and now raises PeerBroke, after which the connection is to be closed.

    session = Session(hello)
    send(session.hello_frame())
    for event in session.receive(frame, now_ms): ...      Greeted, Heard
    send(session.frame(message))
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from kvmhv.errors import PeerBroke
from kvmhv.messages import AnyMessage, Running, ToSource, ToTarget
from kvmhv.model import COUNT_MAX, ClockMs, Epoch, Name, Struct

VERSIONS = (1, 1)
"""Oldest and newest protocol version spoken here: the newest and the one before it."""

SOURCE, TARGET = "source", "target"

Short = Annotated[str, Meta(max_length=256)]
Version = Annotated[int, Meta(ge=0, le=COUNT_MAX)]


class Frame(Struct, frozen=True, kw_only=True, tag_field="frame", tag=True):
    """Base of what travels."""


class Hello(Frame, frozen=True, kw_only=True):
    """The first frame of both sides."""

    versions: tuple[Version, Version] = VERSIONS
    move_id: Name
    host: Short
    role: Short
    """What the speaker is in this move: `source` or `target`."""
    epoch: Epoch
    """The epoch that the move would begin, for a side that has no open state of it any more."""


class Say(Frame, frozen=True, kw_only=True):
    """A message of the move.

    A move that failed and the next one of the same VM have the same epoch: a word of the one is no proof in the other.
    """

    message: AnyMessage
    move_id: Name | None = None
    """None: from an agent that is older than this field."""


class Ping(Frame, frozen=True, kw_only=True):
    """What does your clock say? `sent_ms` is the asker's and comes back untouched."""

    sent_ms: ClockMs


class Pong(Frame, frozen=True, kw_only=True):
    """The answer: `clock_ms` is the answerer's monotonic clock."""

    sent_ms: ClockMs
    clock_ms: ClockMs


AnyFrame = Hello | Say | Ping | Pong


class Greeted(Struct, frozen=True, kw_only=True):
    """The other side's Hello was accepted; `version` is the newest that both speak."""

    hello: Hello
    version: int


class Heard(Struct, frozen=True, kw_only=True):
    """A message. In a Running, `resumed_ms` is already in this side's clock."""

    message: AnyMessage


Event = Greeted | Heard


class ClockOffset(Struct, frozen=True, kw_only=True):
    """How far the other clock is ahead, from the ping with the shortest round trip (the error is half of that)."""

    ahead_ms: float
    round_trip_ms: float


class Session:
    """State of one connection. Not thread-safe, no I/O."""

    def __init__(self, hello: Hello) -> None:
        self._hello = hello
        self._decoder = msgspec.json.Decoder(AnyFrame)
        self._greeted = False
        self._replies: list[bytes] = []
        self.clock: ClockOffset | None = None

    def hello_frame(self) -> bytes:
        """Return the frame to send first."""
        return msgspec.json.encode(self._hello)

    def frame(self, message: AnyMessage) -> bytes:
        """Return a message's frame."""
        return msgspec.json.encode(Say(message=message, move_id=self._hello.move_id))

    def ping_frame(self, now_ms: float) -> bytes:
        """Return a frame that asks for the other clock."""
        return msgspec.json.encode(Ping(sent_ms=now_ms))

    def replies(self) -> list[bytes]:
        """Return (and forget) the frames that what was received wants as an answer."""
        replies, self._replies = self._replies, []
        return replies

    def receive(self, frame: bytes, now_ms: float) -> list[Event]:
        """Take a frame in. Raises PeerBroke `protocol-frame`, `protocol-order`, `protocol-version`."""
        try:
            received = self._decoder.decode(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise PeerBroke("protocol-frame", f"the other agent sent what is no frame: {error}") from error
        if isinstance(received, Hello):
            return [self._greet(received)]
        if not self._greeted:
            raise PeerBroke("protocol-order", "the other agent did not begin with Hello")
        if isinstance(received, Ping):
            self._replies.append(msgspec.json.encode(Pong(sent_ms=received.sent_ms, clock_ms=now_ms)))
            return []
        if isinstance(received, Pong):
            self._align(received, now_ms)
            return []
        if received.move_id not in (None, self._hello.move_id):
            raise PeerBroke("protocol-order", f"the other agent says what belongs to the move {received.move_id}")
        return [self._hear(received.message)]

    def _greet(self, hello: Hello) -> Greeted:
        if self._greeted:
            raise PeerBroke("protocol-order", "the other agent said Hello twice")
        other_role = TARGET if self._hello.role == SOURCE else SOURCE
        if hello.move_id != self._hello.move_id or hello.role != other_role:
            raise PeerBroke(
                "protocol-order", "the other agent speaks of another move, or claims this side's part in it"
            )
        version = min(VERSIONS[1], hello.versions[1])
        if version < max(VERSIONS[0], hello.versions[0]):
            raise PeerBroke(
                "protocol-version",
                f"{hello.host} speaks the versions {hello.versions} of the protocol, {self._hello.host} {VERSIONS}",
                "install versions of kvmhv that are at most one apart",
                host=hello.host,
            )
        self._greeted = True
        return Greeted(hello=hello, version=version)

    def _align(self, pong: Pong, now_ms: float) -> None:
        round_trip_ms = now_ms - pong.sent_ms
        if round_trip_ms < 0:
            raise PeerBroke("protocol-order", "the other agent answered a ping that was not sent")
        if self.clock is None or round_trip_ms < self.clock.round_trip_ms:
            ahead_ms = pong.clock_ms - (pong.sent_ms + round_trip_ms / 2)
            self.clock = ClockOffset(ahead_ms=ahead_ms, round_trip_ms=round_trip_ms)

    def _hear(self, message: AnyMessage) -> Heard:
        allowed = ToSource if self._hello.role == SOURCE else ToTarget
        if not isinstance(message, allowed):
            raise PeerBroke("protocol-order", f"{type(message).__name__} is not for the {self._hello.role}")
        if isinstance(message, Running) and self.clock is not None:
            message = msgspec.structs.replace(
                message,
                resumed_ms=message.resumed_ms - self.clock.ahead_ms,
                uncertainty_ms=self.clock.round_trip_ms / 2,
            )
        return Heard(message=message)


def read_hello(frame: bytes) -> Hello:
    """Read the first frame of a connection whose move is not known yet. Raises PeerBroke `protocol-frame`."""
    try:
        return msgspec.json.decode(frame, type=Hello)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise PeerBroke("protocol-frame", f"the other agent did not begin with Hello: {error}") from error
