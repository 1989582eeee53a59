"""kapsl-scheduler: request scheduling and batching for model inference. The public names; no logic.

Engines are in `kapsl_scheduler.engines`, fakes and virtual time for tests in `kapsl_scheduler.testing`.
"""

from kapsl_scheduler.core.admission import RequestProfile, determine_priority
from kapsl_scheduler.core.batch import BatchPolicy
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.errors import (
    Backend,
    Cancelled,
    DeadlineExceeded,
    EngineError,
    InferenceError,
    InvalidInput,
    InvalidPackage,
    ModelLoadError,
    ModelNotLoaded,
    Overloaded,
    ResourceExhausted,
    Unavailable,
)
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
    "DeadlineExceeded",
    "EngineError",
    "EngineMetrics",
    "InferenceError",
    "InferenceRequest",
    "InferenceResponse",
    "InvalidInput",
    "InvalidPackage",
    "ModelInfo",
    "ModelLoadError",
    "ModelNotLoaded",
    "Overloaded",
    "Priority",
    "QueueOverflowPolicy",
    "QueuePolicy",
    "RequestMetadata",
    "RequestProfile",
    "ResourceExhausted",
    "Scheduler",
    "SchedulerHealth",
    "SchedulerStatistics",
    "SyncScheduler",
    "TensorSpec",
    "Unavailable",
    "determine_priority",
]
