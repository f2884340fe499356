"""Many seeds, one after the other."""

from tests.sim.world import Ledger, World


def many(first_seed: int, moves: int) -> Ledger:
    """Run seeds until so many moves were made; raises Broken, which says how to replay the seed."""
    total = Ledger()
    seed = first_seed
    while total.moves < moves:
        ledger = World(seed).run()
        total.moves += max(1, ledger.moves)
        total.faults += ledger.faults
        total.boundaries += ledger.boundaries
        total.stood_still += ledger.stood_still
        for outcome, count in ledger.outcomes.items():
            total.outcomes[outcome] = total.outcomes.get(outcome, 0) + count
        seed += 1
    return total
