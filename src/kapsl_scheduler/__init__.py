"""kapsl-scheduler: request scheduling and batching for model inference. The public names; no logic.

Engines are in `kapsl_scheduler.engines`, fakes and virtual time for tests in `kapsl_scheduler.testing`. A name is
imported when it is first asked for: the command line, which begins here too, starts without numpy.
"""

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from kapsl_scheduler.core.admission import RequestProfile, determine_priority
    from kapsl_scheduler.core.cron import CronExpression, Interval
    from kapsl_scheduler.core.jobs import (
        Coalesce,
        CronJob,
        CronOverflowPolicy,
        Exclusion,
        FiringPolicy,
        Named,
        OnInterrupt,
        Overlap,
        RunPolicy,
    )
    from kapsl_scheduler.core.policies import BatchPolicy, QueueOverflowPolicy, QueuePolicy
    from kapsl_scheduler.core.runs import Firing, RunState
    from kapsl_scheduler.errors import (
        Backend,
        Cancelled,
        CronError,
        DeadlineExceeded,
        DuplicateId,
        EngineError,
        InferenceError,
        InvalidExpression,
        InvalidInput,
        InvalidJob,
        InvalidPackage,
        ModelLoadError,
        ModelNotLoaded,
        NotFound,
        Overloaded,
        ResourceExhausted,
        StoreError,
        Unavailable,
    )
    from kapsl_scheduler.runtime.cron_metrics import CronStatistics
    from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
    from kapsl_scheduler.runtime.cron_views import CronEvent, CronJobInfo, CronRun
    from kapsl_scheduler.runtime.metrics import SchedulerHealth, SchedulerStatistics
    from kapsl_scheduler.runtime.scheduler import Scheduler
    from kapsl_scheduler.runtime.sync import SyncScheduler
    from kapsl_scheduler.types import (
        EngineMetrics,
        InferenceRequest,
        InferenceResponse,
        ModelInfo,
        Priority,
        RequestMetadata,
        TensorSpec,
    )

__all__ = [
    "Backend",
    "BatchPolicy",
    "Cancelled",
    "Coalesce",
    "CronError",
    "CronEvent",
    "CronExpression",
    "CronJob",
    "CronJobInfo",
    "CronOverflowPolicy",
    "CronRun",
    "CronScheduler",
    "CronStatistics",
    "DeadlineExceeded",
    "DuplicateId",
    "EngineError",
    "EngineMetrics",
    "Exclusion",
    "Firing",
    "FiringPolicy",
    "InferenceError",
    "InferenceRequest",
    "InferenceResponse",
    "Interval",
    "InvalidExpression",
    "InvalidInput",
    "InvalidJob",
    "InvalidPackage",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotLoaded",
    "Named",
    "NotFound",
    "OnInterrupt",
    "Overlap",
    "Overloaded",
    "Priority",
    "QueueOverflowPolicy",
    "QueuePolicy",
    "RequestMetadata",
    "RequestProfile",
    "ResourceExhausted",
    "RunPolicy",
    "RunState",
    "Scheduler",
    "SchedulerHealth",
    "SchedulerStatistics",
    "StoreError",
    "SyncScheduler",
    "TensorSpec",
    "Unavailable",
    "determine_priority",
]

_HOMES: Final = {
    name: f"{__name__}.{module}"
    for module, names in {
        "core.admission": "RequestProfile determine_priority",
        "core.cron": "CronExpression Interval",
        "core.jobs": "Coalesce CronJob CronOverflowPolicy Exclusion FiringPolicy Named OnInterrupt Overlap RunPolicy",
        "core.policies": "BatchPolicy QueueOverflowPolicy QueuePolicy",
        "core.runs": "Firing RunState",
        "errors": "Backend Cancelled CronError DeadlineExceeded DuplicateId EngineError InferenceError "
        "InvalidExpression InvalidInput InvalidJob InvalidPackage ModelLoadError ModelNotLoaded NotFound Overloaded "
        "ResourceExhausted StoreError Unavailable",
        "runtime.cron_metrics": "CronStatistics",
        "runtime.cron_scheduler": "CronScheduler",
        "runtime.cron_views": "CronEvent CronJobInfo CronRun",
        "runtime.metrics": "SchedulerHealth SchedulerStatistics",
        "runtime.scheduler": "Scheduler",
        "runtime.sync": "SyncScheduler",
        "types": "EngineMetrics InferenceRequest InferenceResponse ModelInfo Priority RequestMetadata TensorSpec",
    }.items()
    for name in names.split()
}


if not TYPE_CHECKING:  # for whom there would be every name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _HOMES.keys())
