"""How long effects take, in the report of a move: by name, from its beginning on, also of those that fail."""

import contextlib

from kvmhv.agent import effect_times
from kvmhv.agent.effect_times import EffectTimes


class Watch:
    def __init__(self) -> None:
        self.now_ms = 1000.0

    def __call__(self) -> float:
        return self.now_ms


def noted(times: EffectTimes) -> list[tuple[str, float, float]]:
    return [(one.effect, one.at_ms, one.took_ms) for one in times.ended]


def test_what_is_waited_for_begins_with_a_word_and_ends_with_its_answer() -> None:
    watch = Watch()
    times = EffectTimes(watch)
    times.connecting()
    watch.now_ms += 10
    times.connected()
    times.connected()  # anew, after it was lost
    times.said("Enquire")
    watch.now_ms += 5
    times.said("Enquire")  # said again: the wait is as long as it is
    watch.now_ms += 5
    times.heard("Answer")
    times.said("Grant")
    times.heard("Running")
    watch.now_ms += 3
    times.heard("Owned")
    times.heard("Owned")
    assert noted(times) == [
        ("connect", 0.0, 10.0),
        ("await Answer", 10.0, 10.0),
        ("await Running", 20.0, 0.0),
        ("await Owned", 20.0, 3.0),
    ]


def test_an_effect_that_fails_is_noted_and_so_many_at_most() -> None:
    watch = Watch()
    times = EffectTimes(watch)
    with contextlib.suppress(ValueError), times.of("Prepare"):
        watch.now_ms += 7
        raise ValueError
    assert noted(times) == [("Prepare", 0.0, 7.0)]
    for _ in range(2 * effect_times.AT_MOST):
        with times.of("Journal"):
            pass
    assert len(times.ended) == effect_times.AT_MOST
