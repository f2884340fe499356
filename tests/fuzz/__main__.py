"""Fuzz for longer: python -m tests.fuzz --minutes N [PYTEST-ARGUMENTS]; a failing round prints its seed and case."""

import argparse
import os
import random
import subprocess
import sys
import time


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=None, help="replay one round")
    known, rest = parser.parse_known_args()
    end = time.monotonic() + known.minutes * 60
    rounds = 0
    while rounds == 0 or (known.seed is None and time.monotonic() < end):
        seed = known.seed if known.seed is not None else random.SystemRandom().randrange(2**32)
        command = [sys.executable, "-m", "pytest", "-q", "--timeout=3600", f"--hypothesis-seed={seed}", "tests/fuzz"]
        command += rest
        done = subprocess.run(command, env={**os.environ, "KVMHV_FUZZ": "long"}, check=False)
        rounds += 1
        if done.returncode:
            sys.stdout.write(f"round {rounds} failed: python -m tests.fuzz --seed {seed}\n")
            return 1
    sys.stdout.write(f"{rounds} rounds in {known.minutes:g} minutes, nothing found\n")
    return 0


sys.exit(main())
