"""Run one seed (`--seed N --verbose` prints all that happened), or many (`--moves N`)."""

import argparse
import sys
import time

from tests.sim.ledger import Ledger
from tests.sim.machine import Broken
from tests.sim.run import many
from tests.sim.world import World


def main() -> int:
    """Replay or search."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--moves", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="first seed of --moves")
    arguments = parser.parse_args()
    if arguments.seed is None:
        began = time.monotonic()
        found: list[Broken] = []

        def tell(seed: int, total: Ledger) -> None:
            rate = f"{total.moves / (time.monotonic() - began):.0f} moves a second"
            print(  # noqa: T201
                f"seeds {arguments.first} to {seed - 1}: {total.moves} moves, {total.outcomes}, "
                f"{total.stood_still} stood still, {total.faults} faults {total.kinds}, {len(found)} broken, {rate}",
                flush=True,
            )

        def broken(error: Broken) -> None:
            found.append(error)
            print(error, flush=True)  # noqa: T201

        many(arguments.first, arguments.moves, tell=tell, broken=broken)
        return 1 if found else 0
    world = World(arguments.seed, verbose=arguments.verbose)
    try:
        ledger = world.run()
    except Broken as broken:
        print("\n".join([*world.kernel.lines, str(broken)]))  # noqa: T201
        return 1
    print("\n".join([*world.kernel.lines, str(ledger)]))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
