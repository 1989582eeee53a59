"""Hypothesis profiles for the whole suite: `ci` is the same run every time, `stress` (by the environment variable
HYPOTHESIS_PROFILE) looks further, at random."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# How fast a busy machine is says nothing of what is tested.
settings.register_profile("any", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("any"), derandomize=True, max_examples=100)
settings.register_profile("stress", settings.get_profile("any"), max_examples=5_000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
