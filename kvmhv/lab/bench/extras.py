"""What the benchmark measures of kvmhv alone, by the name under which it is asked for."""

from collections.abc import Callable
from typing import Any

from kvmhv.lab.bench import crowd, limited, scale
from kvmhv.lab.steps import Progress

EXTRAS: dict[str, Callable[[str, Progress], list[dict[str, Any]]]] = {
    "scale": scale.limits,
    "crowd": crowd.limits,
    "blackout-limit": limited.limits,
}
