"""The bytes of a tensor as the Open Inference Protocol has them: little-endian elements in row-major order, texts each
behind its length, BOOL in one byte.

One form for the binary extension of REST and for the raw contents of gRPC. What is not here: the JSON or protobuf
around them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.types import Array, numpy_dtype

__all__ = ["CANONICAL", "RawBytes", "RawTensor", "decode_raw", "decode_strings", "encode_raw", "raw_tensor"]

CANONICAL: Final[Mapping[str, str]] = {
    "BOOL": "bool",
    **{f"INT{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"UINT{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
    "BF16": "bfloat16",
    "BYTES": "string",
}
"""Our names of the protocol's datatypes."""

_DTYPES: Final = {
    # bfloat16 has no other order of bytes
    name: numpy_dtype(canonical) if name == "BF16" else numpy_dtype(canonical).newbyteorder("<")
    for name, canonical in CANONICAL.items()
}
_LENGTH: Final = struct.Struct("<I")


class RawBytes:
    """Tensors one behind the other, from `start` of a body on."""

    def __init__(self, body: bytes | bytearray | memoryview, start: int) -> None:
        self._body = body
        self._at = start

    @property
    def left(self) -> int:
        """Bytes that nobody has taken."""
        return len(self._body) - self._at

    def take(self, size: int, where: str) -> memoryview:
        """The next `size` bytes. Raises `InvalidInput` where there are not so many."""
        if size > self.left:
            raise InvalidInput(f"{where}: {size} bytes were announced, and {self.left} are left in the body")
        self._at += size
        return memoryview(self._body)[self._at - size : self._at]


def decode_raw(datatype: str, shape: Sequence[int], raw: bytes | memoryview, where: str) -> Array:
    """The tensor that these bytes are. Numbers are a view of them, which nobody can write to. Raises `InvalidInput`."""
    dtype = _DTYPES.get(datatype)
    if dtype is None:
        raise InvalidInput(f"{where}: datatype {datatype!r} came, expected one of {', '.join(_DTYPES)}")
    elements = math.prod(shape)
    if dtype.kind == "O":
        array = decode_strings(raw, where)
        if array.size != elements:
            raise InvalidInput(f"{where}: {array.size} elements came, expected {elements} for shape {list(shape)}")
    else:
        if len(raw) != elements * dtype.itemsize:
            raise InvalidInput(
                f"{where}: {len(raw)} bytes came, expected {elements * dtype.itemsize} for {datatype} of shape "
                f"{list(shape)}"
            )
        array = np.frombuffer(raw, dtype) if elements else np.empty(0, dtype)
        if dtype.kind == "b" and elements and array.view(np.uint8).max() > 1:
            raise InvalidInput(f"{where}: a BOOL is neither 0 nor 1")
        if not array.flags.aligned:  # engines read it as it is
            array = array.copy()
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):
        raise InvalidInput(f"{where}: shape {list(shape)} is beyond what an array can have") from None


class RawTensor(NamedTuple):
    """Where numbers lie: `size` bytes of them, of which any are valid."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    size: int

    def view(self, body: bytes | bytearray | memoryview, start: int) -> Array:
        """The tensor that begins at `start` of a body."""
        array: Array = np.ndarray(self.shape, self.dtype, body, start)
        return array if array.flags.aligned else array.copy()  # engines read it as it is


def raw_tensor(name: str, datatype: str, shape: Sequence[int], size: int) -> RawTensor | None:
    """None for a tensor whose bytes have to be looked at (texts, BOOL), that is empty, or that has not `size` bytes."""
    dtype = _DTYPES.get(datatype)
    if dtype is None or dtype.kind in "Ob" or not size or math.prod(shape) * dtype.itemsize != size:
        return None
    return RawTensor(name, dtype, tuple(shape), size)


def decode_strings(raw: bytes | bytearray | memoryview, where: str) -> Array:
    """Bytes each behind their length, in one dimension. Raises `InvalidInput`."""
    found: list[bytes] = []
    view, at, end = memoryview(raw), 0, len(raw)
    while at < end:
        if end - at < 4:
            raise InvalidInput(f"{where}: {end - at} bytes are left where the length of element {len(found)} is due")
        (length,) = _LENGTH.unpack_from(view, at)
        at += 4
        if length > end - at:
            raise InvalidInput(f"{where}: element {len(found)} says {length} bytes, and {end - at} are left")
        found.append(bytes(view[at : at + length]))
        at += length
    array = np.empty(len(found), object)
    array[:] = found
    return array


def encode_raw(array: Array) -> bytes:
    """The bytes of a tensor."""
    if array.dtype.kind in "OSU":
        pieces: list[bytes] = []
        for item in array.ravel().tolist():
            encoded = item if isinstance(item, bytes) else str(item).encode()
            pieces += (_LENGTH.pack(len(encoded)), encoded)
        return b"".join(pieces)
    if array.dtype.byteorder == ">":
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.tobytes()
