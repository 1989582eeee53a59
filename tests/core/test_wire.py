"""The JSON tensor form: what goes in comes out, and what is wrong is said in full."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kapsl_scheduler.core.wire import (
    WIRE_DTYPES,
    WireTensor,
    decode_bytes,
    decode_tensor,
    encode_bytes,
    encode_tensor,
    read_tensor,
)
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.types import numpy_dtype

NUMBERS = [name for name in WIRE_DTYPES if name != "string"]
arrays = st.sampled_from(NUMBERS).flatmap(
    lambda name: hnp.arrays(
        numpy_dtype(name),
        hnp.array_shapes(min_dims=0, max_dims=4, max_side=5),
        elements=None if name == "uint8" else hnp.from_dtype(numpy_dtype(name), allow_nan=True),
    )
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def through_json(wire: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(wire))


@pytest.mark.slow
@given(array=arrays, as_base64=st.booleans(), big_endian=st.booleans())
def test_numbers_survive_the_way_there_and_back(array: np.ndarray, as_base64: bool, big_endian: bool) -> None:
    sent = array.astype(array.dtype.newbyteorder(">")) if big_endian else array
    back = decode_tensor(through_json(encode_tensor(sent, base64=as_base64)), "input")
    assert back.dtype == array.dtype
    assert back.dtype.isnative
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.slow
@given(text=st.text(), rank=st.integers(0, 4), as_base64=st.booleans())
def test_text_survives_the_way_there_and_back(text: str, rank: int, as_base64: bool) -> None:
    array = np.empty((1,) * rank, object)
    array[(0,) * rank] = text  # np.full and array[...] would strip NULs
    back = decode_tensor(through_json(encode_tensor(array, base64=as_base64)), "prompt")
    assert back.dtype == object
    assert back.shape == array.shape
    assert back.item() == text


@pytest.mark.slow
@given(wire=json_values | st.fixed_dictionaries({}, optional=dict.fromkeys(WireTensor.__struct_fields__, json_values)))
def test_whatever_json_brings_is_an_array_or_invalid_input(wire: Any) -> None:
    faults: list[str] = []
    array = read_tensor(wire, "x", faults)
    assert (array is None) == bool(faults)
    assert all(fault.startswith("x") for fault in faults)


def test_data_are_little_endian_bytes_and_not_numbers() -> None:
    wire = {"shape": [2], "dtype": "float32", "data": list(struct.pack("<2f", 1.5, -2.0))}
    assert decode_tensor(wire, "input").tolist() == [1.5, -2.0]
    assert encode_tensor(np.array([1.5, -2.0], np.float32)) == wire


def test_an_empty_shape_is_one_element() -> None:
    array = decode_tensor({"shape": [], "dtype": "int64", "data": [7, 0, 0, 0, 0, 0, 0, 0]}, "sr")
    assert array.shape == ()
    assert array.item() == 7
    assert encode_tensor(array)["shape"] == []


def test_arrays_share_the_decoded_bytes_and_cannot_be_written() -> None:
    for wire in ({"shape": [4], "dtype": "u8", "data": [1, 2, 3, 4]}, {"shape": [1], "dtype": "string", "data": [65]}):
        assert not decode_tensor(wire, "input").flags.writeable


def test_a_transposed_array_is_sent_in_the_order_of_its_shape() -> None:
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    assert decode_tensor(encode_tensor(array), "input").tolist() == array.tolist()


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("FP32", "float32"),
        ("f64", "float64"),
        ("Half", "float16"),
        ("I32", "int32"),
        ("i64", "int64"),
        ("U8", "uint8"),
        ("utf8", "string"),
        ("STRING", "string"),
    ],
)
def test_aliases_in_any_case(alias: str, name: str) -> None:
    size = 1 if name == "string" else numpy_dtype(name).itemsize
    assert decode_tensor({"shape": [1], "dtype": alias, "data": [0] * size}, "x").dtype == numpy_dtype(name)


@pytest.mark.parametrize("key", ["data_base64", "base64"])
def test_both_names_of_base64(key: str) -> None:
    wire = {"shape": [3], "dtype": "uint8", key: base64.b64encode(b"abc").decode(), "data": None}
    assert decode_tensor(wire, "x").tobytes() == b"abc"
    typed = msgspec.json.decode(msgspec.json.encode(wire), type=WireTensor)
    assert decode_tensor(typed, "x").tobytes() == b"abc"


GOOD: dict[str, Any] = {"shape": [2], "dtype": "uint8", "data": [1, 2]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [0]}, "input.shape: expected a list of at most 32 integers above 0, got [0]"),
        ({"shape": [-1]}, "input.shape: expected a list of at most 32 integers above 0, got [-1]"),
        ({"shape": [True, 2]}, "input.shape: expected a list of at most 32 integers above 0, got [True, 2]"),
        ({"shape": [2.0]}, "input.shape: expected a list of at most 32 integers above 0, got [2.0]"),
        ({"shape": "2"}, "input.shape: expected a list of at most 32 integers above 0, got '2'"),
        ({"shape": None}, "input.shape: expected a list of at most 32 integers above 0, got None"),
        (
            {"shape": [1] * 33},
            "input.shape: expected a list of at most 32 integers above 0, got [1, 1, 1, 1, 1, 1, ...]",
        ),
        ({"shape": [2**63]}, "input.shape: expected a list of at most 32 integers above 0, got [9223372036854775808]"),
        ({"shape": [2**62, 2**62]}, f"input: expected {2**124} bytes for uint8 [{2**62}, {2**62}], got 2"),
        ({"shape": [3]}, "input: expected 3 bytes for uint8 [3], got 2"),
        ({"dtype": "int32"}, "input: expected 8 bytes for int32 [2], got 2"),
        (
            {"dtype": "bool"},
            "input.dtype: expected one of float32, float64, float16, int32, int64, uint8, string, got 'bool'",
        ),
        ({"dtype": 3}, "input.dtype: expected one of float32, float64, float16, int32, int64, uint8, string, got 3"),
        ({"data": None}, "input: expected exactly one of data and data_base64, got neither"),
        ({"base64": "AQI="}, "input: expected exactly one of data and data_base64, got data and base64"),
        (
            {"data": [1, 256]},
            "input.data: expected a list of byte values, 0 to 255: Expected `int` <= 255 - at `$[1]`",
        ),
        (
            {"data": [1, True]},
            "input.data: expected a list of byte values, 0 to 255: Expected `int`, got `bool` - at `$[1]`",
        ),
        ({"data": 2}, "input.data: expected a list of byte values, 0 to 255: Expected `array`, got `int`"),
        ({"data": None, "base64": "AQI"}, "input.base64: expected standard base64 text: Incorrect padding"),
        (
            {"data": None, "data_base64": "A Q="},
            "input.data_base64: expected standard base64 text: Only base64 data is allowed",
        ),
        (
            {"data": None, "data_base64": 7},
            "input.data_base64: expected standard base64 text: Expected `str`, got `int`",
        ),
        ({"dtype": "string"}, "input.shape: expected one element for string, got [2]"),
    ],
)
def test_a_fault_says_where_what_came_and_what_was_expected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_tensor({**GOOD, **change}, "input")
    assert str(caught.value) == message


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^x: expected UTF-8 text for string: .*0xff"):
        decode_tensor({"shape": [1, 1], "dtype": "string", "data": [255]}, "x")


def test_all_faults_of_a_tensor_are_told_at_once() -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_tensor({"shape": [0], "dtype": "complex"}, "input")
    assert [part.split(":")[0] for part in str(caught.value).split("; ")] == ["input.shape", "input.dtype", "input"]


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^x: expected \{shape, dtype, data or data_base64\}, got \[1\]$"):
        decode_tensor([1], "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros(2, np.int16),
            "dtype: expected one of float32, float64, float16, int32, int64, uint8, string, got int16",
        ),
        (np.zeros((0, 2), np.int32), "shape: expected dimensions above 0, got [0, 2]"),
        (np.array(["a", "b"]), "shape: expected one element for string, got [2]"),
        (np.array([3], object), "data: expected str or bytes, got 3"),
        (np.array([b"\xff"], object), "data: expected UTF-8 text: 'utf-8' codec can't decode byte 0xff in position 0"),
        (np.array(["\ud800"], object), "data: expected UTF-8 text: 'utf-8' codec can't encode character '\\ud800'"),
    ],
)
def test_what_the_form_cannot_hold_is_not_encoded(array: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        encode_tensor(array)
    assert str(caught.value).startswith(message)


def test_text_may_come_as_any_numpy_string() -> None:
    for array in (
        np.array(["né"]),
        np.array(["né".encode()]),
        np.array(["né"], object),
        np.array([b"n\xc3\xa9"], object),
    ):
        assert bytes(encode_tensor(array)["data"]).decode() == "né"


@pytest.mark.parametrize("offset", [0, 1, 4])
def test_bytes_are_a_view_where_they_are_aligned_and_never_written_to(offset: int) -> None:
    raw = bytearray(offset) + struct.pack("<2d", 1.5, -2.0)
    array = decode_bytes([2], "FP64", memoryview(raw)[offset:].toreadonly(), "input")

    assert array.tolist() == [1.5, -2.0]
    assert array.flags.aligned
    assert not array.flags.writeable
    assert np.shares_memory(array, np.frombuffer(raw, np.uint8)) == (offset == 0)
    assert encode_bytes(array) == ("float64", raw[offset:])


def test_faults_of_a_tensor_in_bytes_are_told_together() -> None:
    with pytest.raises(InvalidInput, match=r"^input.shape: .* got \[0\]; input.dtype: expected one of .* got 'bool'$"):
        decode_bytes([0], "bool", b"", "input")
