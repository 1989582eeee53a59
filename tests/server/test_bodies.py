"""Bodies over HTTP: their bounds, their forms, and what long ones cost everybody else."""

from __future__ import annotations

import asyncio
import gzip
import threading
import tracemalloc
import zlib
from typing import Any

import pytest

from kapsl_scheduler.server import inference
from tests.server.api import Function, assert_error, body_of, double, exchange, serving


async def test_the_content_type_of_a_request_does_not_matter() -> None:
    async with serving() as server:
        for content_type in ("", "application/octet-stream", "application/x-www-form-urlencoded"):
            response = await server.client.post(
                "/v2/models/m/infer", content=body_of(), headers={"content-type": content_type}
            )
            assert response.status_code == 200


async def test_413_by_content_length_before_the_body_is_read() -> None:
    async with serving(max_body_bytes=100) as server:
        status, _ = await exchange(server.api, [], headers=[(b"content-length", b"101")])

    assert status == 413


async def test_413_for_a_whole_body_without_a_length() -> None:
    async with serving(max_body_bytes=100) as server:
        status, _ = await exchange(server.api, [{"type": "http.request", "body": b" " * 101}])

    assert status == 413


async def test_413_while_a_body_without_a_length_is_read() -> None:
    endless = [{"type": "http.request", "body": b" " * 60, "more_body": True}] * 1000
    async with serving(max_body_bytes=100) as server:
        status, read = await exchange(server.api, endless)

    assert status == 413
    assert read == 2


async def test_a_body_in_pieces_is_put_together() -> None:
    body = body_of()
    pieces = [
        {"type": "http.request", "body": body[:20], "more_body": True},
        {"type": "http.request", "body": body[20:]},
    ]
    async with serving() as server:
        status, _ = await exchange(server.api, pieces)

    assert status == 200


def bodies(encoding: str) -> bytes:
    return gzip.compress(body_of()) if encoding == "gzip" else zlib.compress(body_of())


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_a_packed_body_is_unpacked(encoding: str) -> None:
    async with serving() as server:
        path, headers = "/v2/models/m/infer", {"content-encoding": encoding}
        answer = await server.client.post(path, content=bodies(encoding), headers=headers)
        broken = await server.client.post(path, content=b"no such thing", headers=headers)
        cut_short = await server.client.post(path, content=bodies(encoding)[:-1], headers=headers)
        more = await server.client.post(path, content=bodies(encoding) + b"x", headers=headers)

    assert answer.status_code == 200
    for response in (broken, cut_short, more):
        assert assert_error(response, 400, "invalid_input").startswith("content-encoding: ")


async def test_400_for_a_body_that_is_packed_in_another_way() -> None:
    async with serving() as server:
        path = "/v2/models/m/infer"
        other = await server.client.post(path, content=body_of(), headers={"content-encoding": "br"})
        plain = await server.client.post(path, content=body_of(), headers={"content-encoding": "identity"})

    expected = "content-encoding: 'br' came, expected one of gzip, deflate, identity"
    assert assert_error(other, 400, "invalid_input") == expected
    assert plain.status_code == 200


@pytest.mark.parametrize("size", [1 << 20, 200 << 20])
async def test_413_for_a_body_that_is_too_large_once_it_is_unpacked(size: int) -> None:
    """The larger one is 200 kB as it comes; none of it is unpacked beyond the bound."""
    packing = zlib.compressobj(9, wbits=31)
    bomb = b"".join([*(packing.compress(bytes(1 << 20)) for _ in range(size >> 20)), packing.flush()])
    tracemalloc.start()
    try:
        async with serving(max_body_bytes=900_000) as server:
            response = await server.client.post(
                "/v2/models/m/infer", content=bomb, headers={"content-encoding": "gzip"}
            )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert_error(response, 413, "resource_exhausted")
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("accepted", "packed"),
    [
        ("gzip", "gzip"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("gzip;q=0, *", "deflate"),
        ("*;q=0.1", "gzip"),
        ("br", None),
        ("gzip;q=0", None),
        ("gzip;q=x", None),
        ("", None),
    ],
)
async def test_a_long_answer_is_packed_as_the_client_takes_it(accepted: str, packed: str | None) -> None:
    rows = 300
    inputs = [{"name": "x", "shape": [rows, 2], "datatype": "FP32", "data": [0.5] * rows * 2}]
    async with serving(max_batch_size=rows) as server:
        headers = {"accept-encoding": accepted}
        path = "/v2/models/m/infer"
        answer = await server.client.post(path, content=body_of(inputs=inputs), headers=headers)
        short = await server.client.post(path, content=body_of(), headers=headers)

    assert answer.headers.get("content-encoding") == packed
    assert answer.json()["outputs"][0]["data"] == [1.0] * rows * 2
    assert "content-encoding" not in short.headers


async def test_long_requests_and_answers_do_not_keep_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, list[bool]] = {"decode_request": [], "encode_reply": []}
    here = threading.get_ident()

    def recorded(function: Function) -> Function:
        def record(*arguments: Any, **options: Any) -> Any:
            threads[function.__name__].append(threading.get_ident() != here)
            return function(*arguments, **options)

        return record

    for function in (inference.decode_request, inference.encode_reply):
        monkeypatch.setattr(inference, function.__name__, recorded(function))
    rows = 20_000
    long = {"name": "x", "shape": [rows, 2], "datatype": "FP32", "data": [0.123456789012345] * rows * 2}
    async with serving(max_body_bytes=2 << 20, max_batch_size=rows) as server:
        answers = [await server.infer(), await server.infer(inputs=[long])]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(answers[1].json()["outputs"][0]["data"]) == rows * 2
    assert threads == {"decode_request": [False, True], "encode_reply": [False, True]}


async def test_a_model_that_is_replaced_while_a_request_is_decoded_answers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, replaced = asyncio.Event(), threading.Event()
    loop, decode = asyncio.get_running_loop(), inference.decode_request

    def slow(body: bytes, *more: Any, **options: Any) -> Any:
        loop.call_soon_threadsafe(decoding.set)
        replaced.wait()
        return decode(body, *more, **options)

    monkeypatch.setattr(inference, "decode_request", slow)
    async with serving(max_body_bytes=1 << 20) as server, asyncio.TaskGroup() as group:
        path = "/v2/models/m/infer"
        asked = group.create_task(server.client.post(path, content=body_of() + b" " * (600 << 10)))
        await decoding.wait()
        try:
            await server.registry.replace("m", double)
        finally:
            replaced.set()

        assert (await asked).status_code == 200


async def test_a_client_that_goes_away_within_its_body_is_not_asked_to_wait() -> None:
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]
    async with serving() as server:
        status, _ = await exchange(server.api, messages)

        assert status == 499
        assert server.scheduler.statistics().offered == 0
