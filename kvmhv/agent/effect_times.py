"""How long each effect of one side of a move took, and how long it waited for the other side: for the move's record."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvmhv.model import EffectTime

AT_MOST = 80
"""Effects that are noted of a move; most have some fifteen."""
CONNECT = "connect"
ANSWERS = {"Enquire": "Answer", "Offer": "Ready", "Grant": "Running"}
"""What is waited for once this is said."""
FOLLOWS = {"Running": "Owned"}
"""What is waited for once this is heard."""


class EffectTimes:
    """A stop watch for the effects of one runner; its clock begins when it is made."""

    def __init__(self, now_ms: Callable[[], float]) -> None:
        self._now_ms = now_ms
        self._since_ms = now_ms()
        self._awaited: dict[str, float] = {}
        self.ended: tuple[EffectTime, ...] = ()
        """Those that are over, in the order of their ends."""

    @contextmanager
    def of(self, effect: str) -> Iterator[None]:
        """Note how long something takes, also when it fails or is given up."""
        begun_ms = self._now_ms()
        try:
            yield
        finally:
            self._note(effect, begun_ms)

    def connecting(self) -> None:
        """Note that the other side is looked for."""
        self._awaited.setdefault(CONNECT, self._now_ms())

    def connected(self) -> None:
        """Note that it was found."""
        self._end(CONNECT)

    def said(self, message: str) -> None:
        """Note that an answer is waited for, if this message has one."""
        self._await(ANSWERS.get(message))

    def heard(self, message: str) -> None:
        """Note what the other side said."""
        self._end(f"await {message}")
        self._await(FOLLOWS.get(message))

    def _await(self, message: str | None) -> None:
        if message is not None:
            self._awaited.setdefault(f"await {message}", self._now_ms())

    def _end(self, effect: str) -> None:
        begun_ms = self._awaited.pop(effect, None)
        if begun_ms is not None:
            self._note(effect, begun_ms)

    def _note(self, effect: str, begun_ms: float) -> None:
        if len(self.ended) < AT_MOST:
            at_ms, took_ms = round(begun_ms - self._since_ms, 2), round(self._now_ms() - begun_ms, 2)
            self.ended = (*self.ended, EffectTime(effect=effect, at_ms=at_ms, took_ms=took_ms))
