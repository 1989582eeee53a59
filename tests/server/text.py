"""A server in process with small models of text: one that repeats words, one that makes vectors of them, and one of
numbers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np

from kapsl_scheduler import QueueOverflowPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.generate import GenerateApi
from kapsl_scheduler.server.http import HttpApi
from kapsl_scheduler.server.openai import OpenAiApi
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.server.tracing import Tracing

TEXT = ("string", (1,))


class Words:
    """Says the last word of its prompt `max_tokens` times (0: three times). `fails` raises instead of the word of that
    number; `gate` is waited for before each word but the first."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.fails: int | None = None
        self.gate: asyncio.Event | None = None
        self.said = 0
        self.closed = 0

    async def __call__(self, text_input: Any, temperature: Any, max_tokens: Any) -> AsyncIterator[Any]:
        self.prompts.append(text_input[0])
        self.asked.append({"temperature": float(temperature[0]), "max_tokens": int(max_tokens[0])})
        word = str(text_input[0]).removesuffix("assistant:").split()[-1]
        try:
            for number in range(int(max_tokens[0]) or 3):
                if number == self.fails:
                    raise InferenceError("the words are gone")
                if number and self.gate is not None:
                    await self.gate.wait()
                self.said += 1
                yield np.array([f"{word}{number} "], object)
        finally:
            self.closed += 1


def embed(texts: Any) -> Any:
    """Three numbers of a text: its length, its words, its number of e's."""
    flat = [text for row in texts for text in row]
    return np.array([[len(text), len(text.split()), text.count("e")] for text in flat], np.float32)


class TextServer:
    def __init__(self, api: HttpApi, service: Service, words: Words) -> None:
        self.api = api
        self.service = service
        self.words = words
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(api, raise_app_exceptions=False), base_url="http://server"
        )


@asynccontextmanager
async def serving_text(tracing: Tracing | None = None) -> AsyncIterator[TextServer]:
    words = Words()
    engines = {
        "words": CallableEngine(
            words,
            batched=False,
            version="7",
            inputs={
                "text_input": TEXT,
                "temperature": ("float32", (1,)),
                "max_tokens": ("int64", (1,)),
            },
            outputs={"text_output": TEXT},
            max_streams=8,
        ),
        "vectors": CallableEngine(
            embed, inputs={"text": ("string", (None, 1))}, outputs={"vector": ("float32", (None, 3))}
        ),
        "numbers": CallableEngine(
            lambda x: x, inputs={"x": ("float32", (None, 2))}, outputs={"y": ("float32", (None, 2))}
        ),
    }

    async def start(engine: CallableEngine) -> Scheduler:
        queue = QueuePolicy(overflow=QueueOverflowPolicy.DROP_NEWEST)
        observer = None if tracing is None else tracing.observer("words")
        return await Scheduler([engine], queue=queue, observer=observer).__aenter__()

    async with ModelRegistry(start) as registry:
        for name, engine in engines.items():
            await registry.load(name, engine)
        service = Service(registry, version="1.2.3", max_in_flight=4, tracing=tracing)
        parts = [GenerateApi(service, max_body_bytes=100_000), OpenAiApi(service, max_body_bytes=100_000)]
        server = TextServer(HttpApi(service, parts=parts), service, words)
        async with server.client:
            yield server
        assert service.in_flight == 0


class Stream:
    """A streamed answer over bare ASGI: what came so far, and a client that may go away."""

    def __init__(self, api: HttpApi, path: str, body: bytes) -> None:
        self.status = 0
        self.came = b""
        self.complete = False
        self.gone = asyncio.Event()
        self._news = asyncio.Event()
        self._body: bytes | None = body
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "root_path": "",
            "headers": [],
        }
        self.task = asyncio.create_task(api(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.came += message["body"]
            self.complete = not message.get("more_body", False)
        self._news.set()

    async def until(self, text: bytes) -> None:
        async with asyncio.timeout(5.0):
            while text not in self.came:
                self._news.clear()
                await self._news.wait()
