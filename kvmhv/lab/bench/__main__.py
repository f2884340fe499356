"""`script/bench`: the command line of the benchmark."""

import argparse
import json
import math
import sys
import time
from pathlib import Path

from kvmhv import __version__
from kvmhv.errors import KvmhvError
from kvmhv.lab.bench import page
from kvmhv.lab.bench.cases import CASES
from kvmhv.lab.bench.extras import EXTRAS
from kvmhv.lab.bench.pace import Pace
from kvmhv.lab.bench.run import expected_s, run

ROUNDS, QUICK_ROUNDS = 7, 3


def main(arguments: list[str]) -> int:
    """Run it; exit status 1 when a case broke, 2 when the request is wrong."""
    parser = argparse.ArgumentParser(prog="script/bench", description="kvmhv beside virsh and QMP by hand, in the lab.")
    parser.add_argument("--quick", action="store_true", help="two small guests, three rounds: under ten minutes")
    parser.add_argument("--case", action="append", choices=[*(case.name for case in CASES), *EXTRAS], help="only this")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"rounds of each case ({ROUNDS}; quick: {QUICK_ROUNDS})"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page with the plots there")
    parser.add_argument("--lab", default="bench", metavar="NAME", help="the name of the lab that is made for it")
    given = parser.parse_args(arguments)
    cases = [case for case in CASES if (case.in_quick if given.quick else case.in_full)]
    if given.case:
        cases = [case for case in CASES if case.name in given.case]
    rounds = given.rounds or (QUICK_ROUNDS if given.quick else ROUNDS)
    extras = [name for name in EXTRAS if (name in given.case if given.case else not given.quick)]
    started_s = time.monotonic()
    pace = Pace(expected_s(cases, rounds, extras), time.monotonic)

    def progress(text: str) -> None:
        left_s = pace.left_s()
        left = "" if left_s is None else f", {math.ceil(left_s / 60):2d} min left"
        sys.stderr.write(f"{time.monotonic() - started_s:6.0f} s{left}  {text}\n")

    try:
        result = {
            "kvmhv": __version__,
            "quick": given.quick,
            "rounds": rounds,
            **run(given.lab, cases, rounds, progress, pace, extras=extras),
        }
    except KvmhvError as error:
        sys.stderr.write(f"bench: {error}\n")
        return error.exit_status
    if given.json is not None:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    if given.html is not None:
        given.html.write_text(page.page(result))
    sys.stdout.write(page.text(result))
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
