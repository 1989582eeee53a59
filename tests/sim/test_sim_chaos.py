"""Random arrivals, cancellations, deadlines, failures, losses, hangs and shutdowns in virtual time.

The everyday run is short; `KAPSL_STRESS=1` makes it more than 100,000 arrivals.
"""

from __future__ import annotations

import os

import pytest

from tests.runtime.virtual import virtual
from tests.sim.chaos import Chaos

ARRIVALS = 500
FAILED_ONCE = (24, 101, 138, 167, 185, 737)
"""Seeds beyond the everyday ones that have found a fault: they are always run. 24, 101: an eviction left room that was
given to nobody. 138, 167, 185: who was moved after a loss stood in the queue twice. 737: closing twice raised."""

SEEDS = sorted({*range(220 if os.environ.get("KAPSL_STRESS") else 20), *FAILED_ONCE})


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_chaos(seed: int) -> None:
    run = Chaos(seed, ARRIVALS)
    virtual(run.run)()
    assert not run.violations, (run.scenario, run.violations)
