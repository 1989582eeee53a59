"""From a job as a package declares it to one that can be registered.

What is not here: the form of a manifest (`packages.manifest`), which jobs of a package come and go
(`runtime.cron_scheduler`).
"""

from __future__ import annotations

import logging

from kapsl_scheduler.core.jobs import CronJob, CronOverflowPolicy
from kapsl_scheduler.packages.manifest import CronJobDef, IntervalDef
from kapsl_scheduler.types import ModelInfo, Priority, Tensors

__all__ = ["declared_inputs", "declared_job"]

logger = logging.getLogger(__name__)


def declared_inputs(definition: CronJobDef, info: ModelInfo) -> Tensors:
    """What the job sends to a model: the one unnamed input is the model's first."""
    first = info.inputs[0].name if info.inputs else "input"
    return {first: definition.input, **{named.name: named.tensor for named in definition.additional_inputs}}


def declared_job(
    definition: CronJobDef, info: ModelInfo, *, model: str | None, package: str | None, allow_latency_critical: bool
) -> CronJob:
    """The job for a model with these inputs, its id within its package. Work that is not urgent by the manifest is
    background work; what it calls urgent is that only where jobs are allowed to be, and throughput work elsewhere."""
    id = definition.id if package is None else f"{package}:{definition.id}"
    priority = Priority.BACKGROUND
    if definition.priority == "latency_critical":
        priority = Priority.LATENCY_CRITICAL
        if not allow_latency_critical:
            priority = Priority.THROUGHPUT
            logger.warning(
                "job %r asks to be latency-critical and runs as throughput: this server does not allow it to delay "
                "live requests",
                id,
            )
    schedule = definition.schedule
    return CronJob(
        id,
        schedule.interval_secs if isinstance(schedule, IntervalDef) else schedule,
        declared_inputs(definition, info),
        priority=priority,
        overflow_policy=CronOverflowPolicy(definition.overflow_policy),
        force_cpu=definition.force_cpu,
        model=model,
        package=package,
    )
