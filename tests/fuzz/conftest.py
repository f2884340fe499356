"""How much is tried: the same cases at each CI run, or fresh ones for as long as one likes (python -m tests.fuzz)."""

import os

from hypothesis import HealthCheck, settings

QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
settings.register_profile("ci", derandomize=True, database=None, deadline=None, suppress_health_check=QUIET)
settings.register_profile("long", max_examples=2000, database=None, deadline=None, suppress_health_check=QUIET)
settings.load_profile("long" if os.environ.get("KVMHV_FUZZ") == "long" else "ci")
