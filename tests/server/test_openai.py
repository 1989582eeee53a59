"""OpenAI's API, driven by OpenAI's own client over the application in process."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.server.texts import StopWords
from tests.server.text import Stream, TextServer, serving_text

HELLO: Any = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "a word"}]},
]


@asynccontextmanager
async def talking() -> AsyncIterator[tuple[TextServer, openai.AsyncOpenAI]]:
    async with serving_text() as server:
        client = openai.AsyncOpenAI(
            base_url="http://server/v1", api_key="none", http_client=server.client, max_retries=0
        )
        yield server, client


async def test_models_are_listed_and_found() -> None:
    async with talking() as (_, client):
        listed = [model.id async for model in client.models.list()]
        one = await client.models.retrieve("words")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("no")

    assert listed == ["numbers", "vectors", "words"]
    assert (one.id, one.object, one.owned_by) == ("words", "model", "kapsl-scheduler")
    assert caught.value.code == "model_not_found"


async def test_a_chat_is_answered_whole() -> None:
    async with talking() as (server, client):
        answer = await client.chat.completions.create(
            model="words", messages=HELLO, temperature=0.5, max_completion_tokens=2
        )
        stats = server.service.figures("words")

    assert server.words.prompts == ["system: be brief\nuser: a word\nassistant:"]
    assert server.words.asked == [{"temperature": 0.5, "max_tokens": 2}]
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "word0 word1 ")
    assert (choice.finish_reason, answer.model, answer.usage) == ("stop", "words", None)
    assert stats.answers == {200: 1}


async def test_a_chat_is_streamed() -> None:
    async with talking() as (server, client):
        stream = await client.chat.completions.create(
            model="words", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        stats = server.service.figures("words")

    assert len({chunk.id for chunk in chunks}) == 1
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert [delta.content for delta in deltas] == ["word0 ", "word1 ", "word2 ", None]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices] == [None, None, None, "stop"]
    assert chunks[-1].choices == []
    assert stats.answers == {200: 1}


async def test_an_answer_ends_before_a_stop_word_and_its_model_is_told() -> None:
    async with talking() as (server, client):
        for stop in ("1 w", ["zzz", "1"]):
            whole = await client.chat.completions.create(model="words", messages=HELLO, stop=stop)
            stream = await client.chat.completions.create(model="words", messages=HELLO, stop=stop, stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert whole.choices[0].message.content == streamed == "word0 word"
        assert server.words.closed == 4


@given(st.text("ab", max_size=30), st.lists(st.text("ab", max_size=4), max_size=3), st.data())
def test_a_text_in_any_pieces_ends_where_the_whole_would(text: str, words: list[str], data: st.DataObject) -> None:
    stop = StopWords(words)
    shown, at = "", 0
    while at < len(text) and not stop.found:
        size = data.draw(st.integers(1, len(text) - at))
        shown += stop.take(text[at : at + size])
        at += size
    shown += stop.rest()

    ends = [end for word in words if word and (end := text.find(word)) >= 0]
    # Which of several overlapping words is seen first depends on the pieces; none of them is ever shown whole.
    assert text.startswith(shown)
    assert not any(word and word in shown for word in words)
    assert stop.found == bool(ends)
    if len({word for word in words if word}) == 1:
        assert shown == (text[: min(ends)] if ends else text)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"n": 2}, "n: expected 1, got 2"),
        ({"logprobs": True}, "logprobs: not offered"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: not offered"),
        ({"messages": []}, "`$.messages`"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "`$.messages[0].role`"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({"temperature": "hot"}, "`$.temperature`"),
        ({"model": "numbers"}, "it is no model of text"),
    ],
)
async def test_what_cannot_be_had_is_refused(fields: dict[str, Any], said: str) -> None:
    async with talking() as (_, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(**{"model": "words", "messages": HELLO, **fields})

    assert said in caught.value.message
    assert (caught.value.type, caught.value.code) == ("invalid_request_error", "invalid_input")


async def test_an_error_before_the_first_piece_has_a_status() -> None:
    async with talking() as (server, client):
        server.words.fails = 0
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="words", messages=HELLO, stream=stream)
            assert (caught.value.type, caught.value.code) == ("server_error", "inference_error")
        assert server.service.figures("words").answers == {500: 2}


async def test_an_error_in_the_middle_is_an_event() -> None:
    async with talking() as (server, client):
        server.words.fails = 1
        stream = await client.chat.completions.create(model="words", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="the words are gone"):
            async for _ in stream:
                pass
        assert server.service.figures("words").answers == {500: 1}


async def test_the_first_piece_is_sent_while_the_next_is_made_and_a_client_that_goes_ends_it() -> None:
    async with serving_text() as server:
        server.words.gate = asyncio.Event()
        body = json.dumps({"model": "words", "messages": HELLO, "stream": True}).encode()
        stream = Stream(server.api, "/v1/chat/completions", body)
        await stream.until(b"word0 ")
        assert (stream.status, stream.complete, server.words.said) == (200, False, 1)
        stream.gone.set()
        await stream.task
        assert server.service.in_flight == 0
        assert server.service.figures("words").answers == {499: 1}
        server.words.gate.set()


async def test_beyond_the_requests_in_flight_it_is_too_many() -> None:
    async with talking() as (server, client):
        for _ in range(4):
            server.service.enter()
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="words", messages=HELLO)
        assert caught.value.type == "rate_limit_error"
        for _ in range(4):
            server.service.leave()


@pytest.mark.parametrize("form", ["float", "base64"])
async def test_embeddings(form: Any) -> None:
    texts = ["eel", "a bee", ""]
    async with talking() as (_, client):
        answer = await client.embeddings.create(model="vectors", input=texts, encoding_format=form)
        usual = await client.embeddings.create(model="vectors", input="eel")

    vectors: list[Any] = [item.embedding for item in answer.data]
    if form == "base64":
        vectors = [list(memoryview(base64.b64decode(vector)).cast("f")) for vector in vectors]
    assert vectors == [[3, 1, 2], [5, 2, 2], [0, 0, 0]]
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert usual.data[0].embedding == [3, 1, 2]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": []}, "input: expected 1 to 2048 texts, got 0"),
        ({"input": [[1, 2]]}, "`$.input[0]`"),
        ({"dimensions": 2}, "dimensions: the model's embeddings have 3, got 2"),
        ({"model": "words"}, "is no model of embeddings"),
        ({"model": "numbers"}, "is no model of embeddings"),
    ],
)
async def test_embeddings_that_cannot_be_had_are_refused(fields: dict[str, Any], said: str) -> None:
    async with talking() as (_, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.embeddings.create(**{"model": "vectors", "input": "x", **fields})

    assert said in caught.value.message
