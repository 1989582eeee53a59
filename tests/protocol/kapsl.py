"""The Kapsl socket from the other side: frames and payloads, put together by hand from the description of the protocol,
and a client of them."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

OK, ERR, CHUNK, END = range(4)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def option(value: bytes | None) -> bytes:
    return b"\x00" if value is None else b"\x01" + value


def packet(shape: Sequence[int], dtype: str, data: bytes | None, base64: str | None = None) -> bytes:
    sizes = struct.pack(f"<Q{len(shape)}q", len(shape), *shape)
    held = None if data is None else struct.pack("<Q", len(data)) + data
    return sizes + text(dtype) + option(held) + option(None if base64 is None else text(base64))


class Meta(NamedTuple):
    """All fields of a request's metadata, in their order."""

    request_id: str | None = None
    timeout_ms: int | None = None
    priority: int | None = None
    force_cpu: bool | None = None
    model_version: str | None = None
    auth_token: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop_token_ids: Sequence[int] | None = None

    def encoded(self) -> bytes:
        formats = {
            "timeout_ms": "<Q",
            "priority": "<B",
            "force_cpu": "<?",
            "max_new_tokens": "<I",
            "temperature": "<f",
            "top_p": "<f",
            "top_k": "<I",
            "repetition_penalty": "<f",
            "seed": "<Q",
        }
        fields = []
        for name, value in self._asdict().items():
            if value is None:
                fields.append(option(None))
            elif name in formats:
                fields.append(option(struct.pack(formats[name], value)))
            elif name == "stop_token_ids":
                fields.append(option(struct.pack(f"<Q{len(value)}I", len(value), *value)))
            else:
                fields.append(option(text(value)))
        return b"".join(fields)


def payload(
    first: bytes,
    additional: Sequence[tuple[str, bytes]] = (),
    session_id: str | None = None,
    metadata: Meta | None = None,
    *,
    version_1: bool = False,
) -> bytes:
    others = struct.pack("<Q", len(additional)) + b"".join(text(name) + one for name, one in additional)
    request = first + others + option(None if session_id is None else text(session_id))
    if version_1:
        return request
    return request + option(None if metadata is None else metadata.encoded())


def frame(model: int, op: int, body: bytes) -> bytes:
    return struct.pack("<III", model, op, len(body)) + body


def floats(*values: float, shape: Sequence[int] | None = None) -> bytes:
    return packet(shape or (1, len(values)), "float32", struct.pack(f"<{len(values)}f", *values))


def read_packet(raw: bytes) -> tuple[tuple[int, ...], str, bytes]:
    """Shape, dtype and bytes of an answer, which must be nothing else."""
    (rank,) = struct.unpack_from("<Q", raw)
    shape = struct.unpack_from(f"<{rank}q", raw, 8)
    at = 8 + 8 * rank
    (length,) = struct.unpack_from("<Q", raw, at)
    dtype = raw[at + 8 : at + 8 + length].decode()
    at += 8 + length
    tag, size = struct.unpack_from("<BQ", raw, at)
    data = raw[at + 9 : at + 9 + size]
    assert (tag, len(data), raw[at + 9 + size :]) == (1, size, b"\x00")
    return shape, dtype, data


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, model: int, body: bytes, op: int = 1) -> None:
        self.writer.write(frame(model, op, body))

    async def answer(self) -> tuple[int, bytes]:
        status, size = struct.unpack("<II", await self.reader.readexactly(8))
        return status, await self.reader.readexactly(size)

    async def ask(self, model: int, body: bytes, op: int = 1) -> tuple[int, bytes]:
        self.send(model, body, op)
        return await self.answer()

    async def values(self, model: int, body: bytes) -> list[float]:
        status, raw = await self.ask(model, body)
        assert status == OK, raw
        _, dtype, data = read_packet(raw)
        assert dtype == "float32"
        return list(struct.unpack(f"<{len(data) // 4}f", data))

    async def error(self, model: int, body: bytes, op: int = 1) -> str:
        status, raw = await self.ask(model, body, op)
        assert status == ERR
        assert raw
        return raw.decode()

    async def stream(self, model: int, body: bytes) -> tuple[list[Any], str | None]:
        """The chunks of a stream, and what it failed with."""
        self.send(model, body, op=2)
        chunks: list[Any] = []
        failure: str | None = None
        while True:
            status, raw = await self.answer()
            if status == CHUNK:
                chunks.append(read_packet(raw))
            elif status == ERR:
                failure = raw.decode()
                if not chunks:
                    return chunks, failure
            else:
                assert (status, raw) == (END, b"")
                return chunks, failure
