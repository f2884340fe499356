"""Many seeds, one after the other."""

from collections.abc import Callable

from tests.sim.ledger import Ledger
from tests.sim.machine import Broken
from tests.sim.world import World

TOLD_EVERY_MOVES = 10_000


def many(
    first_seed: int,
    moves: int,
    *,
    tell: Callable[[int, Ledger], None] = lambda seed, total: None,
    broken: Callable[[Broken], None] | None = None,
) -> Ledger:
    """Run seeds until so many moves were made.

    Raises Broken, which says how to replay the seed, unless `broken` is there to hear it.
    `tell` hears the next seed and the sums now and then.
    """
    total = Ledger()
    seed = first_seed
    while total.moves < moves:
        before = total.moves // TOLD_EVERY_MOVES
        try:
            total.add(World(seed).run())
        except Broken as error:
            if broken is None:
                raise
            broken(error)
        seed += 1
        if total.moves // TOLD_EVERY_MOVES > before:
            tell(seed, total)
    tell(seed, total)
    return total
