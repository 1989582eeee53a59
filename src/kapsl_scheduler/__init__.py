"""kapsl-scheduler: request scheduling and batching for model inference. The public names; no logic.

Engines are in `kapsl_scheduler.engines`, fakes and virtual time for tests in `kapsl_scheduler.testing`.
"""

from kapsl_scheduler.core.admission import RequestProfile, determine_priority
from kapsl_scheduler.core.batch import BatchPolicy
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
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy
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
