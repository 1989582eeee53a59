"""The JSON codec of the Open Inference Protocol: golden bodies, then round trips and hostile bodies by Hypothesis."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kapsl_scheduler.errors import InferenceError, InvalidInput
from kapsl_scheduler.server import oip_json
from kapsl_scheduler.server.oip import InferCall, check_outputs, numpy_dtype_of
from kapsl_scheduler.server.oip_json import decode_reply, decode_request, encode_reply, encode_request
from kapsl_scheduler.server.oip_models import model_metadata
from kapsl_scheduler.types import InferenceRequest, ModelInfo, Priority, TensorSpec

GOLDEN = Path(__file__).parent / "golden"
MODEL = ModelInfo("m", version="3")
DATATYPES = [
    "BOOL",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "FP16",
    "BF16",
    "FP32",
    "FP64",
]


def golden(name: str) -> list[dict[str, Any]]:
    cases: list[dict[str, Any]] = json.loads((GOLDEN / name).read_text("utf-8"))
    return cases


def array_of(described: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.array(described["data"], described["dtype"]).reshape(described["shape"])


def as_text(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """BYTES come as bytes, and in JSON as text; a model may have either."""
    if array.dtype.kind != "O":
        return array
    texts = np.empty(array.shape, object)
    texts.ravel()[:] = [item.decode() if isinstance(item, bytes) else item for item in array.ravel().tolist()]
    return texts


def same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and left.tolist() == right.tolist()


def check_call(call: InferCall, case: dict[str, Any]) -> None:
    """It is what a golden case says, whatever encoding it came in."""
    assert call.id == case.get("id", "")
    assert call.priority == (Priority[case["priority"]] if "priority" in case else None)
    assert call.timeout == case.get("timeout")
    assert call.outputs == (tuple(case["outputs"]) if "outputs" in case else None)
    assert call.request.session_id == case.get("session")
    assert list(call.request.inputs) == list(case["inputs"])
    for name, described in case["inputs"].items():
        assert same(as_text(call.request.inputs[name]), array_of(described))


# ---------------------------------------------------------------------------------------------- golden


@pytest.mark.parametrize("case", golden("requests.json"), ids=lambda case: case["name"])
def test_a_request_is_decoded(case: dict[str, Any]) -> None:
    call = decode_request(case["body"].encode())

    check_call(call, case)


@pytest.mark.parametrize("case", golden("faults.json"), ids=lambda case: case["message"])
def test_a_fault_names_the_input_what_came_and_what_was_expected(case: dict[str, Any]) -> None:
    body = json.dumps({"inputs": [{"name": "x", **case["input"]}]})

    with pytest.raises(InvalidInput) as raised:
        decode_request(body.encode())

    assert str(raised.value) == case["message"]


@pytest.mark.parametrize("case", golden("replies.json"), ids=lambda case: case["name"])
def test_a_reply_is_encoded(case: dict[str, Any]) -> None:
    wanted = tuple(case["wanted"]) if "wanted" in case else None
    call = InferCall(InferenceRequest({}), case.get("id", ""), outputs=wanted)
    outputs = {name: array_of(described) for name, described in case["outputs"].items()}

    body, header_length = encode_reply(MODEL, "m", outputs, call)

    assert (body.decode(), header_length) == (case["body"], None)


@pytest.mark.parametrize(
    ("datatype", "data", "said"),
    [
        ("FP32", b"[1, 1e999]", r"'x': data\[1\] cannot be read, expected a number within the range of FP32"),
        ("FP64", b"[-1e999]", r"'x': data\[0\] cannot be read, expected a number"),
        ("BOOL", b"[1e999]", r"'x': data\[0\] cannot be read, expected true, false, 0 or 1"),
        ("INT8", b'[[1], ["\xff"]]', r"'x': data\[1\]\[0\] cannot be read, expected an integer"),
        ("BYTES", b'["\xff"]', r"'x': data: .*utf-8.*, expected a string"),
    ],
)
def test_values_that_no_decoder_can_show_are_refused_by_name(datatype: str, data: bytes, said: str) -> None:
    shape = b"[2,1]" if data.startswith(b"[[") else b"[1]"
    body = b'{"inputs":[{"name":"x","shape":%b,"datatype":"%b","data":%b}]}' % (shape, datatype.encode(), data)

    with pytest.raises(InvalidInput, match=said):
        decode_request(body)


@pytest.mark.parametrize(
    ("datatype", "data", "came"),
    [
        ("INT32", "[3.0, -2, 0.0]", [3, -2, 0]),
        ("UINT8", "[255.0]", [255]),
        ("INT64", "[[9007199254740991.0], [1]]", [[2**53 - 1], [1]]),
        ("BOOL", "[1.0, 0]", [True, False]),
        ("UINT8", "[256.0]", "data[0] is 256.0, expected an integer from 0 to 255"),
        ("INT64", "[9007199254740992.0]", "data[0] is"),
        ("INT64", "[9007199254740993, 1.0]", "data[1] is 1.0, expected an integer"),
        ("INT32", "[1, 2.5]", "data[1] is 2.5, expected an integer"),
        ("BOOL", "[2.0]", "data[0] is 2.0, expected true, false, 0 or 1"),
        ("BOOL", "[true, 1.0]", "data[1] is 1.0, expected true, false, 0 or 1"),
        ("INT8", '[1.0, "1"]', "data[0] is 1.0, expected an integer"),
    ],
)
def test_whole_numbers_may_come_as_floats(datatype: str, data: str, came: Any) -> None:
    shape = list(np.array(json.loads(data), object).shape)
    body = json.dumps({"name": "x", "shape": shape, "datatype": datatype, "data": 0}).replace(": 0}", f": {data}}}")
    body = f'{{"inputs": [{body}]}}'
    if isinstance(came, str):
        with pytest.raises(InvalidInput) as raised:
            decode_request(body.encode())
        assert came in str(raised.value)
    else:
        array = decode_request(body.encode()).request.inputs["x"]
        assert (array.dtype, array.tolist()) == (numpy_dtype_of(datatype), came)


def test_an_error_is_never_much_larger_than_a_request_may_be() -> None:
    faulty = {"name": "x", "shape": [1], "datatype": "FP31", "data": [1]}
    bodies: list[dict[str, Any]] = [
        {"inputs": [faulty | {"name": str(number)} for number in range(5000)]},
        {"inputs": [faulty | {"name": "x" * 100_000}]},
        {"inputs": [faulty | {"datatype": "F" * 100_000}]},
        {"inputs": [], "outputs": [{"name": "y" * 100_000}]},
        {"inputs": [], "outputs": [{"name": "y"}] * 5000},
    ]

    for body in bodies:
        with pytest.raises(InvalidInput, match=r"^.{1,1000}$"):
            decode_request(json.dumps(body).encode())


@pytest.mark.parametrize("datatype", DATATYPES)
def test_long_tensors_mean_what_short_ones_mean(datatype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_json, "_PIECE_BYTES", 7)
    monkeypatch.setattr(oip_json, "_PIECE_VALUES", 3)
    dtype = numpy_dtype_of(datatype)
    for count in range(20):
        array = (np.arange(count) % 101).astype(dtype).reshape(1, count)
        body = json.dumps(
            {"inputs": [{"name": "x", "shape": [1, count], "datatype": datatype, "data": array[0].tolist()}]}
        )

        assert json.loads(encode_request({"x": array})) == json.loads(body)
        assert same(decode_request(body.encode()).request.inputs["x"], array)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ('[1, 2, 3, 4, 5, 6, 7, 8, 9, "ten, or eleven", 12]', r'data\[9\] is "ten, or eleven", expected a number'),
        ("[1, 2, 3, 4, 5, 6, 7, 8, 9, [10, 11, 12], 13, 14]", r"data\[9\] is \[10,11,12\], expected a number"),
        ("[1, 2, 3, 4, 5, 6, 7, 8, 9, 1e39, 11, 12, 13]", r"data\[9\] is 1e39, expected a number"),
        ("[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]", "data has 12 elements, expected 13"),
    ],
)
def test_a_fault_in_a_long_tensor_has_its_place(data: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_json, "_PIECE_BYTES", 7)
    body = f'{{"inputs":[{{"name":"x","shape":[13],"datatype":"FP32","data":{data}}}]}}'

    with pytest.raises(InvalidInput, match=said):
        decode_request(body.encode())


def test_numbers_that_are_none_are_null_in_a_long_tensor_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_json, "_PIECE_VALUES", 2)
    outputs = {"y": np.array([1, np.nan, np.inf, 2, 3], np.float32)}

    body, _ = encode_reply(MODEL, "m", outputs, InferCall(InferenceRequest({})))

    assert json.loads(body)["outputs"][0]["data"] == [1, None, None, 2, 3]
    assert decode_reply(body).outputs["y"].shape == (5,)


def test_the_shortest_timeout_is_not_sent_as_none() -> None:
    assert decode_request(encode_request({}, timeout=1e-9)).timeout == 1e-6


def test_an_output_is_sent_once() -> None:
    with pytest.raises(InvalidInput, match="output 'y' was asked for twice, expected once"):
        decode_request(b'{"inputs":[],"outputs":[{"name":"x"},{"name":"y"},{"name":"y"}]}')


def test_null_stands_for_what_is_left_out() -> None:
    call = decode_request(b'{"id":null,"parameters":null,"outputs":null,"inputs":[]}')

    assert (call.id, call.priority, call.timeout, call.outputs) == ("", None, None, None)


def test_all_faulty_inputs_are_reported_at_once() -> None:
    tensors = [
        {"name": "a", "shape": [1], "datatype": "INT8", "data": [999]},
        {"name": "b", "shape": [2], "datatype": "INT8", "data": [1]},
        {"name": "c", "shape": [1], "datatype": "INT8", "data": [1]},
        {"name": "c", "shape": [1], "datatype": "INT8", "data": [1]},
    ]

    with pytest.raises(InvalidInput, match=r"'a'.*999.*; .*'b'.*1 elements.*; .*'c' came twice"):
        decode_request(json.dumps({"inputs": tensors}).encode())


@pytest.mark.parametrize("parameter", ["timeout", "priority"])
@pytest.mark.parametrize("value", [2**63, 10**400])
def test_a_parameter_beyond_all_measure_is_refused_by_name(parameter: str, value: int) -> None:
    body = json.dumps({"inputs": [], "parameters": {parameter: value}}).encode()

    with pytest.raises(InvalidInput, match=parameter):
        decode_request(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"inputs":{}}',
        b'{"inputs":[{"name":"x","shape":[-1],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1.5],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[],"parameters":{"priority":-1}}',
        b'{"inputs":[],"parameters":{"timeout":"soon"}}',
        b'{"inputs":[{"name":"x","shape":[' + b"9" * 5000 + b'],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[' + b",".join([b"9" * 400] * 16) + b'],"datatype":"FP32","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":' + b"[" * 50_000 + b"]" * 50_000 + b"}]}",
        b'{"inputs":[{"name":"x","shape":[' + b"1," * 100 + b'1],"datatype":"FP32","data":[1]}]}',
    ],
)
def test_a_body_that_is_no_request_is_invalid_input(body: bytes) -> None:
    with pytest.raises(InvalidInput, match="not an inference request"):
        decode_request(body)


@pytest.mark.parametrize(
    ("sent", "meant"),
    [
        (0, None),
        (1, Priority.LATENCY_CRITICAL),
        (2, Priority.THROUGHPUT),
        (3, Priority.BACKGROUND),
        (4, Priority.BACKGROUND),
        (2**40, Priority.BACKGROUND),
    ],
)
def test_priorities_count_from_one(sent: int, meant: Priority | None) -> None:
    body = json.dumps({"inputs": [], "parameters": {"priority": sent}})

    assert decode_request(body.encode()).priority == meant


def test_an_output_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(InvalidInput, match="output 'z' was asked for, expected one of 'x', 'y'"):
        check_outputs(["x", "z"], ["x", "y"])


def test_bytes_that_json_cannot_carry_are_an_inference_error() -> None:
    outputs = {"y": np.array([b"ok", b"\xff"], object)}

    with pytest.raises(InferenceError, match="'y' holds bytes that are not UTF-8"):
        encode_reply(MODEL, "m", outputs, InferCall(InferenceRequest({})))


def test_an_answer_that_cannot_be_read_is_an_inference_error() -> None:
    for body in (b"{", b"[]", b'{"model_name":"m","outputs":[{"name":"y","shape":[2],"datatype":"FP32","data":[1]}]}'):
        with pytest.raises(InferenceError, match="cannot be read"):
            decode_reply(body)


def test_metadata_has_minus_one_for_every_open_dimension() -> None:
    model = ModelInfo(
        "inner name",
        inputs=(TensorSpec("x", "float32", ("batch", None, 64), 0),),
        outputs=(TensorSpec("y", "string", ("batch",), 0),),
        version="2",
        framework="onnx",
    )

    assert model_metadata("outer", model, ["1", "2"]) == {
        "name": "outer",
        "versions": ["1", "2"],
        "platform": "onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1, 64]}],
        "outputs": [{"name": "y", "datatype": "BYTES", "shape": [-1]}],
    }


# ------------------------------------------------------------------------------------------- properties


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=3))
    if draw(st.booleans()):
        text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
        flat = draw(st.lists(text, min_size=math.prod(shape), max_size=math.prod(shape)))
        return np.array(flat, object).reshape(shape)
    dtype = numpy_dtype_of(draw(st.sampled_from(DATATYPES)))
    if dtype == numpy_dtype_of("BF16"):
        return draw(
            hnp.arrays(np.float32, shape, elements=st.floats(width=16, allow_nan=False, allow_infinity=False))
        ).astype(dtype)
    finite = {"allow_nan": False, "allow_infinity": False} if dtype.kind == "f" else {}
    return draw(hnp.arrays(dtype, shape, elements=hnp.from_dtype(dtype, **finite)))


@pytest.mark.slow
@given(inputs=st.dictionaries(st.text(max_size=5), arrays(), max_size=3), id=st.text(max_size=5))
def test_requests_come_back_as_they_were_sent(inputs: dict[str, np.ndarray[Any, Any]], id: str) -> None:
    call = decode_request(encode_request(inputs, id=id, priority=Priority.THROUGHPUT, timeout=1.5, outputs=["y"]))

    assert (call.id, call.priority, call.timeout, call.outputs) == (id, Priority.THROUGHPUT, 1.5, ("y",))
    assert list(call.request.inputs) == list(inputs)
    assert all(same(call.request.inputs[name], array) for name, array in inputs.items())


@pytest.mark.slow
@given(array=arrays())
def test_nested_data_means_what_flat_data_means(array: np.ndarray[Any, Any]) -> None:
    body = json.loads(encode_request({"x": array}))
    body["inputs"][0]["data"] = array.tolist() if array.ndim else [array.item()]

    if 0 in array.shape[:-1]:  # such nesting cannot show its inner dimensions
        return
    assert same(decode_request(json.dumps(body).encode()).request.inputs["x"], array)


@pytest.mark.slow
@given(outputs=st.dictionaries(st.text(max_size=5), arrays(), max_size=3), id=st.text(max_size=5))
def test_replies_come_back_as_they_were_sent(outputs: dict[str, np.ndarray[Any, Any]], id: str) -> None:
    reply = decode_reply(*encode_reply(MODEL, "m", outputs, InferCall(InferenceRequest({}), id)))

    assert (reply.model_name, reply.model_version, reply.id) == ("m", "3", id)
    assert list(reply.outputs) == list(outputs)
    assert all(same(reply.outputs[name], array) for name, array in outputs.items())


def test_a_number_that_is_none_comes_back_as_nan() -> None:
    outputs = {"y": np.array([np.nan, np.inf], np.float32)}

    reply = decode_reply(*encode_reply(MODEL, "m", outputs, InferCall(InferenceRequest({}))))

    assert np.isnan(reply.outputs["y"]).all()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
HOSTILE_INPUT = st.fixed_dictionaries(
    {"name": st.just("x") | JSON},
    optional={
        "shape": st.lists(st.integers(-1, 2**63), max_size=3) | JSON,
        "datatype": st.sampled_from([*DATATYPES, "BYTES"]) | JSON,
        "data": JSON,
    },
)


@pytest.mark.slow
@given(
    body=st.binary(max_size=50)
    | st.fixed_dictionaries(
        {"inputs": st.lists(HOSTILE_INPUT, max_size=2) | JSON}, optional={"parameters": JSON, "id": JSON}
    ).map(lambda body: json.dumps(body).encode())
)
def test_no_body_raises_anything_but_invalid_input(body: bytes) -> None:
    try:
        call = decode_request(body)
    except InvalidInput:
        return
    assert all(isinstance(array, np.ndarray) for array in call.request.inputs.values())
