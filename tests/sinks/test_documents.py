"""The JSON form of results."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.ports import SinkItem
from kapsl_scheduler.sinks.documents import encode_item
from tests.sinks.answers import answer


def test_an_answer_has_its_outputs_with_the_batch_axis() -> None:
    item = answer("a.csv:1", y=np.array([[1, 2]], np.int64), ok=np.array([True]), z=np.float64(0.1))
    assert encode_item(item) == b'{"key":"a.csv:1","outputs":{"y":[[1,2]],"ok":[true],"z":0.1}}'
    assert encode_item(SinkItem("k", None)) == b'{"key":"k","outputs":{}}'


def test_an_error_has_its_code_and_its_message() -> None:
    assert encode_item(SinkItem("k", None, InvalidInput("no"))) == (
        b'{"key":"k","error":{"code":"invalid_input","message":"no"}}'
    )
    assert json.loads(encode_item(SinkItem("k", None, KeyError("x"))))["error"]["code"] == "KeyError"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_there_is_no_nan_and_no_infinity_in_json(dtype: Any) -> None:
    item = answer("k", y=np.array([np.nan, np.inf, -np.inf, 0.1], dtype))
    assert encode_item(item) == b'{"key":"k","outputs":{"y":[null,null,null,0.1]}}'


def test_bytes_are_base64_and_what_json_does_not_know_is_text() -> None:
    class Thing:
        def __str__(self) -> str:
            return "a thing"

    values = np.array(["ä", b"\xff\x00", 1, None, Thing(), 1 + 2j], object)
    moment = np.array(["2026-11-25T03:00"], "datetime64[s]")
    outputs = json.loads(encode_item(answer("k", y=values, t=moment)))["outputs"]
    assert outputs == {"y": ["ä", "/wA=", 1, None, "a thing", "(1+2j)"], "t": ["2026-11-25T03:00:00"]}
    assert dt.datetime.fromisoformat(outputs["t"][0]) == moment[0].item()


@settings(max_examples=50)
@given(
    npst.arrays(st.sampled_from([np.float16, np.float32]), 5, elements={"allow_nan": False, "allow_infinity": False})
)
def test_narrow_floats_are_short_and_exact(array: Any) -> None:
    came = json.loads(encode_item(answer("k", y=array)))["outputs"]["y"]
    np.testing.assert_array_equal(np.array(came, array.dtype), array)
    assert all(len(str(number)) <= len(str(float(value))) for number, value in zip(came, array, strict=True))
