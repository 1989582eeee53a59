"""The error trees: codes, what may be tried again, and instances of one's own."""

from __future__ import annotations

import pickle

import pytest

from kapsl_scheduler import errors
from kapsl_scheduler.errors import (
    CronError,
    DeadlineExceeded,
    EngineError,
    InferenceError,
    InvalidExpression,
    InvalidJob,
    InvalidPackage,
    ModelLoadError,
    Overloaded,
)

TREE = {
    "EngineError": ("engine_error", False),
    "InvalidInput": ("invalid_input", False),
    "ModelNotLoaded": ("model_not_loaded", False),
    "ModelLoadError": ("model_load_error", False),
    "InvalidPackage": ("invalid_package", False),
    "Overloaded": ("overloaded", True),
    "DeadlineExceeded": ("deadline_exceeded", True),
    "Unauthorized": ("unauthorized", False),
    "Forbidden": ("forbidden", False),
    "Cancelled": ("cancelled", False),
    "Unavailable": ("unavailable", True),
    "ResourceExhausted": ("resource_exhausted", False),
    "InferenceError": ("inference_error", False),
    "Backend": ("backend", False),
}
CRON_TREE = {
    "CronError": ("cron_error", False),
    "InvalidExpression": ("invalid_expression", False),
    "InvalidJob": ("invalid_job", False),
    "DuplicateId": ("duplicate_id", False),
    "NotFound": ("not_found", False),
    "StoreError": ("store_error", True),
}


def test_the_codes_and_what_may_be_tried_again_are_a_contract() -> None:
    assert {name: (getattr(errors, name).code, getattr(errors, name).retryable) for name in errors.__all__} == (
        TREE | CRON_TREE
    )


@pytest.mark.parametrize("name", errors.__all__)
def test_each_belongs_to_its_tree(name: str) -> None:
    assert issubclass(getattr(errors, name), CronError if name in CRON_TREE else EngineError)


def test_a_deadline_is_a_timeout_to_those_who_know_only_that() -> None:
    assert issubclass(DeadlineExceeded, TimeoutError)


def test_retry_after_is_known_or_not() -> None:
    assert Overloaded("full", retry_after=1.5).retry_after == 1.5
    assert Overloaded("full").retry_after is None
    assert str(Overloaded("full", retry_after=1.5)) == "full"


def raised(error: EngineError, cause: BaseException | None = None) -> EngineError:
    with pytest.raises(EngineError) as caught:
        raise error from cause
    return caught.value


@pytest.mark.parametrize(
    "error",
    [Overloaded("full", retry_after=2.0), InferenceError("nan"), DeadlineExceeded("late"), EngineError()],
)
def test_a_fresh_instance_says_the_same_and_has_no_traceback(error: EngineError) -> None:
    cause = ValueError("why")
    original = raised(error, cause)
    assert original.__traceback__ is not None
    twin = original.fresh()
    assert twin is not original
    assert type(twin) is type(original)
    assert (str(twin), twin.args, twin.retry_after) == (str(original), original.args, original.retry_after)
    assert twin.__cause__ is cause
    assert twin.__traceback__ is None


def test_a_fresh_instance_keeps_what_its_class_adds() -> None:
    twin = InvalidPackage(["a: missing", "b: wrong"], source="m.aimod").fresh()
    assert isinstance(twin, InvalidPackage)
    assert twin.faults == ("a: missing", "b: wrong")
    assert str(twin) == "m.aimod: a: missing; b: wrong"


def test_a_package_names_every_fault() -> None:
    error = InvalidPackage(["a: missing", "b: wrong"])
    assert isinstance(error, ModelLoadError)
    assert str(error) == "package: a: missing; b: wrong"


def test_an_expression_is_wrong_in_one_place_and_a_job_in_many() -> None:
    wrong = InvalidExpression("minute: expected 0-59", text="0 60", field="minute", token="60", position=2, hint="x")
    job = InvalidJob(["timeout: must be above 0", "spread: must be 0 or more"], "nightly")
    assert str(wrong) == "minute: expected 0-59; x"
    assert str(job) == "job 'nightly': timeout: must be above 0; spread: must be 0 or more"
    for error in (wrong, job):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize("name", [name for name in TREE if name != "InvalidPackage"])
def test_errors_cross_process_boundaries(name: str) -> None:
    error = getattr(errors, name)("what happened", retry_after=3.0)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), copy.retry_after) == ("what happened", 3.0)
