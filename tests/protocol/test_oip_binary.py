"""Tensors as bytes behind the JSON: the binary extension of the Open Inference Protocol. Golden bytes, then what is
read and written, and hostile bodies by Hypothesis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.oip_json import decode_reply, decode_request, encode_reply
from kapsl_scheduler.types import InferenceRequest, ModelInfo, Priority, TensorSpec, numpy_dtype
from tests.protocol.test_oip import array_of, check_call, golden

MODEL = ModelInfo("m", version="3", inputs=(TensorSpec("x", "float32", (None, 2)),))


def tensor(name: str, datatype: str, shape: list[int], size: int, **more: Any) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": size}, **more}


def body_of(head: Mapping[str, Any], *raws: bytes) -> tuple[bytes, int]:
    text = json.dumps(head).encode()
    return b"".join((text, *raws)), len(text)


def arrays(call: InferCall) -> dict[str, Any]:
    return {name: (array.dtype, array.shape, array.tolist()) for name, array in call.request.inputs.items()}


def said(body: bytes, header_length: int) -> Any:
    """What becomes of a body: all of the call, or the error's text."""
    try:
        call = decode_request(body, header_length, model=MODEL)
    except InvalidInput as error:
        return str(error)
    asked = (call.id, call.priority, call.timeout, call.outputs, call.binary, call.request.session_id)
    return asked, repr(arrays(call))  # where NaN is NaN


# ----------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("case", golden("binary_requests.json"), ids=lambda case: case["name"])
def test_a_request_is_decoded(case: dict[str, Any]) -> None:
    head = case["head"].encode()
    call = decode_request(head + bytes.fromhex(case["raw"]), len(head))

    check_call(call, case)
    assert call.binary == as_bytes(case)


@pytest.mark.parametrize("case", golden("binary_replies.json"), ids=lambda case: case["name"])
def test_a_reply_is_encoded(case: dict[str, Any]) -> None:
    wanted = tuple(case["wanted"]) if "wanted" in case else None
    call = InferCall(InferenceRequest({}), case.get("id", ""), outputs=wanted, binary=as_bytes(case))
    outputs = {name: array_of(described) for name, described in case["outputs"].items()}

    body, header_length = encode_reply(MODEL, "m", outputs, call)

    assert header_length == len(case["head"])
    assert (body[:header_length].decode(), body[header_length:].hex()) == (case["head"], case["raw"])


def as_bytes(case: dict[str, Any]) -> bool | frozenset[str]:
    """Which outputs are to come back as bytes."""
    return True if case["binary"] is True else frozenset(case["binary"])


# --------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    ("datatype", "array"),
    [
        ("FP32", np.array([[1.5, -2], [0, 3]], "<f4")),
        ("FP16", np.array([1.5, -2], "<f2")),
        ("BF16", np.array([[1.5, -2]], numpy_dtype("bfloat16"))),
        ("INT64", np.array([[-(2**63)]], "<i8")),
        ("UINT8", np.array([0, 255], "u1")),
        ("BOOL", np.array([True, False])),
    ],
)
def test_numbers_are_read_as_they_are(datatype: str, array: Any) -> None:
    raw = array.tobytes()
    call = decode_request(*body_of({"inputs": [tensor("x", datatype, list(array.shape), len(raw))]}, raw))
    assert arrays(call) == {"x": (array.dtype, array.shape, array.tolist())}


def test_texts_stand_behind_their_lengths() -> None:
    raw = b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0\xff"
    call = decode_request(*body_of({"inputs": [tensor("x", "BYTES", [3], len(raw))]}, raw))
    assert call.request.inputs["x"].tolist() == [b"ab", b"", b"\xff"]


@pytest.mark.parametrize("pad", range(4))
def test_an_engine_is_given_aligned_arrays_that_it_cannot_write_to_the_request(pad: int) -> None:
    raw = np.arange(4, dtype="<f4").tobytes()
    body, length = body_of({"inputs": [tensor("x", "FP32", [2, 2], 16)], "id": "i" * pad}, raw)
    array = decode_request(body, length).request.inputs["x"]
    assert array.flags.aligned
    assert array.tolist() == [[0, 1], [2, 3]]
    if array.base is not None:
        assert not array.flags.writeable


def test_all_that_was_asked_is_the_same_the_first_time_and_after() -> None:
    head = {
        "id": "seven",
        "parameters": {"priority": 1, "timeout": 250_000, "sequence_id": 9, "binary_data_output": True},
        "inputs": [tensor("x", "FP32", [1, 2], 8), tensor("y", "INT32", [3], 12)],
        "outputs": [{"name": "a", "parameters": {"binary_data": False}}, {"name": "b"}],
    }
    for number in range(3):
        x, y = np.full((1, 2), number, "<f4"), np.arange(number, number + 3, dtype="<i4")
        call = decode_request(*body_of(head, x.tobytes(), y.tobytes()))
        assert (call.id, call.priority, call.timeout) == ("seven", Priority.LATENCY_CRITICAL, 0.25)
        assert (call.outputs, call.binary, call.request.session_id) == (("a", "b"), frozenset("b"), "9")
        assert [array.tolist() for array in call.request.inputs.values()] == [x.tolist(), y.tolist()]
        call.request.inputs.clear()  # nobody else's


@pytest.mark.parametrize(
    ("head", "raw", "fault"),
    [
        ({"inputs": [tensor("x", "FP32", [1, 2], 8)]}, b"1234567", "8 bytes were announced, and 7 are left"),
        ({"inputs": [tensor("x", "FP32", [1, 2], 8)]}, b"123456789", "1 bytes came behind the last tensor"),
        ({"inputs": [tensor("x", "FP32", [1, 3], 8)]}, b"12345678", "8 bytes came, expected 12 for FP32 of shape"),
        ({"inputs": [tensor("x", "FP8", [1], 2)]}, b"12", "datatype 'FP8' came, expected one of BOOL"),
        ({"inputs": [tensor("x", "BOOL", [1], 1)]}, b"\x02", "a BOOL is neither 0 nor 1"),
        ({"inputs": [tensor("x", "BYTES", [1], 4)]}, b"\x09\0\0\0", "element 0 says 9 bytes, and 0 are left"),
        ({"inputs": [tensor("x", "FP32", [1], 4)] * 2}, b"12345678", "input 'x' came twice"),
        ({"inputs": [tensor("x", "FP32", [1], 4, data=[1])]}, b"1234", "data came as JSON and as bytes"),
        ({"inputs": []}, b"1", "1 bytes came behind the last tensor"),
    ],
)
def test_what_does_not_fit_is_said(head: Any, raw: bytes, fault: str) -> None:
    for _ in range(2):
        assert fault in said(*body_of(head, raw))


def test_a_header_length_beyond_the_body_is_said() -> None:
    assert said(b"{}", 3) == "inference-header-content-length: 3 came, the body has 2 bytes"


def test_a_body_without_json_is_the_one_input() -> None:
    call = decode_request(np.arange(4, dtype="<f4").tobytes(), 0, model=MODEL)
    assert arrays(call) == {"x": (np.dtype("<f4"), (2, 2), [[0, 1], [2, 3]])}
    assert call.binary is True


tensors = st.builds(
    tensor,
    st.sampled_from("xyz"),
    st.sampled_from(["FP32", "INT8", "FP64", "BOOL", "BYTES", "none"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([0, 1, 2, 4, 8, 12]),
)
parameters = st.fixed_dictionaries(
    {}, optional={"priority": st.integers(0, 4), "timeout": st.just(5), "binary_data_output": st.booleans()}
)


@given(
    inputs=st.lists(tensors, max_size=3),
    parameters=parameters,
    outputs=st.lists(st.fixed_dictionaries({"name": st.sampled_from("ab")}), max_size=2),
    raw=st.binary(max_size=24),
)
def test_the_short_way_and_the_long_one_come_to_the_same(
    inputs: list[Any], parameters: Any, outputs: list[Any], raw: bytes
) -> None:
    """JSON beyond a length is not remembered: blanks make it longer."""
    head = {"inputs": inputs, "parameters": parameters, "outputs": outputs}
    body, length = body_of(head, raw)
    blanks = b" " * 4096
    assert said(body, length) == said(blanks + body, len(blanks) + length)


# ---------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("id", ["", "seven"])
def test_an_answer_has_its_tensors_as_bytes_where_that_was_asked(id: str) -> None:
    outputs = {
        "a": np.array([[1.5, 2]], np.float32),
        "b": np.array([7]),
        "bf": np.ones(1, numpy_dtype("bfloat16")),
        "c": np.array(["é"], object),
    }
    for binary in (True, frozenset(("a", "c"))):
        body, length = encode_reply(MODEL, "m", outputs, InferCall(InferenceRequest({}), id, binary=binary))
        assert length is not None
        head = json.loads(body[:length])
        assert (head["model_name"], head["model_version"], head.get("id", "")) == ("m", "3", id)
        assert [one["name"] for one in head["outputs"]] == ["a", "b", "bf", "c"]
        assert ("data" in head["outputs"][1]) == (binary is not True)
        reply = decode_reply(body, length)
        assert [array.tolist() for array in reply.outputs.values()] == [[[1.5, 2]], [7], [1], ["é".encode()]]


def test_answers_of_other_shapes_do_not_share_their_json() -> None:
    call = InferCall(InferenceRequest({}), binary=True)
    for shape, dtype in (((1, 4), "<f4"), ((2, 2), "<f4"), ((4,), "<f4"), ((4,), "<i4"), ((2,), "<f8")):
        array = np.zeros(shape, dtype)
        body, length = encode_reply(MODEL, "m", {"a": array}, call)
        found = decode_reply(body, length).outputs["a"]
        assert (found.shape, found.dtype) == (array.shape, array.dtype)
