"""From the text of a stored job to one that can fire: callables by name, sources and sinks by kind, packages.

What is not here: the form of the text (`core.definition`), when jobs are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from kapsl_scheduler.core.definition import Adapters, callable_name, decode_job
from kapsl_scheduler.core.jobs import CronJob, Named
from kapsl_scheduler.errors import InvalidExpression, InvalidJob

__all__ = ["Bindings"]

_FIELDS = ("request", "on_result", "condition", "sink")


class Bindings:
    """What jobs refer to by name. `packages` are those whose jobs may fire here; `lacks(model)` says why the jobs of a
    model may not, None if they may."""

    def __init__(self, adapters: Adapters | None, lacks: Callable[[str], str | None] | None = None) -> None:
        self.callables: dict[str, Callable[..., Any]] = {}
        self.packages: set[str] = set()
        self.lacks = lacks or _lacks_nothing
        self._adapters = adapters or _no_adapters

    def learn(self, job: CronJob) -> None:
        """Remember a job's callables under their own names, and its package: it will be read again."""
        if job.package is not None:
            self.packages.add(job.package)
        for field in _FIELDS:
            value = getattr(job, field)
            if callable(value):
                self.callables[callable_name(value)] = value

    def bind(self, job: CronJob, *, loaded: str | None = None) -> tuple[CronJob, list[str]]:
        """The job with callables in place of their names, and what is missing. The package `loaded` is not."""
        found: dict[str, Any] = {}
        missing: list[str] = []
        for field in _FIELDS:
            value = getattr(job, field)
            if not isinstance(value, Named):
                continue
            if value.name in self.callables:
                found[field] = self.callables[value.name]
            else:
                missing.append(f"{field}: nothing is bound as {value.name!r}")
        if job.package not in (None, loaded) and job.package not in self.packages:
            missing.append(f"package: {job.package!r} is not loaded")
        elif job.model is not None and (why := self.lacks(job.model)) is not None:
            missing.append(f"model: {why}")
        return (msgspec.structs.replace(job, **found) if found else job), missing

    def read(self, definition: bytes, *, allow_latency_critical: bool) -> tuple[CronJob | None, str | None]:
        """The job that a store holds, and why it cannot fire here (None if it can)."""
        try:
            job = decode_job(definition, self._adapters).check(allow_latency_critical=allow_latency_critical)
        except (InvalidJob, InvalidExpression) as error:
            return None, str(error)
        bound, missing = self.bind(job)
        return bound, "; ".join(missing) or None

    def decode(self, definition: bytes) -> CronJob:
        """The job that a text describes, unchecked. Raises `InvalidJob`."""
        return decode_job(definition, self._adapters)


def _lacks_nothing(model: str) -> str | None:
    return None


def _no_adapters(kind: str, settings: Any) -> Any:
    raise ValueError(f"no {kind} of type {settings.get('type')!r} is known here")
