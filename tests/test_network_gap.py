"""The network gap: put together from the blackout and the frame, told to the move or its record, never waited for."""

import asyncio
from collections.abc import Mapping

import msgspec
import pytest

from kvmhv.agent.network_gap import NetworkGap
from kvmhv.core import first_frame
from kvmhv.errors import HostError
from kvmhv.model import BlackoutStep, Nic, Outcome, Vm
from tests.cli_agent import report

VM = Vm(
    id="id-1",
    name="web01",
    memory_bytes=1,
    cpus=1,
    nics=(Nic(name="nic0", switch="lan", mac="52:54:00:00:00:01", pci_slot=16),),
)
RUNNING = BlackoutStep(name="running", host="host2", at_ms=80.0)
DONE = msgspec.structs.replace(
    report(outcome=Outcome.DONE), target="host2", blackout_ms=80.0, blackout_steps=(RUNNING,)
)


class Watch:
    def __init__(self) -> None:
        self.seen: asyncio.Future[float | None] = asyncio.get_running_loop().create_future()
        self.closed = 0

    async def first_ms(self, timeout_s: float) -> float | None:
        return await self.seen

    async def close(self) -> None:
        self.closed += 1


class Frames:
    def __init__(self, watch: Watch | None) -> None:
        self.watched: dict[str, str] = {}
        self._watch = watch

    async def watch(self, taps: Mapping[str, str]) -> Watch:
        if self._watch is None:
            raise HostError("network", "no such tap")
        self.watched = dict(taps)
        return self._watch


async def test_the_frame_is_told_once_and_counted_from_resume() -> None:
    watch, told = Watch(), list[float]()
    frames = Frames(watch)
    gap = NetworkGap(frames, VM, told.append)
    await gap.open({"nic0": "kv01"})
    assert frames.watched == {"kv01": "52:54:00:00:00:01"}
    gap.resumed(1000.0)
    gap.resumed(1001.0)
    watch.seen.set_result(1012.5)
    await gap.close(let_it_look=True)
    assert (told, gap.after_resume_ms, watch.closed) == ([12.5], 12.5, 1)


async def test_a_move_that_failed_stops_looking_at_once() -> None:
    watch, told = Watch(), list[float]()
    gap = NetworkGap(Frames(watch), VM, told.append)
    await gap.open({"nic0": "kv01"})
    gap.resumed(1000.0)
    async with asyncio.timeout(1):
        await gap.close(let_it_look=False)
    assert (told, watch.closed) == ([], 1)


async def test_a_vm_that_says_nothing_has_no_gap() -> None:
    watch, told = Watch(), list[float]()
    gap = NetworkGap(Frames(watch), VM, told.append)
    await gap.open({"nic0": "kv01"})
    gap.resumed(1000.0)
    watch.seen.set_result(None)
    await gap.close(let_it_look=True)
    assert (told, gap.after_resume_ms) == ([], None)


async def test_what_cannot_be_watched_keeps_no_move_from_going_on() -> None:
    gap = NetworkGap(Frames(None), VM, lambda after_ms: pytest.fail("nothing was seen"))
    await gap.open({"nic0": "kv01"})
    gap.resumed(1000.0)
    await gap.close(let_it_look=True)
    without_nics = NetworkGap(Frames(None), msgspec.structs.replace(VM, nics=()), lambda after_ms: None)
    await without_nics.open({})
    await without_nics.close(let_it_look=True)


@pytest.mark.parametrize(("after_ms", "gap_ms"), [(20.0, 100.0), (-5.0, 75.0), (-90.0, 0.0)])
def test_the_gap_in_the_report(after_ms: float, gap_ms: float) -> None:
    noted = first_frame.noted(DONE, after_ms)
    assert noted.network_gap_ms == gap_ms
    assert sorted(one.at_ms for one in noted.blackout_steps) == [one.at_ms for one in noted.blackout_steps]
    assert first_frame.noted(noted, 1.0) is noted, "what is known is not changed"


def test_no_gap_without_both_ends() -> None:
    assert first_frame.noted(DONE, None) is DONE
    without = msgspec.structs.replace(DONE, blackout_ms=None)
    assert first_frame.noted(without, 5.0) is without
