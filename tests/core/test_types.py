"""The nouns: classes, dtypes, requests and responses."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.types import (
    EngineMetrics,
    InferenceRequest,
    InferenceResponse,
    ModelInfo,
    Priority,
    RequestMetadata,
    TensorSpec,
    canonical_dtype,
    dtype_name,
    numpy_dtype,
)

BITS = {"float": (16, 32, 64), "int": (8, 16, 32, 64), "uint": (8, 16, 32, 64)}
NAMES = [f"{kind}{bits}" for kind, sizes in BITS.items() for bits in sizes] + ["bool", "string"]


def test_lower_numbers_are_served_first() -> None:
    assert list(Priority) == [Priority.LATENCY_CRITICAL, Priority.THROUGHPUT, Priority.BACKGROUND]
    assert [int(priority) for priority in Priority] == [0, 1, 2]


# ------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("name", NAMES)
def test_a_dtype_is_its_own_canonical_name_and_numpys(name: str) -> None:
    assert canonical_dtype(name) == name
    assert dtype_name(numpy_dtype(name)) == name


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("fp32", "float32"),
        ("f32", "float32"),
        ("FP16", "float16"),
        ("f64", "float64"),
        ("float", "float32"),
        ("double", "float64"),
        ("half", "float16"),
        ("i64", "int64"),
        ("i8", "int8"),
        ("u8", "uint8"),
        ("u16", "uint16"),
        ("str", "string"),
        ("utf8", "string"),
        ("BYTES", "string"),
        ("boolean", "bool"),
        (" Float32 ", "float32"),
        ("complex64", None),
        ("", None),
        ("fp8", None),
    ],
)
def test_aliases_in_any_case(alias: str, name: str | None) -> None:
    assert canonical_dtype(alias) == name


def test_numpy_dtypes_of_other_names_are_not_known() -> None:
    with pytest.raises(KeyError):
        numpy_dtype("fp32")


@pytest.mark.parametrize(
    ("dtype", "name"), [("<U3", "string"), ("S2", "string"), ("O", "string"), ("complex64", "complex64")]
)
def test_what_numpy_says_is_named_for_people(dtype: str, name: str) -> None:
    assert dtype_name(np.dtype(dtype)) == name


# ---------------------------------------------------------------------------------------------- requests


def test_a_request_carries_what_it_was_given() -> None:
    inputs, metadata = {"x": [1.0]}, RequestMetadata(tenant="a")
    request = InferenceRequest(inputs, session_id="s", metadata=metadata)
    assert request.inputs is inputs
    assert (request.session_id, request.metadata) == ("s", metadata)
    assert "session_id='s'" in repr(request)
    assert "tenant='a'" in repr(request)
    assert "1.0" not in repr(request)  # tensors are no reading matter
    with pytest.raises(AttributeError):
        request.priority = 1  # type: ignore[attr-defined]


def test_metadata_has_nothing_to_say_by_default() -> None:
    assert msgspec.to_builtins(RequestMetadata()) == {
        "request_id": None,
        "timeout_ms": None,
        "priority": None,
        "force_cpu": False,
        "tenant": None,
        "model_version": None,
        "auth_token": None,
    }
    with pytest.raises(AttributeError):
        RequestMetadata().tenant = "b"  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------- responses


def response(request_id: str | None = None, **outputs: np.ndarray) -> InferenceResponse:
    return InferenceResponse.of(outputs, 0.1, 0.2, 4, request_id)


def test_the_first_output_is_the_output() -> None:
    first = np.zeros(1)
    assert response(a=first, b=np.ones(1)).output is first


def test_a_model_without_outputs_has_none() -> None:
    with pytest.raises(InferenceError, match="no outputs"):
        _ = response().output


def test_the_callers_id_comes_back_or_one_is_made_when_asked_for() -> None:
    assert response("mine").request_id == "mine"
    answer = response()
    assert answer.request_id == answer.request_id
    assert len(answer.request_id) == 32
    assert response().request_id != answer.request_id


def test_a_copy_has_arrays_of_its_own() -> None:
    batch = np.arange(4.0)
    answer = response("mine", y=batch[1:2])
    copy = answer.copy()
    batch[:] = 0
    assert copy.output.tolist() == [1.0]
    assert answer.output.tolist() == [0.0]
    assert (copy.queue_time, copy.compute_time, copy.batch_rows, copy.request_id) == (0.1, 0.2, 4, "mine")


# ------------------------------------------------------------------------------------------------- models


def test_infos_of_equal_models_are_equal() -> None:
    def info(name: str = "m") -> ModelInfo:
        return ModelInfo(name, (TensorSpec("x", "float32", ("N", 4), 0),), batchable=True)

    assert info() == info()
    assert info() != info("other")
    assert info().version == "1"


def test_an_engine_that_has_done_nothing_says_so() -> None:
    assert EngineMetrics() == EngineMetrics(calls=0, rows=0, errors=0, busy_time=0.0)
