"""The original's form of a tensor, `{shape, dtype, data | data_base64}`, in and out.

Packages and the JSON routes speak it in JSON: `data` lists byte values (0 to 255), never numbers, and the bytes are
little-endian. The Kapsl socket has the same tensors with bytes that are bytes. What is not here: whether a tensor fits
a model (`core.admission`) and the binary forms of the protocols (`server`).
"""

from __future__ import annotations

import binascii
import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.types import Array, canonical_dtype, dtype_name, numpy_dtype

__all__ = ["WIRE_DTYPES", "WireTensor", "decode_bytes", "decode_tensor", "encode_bytes", "encode_tensor", "read_tensor"]

WIRE_DTYPES: Final = ("float32", "float64", "float16", "int32", "int64", "uint8", "string")

_MAX_RANK: Final = 32  # numpy's own limit before 2.0; it also bounds the product of the dimensions
_MAX_DIMENSION: Final = 2**63 - 1


class WireTensor(msgspec.Struct, omit_defaults=True):
    """The keys of the form, for servers that decode whole bodies with msgspec.

    `base64` is an alias of `data_base64`. Exactly one of `data`, `data_base64` and `base64` is set; that and
    the values are checked by `decode_tensor`.
    """

    shape: list[int]
    dtype: str
    data: list[int] | None = None
    data_base64: str | None = None
    base64: str | None = None


def decode_tensor(wire: WireTensor | Mapping[str, Any], where: str) -> Array:
    """The array that `wire` describes: read-only, in native byte order, of the shape that was given.

    A `string` tensor is one element, an object array holding a `str`. `where` names the tensor in messages.
    Raises `InvalidInput` with everything that is wrong with it.
    """
    faults: list[str] = []
    array = read_tensor(wire, where, faults)
    if array is None:
        raise InvalidInput("; ".join(faults))
    return array


def decode_bytes(shape: list[int], dtype: str, raw: bytes | memoryview, where: str) -> Array:
    """The same of a tensor whose bytes came as bytes. Numbers are a view of them, where they are aligned."""
    faults: list[str] = []
    sizes = _read_shape(shape, where, faults)
    name = _read_dtype(dtype, where, faults)
    if sizes is not None and name is not None:
        array = (_text if name == "string" else _numbers)(sizes, name, raw, where, faults)
        if array is not None:
            return array
    raise InvalidInput("; ".join(faults))


def read_tensor(wire: Any, where: str, faults: list[str]) -> Array | None:
    """As `decode_tensor`, for readers that gather faults: they are appended, and None is returned."""
    if isinstance(wire, WireTensor):
        wire = msgspec.structs.asdict(wire)
    if not isinstance(wire, Mapping):
        faults.append(f"{where}: expected {{shape, dtype, data or data_base64}}, got {reprlib.repr(wire)}")
        return None
    shape = _read_shape(wire.get("shape"), where, faults)
    dtype = _read_dtype(wire.get("dtype"), where, faults)
    raw = _read_bytes(wire, where, faults)
    if shape is None or dtype is None or raw is None:
        return None
    return (_text if dtype == "string" else _numbers)(shape, dtype, raw, where, faults)


def encode_tensor(array: Array, *, base64: bool = False) -> dict[str, Any]:
    """`array` in the JSON form, its bytes in `data`, or in `data_base64` where `base64` is set.

    Raises `InvalidInput` for what the form cannot hold: another dtype than `WIRE_DTYPES`, a dimension of 0, a
    string tensor of several elements or with text that is not UTF-8.
    """
    dtype, raw = encode_bytes(array)
    tensor = {"shape": list(array.shape), "dtype": dtype}
    if base64:
        return {**tensor, "data_base64": binascii.b2a_base64(raw, newline=False).decode("ascii")}
    return {**tensor, "data": list(raw)}


def encode_bytes(array: Array) -> tuple[str, bytes]:
    """The dtype and the bytes of `array`. Raises what `encode_tensor` raises."""
    dtype = dtype_name(array.dtype)
    if dtype not in WIRE_DTYPES:
        raise InvalidInput(f"dtype: expected one of {', '.join(WIRE_DTYPES)}, got {dtype}")
    if array.size == 0:
        raise InvalidInput(f"shape: expected dimensions above 0, got {list(array.shape)}")
    return dtype, _utf8(array) if dtype == "string" else array.astype(_little_endian(dtype), copy=False).tobytes()


# ------------------------------------------------------------------------------------------------ fields


def _read_shape(shape: Any, where: str, faults: list[str]) -> tuple[int, ...] | None:
    if (
        isinstance(shape, list | tuple)
        and len(shape) <= _MAX_RANK
        and all(type(size) is int and 0 < size <= _MAX_DIMENSION for size in shape)
    ):
        return tuple(shape)
    faults.append(f"{where}.shape: expected a list of at most {_MAX_RANK} integers above 0, got {reprlib.repr(shape)}")
    return None


def _read_dtype(dtype: Any, where: str, faults: list[str]) -> str | None:
    name = canonical_dtype(dtype) if isinstance(dtype, str) else None
    if name in WIRE_DTYPES:
        return name
    faults.append(f"{where}.dtype: expected one of {', '.join(WIRE_DTYPES)}, got {reprlib.repr(dtype)}")
    return None


def _read_bytes(wire: Mapping[str, Any], where: str, faults: list[str]) -> bytes | None:
    given = [key for key in _PAYLOADS if wire.get(key) is not None]
    if len(given) != 1:
        came = " and ".join(given) or "neither"
        faults.append(f"{where}: expected exactly one of data and data_base64, got {came}")
        return None
    expected, convert = _PAYLOADS[given[0]]
    try:
        return convert(wire[given[0]])
    except ValueError as error:
        faults.append(f"{where}.{given[0]}: expected {expected}: {error}")
        return None


def _from_values(payload: Any) -> bytes:
    # `bytes` alone would take true, an array or a bare number for a list of byte values.
    return bytes(msgspec.convert(payload, list[Annotated[int, msgspec.Meta(ge=0, le=255)]]))


def _from_base64(payload: Any) -> bytes:
    return binascii.a2b_base64(msgspec.convert(payload, str), strict_mode=True)


_PAYLOADS: Final[Mapping[str, tuple[str, Callable[[Any], bytes]]]] = {
    "data": ("a list of byte values, 0 to 255", _from_values),
    "data_base64": ("standard base64 text", _from_base64),
    "base64": ("standard base64 text", _from_base64),
}


# ----------------------------------------------------------------------------------------------- payload


def _numbers(
    shape: tuple[int, ...], dtype: str, raw: bytes | memoryview, where: str, faults: list[str]
) -> Array | None:
    little = _little_endian(dtype)
    expected = math.prod(shape) * little.itemsize
    if len(raw) != expected:
        faults.append(f"{where}: expected {expected} bytes for {dtype} {list(shape)}, got {len(raw)}")
        return None
    array = np.frombuffer(raw, little).reshape(shape).astype(numpy_dtype(dtype), copy=False)
    if not array.flags.aligned:  # engines read it as it is
        array = array.copy()
        array.flags.writeable = False
    return array


def _text(shape: tuple[int, ...], dtype: str, raw: bytes | memoryview, where: str, faults: list[str]) -> Array | None:
    if math.prod(shape) != 1:
        faults.append(f"{where}.shape: expected one element for {dtype}, got {list(shape)}")
        return None
    try:
        text = str(raw, "utf-8")
    except UnicodeDecodeError as error:
        faults.append(f"{where}: expected UTF-8 text for {dtype}: {error}")
        return None
    array = np.empty(shape, numpy_dtype(dtype))
    array[...] = text  # np.full would strip NULs at its end
    array.flags.writeable = False  # as the arrays of numbers, which are views of the bytes
    return array


def _utf8(array: Array) -> bytes:
    if array.size != 1:
        raise InvalidInput(f"shape: expected one element for string, got {list(array.shape)}")
    element = array.item()
    try:
        if isinstance(element, str):
            return element.encode("utf-8")
        if isinstance(element, bytes):
            element.decode("utf-8")
            return element
    except UnicodeError as error:
        raise InvalidInput(f"data: expected UTF-8 text: {error}") from None
    raise InvalidInput(f"data: expected str or bytes, got {reprlib.repr(element)}")


def _little_endian(dtype: str) -> np.dtype[Any]:
    return numpy_dtype(dtype).newbyteorder("<")
