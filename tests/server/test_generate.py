"""Triton's generate extension over the application in process."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.server.api import assert_error
from tests.server.text import Stream, serving_text

PATH = "/v2/models/words/generate"
ASKED = {"text_input": "a word", "max_tokens": 2, "parameters": {"temperature": 0.5}}


def events(came: bytes) -> list[Any]:
    assert came.endswith(b"\n\n")
    return [json.loads(event.removeprefix(b"data: ")) for event in came.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("path", [PATH, "/v2/models/words/versions/7/generate"])
async def test_a_text_is_generated_whole(path: str) -> None:
    async with serving_text() as server:
        answer = await server.client.post(path, json={**ASKED, "id": "5"})
        assert server.service.figures("words").answers == {200: 1}

    assert answer.json() == {"id": "5", "model_name": "words", "model_version": "7", "text_output": "word0 word1 "}
    assert server.words.asked == [{"temperature": 0.5, "max_tokens": 2}]


async def test_a_text_is_streamed() -> None:
    async with serving_text() as server:
        answer = await server.client.post(PATH + "_stream", json=ASKED)

    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert [event["text_output"] for event in events(answer.content)] == ["word0 ", "word1 "]


async def test_an_error_in_the_middle_of_a_stream_is_its_last_event() -> None:
    async with serving_text() as server:
        server.words.fails = 1
        stream = await server.client.post(PATH + "_stream", json=ASKED)
        whole = await server.client.post(PATH, json=ASKED)

    assert events(stream.content)[1] == {"error": "the words are gone", "code": "inference_error"}
    assert_error(whole, 500, "inference_error")


async def test_a_stream_begins_before_it_is_made_and_ends_with_its_client() -> None:
    async with serving_text() as server:
        server.words.gate = asyncio.Event()
        stream = Stream(server.api, PATH + "_stream", json.dumps(ASKED).encode())
        await stream.until(b"word0 ")
        assert server.service.in_flight == 1
        stream.gone.set()
        await stream.task
        assert (server.service.in_flight, server.service.figures("words").answers) == (0, {499: 1})
        server.words.gate.set()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("[", "no JSON object"),
        ("[]", "no JSON object"),
        ({}, "text_input: model 'words' expects it, and nothing came"),
        ({**ASKED, "text_input": 5}, "text_input: expected string of shape [1], got '5'"),
        ({**ASKED, "max_tokens": "x"}, "max_tokens: expected int64 of shape [1], got 'x'"),
        ({**ASKED, "max_tokens": [1, 2]}, "max_tokens: expected int64 of shape [1]"),
        ({**ASKED, "parameters": 5}, "parameters: expected an object, got int"),
        ({**ASKED, "priority": -1}, "priority: expected an integer of 0 or more, got -1"),
    ],
)
@pytest.mark.parametrize("way", ["", "_stream"])
async def test_a_bad_request_is_refused(way: str, body: Any, said: str) -> None:
    async with serving_text() as server:
        content = body if isinstance(body, str) else json.dumps(body)
        answer = await server.client.post(PATH + way, content=content)

    assert said in assert_error(answer, 400, "invalid_input")


async def test_a_model_of_numbers_generates_nothing() -> None:
    async with serving_text() as server:
        answer = await server.client.post("/v2/models/numbers/generate", json=ASKED)
        unknown = await server.client.post("/v2/models/no/generate", json=ASKED)

    assert "no model of text" in assert_error(answer, 400, "invalid_input")
    assert_error(unknown, 404, "model_not_loaded")
