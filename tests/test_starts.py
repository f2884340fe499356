"""QEMUs that start at the same time take turns, and none waits for ever for one that hangs."""

import asyncio

import pytest

from kvmhv.drivers.qemu.starts import Starts


class Start:
    """One that has its turn until it is told to be ready."""

    def __init__(self, starts: Starts) -> None:
        self.began, self.ready = asyncio.Event(), asyncio.Event()
        self._task = asyncio.create_task(self._run(starts))

    async def _run(self, starts: Starts) -> None:
        async with starts.turn():
            self.began.set()
            await self.ready.wait()

    async def end(self) -> None:
        self.ready.set()
        await self._task


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)


async def test_as_many_start_at_a_time_as_there_are_cores_and_the_next_when_one_is_ready() -> None:
    starts = Starts(turn_s=60.0)
    first, second, third = (Start(starts) for _ in range(3))
    await first.began.wait()
    await second.began.wait()
    await asyncio.sleep(0)
    assert not third.began.is_set()
    await first.end()
    await third.began.wait()
    await second.end()
    await third.end()


async def test_a_start_that_hangs_keeps_no_other_from_starting_for_longer_than_a_turn() -> None:
    starts = Starts(turn_s=0.001)
    hanging = [Start(starts) for _ in range(2)]
    late = Start(starts)
    await late.began.wait()
    await late.end()
    for one in hanging:
        assert not one.ready.is_set()
        await one.end()
    again = Start(starts)  # who had no place gives none back
    await again.began.wait()
    await again.end()
