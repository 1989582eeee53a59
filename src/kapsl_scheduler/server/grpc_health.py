"""What gRPC's own tools ask a server: is it healthy (`grpc.health.v1`), and which services and messages has it (server
reflection).

What is not here: the calls of the Open Inference Protocol (`server.oip_grpc`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import grpc

from kapsl_scheduler.errors import InvalidInput, ModelNotLoaded, Overloaded
from kapsl_scheduler.server.grpc_answers import Context
from kapsl_scheduler.server.grpc_door import Asking, Stream, Streamed, Unary
from kapsl_scheduler.server.oip_proto import POOL, Message, message_class, parsed
from kapsl_scheduler.server.service import Service

__all__ = ["HEALTH", "REFLECTION", "Health", "Reflection"]

HEALTH: Final = "grpc.health.v1.Health"
REFLECTION: Final = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
"""Two names of one protocol: tools ask for either."""

LOOK_AGAIN: Final = 1.0
"""Seconds after which it is looked again for those who watch: a model's readiness says nothing when it changes."""
MOST: Final = 256
"""Watches and reflections that may be open, each."""
EACH: Final = 8
"""Of them, those of one connection."""
LONGEST: Final = 4096
"""Bytes of a question: it has a name in it."""

_HealthRequest: Final = message_class("grpc.health.v1.HealthCheckRequest")
_HealthResponse: Final = message_class("grpc.health.v1.HealthCheckResponse")
_ReflectionRequest: Final = message_class("grpc.reflection.v1.ServerReflectionRequest")
_ReflectionResponse: Final = message_class("grpc.reflection.v1.ServerReflectionResponse")


class _Open:
    """Calls of one kind that are open, by the connection that they came on."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._by_peer: Counter[str] = Counter()

    @contextmanager
    def another(self, peer: str) -> Iterator[None]:
        """One more, while this is open. Raises `Overloaded`."""
        if self._by_peer.total() >= MOST:
            raise Overloaded(f"{MOST} {self._what} are open, which is the limit")
        if self._by_peer[peer] >= EACH:
            raise Overloaded(f"{EACH} {self._what} of one connection are open, which is the limit")
        self._by_peer[peer] += 1
        try:
            yield
        finally:
            self._by_peer[peer] -= 1
            self._by_peer += Counter()  # which leaves out those that are at 0


class Health:
    """Health of the server as a whole (the empty name, and the `names` of its services), and of each model by its
    name."""

    def __init__(self, service: Service, names: Sequence[str]) -> None:
        self._service = service
        self._names = frozenset(("", *names))
        self._closing = asyncio.Event()
        self._watches = _Open("watches")

    def calls(self) -> dict[str, Unary | Streamed]:
        return {"Check": Unary(self._check), "Watch": Streamed(self._watch)}

    def close(self) -> None:
        """Tells those who watch that the server is closing, and ends their calls."""
        self._closing.set()

    def _ready(self, name: str) -> bool:
        """Raises `ModelNotLoaded` for a name that nothing has."""
        if name in self._names:
            return self._service.ready()
        return self._service.registry.get(name).ready and not self._service.draining

    def _status(self, name: str) -> str:
        return "SERVING" if self._ready(name) else "NOT_SERVING"

    async def _check(self, body: bytes, context: Context, asking: Asking) -> bytes:
        name = _question(_HealthRequest, body).service
        try:
            return _health(self._status(name))
        except ModelNotLoaded:  # which names what is loaded, and anybody may ask
            raise ModelNotLoaded("no service or model has that name") from None

    async def _watch(self, body: bytes, context: Context, asking: Asking) -> None:
        name = _question(_HealthRequest, body).service
        last = ""
        with self._watches.another(context.peer()):
            while True:
                closing = self._closing.is_set()
                try:
                    status = self._status(name)
                except ModelNotLoaded:  # it may come
                    status = "SERVICE_UNKNOWN"
                if status != last:
                    last = status
                    await context.write(_health(status))
                if closing:
                    return
                try:
                    async with asyncio.timeout(LOOK_AGAIN):
                        await self._closing.wait()
                except TimeoutError:
                    pass


def _question(kind: Message, body: bytes) -> Message:
    """Raises `InvalidInput`."""
    if len(body) > LONGEST:
        raise InvalidInput(f"the message has {len(body)} bytes, expected at most {LONGEST}")
    return parsed(kind, body)


def _health(status: str) -> bytes:
    data: bytes = _HealthResponse(status=status).SerializeToString()
    return data


class Reflection:
    """Describes the services that are offered, by the files that the messages are made of."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(sorted(names))
        self._open = _Open("reflections")

    def calls(self) -> dict[str, Stream]:
        return {"ServerReflectionInfo": Stream(self._info)}

    async def _info(self, requests: AsyncIterator[bytes], context: Context, asking: Asking) -> None:
        with self._open.another(context.peer()):
            async for body in requests:
                answer = self._answered(_question(_ReflectionRequest, body))
                await context.write(answer.SerializeToString())

    def _answered(self, request: Message) -> Message:
        answer = _ReflectionResponse(valid_host=request.host, original_request=request)
        kind = request.WhichOneof("message_request")
        try:
            if kind == "list_services":
                for name in self._names:
                    answer.list_services_response.service.add(name=name)
            elif kind == "file_by_filename":
                _describe(answer, POOL.FindFileByName(request.file_by_filename))
            elif kind == "file_containing_symbol":
                _describe(answer, POOL.FindFileContainingSymbol(request.file_containing_symbol))
            elif kind == "all_extension_numbers_of_type":
                name = POOL.FindMessageTypeByName(request.all_extension_numbers_of_type).full_name
                answer.all_extension_numbers_response.base_type_name = name  # there are no extensions
            else:
                raise KeyError
        except KeyError:
            code: int = grpc.StatusCode.NOT_FOUND.value[0]
            answer.error_response.error_code = code
            answer.error_response.error_message = f"nothing is known by that {kind}"
        return answer


def _describe(answer: Message, file: Message) -> None:
    answer.file_descriptor_response.file_descriptor_proto.append(file.serialized_pb)
