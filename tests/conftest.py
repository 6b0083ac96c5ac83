"""Hypothesis profiles: `default` is quick and repeatable; `exhaustive` (HYPOTHESIS_PROFILE=exhaustive) digs.

The suite runs one process a core (pytest-xdist; `-n0` runs it in one), so torch gets one thread in each of them.
"""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

from hypothesis import HealthCheck, settings

# Timing on a shared machine is no property of the code, so examples have no deadline.
settings.register_profile(
    "default", max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("exhaustive", parent=settings.get_profile("default"), max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
