"""The payloads of the Kapsl socket, in bincode 1.3 as its defaults have it: little-endian, integers of fixed width,
every length a u64, an Option a byte (0, 1) and what is behind it, nothing padded. Bytes behind the last field are not
looked at, as bincode does not either.

Nothing is set aside for what a length says before so many bytes are there. What is not here: the frames around payloads
(`server.kapsl_socket`), and what a request means (`server.kapsl_call`).
"""

from __future__ import annotations

import binascii
import struct
from typing import Any, Final

from kapsl_scheduler.core.wire import decode_bytes
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.server.kapsl_call import Answered, KapslRequest, Malformed, Metadata
from kapsl_scheduler.types import Array

__all__ = ["decode_request", "encode_answer"]

# Names stand in the messages of errors, and each input costs more than its bytes: a payload of nothing but empty inputs
# must not keep everybody else waiting.
_MAX_INPUTS: Final = 1024
_MAX_NAME: Final = 1024
_MAX_TEXT: Final = 64 << 10
_MAX_RANK: Final = 64

_U8: Final = struct.Struct("<B")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_F32: Final = struct.Struct("<f")
_BEHIND_DATA: Final = b"\x00"  # no data_base64


class _Reader:
    """Reads fields one behind the other. `Malformed` names the field where something is wrong."""

    __slots__ = ("_at", "_payload")

    def __init__(self, payload: memoryview) -> None:
        self._payload = payload
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._payload) - self._at

    def raw(self, size: int, where: str) -> memoryview:
        if size > self.left:
            raise Malformed(f"{where}: {size} bytes are due, and {self.left} are left")
        self._at += size
        return self._payload[self._at - size : self._at]

    def number(self, kind: struct.Struct, where: str) -> Any:
        return kind.unpack(self.raw(kind.size, where))[0]

    def length(self, most: int | None, where: str) -> int:
        length: int = self.number(_U64, where)
        if most is not None and length > most:
            raise Malformed(f"{where}: {length} elements came, expected at most {most}")
        return length

    def text(self, most: int, where: str) -> str:
        try:
            return str(self.raw(self.length(most, where), where), "utf-8")
        except UnicodeDecodeError as error:
            raise Malformed(f"{where}: expected UTF-8: {error}") from None

    def flag(self, where: str) -> bool:
        value: int = self.number(_U8, where)
        if value > 1:
            raise Malformed(f"{where}: {value} came, expected 0 or 1")
        return value == 1

    def optional_text(self, where: str) -> str | None:
        return self.text(_MAX_TEXT, where) if self.flag(where) else None

    def optional_number(self, kind: struct.Struct, where: str) -> Any:
        return self.number(kind, where) if self.flag(where) else None

    def packet(self, where: str) -> Array:
        """A tensor. Raises `InvalidInput` for one that is read and cannot be."""
        rank = self.length(_MAX_RANK, f"{where}.shape")
        shape = list(struct.unpack(f"<{rank}q", self.raw(8 * rank, f"{where}.shape")))
        dtype = self.text(_MAX_NAME, f"{where}.dtype")
        data: bytes | memoryview | None = None
        if self.flag(f"{where}.data"):
            data = self.raw(self.length(None, f"{where}.data"), f"{where}.data")
        base64 = None
        if self.flag(f"{where}.data_base64"):
            base64 = self.raw(self.length(None, f"{where}.data_base64"), f"{where}.data_base64")
        if (data is None) == (base64 is None):
            came = "neither" if data is None else "both"
            raise InvalidInput(f"{where}: expected exactly one of data and data_base64, got {came}")
        if base64 is not None:
            try:
                data = binascii.a2b_base64(base64, strict_mode=True)
            except binascii.Error as error:
                raise InvalidInput(f"{where}.data_base64: expected standard base64 text: {error}") from None
        assert data is not None
        return decode_bytes(shape, dtype, data, where)

    def metadata(self) -> Metadata:
        found = Metadata(
            self.optional_text("metadata.request_id"),
            self.optional_number(_U64, "metadata.timeout_ms"),
            self.optional_number(_U8, "metadata.priority"),
            self.flag("metadata.force_cpu") if self.flag("metadata.force_cpu") else None,
            self.optional_text("metadata.model_version"),
            self.optional_text("metadata.auth_token"),
        )
        for name, kind in _SAMPLING:
            setattr(found, name, self.optional_number(kind, f"metadata.{name}"))
        if self.flag("metadata.stop_token_ids"):
            where = "metadata.stop_token_ids"
            self.raw(4 * self.length(None, where), where)
        return found


_SAMPLING: Final = (
    ("max_new_tokens", _U32),
    ("temperature", _F32),
    ("top_p", _F32),
    ("top_k", _U32),
    ("repetition_penalty", _F32),
    ("seed", _U64),
)


def decode_request(payload: bytes | memoryview) -> KapslRequest:
    """The request of a payload; one of the first version ends before the metadata. Tensors are views of the payload
    where they can be. Raises `Malformed` for what is no request, `InvalidInput` for tensors that are none; both name
    the field."""
    reader = _Reader(memoryview(payload))
    first = reader.packet("input")
    number = reader.length(_MAX_INPUTS, "additional_inputs")
    additional = []
    for index in range(number):
        name = reader.text(_MAX_NAME, f"additional_inputs[{index}].name")
        additional.append((name, reader.packet(f"additional_inputs[{index}]")))
    session_id = reader.optional_text("session_id")
    request = KapslRequest(first, additional, session_id)
    if reader.left and reader.flag("metadata"):
        request.metadata = reader.metadata()
    return request


def encode_answer(answer: Answered) -> bytes:
    """The payload of an answer, or of one chunk of a stream."""
    rank, dtype = len(answer.shape), answer.dtype.encode()
    return b"".join(
        (
            struct.pack(f"<Q{rank}qQ", rank, *answer.shape, len(dtype)),
            dtype,
            struct.pack("<BQ", 1, len(answer.data)),
            answer.data,
            _BEHIND_DATA,
        )
    )
