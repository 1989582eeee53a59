"""Payloads of the Kapsl socket: golden bytes, round trips, and bytes that are no request."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kapsl_scheduler.core.wire import WIRE_DTYPES
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.server.bincode import decode_request, encode_answer
from kapsl_scheduler.server.kapsl_call import Answered, Malformed, Metadata
from kapsl_scheduler.types import numpy_dtype
from tests.protocol.kapsl import Meta, floats, option, packet, payload, read_packet, text

NUMBERS = [name for name in WIRE_DTYPES if name != "string"]
arrays = st.sampled_from(NUMBERS).flatmap(
    lambda name: hnp.arrays(numpy_dtype(name), hnp.array_shapes(min_dims=0, max_dims=4, max_side=4))
)
texts = st.text(max_size=20)


def wired(array: np.ndarray[Any, Any]) -> bytes:
    return packet(array.shape, array.dtype.name, array.astype(array.dtype.newbyteorder("<")).tobytes())


def same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    return (left.dtype, left.shape, left.tobytes()) == (right.dtype, right.shape, right.tobytes())


# The bytes that kapsl-sdk 0.1.23 sends for `infer(7, [1, 2], "fp32", bytes(8))`, behind the header of its frame.
CAPTURED = bytes.fromhex(
    "0200000000000000"  # two dimensions
    "0100000000000000"
    "0200000000000000"
    "0700000000000000"
    "666c6f61743332"  # float32
    "01"
    "0800000000000000"
    "0000000000000000"
    "00"  # no base64
    "0000000000000000"  # no additional inputs
    "00"  # no session
    "00"  # no metadata
)


def test_what_the_client_sends_is_read() -> None:
    assert len(CAPTURED) == 67

    request = decode_request(CAPTURED)

    assert same(request.input, np.zeros((1, 2), np.float32))
    assert (request.additional, request.session_id, request.metadata) == ([], None, Metadata())
    assert payload(packet([1, 2], "float32", bytes(8))) == CAPTURED


def test_an_answer_is_written() -> None:
    raw = encode_answer(Answered((1, 2), "float32", struct.pack("<2f", 1.0, -2.0)))

    assert raw.hex() == (
        "0200000000000000010000000000000002000000000000000700000000000000666c6f61743332"
        "0108000000000000000000803f000000c000"
    )


def test_a_request_of_the_first_version_ends_before_the_metadata() -> None:
    request = decode_request(payload(floats(1, 2), session_id="s", version_1=True))

    assert (request.session_id, request.metadata) == ("s", Metadata())


def test_what_comes_behind_a_request_is_not_looked_at() -> None:
    assert decode_request(payload(floats(1, 2), metadata=Meta(priority=1)) + b"later").metadata.priority == 1


@given(
    first=arrays,
    additional=st.lists(st.tuples(texts, arrays), max_size=3),
    session=st.none() | texts,
    meta=st.none()
    | st.builds(
        Meta,
        st.none() | texts,
        st.none() | st.integers(0, 2**64 - 1),
        st.none() | st.integers(0, 255),
        st.none() | st.booleans(),
        st.none() | texts,
        st.none() | texts,
        st.none() | st.integers(0, 2**32 - 1),
        st.none() | st.floats(width=32, allow_nan=False),
        st.none() | st.floats(width=32, allow_nan=False),
        st.none() | st.integers(0, 2**32 - 1),
        st.none() | st.floats(width=32, allow_nan=False),
        st.none() | st.integers(0, 2**64 - 1),
        st.none() | st.lists(st.integers(0, 2**32 - 1), max_size=3),
    ),
)
@pytest.mark.slow
def test_requests_survive_the_way(first: Any, additional: Any, session: Any, meta: Meta | None) -> None:
    raw = payload(wired(first), [(name, wired(array)) for name, array in additional], session, meta)

    request = decode_request(memoryview(raw))

    assert same(request.input, first)
    assert not request.input.flags.writeable
    assert request.input.flags.aligned
    assert [name for name, _ in request.additional] == [name for name, _ in additional]
    assert all(same(came, sent) for (_, came), (_, sent) in zip(request.additional, additional, strict=True))
    assert request.session_id == session
    expected = {} if meta is None else {key: value for key, value in meta._asdict().items() if key != "stop_token_ids"}
    assert request.metadata == Metadata(**expected)


@given(array=arrays)
@pytest.mark.slow
def test_answers_survive_the_way(array: Any) -> None:
    raw = encode_answer(Answered(array.shape, array.dtype.name, array.tobytes()))

    assert read_packet(raw) == (array.shape, array.dtype.name, array.tobytes())


@pytest.mark.parametrize("alias", ["FP32", "f32", "Float32", "float"])
def test_aliases_of_dtypes_are_taken_in_any_case(alias: str) -> None:
    assert decode_request(payload(packet([2], alias, bytes(8)))).input.dtype == np.float32


@pytest.mark.parametrize("shape", [[1, 1], [], [1]])
def test_a_text_has_any_number_of_bytes_in_one_element(shape: list[int]) -> None:
    prompt = "wie geht's? ☀" * 100

    request = decode_request(payload(packet(shape, "utf8", prompt.encode())))

    assert (request.input.shape, request.input.item()) == (tuple(shape), prompt)


def test_base64_may_come_instead_of_bytes() -> None:
    assert decode_request(payload(packet([3], "uint8", None, "AQID"))).input.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("first", "fault"),
    [
        (packet([1, 2], "float32", bytes(7)), r"^input: expected 8 bytes for float32 \[1, 2\], got 7$"),
        (
            packet([1, 0], "float32", b""),
            r"^input.shape: expected a list of at most 32 integers above 0, got \[1, 0\]$",
        ),
        (packet([-1, 2], "float32", bytes(8)), r"^input.shape: .* got \[-1, 2\]$"),
        (packet([2**62] * 32, "float64", bytes(8)), r"^input: expected \d+ bytes"),
        (packet([2], "bool", bytes(2)), r"^input.dtype: expected one of float32, .* got 'bool'$"),
        (packet([2], "string", b"ab"), r"^input.shape: expected one element for string, got \[2\]$"),
        (packet([1], "string", b"\xff"), r"^input: expected UTF-8 text for string"),
        (packet([2], "uint8", None), r"^input: expected exactly one of data and data_base64, got neither$"),
        (packet([2], "uint8", b"ab", "AQI="), r"^input: expected exactly one of data and data_base64, got both$"),
        (packet([2], "uint8", None, "A"), r"^input.data_base64: expected standard base64 text"),
    ],
)
def test_a_tensor_that_cannot_be_is_said_to_be_invalid(first: bytes, fault: str) -> None:
    with pytest.raises(InvalidInput, match=fault) as raised:
        decode_request(payload(first))
    assert type(raised.value) is InvalidInput


HUGE = struct.pack("<Q", 2**60)


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"", "input.shape: 8 bytes are due, and 0 are left"),
        (HUGE, f"input.shape: {2**60} elements came, expected at most 64"),
        (struct.pack("<Qq", 1, 2) + HUGE, f"input.dtype: {2**60} elements came, expected at most 1024"),
        (
            struct.pack("<Qq", 1, 2) + text("uint8") + b"\x01" + HUGE,
            f"input.data: {2**60} bytes are due, and 0 are left",
        ),
        (struct.pack("<Qq", 1, 2) + text("uint8") + b"\x02", "input.data: 2 came, expected 0 or 1"),
        (struct.pack("<Qq", 1, 2) + struct.pack("<Q", 1) + b"\xff", "input.dtype: expected UTF-8: "),
        (floats(1) + struct.pack("<Q", 1025), "additional_inputs: 1025 elements came, expected at most 1024"),
        (floats(1) + struct.pack("<Q", 1) + text("x"), "additional_inputs[0].shape: 8 bytes are due, and 0 are left"),
        (payload(floats(1), version_1=True) + b"\x01", "metadata.request_id: 1 bytes are due, and 0 are left"),
        (payload(floats(1), version_1=True) + b"\x07", "metadata: 7 came, expected 0 or 1"),
        (
            payload(floats(1), version_1=True) + b"\x01\x00\x00\x00\x01\x02",
            "metadata.force_cpu: 2 came, expected 0 or 1",
        ),
        (
            payload(floats(1), metadata=Meta())[:-1] + option(HUGE),
            f"metadata.stop_token_ids: {2**62} bytes are due, and 0 are left",
        ),
    ],
)
def test_what_is_no_request_is_said_with_the_field(raw: bytes, fault: str) -> None:
    with pytest.raises(Malformed) as raised:
        decode_request(raw)
    assert str(raised.value).startswith(fault)


WHOLE = payload(floats(1, 2), [("other", floats(3))], "session", Meta(request_id="r", priority=1, stop_token_ids=[1]))
V1_END = len(payload(floats(1, 2), [("other", floats(3))], "session", version_1=True))


@pytest.mark.parametrize("length", [length for length in range(len(WHOLE)) if length != V1_END])
def test_a_request_that_is_cut_short_is_refused(length: int) -> None:
    with pytest.raises(Malformed):
        decode_request(WHOLE[:length])


@given(raw=st.binary(max_size=200) | st.tuples(st.integers(0, len(WHOLE)), st.binary(min_size=1, max_size=12)))
@pytest.mark.slow
def test_no_bytes_are_anything_but_a_request_or_an_error(raw: Any) -> None:
    if isinstance(raw, tuple):  # a request of which some bytes are others
        at, other = raw
        raw = WHOLE[:at] + other + WHOLE[at + len(other) :]
    try:
        request = decode_request(raw)
    except InvalidInput as error:
        said = str(error)
    else:
        said = str(request.input.size)
    assert 0 < len(said) < 5000
