"""OpenAI's API over models of text: `/v1/models`, `/v1/chat/completions`, `/v1/embeddings`.

A chat becomes one prompt, a line `role: text` for each message and `assistant:` for what is to come; options go to the
model's inputs of their names. What is not here: which models these are (`server.texts`).
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.errors import CronError, EngineError, InferenceError, InvalidInput, ModelNotLoaded
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.answers import Answer, error_answer, json_response, response_of, status_of
from kapsl_scheduler.server.bodies import read_body
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.presence import sent_events, while_connected
from kapsl_scheduler.server.service import Flight, Service
from kapsl_scheduler.server.texts import (
    TEXT_INPUT,
    TEXT_OUTPUT,
    StopWords,
    check_text_model,
    text_inputs,
    texts_of,
)
from kapsl_scheduler.types import Array, InferenceRequest, InferenceResponse

__all__ = ["OpenAiApi"]

Asked = TypeVar("Asked", bound=msgspec.Struct)

_CHAT: Final = "/v1/chat/completions"
_EMBEDDINGS: Final = "/v1/embeddings"

MOST_TEXTS: Final = 2048
"""Texts of one request for embeddings, as with OpenAI."""

_DEFAULTS: Final[Mapping[str, Any]] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "max_tokens": 0,  # no limit but the model's own
    "seed": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}
"""What a model's inputs of these names get where the request says nothing."""
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class _Part(msgspec.Struct):
    type: str
    text: str = ""


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Chat(msgspec.Struct):
    model: str
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1, max_length=4096)]
    stream: bool = False
    stream_options: _StreamOptions | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=4)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    n: int | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None


class _Embeddings(msgspec.Struct):
    model: str
    input: str | list[str]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None


class OpenAiApi:
    """The routes over a service."""

    def __init__(self, service: Service, *, max_body_bytes: int) -> None:
        self._service = service
        self._max_body_bytes = max_body_bytes
        self._began = int(time.time())

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/models", _guarded(self._models)),
            Route("/v1/models/{model}", _guarded(self._model)),
            Route(_CHAT, _guarded(self._chat), methods=["POST"]),
            Route(_EMBEDDINGS, _guarded(self._embeddings), methods=["POST"]),
        ]

    # --------------------------------------------------------------------------------------------- models

    async def _models(self, request: Request) -> Response:
        return json_response(
            {
                "object": "list",
                "data": [
                    self._shown(name) for name in dict.fromkeys(one.name for one in self._service.registry.list())
                ],
            }
        )

    async def _model(self, request: Request) -> Response:
        return json_response(self._shown(self._service.registry.get(request.path_params["model"]).name))

    def _shown(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._began, "owned_by": "kapsl-scheduler"}

    # ----------------------------------------------------------------------------------------------- chat

    async def _chat(self, request: Request) -> Response:
        asked = await self._read(request, _Chat)
        with self._flight(request, _CHAT, asked.model) as flight:
            answer = _ChatAnswer(self._service, flight, asked)
            if asked.stream:
                return await sent_events(request.receive, flight, answer.events(), _failed)
            return json_response(await while_connected(request.receive, answer.whole()))

    # ----------------------------------------------------------------------------------------- embeddings

    async def _embeddings(self, request: Request) -> Response:
        asked = await self._read(request, _Embeddings)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        if not 0 < len(texts) <= MOST_TEXTS:
            raise InvalidInput(f"input: expected 1 to {MOST_TEXTS} texts, got {len(texts)}")
        with self._flight(request, _EMBEDDINGS, asked.model):
            model = self._service.registry.get(asked.model)
            output = _embedding_output(model)
            inputs = [text_inputs(model, {model.info.inputs[0].name: text}, {}) for text in texts]
            vectors = await while_connected(request.receive, _embedded(model, inputs, output))
            if asked.dimensions is not None and asked.dimensions != len(vectors[0]):
                raise InvalidInput(f"dimensions: the model's embeddings have {len(vectors[0])}, got {asked.dimensions}")
            data = [
                {"object": "embedding", "index": index, "embedding": _written(vector, asked.encoding_format)}
                for index, vector in enumerate(vectors)
            ]
            return json_response({"object": "list", "model": asked.model, "data": data, "usage": None})

    def _flight(self, request: Request, route: str, model: str) -> Flight:
        return Flight(self._service, model, trace=self._service.begin_trace(route, model, request.scope["headers"]))

    async def _read(self, request: Request, kind: type[Asked]) -> Asked:
        body = await read_body(request.scope, request.receive, self._max_body_bytes)
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the request body: {error}") from None


class _ChatAnswer:
    """One chat and its answer. Raises `InvalidInput` for what cannot be had."""

    def __init__(self, service: Service, flight: Flight, asked: _Chat) -> None:
        model = service.registry.get(asked.model)
        check_text_model(model)
        if asked.n not in (None, 1):
            raise InvalidInput(f"n: expected 1, got {asked.n}")
        if asked.logprobs:
            raise InvalidInput("logprobs: not offered")
        if asked.tools:
            raise InvalidInput("tools: not offered")
        words = asked.stop or []
        self._stop = [words] if isinstance(words, str) else words
        self._model = model
        inputs = text_inputs(model, {TEXT_INPUT: _prompt(asked.messages), **_options(asked)}, _DEFAULTS)
        self._chunks = partial(service.stream, model, InferCall(InferenceRequest(inputs)), flight.trace)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.model}
        self._usage = asked.stream_options is not None and asked.stream_options.include_usage

    async def _texts(self) -> AsyncGenerator[str, None]:
        """The answer piece by piece, up to a stop word."""
        stop = StopWords(self._stop)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                outputs = chunk.outputs
                if TEXT_OUTPUT not in outputs:
                    raise InferenceError(f"the model {self._model.name!r} gave no {TEXT_OUTPUT!r}")
                if text := stop.take("".join(texts_of(outputs[TEXT_OUTPUT]))):
                    yield text
                if stop.found:
                    return
        if text := stop.rest():
            yield text

    async def whole(self) -> dict[str, Any]:
        async with aclosing(self._texts()) as texts:
            text = "".join([text async for text in texts])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": None}

    async def events(self) -> AsyncGenerator[bytes, None]:
        async with aclosing(self._texts()) as texts:
            first: dict[str, Any] = {"role": "assistant"}
            async for text in texts:
                yield self._event({**first, "content": text})
                first = {}
        yield self._event({**first}, "stop")
        if self._usage:
            yield _event({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": None})
        yield b"data: [DONE]\n\n"

    def _event(self, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return _event({**self._head, "object": "chat.completion.chunk", "choices": [choice]})


def _prompt(messages: Sequence[_Message]) -> str:
    lines: list[str] = []
    for number, message in enumerate(messages):
        if isinstance(message.content, list):
            for part in message.content:
                if part.type != "text":
                    raise InvalidInput(f"messages[{number}].content: expected parts of type 'text', got {part.type!r}")
            text = "".join(part.text for part in message.content)
        else:
            text = message.content or ""
        lines.append(f"{message.role}: {text}\n")
    return "".join(lines) + "assistant:"


def _options(asked: _Chat) -> dict[str, Any]:
    """What the request says for inputs of the model, by their names."""
    said = {name: getattr(asked, name) for name in _DEFAULTS}
    said["max_tokens"] = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    return {name: value for name, value in said.items() if value is not None}


def _embedding_output(model: ServedModel) -> str:
    info = model.info
    texts_in = len(info.inputs) == 1 and info.inputs[0].dtype == "string"
    vectors = [spec.name for spec in info.outputs if spec.dtype.startswith("float")]
    if not texts_in or not vectors:
        raise InvalidInput(f"model {model.name!r} is no model of embeddings: it takes no text, or gives no numbers")
    return vectors[0]


async def _embedded(model: ServedModel, inputs: Sequence[Mapping[str, Array]], output: str) -> list[Array]:
    """A vector for each; they go to the model side by side, which batches them."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_one(model, one)) for one in inputs]
    except ExceptionGroup as failures:
        error = failures.exceptions[0]
        raise error from error.__cause__
    return [np.asarray(task.result().outputs[output]).ravel() for task in tasks]


async def _one(model: ServedModel, inputs: Mapping[str, Array]) -> InferenceResponse:
    return await model.scheduler.infer(inputs)


def _written(vector: Array, form: str) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()


# ------------------------------------------------------------------------------------------------- errors


def _guarded(route: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """A route whose errors are in OpenAI's form."""

    async def guarded(request: Request) -> Response:
        try:
            return await route(request)
        except (EngineError, CronError) as error:
            return response_of(_error(error))

    return guarded


def _error(error: Exception) -> Answer:
    answer = error_answer(error)
    status = status_of(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = "model_not_found" if isinstance(error, ModelNotLoaded) else getattr(error, "code", "internal")
    answer.body = msgspec.json.encode({"error": {"message": str(error), "type": kind, "param": None, "code": code}})
    return answer


def _failed(error: EngineError) -> bytes:
    return b"data: %b\n\n" % _error(error).body


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(body)
