"""From the text of a stored job to one that can fire: callables by name, sources and sinks by kind, packages.

What is not here: the form of the text (`core.definition`), when jobs are read.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from kapsl_scheduler.core.definition import Adapters, callable_name, decode_job
from kapsl_scheduler.core.jobs import CronJob, Named
from kapsl_scheduler.errors import InvalidExpression, InvalidJob

__all__ = ["Bindings"]

logger = logging.getLogger(__name__)

_FIELDS = ("request", "on_result", "condition", "sink")


class Bindings:
    """What jobs refer to by name. `packages` are those whose jobs may fire here; `lacks(model)` says why the jobs of a
    model may not, None if they may."""

    def __init__(self, adapters: Adapters | None, lacks: Callable[[str], str | None] | None = None) -> None:
        self._callables: dict[str, Callable[..., Any]] = {}
        self._own: dict[str, dict[str, Callable[..., Any]]] = {}  # by job and field: what it was registered with
        self.packages: set[str] = set()
        self.lacks = lacks or _lacks_nothing
        self._adapters = adapters or _no_adapters

    def name(self, name: str, function: Callable[..., Any]) -> None:
        """Let jobs refer to a callable by name. Raises `ValueError` for a name that stands for another one."""
        if self._callables.setdefault(name, function) is not function:
            raise ValueError(f"name: {name!r} is bound to another callable")

    def learn(self, job: CronJob) -> None:
        """Remember the callables and the package of a job that has been registered: it will be read again."""
        if job.package is not None:
            self.packages.add(job.package)
        self.learn_callables(job)

    def learn_callables(self, job: CronJob) -> None:
        """Other jobs may refer to a function of a module by its own name; a lambda, a method or the like shares its
        name with others, and is the job's alone. One that the job says by its name again stays the job's."""
        before = self._own.get(job.id, {})
        own: dict[str, Callable[..., Any]] = {}
        for field in _FIELDS:
            value = getattr(job, field)
            if callable(value):
                own[field] = value
                if _stands_for(name := callable_name(value), value):
                    self._callables[name] = value
            elif isinstance(value, Named) and field in before and callable_name(before[field]) == value.name:
                own[field] = before[field]
        if own:
            self._own[job.id] = own
        else:
            self._own.pop(job.id, None)

    def forget(self, job: str) -> None:
        """There is no such job any more."""
        self._own.pop(job, None)

    def bind(self, job: CronJob, *, loaded: str | None = None) -> tuple[CronJob, list[str]]:
        """The job with callables in place of their names, and what is missing. The package `loaded` is not."""
        found: dict[str, Any] = {}
        missing: list[str] = []
        own = self._own.get(job.id, {})
        for field in _FIELDS:
            value = getattr(job, field)
            if not isinstance(value, Named):
                continue
            if field in own and callable_name(own[field]) == value.name:
                found[field] = own[field]
            elif value.name in self._callables:
                found[field] = self._callables[value.name]
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
        except Exception as error:  # an adapter's mistake must not be the end of all other jobs
            logger.exception("the definition of a job could not be read")
            return None, f"{type(error).__name__}: {error}"
        bound, missing = self.bind(job)
        return bound, "; ".join(missing) or None

    def decode(self, definition: bytes) -> CronJob:
        """The job that a text describes, unchecked. Raises `InvalidJob`."""
        return decode_job(definition, self._adapters)


def _stands_for(name: str, function: Callable[..., Any]) -> bool:
    """Whether a callable's own name leads to it, and to no other."""
    module, _, path = name.partition(":")
    try:
        found: Any = functools.reduce(getattr, path.split("."), sys.modules.get(module))
        return found is function
    except AttributeError:
        return False


def _lacks_nothing(model: str) -> str | None:
    return None


def _no_adapters(kind: str, settings: Any) -> Any:
    here = "known here; adapters=builtin_adapters makes those that come with kapsl_scheduler"
    raise ValueError(f"no {kind} of type {settings.get('type')!r} is {here}")
