"""How much time is left of a run, by what was expected of each part and how long the others took. Pure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

ENOUGH_S = 30.0
"""What was expected of so much is worth a judgement of the machine."""


@dataclass
class Pace:
    """The parts of a run by name, with the seconds that are expected of each."""

    expected_s: Mapping[str, float]
    now_s: Callable[[], float]
    _part: str = ""
    _over: set[str] = field(default_factory=set)
    _done_s: float = 0.0
    _of_part_s: float = 0.0
    _since_s: float = 0.0

    def begin(self, part: str) -> None:
        """Begin a part; the clock of the run starts with the first one."""
        if not self._part and not self._over:
            self._since_s = self.now_s()
        self._part, self._of_part_s = part, 0.0

    def done(self, expected_s: float) -> None:
        """Note that so much of what was expected of the part is over."""
        self._of_part_s = min(self._of_part_s + expected_s, self.expected_s[self._part])

    def end(self) -> None:
        """Note that the part is over, also when it broke: what it left out will not be made up for."""
        self._done_s += self._of_part_s
        self._over.add(self._part)
        self._part, self._of_part_s = "", 0.0

    def left_s(self) -> float | None:
        """Return the seconds that are left; None before the run has begun."""
        if not self._part and not self._over:
            return None
        done_s = self._done_s + self._of_part_s
        ahead_s = sum(seconds for name, seconds in self.expected_s.items() if name not in self._over) - self._of_part_s
        slower = (self.now_s() - self._since_s) / done_s if done_s >= ENOUGH_S else 1.0
        return ahead_s * slower
