"""For tests, ours and yours: virtual time, a wall clock to be set, fake engines and the faults that they are to have.

Nothing here needs more than the base install, but for `kapsl_scheduler.testing.strategies` (hypothesis).
"""

from kapsl_scheduler.testing.engines import FAKE_INFO, FakeAsyncEngine, FakeCall, FakeEngine, spin
from kapsl_scheduler.testing.faults import Fault, FaultPlan
from kapsl_scheduler.testing.virtual_time import DeadlockError, VirtualClock, VirtualTimeLoop, run_virtual
from kapsl_scheduler.testing.wall_clock import WallClock

__all__ = [
    "FAKE_INFO",
    "DeadlockError",
    "FakeAsyncEngine",
    "FakeCall",
    "FakeEngine",
    "Fault",
    "FaultPlan",
    "VirtualClock",
    "VirtualTimeLoop",
    "WallClock",
    "run_virtual",
    "spin",
]
