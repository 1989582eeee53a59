"""The error trees. Every failure that a caller can see is one of these: `EngineError` for requests and models,
`CronError` for jobs and their store.

Each class carries `code` (a stable word for logs and wire formats) and `retryable` (may the same request
succeed later, unchanged?). What is not here: the table from error to HTTP status, which belongs to the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

__all__ = [
    "Backend",
    "Cancelled",
    "CronError",
    "DeadlineExceeded",
    "DuplicateId",
    "EngineError",
    "Forbidden",
    "InferenceError",
    "InvalidExpression",
    "InvalidInput",
    "InvalidJob",
    "InvalidPackage",
    "ModelLoadError",
    "ModelNotLoaded",
    "NotFound",
    "Overloaded",
    "ResourceExhausted",
    "StoreError",
    "Unauthorized",
    "Unavailable",
]


class EngineError(Exception):
    """Base of everything that a request or a model can fail with.

    `retry_after` is the number of seconds after which trying again is sensible, where that is known.
    """

    code: ClassVar[str] = "engine_error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def fresh(self) -> EngineError:
        """A new instance of the same error, for another caller: an instance that several tasks raise
        would collect all their tracebacks. The same one, where a class of somebody's own cannot be made so."""
        try:
            twin = type(self).__new__(type(self))
        except Exception:
            return self
        twin.__dict__.update(self.__dict__)
        twin.args = self.args
        twin.__cause__ = self.__cause__
        return twin


class InvalidInput(EngineError):
    """The request does not fit the model: the message names the input, what came and what was expected."""

    code = "invalid_input"


class ModelNotLoaded(EngineError):
    """No model of that name (and version) is loaded."""

    code = "model_not_loaded"


class ModelLoadError(EngineError):
    """A model could not be loaded."""

    code = "model_load_error"


class InvalidPackage(ModelLoadError):
    """A package or its manifest is faulty. `faults` has every fault found, each with its path; `source` names the
    package."""

    code = "invalid_package"

    def __init__(self, faults: Sequence[str], *, source: str = "package") -> None:
        self.faults = tuple(faults)
        self.source = source
        super().__init__(f"{source}: " + "; ".join(self.faults))


class Overloaded(EngineError):
    """There was no room for the request, or it had to make room for a more urgent one: then it is `evicted`, having
    been in the queue for a while."""

    code = "overloaded"
    retryable = True
    evicted: bool = False


class DeadlineExceeded(EngineError, TimeoutError):
    """The request's timeout passed, or would pass before its batch could be done."""

    code = "deadline_exceeded"
    retryable = True


class Unauthorized(EngineError):
    """Who asks has not said who they are, or nobody knows them."""

    code = "unauthorized"


class Forbidden(EngineError):
    """Who asks may not have this."""

    code = "forbidden"


class Cancelled(EngineError):
    """Somebody other than the awaiting caller cancelled the request."""

    code = "cancelled"


class Unavailable(EngineError):
    """Nothing can serve the request now: the scheduler is closed or closing, or its engines are lost.

    An engine raises it to say that it is lost: it is not asked again until its health check succeeds.
    """

    code = "unavailable"
    retryable = True


class ResourceExhausted(EngineError):
    """A fixed limit (bytes, memory) cannot hold the request, now or later."""

    code = "resource_exhausted"


class InferenceError(EngineError):
    """The engine failed while it ran the request. `__cause__` is what the engine raised."""

    code = "inference_error"


class Backend(EngineError):
    """The runtime below the engine (a driver, a device, a library) failed."""

    code = "backend"


# ------------------------------------------------------------------------------------------------- cron


class CronError(Exception):
    """Base of what can be wrong with a job, its schedule or the store that keeps it."""

    code: ClassVar[str] = "cron_error"
    retryable: ClassVar[bool] = False


class InvalidExpression(CronError, ValueError):
    """The text is no cron expression.

    `field` is the field at fault (`"minute"`), None where the whole text is; `token` the offending part and
    `position` where it starts in `text`, counted in characters from 0; `hint` the likely fix, where one can be
    guessed.
    """

    code = "invalid_expression"

    def __init__(
        self,
        message: str,
        *,
        text: str = "",
        field: str | None = None,
        token: str = "",
        position: int = 0,
        hint: str | None = None,
    ) -> None:
        super().__init__(message if hint is None else f"{message}; {hint}")
        self.text = text
        self.field = field
        self.token = token
        self.position = position
        self.hint = hint


class InvalidJob(CronError, ValueError):
    """A job cannot be as it was asked for. `faults` has everything that is wrong, each with the field's name."""

    code = "invalid_job"

    def __init__(self, faults: Sequence[str], job: str = "") -> None:
        super().__init__(faults, job)
        self.faults = tuple(faults)
        self.job = job

    def __str__(self) -> str:
        faults = "; ".join(self.faults)
        return f"job {self.job!r}: {faults}" if self.job else faults


class DuplicateId(CronError):
    """A job of that id is registered already."""

    code = "duplicate_id"


class NotFound(CronError, LookupError):
    """There is no job (or no run) of that id."""

    code = "not_found"


class StoreError(CronError):
    """The store of the jobs cannot do what was asked: it is locked, full, damaged or of a later version.

    What was stored before is as it was.
    """

    code = "store_error"
    retryable = True
