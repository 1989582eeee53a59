"""Bodies over HTTP: their bounds, their forms, and what long ones cost everybody else."""

from __future__ import annotations

import asyncio
import gzip
import threading
from typing import Any

import pytest

from kapsl_scheduler.server import http
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


@pytest.mark.parametrize(
    ("header", "value", "body", "said"),
    [
        ("content-encoding", "gzip", gzip.compress(body_of()), "a compressed body came (content-encoding: gzip)"),
        (
            "inference-header-content-length",
            "76",
            b'{"inputs":[{"name":"x","shape":[1,2],"datatype":"FP32","parameters":{"binary_data_size":8}}]}' + bytes(8),
            "binary tensor data came (inference-header-content-length: 76)",
        ),
    ],
)
async def test_400_for_a_body_in_another_form_names_the_form(header: str, value: str, body: bytes, said: str) -> None:
    async with serving() as server:
        response = await server.client.post("/v2/models/m/infer", content=body, headers={header: value})
        plain = await server.client.post("/v2/models/m/infer", content=body_of(), headers={header: "identity"})

    assert assert_error(response, 400, "invalid_input").startswith(said)
    assert plain.status_code == 200


async def test_long_requests_and_answers_do_not_keep_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, list[bool]] = {"decode_request": [], "encode_reply": []}
    here = threading.get_ident()

    def recorded(function: Function) -> Function:
        def record(*arguments: Any) -> Any:
            threads[function.__name__].append(threading.get_ident() != here)
            return function(*arguments)

        return record

    for function in (http.decode_request, http.encode_reply):
        monkeypatch.setattr(http, function.__name__, recorded(function))
    rows = 20_000
    long = {"name": "x", "shape": [rows, 2], "datatype": "FP32", "data": [0.123456789012345] * rows * 2}
    async with serving(max_body_bytes=2 << 20, max_batch_size=rows) as server:
        answers = [await server.infer(), await server.infer(inputs=[long])]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert len(answers[1].json()["outputs"][0]["data"]) == rows * 2
    assert threads == {"decode_request": [False, True], "encode_reply": [False, True]}


async def test_a_model_that_is_replaced_while_a_request_is_decoded_answers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding, replaced = asyncio.Event(), threading.Event()
    loop, decode = asyncio.get_running_loop(), http.decode_request

    def slow(body: bytes) -> Any:
        loop.call_soon_threadsafe(decoding.set)
        replaced.wait()
        return decode(body)

    monkeypatch.setattr(http, "decode_request", slow)
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
