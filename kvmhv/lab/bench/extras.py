"""What the benchmark measures of kvmhv alone, by the name under which it is asked for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kvmhv.lab.bench import crowd, limited, scale
from kvmhv.lab.steps import Progress

Found = tuple[list[dict[str, Any]], Any]
"""Figures with their limits, and what they were made from."""


@dataclass(frozen=True)
class Extra:
    """A measurement in labs of its own, and about how long it takes."""

    measure: Callable[[str, Progress], Found]
    expected_s: float


EXTRAS = {
    "scale": Extra(scale.measure, 150.0),
    "crowd": Extra(crowd.measure, 210.0),
    "blackout-limit": Extra(limited.measure, 560.0),
}
