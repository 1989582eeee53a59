"""The Open Inference Protocol in protobuf: golden bytes, what is refused and in which words, and that a call means the
same in each of its encodings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.server.oip import InferCall, datatype_of_dtype
from kapsl_scheduler.server.oip_json import decode_request, encode_request
from kapsl_scheduler.server.oip_proto import decode_call, encode_response, message_class, parsed
from kapsl_scheduler.server.oip_raw import encode_raw
from kapsl_scheduler.types import InferenceRequest, ModelInfo, Priority
from tests.protocol.test_oip import array_of, as_text, check_call, golden, same

PROTO = Path(__file__).parents[2] / "src" / "kapsl_scheduler" / "server" / "proto"
Request = message_class("inference.ModelInferRequest")
MODEL = ModelInfo("m", version="3")
TYPED = {
    **{f"INT{bits}": "int_contents" for bits in (8, 16, 32)},
    **{f"UINT{bits}": "uint_contents" for bits in (8, 16, 32)},
    "INT64": "int64_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BOOL": "bool_contents",
    "BYTES": "bytes_contents",
}


def decode(data: bytes) -> InferCall:
    return decode_call(parsed(Request, data))[0]


# ---------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("case", golden("grpc_requests.json"), ids=lambda case: case["name"])
def test_a_message_is_decoded(case: dict[str, Any]) -> None:
    call = decode(bytes.fromhex(case["hex"]))

    check_call(call, case)
    assert call.binary is True


@pytest.mark.parametrize("case", golden("grpc_replies.json"), ids=lambda case: case["name"])
def test_an_answer_is_encoded(case: dict[str, Any]) -> None:
    wanted = tuple(case["wanted"]) if "wanted" in case else None
    call = InferCall(InferenceRequest({}), case.get("id", ""), outputs=wanted)
    outputs = {name: array_of(described) for name, described in case["outputs"].items()}

    assert encode_response(MODEL, "m", outputs, call).SerializeToString().hex() == case["hex"]


def test_the_messages_are_those_of_the_proto_files(tmp_path: Path) -> None:
    from grpc_tools import protoc

    made = tmp_path / "made.binpb"
    files = [path.name for path in sorted(PROTO.glob("*.proto"))]
    assert protoc.main(["protoc", f"--proto_path={PROTO}", f"--descriptor_set_out={made}", *files]) == 0
    assert made.read_bytes() == (PROTO / "descriptors.binpb").read_bytes()


# --------------------------------------------------------------------------------- one call, three encodings


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    if draw(st.booleans()):
        kinds = st.sampled_from(["bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
        return draw(hnp.arrays(draw(kinds), shape))
    if draw(st.booleans()):
        array = np.empty(shape, object)
        array.ravel()[:] = [draw(st.text(max_size=3)) for _ in range(array.size)]
        return array
    kind = draw(st.sampled_from(["float16", "float32", "float64"]))
    return draw(hnp.arrays(kind, shape, elements={"allow_nan": False, "allow_infinity": False}))


def binary_body(inputs: dict[str, np.ndarray[Any, Any]], said: dict[str, Any]) -> tuple[bytes, int]:
    raws = [encode_raw(array) for array in inputs.values()]
    described = [
        {
            "name": name,
            "shape": array.shape,
            "datatype": datatype_of_dtype(array.dtype),
            "parameters": {"binary_data_size": len(raw)},
        }
        for (name, array), raw in zip(inputs.items(), raws, strict=True)
    ]
    head = json.dumps({"inputs": described, **said}).encode()
    return head + b"".join(raws), len(head)


def message(inputs: dict[str, np.ndarray[Any, Any]], *, typed: bool, **fields: Any) -> bytes:
    request = Request(model_name="m", **fields)
    for name, array in inputs.items():
        datatype = datatype_of_dtype(array.dtype)
        tensor = request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        if typed:
            values = array.ravel().tolist()
            field = getattr(tensor.contents, TYPED[datatype])
            field.extend([value.encode() for value in values] if datatype == "BYTES" else values)
        else:
            request.raw_input_contents.append(encode_raw(array))
    data: bytes = request.SerializeToString()
    return data


@given(
    arrays=st.lists(tensors(), min_size=1, max_size=3),
    id=st.text("ab7", max_size=2),
    priority=st.sampled_from([None, *Priority]),
    timeout=st.sampled_from([None, 0.25, 3.0]),
    outputs=st.sampled_from([None, ("y",), ("z", "y")]),
)
def test_a_call_is_the_same_in_json_in_binary_and_in_protobuf(
    arrays: list[np.ndarray[Any, Any]],
    id: str,
    priority: Priority | None,
    timeout: float | None,
    outputs: tuple[str, ...] | None,
) -> None:
    inputs = {f"x{number}": array for number, array in enumerate(arrays)}
    text = encode_request(inputs, id=id, priority=priority, timeout=timeout, outputs=outputs)
    said = {key: value for key, value in json.loads(text).items() if key != "inputs"}
    parameters = {name: {"int64_param": value} for name, value in said.get("parameters", {}).items()}
    fields = {"id": id, "parameters": parameters, "outputs": [{"name": name} for name in outputs or ()]}

    calls = [decode_request(text), decode_request(*binary_body(inputs, said))]
    calls.append(decode(message(inputs, typed=False, **fields)))
    if not any(array.dtype == np.float16 for array in arrays):
        calls.append(decode(message(inputs, typed=True, **fields)))

    for call in calls:
        assert (call.id, call.priority, call.timeout, call.outputs) == (id, priority, timeout, outputs)
        assert list(call.request.inputs) == list(inputs)
        for name, array in inputs.items():
            assert same(as_text(call.request.inputs[name]), array)


# ---------------------------------------------------------------------------------------------- refused


def refused(**fields: Any) -> str:
    with pytest.raises(InvalidInput) as raised:
        decode(Request(model_name="m", **fields).SerializeToString())
    return str(raised.value)


def tensor(datatype: str = "FP32", shape: list[int] | None = None, **fields: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": [1] if shape is None else shape, **fields}


def parameter(name: str, **value: Any) -> dict[str, Any]:
    return {name: value}


ONE = b"\0\0\x80\x3f"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"inputs": [tensor()], "raw_input_contents": [ONE, ONE]}, "2 raw contents came, expected one for each of 1"),
        ({"inputs": [tensor()], "raw_input_contents": [b"123"]}, "3 bytes came, expected 4 for FP32 of shape [1]"),
        ({"inputs": [tensor(), tensor()], "raw_input_contents": [ONE, ONE]}, "input 'x' came twice, expected once"),
        ({"inputs": [tensor("FP8")], "raw_input_contents": [b"12"]}, "datatype 'FP8' came, expected one of BOOL"),
        ({"inputs": [tensor("FP8", contents={"fp32_contents": [1]})]}, "datatype 'FP8' came, expected one of BOOL"),
        ({"inputs": [tensor("FP16", contents={"fp32_contents": [1]})]}, "FP16 has no typed contents, expected raw"),
        (
            {"inputs": [tensor(contents={"fp64_contents": [1]})]},
            "fp64_contents came for FP32, expected fp32_contents",
        ),
        ({"inputs": [tensor()]}, "0 elements came, expected 1 for shape [1]"),
        ({"inputs": [tensor(shape=[-1])], "raw_input_contents": [ONE]}, "shape [-1] came, expected dimensions of 0"),
        ({"inputs": [tensor(shape=[1] * 33)], "raw_input_contents": [ONE]}, "33 dimensions came, expected at most 32"),
        ({"inputs": [tensor(shape=[2**62, 0, 2**62])], "raw_input_contents": [b""]}, "beyond what an array can have"),
        ({"inputs": [tensor(shape=[2**62, 0, 2**62], contents={})]}, "beyond what an array can have"),
        (
            {"inputs": [tensor(contents={"fp32_contents": [1]})], "raw_input_contents": [ONE]},
            "contents came typed and raw, expected one of them",
        ),
        (
            {"inputs": [tensor("INT8", contents={"int_contents": [128]})]},
            "a value is out of range, expected integers from -128 to 127",
        ),
        ({"inputs": [tensor("BOOL")], "raw_input_contents": [b"\2"]}, "a BOOL is neither 0 nor 1"),
        (
            {"inputs": [tensor("BYTES")], "raw_input_contents": [b"\5\0\0\0ab"]},
            "element 0 says 5 bytes, and 2 are left",
        ),
        (
            {"inputs": [tensor(parameters=parameter("shared_memory_region", string_param="r"))]},
            "shared memory is not offered",
        ),
        (
            {"outputs": [{"name": "y", "parameters": parameter("shared_memory_region", string_param="r")}]},
            "output 'y': shared memory is not offered",
        ),
        (
            {"outputs": [{"name": "y", "parameters": parameter("classification", int64_param=3)}]},
            "output 'y': classification is not offered",
        ),
        ({"outputs": [{"name": "y"}, {"name": "y"}]}, "output 'y' was asked for twice"),
        ({"outputs": [{"name": str(number)} for number in range(1025)]}, "1025 outputs were asked for, expected at"),
        ({"inputs": [{"name": str(number)} for number in range(1025)]}, "1025 inputs came, expected at most 1024"),
        ({"parameters": parameter("priority", string_param="1")}, "priority: expected an integer from 0"),
        ({"parameters": parameter("timeout", int64_param=-1)}, "timeout: expected an integer from 0"),
        ({"parameters": parameter("timeout", bool_param=True)}, "timeout: expected an integer from 0"),
        ({"parameters": parameter("sequence_id", double_param=1.5)}, "sequence_id: expected a text or an integer"),
    ],
)
def test_what_is_wrong_with_a_message_is_said(fields: dict[str, Any], said: str) -> None:
    assert said in refused(**fields)


def test_every_tensor_that_is_wrong_is_said() -> None:
    faulty = [tensor("FP31"), tensor("FP32") | {"name": "y"}]

    assert refused(inputs=faulty, raw_input_contents=[b"", b"1"]).count("; input 'y': 1 bytes came") == 1


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x05m", b"\x0a\x01\xff"])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="the message is no ModelInferRequest"):
        parsed(Request, data)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_call_or_refused(data: bytes) -> None:
    try:
        decode(data)
    except InvalidInput:
        pass
