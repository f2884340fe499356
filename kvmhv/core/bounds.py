"""How long a move can take at most, from the configuration: every step has a timer, and this is their sum.

A move that the operator is needed for may stand for longer; it has told so by then, with a command for each way out.
"""

from kvmhv.core.source_undo import UNDO_TRIES
from kvmhv.model import Timeouts


def blackout_s(timeouts: Timeouts) -> float:
    """Return how long the guest can stand still until it runs again on one side or the operator is told."""
    return timeouts.switchover_s + timeouts.grant_s + _undo_s(timeouts)


def move_s(timeouts: Timeouts, cont_s: float, *, post_copy: bool = False) -> float:
    """Return how long a move can take until it has ended or the operator is told; agents that stay up.

    `cont_s`: what a guest that is let run at the very end may take. `post_copy`: with so much more for the pages that
    follow.
    """
    pages_s = timeouts.memory_s if post_copy else 0.0
    live_s = timeouts.answer_s + timeouts.prepare_s + timeouts.storage_s + timeouts.memory_s
    clean_up_s = timeouts.undo_s
    return live_s + pages_s + timeouts.reconnect_s + blackout_s(timeouts) + clean_up_s + cont_s


def _undo_s(timeouts: Timeouts) -> float:
    return timeouts.undo_s * (UNDO_TRIES + 1)
