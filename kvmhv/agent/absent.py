"""Stands where a part of the agent is not built yet: whoever asks gets an error that says so."""

from typing import Any

from kvmhv.errors import HostError


class Absent:
    """Every method raises HostError `not-built`; lists are empty."""

    def __init__(self, part: str) -> None:
        self._part = part

    async def switches(self) -> tuple[Any, ...]:
        """Return nothing."""
        return ()

    def __getattr__(self, name: str) -> Any:
        async def fail(*arguments: object, **named: object) -> None:
            raise HostError("not-built", f"{self._part} is not built yet")

        return fail
