"""Simulated time: a heap of things to come, one source of chance, and a trace of what happened."""

import heapq
import random
from collections.abc import Callable


class Kernel:
    """Runs what was planned in the order of its time; the same seed gives the same run."""

    def __init__(self, seed: int | str, *, verbose: bool = False) -> None:
        self.rng = random.Random(seed)
        self.now_ms = 0.0
        self.lines: list[str] = []
        self._verbose = verbose
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._planned = 0

    def after(self, delay_ms: float, what: Callable[[], None]) -> None:
        """Do something so much later."""
        self.at(self.now_ms + delay_ms, what)

    def at(self, time_ms: float, what: Callable[[], None]) -> None:
        """Do something at a time; what was planned first goes first."""
        self._planned += 1
        heapq.heappush(self._heap, (time_ms, self._planned, what))

    def step(self, until_ms: float) -> bool:
        """Do the next thing, unless it lies beyond this time."""
        if not self._heap or self._heap[0][0] > until_ms:
            return False
        self.now_ms, _, what = heapq.heappop(self._heap)
        what()
        return True

    def some_ms(self, shortest_ms: float, longest_ms: float) -> float:
        """Draw a delay."""
        return self.rng.uniform(shortest_ms, longest_ms)

    def tell(self, where: str, text: str) -> None:
        """Note what happened."""
        if self._verbose:
            self.lines.append(f"{self.now_ms / 1000:12.4f} s  {where:6} {text}")
