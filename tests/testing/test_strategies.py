"""The Hypothesis strategies draw what admission takes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings

from kapsl_scheduler.core.admission import Admission
from kapsl_scheduler.testing.strategies import inputs_for
from kapsl_scheduler.types import ModelInfo, TensorSpec

INFO = ModelInfo(
    "all sorts",
    inputs=(
        TensorSpec("input", "float16", ("batch", "length"), 0),
        TensorSpec("mask", "bool", ("batch", "length"), 0),
        TensorSpec("state", "float32", (2, "batch", None), 1),
        TensorSpec("rate", "int64", ()),
        TensorSpec("text", "string", ("batch", 1), 0),
    ),
    batchable=True,
)


@pytest.mark.slow
@settings(max_examples=50)
@given(inputs=inputs_for(INFO, min_rows=2, max_rows=3))
def test_inputs_are_valid(inputs: dict[str, Any]) -> None:
    Admission(INFO, max_rows=3).admit(inputs)
    rows, length = inputs["input"].shape
    assert rows in (2, 3)
    assert inputs["mask"].shape == (rows, length)
    assert inputs["state"].shape[:2] == (2, rows)


@pytest.mark.slow
def test_hypothesis_is_needed_for_nothing_else() -> None:
    code = "import sys; sys.modules['hypothesis'] = None; import kapsl_scheduler.testing, kapsl_scheduler.engines"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_base_install_is_enough_for_engines_and_fakes() -> None:
    code = (
        "import sys; import kapsl_scheduler.testing, kapsl_scheduler.engines; "
        "assert not {'onnxruntime', 'onnx', 'hypothesis', 'uvloop'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
