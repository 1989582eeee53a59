"""The calls of the gRPC port, whatever service they belong to: who may ask, how long its message is waited for, how a
call ends in an error, what is told of it.

A call with one message is begun before that has come, so that the wait for it can be bounded. A browser does not come
here as it might to HTTP (`server.access.Hosts`): it speaks HTTP/2 to nobody without a certificate for the name that it
asked for. What is not here: what a call answers.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio

from kapsl_scheduler.errors import CronError, DeadlineExceeded, EngineError, InvalidInput, Overloaded
from kapsl_scheduler.server.access import Access, Caller, Role, role_for
from kapsl_scheduler.server.answers import status_of
from kapsl_scheduler.server.grpc_answers import Context, refuse
from kapsl_scheduler.server.journal import ACCESS, AUDIT, log_request

__all__ = ["Asking", "Door", "Stream", "Streamed", "Unary"]

logger = logging.getLogger(__name__)

STRANGERS: Final = 32
"""Calls that take no token and whose message has not come, at a time: each may hold as much memory as a message."""


class Asking:
    """One call: who asks (None where nobody has to say so), and for which model, once that is known."""

    __slots__ = ("caller", "model")

    def __init__(self, caller: Caller | None = None) -> None:
        self.caller = caller
        self.model = ""

    @property
    def who(self) -> str:
        """The name of a token, empty where nobody said."""
        return "" if self.caller is None else self.caller.token.name


class Unary(NamedTuple):
    """A call with one message and one answer, as bytes. What it raises becomes a status."""

    answer: Callable[[bytes, Context, Asking], Awaitable[bytes]]


class Streamed(NamedTuple):
    """A call with one message and many answers, which it writes to its context."""

    answer: Callable[[bytes, Context, Asking], Awaitable[None]]


class Stream(NamedTuple):
    """A call with many messages and many answers, which it writes to its context."""

    answer: Callable[[AsyncIterator[bytes], Context, Asking], Awaitable[None]]


Call = Unary | Streamed | Stream

_HANDLERS: Final[Mapping[type[Any], Callable[..., grpc.RpcMethodHandler]]] = {
    Unary: grpc.stream_unary_rpc_method_handler,
    Streamed: grpc.stream_stream_rpc_method_handler,
    Stream: grpc.stream_stream_rpc_method_handler,
}


class _Messages:
    """Reads the one message of calls that have one, each within so many seconds. All share a timer: one for each call
    would cost about as much as the rest of this door."""

    __slots__ = ("_patience", "_timer", "_until")

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._until: dict[asyncio.Task[Any], float] = {}  # by the loop's clock, the earliest first
        self._timer: asyncio.TimerHandle | None = None

    @property
    def awaited(self) -> int:
        """How many it waits for."""
        return len(self._until)

    async def one(self, context: Context) -> bytes:
        """Raises `DeadlineExceeded` and `InvalidInput`."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        until = self._until[task] = loop.time() + self._patience
        if self._timer is None:
            self._timer = loop.call_at(until, self._ring, loop)
        try:
            message = await context.read()
        except asyncio.CancelledError:
            if task in self._until or task.uncancel():
                raise
            raise DeadlineExceeded(f"the message of the call did not come within {self._patience:g} s") from None
        finally:
            self._until.pop(task, None)
        if message is grpc.aio.EOF:
            raise InvalidInput("the call has no message, expected one")
        return message  # type: ignore[no-any-return]

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        while self._until:
            task, until = next(iter(self._until.items()))
            if until > now:
                self._timer = loop.call_at(until, self._ring, loop)
                return
            del self._until[task]
            task.cancel()


class _Method:
    """A call that is offered, and what is known of it before anybody asks."""

    __slots__ = ("answer", "changes", "handler", "kind", "messages", "path", "role")

    def __init__(self, path: str, call: Call, messages: _Messages) -> None:
        self.path = path
        self.kind = type(call)
        self.messages = messages
        self.answer = call.answer if isinstance(call, Stream) else self._read_and(call.answer)
        self.role = role_for("GRPC", path)
        self.changes = self.role is not None and self.role > Role.READER
        self.handler = self._bare()

    def _read_and(self, answer: Callable[[bytes, Context, Asking], Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def answered(_: Any, context: Context, asking: Asking) -> Any:
            return await answer(await self.messages.one(context), context, asking)

        return answered

    def _bare(self) -> grpc.RpcMethodHandler:
        """For calls that anybody may make, and of which nothing is told."""
        answer, path = self.answer, self.path

        async def handle(asked: Any, context: Context) -> Any:
            try:
                return await answer(asked, context, Asking())
            except grpc.aio.BaseError:
                raise  # the call is at its end already
            except Exception as error:
                await _end(path, context, error)

        return _HANDLERS[self.kind](handle)

    def told(self, caller: Caller | None, *, access_log: bool) -> grpc.RpcMethodHandler:
        """For one call, of which it is told who made it and what became of it."""
        answer, path, changes = self.answer, self.path, self.changes
        begun = time.perf_counter()

        async def handle(asked: Any, context: Context) -> Any:
            asking, status = Asking(caller), 499
            try:
                answered = await answer(asked, context, asking)
                status = 200
            except grpc.aio.AbortError:
                status = 501  # none of our errors: there is no such call
                raise
            except (asyncio.CancelledError, grpc.aio.BaseError):
                raise  # the client is gone
            except Exception as error:
                status = status_of(error)
                await _end(path, context, error)
            finally:
                full = f"{path}/{asking.model}" if asking.model else path
                if changes:
                    log_request(AUDIT, asking.who, "GRPC", full, status, begun)
                if access_log:
                    log_request(ACCESS, asking.who, "GRPC", full, status, begun)
            return answered

        return _HANDLERS[self.kind](handle)

    def refusing(self, error: EngineError, *, access_log: bool) -> grpc.RpcMethodHandler:
        """For one call that is not to be, whose message is not waited for."""
        begun = time.perf_counter()

        async def handle(asked: Any, context: Context) -> None:
            if self.changes:
                log_request(AUDIT, "", "GRPC", self.path, status_of(error), begun)
            if access_log:
                log_request(ACCESS, "", "GRPC", self.path, status_of(error), begun)
            await refuse(context, error)

        return grpc.stream_stream_rpc_method_handler(handle)


class Door(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpcio has no types
    """The services by their names. With `access`, each call says who asks by a token in its metadata, as an HTTP
    request does in its headers; what changes something is told to the log `kapsl_scheduler.audit`, with `access_log`
    every call to `kapsl_scheduler.access`. The message of a call is waited for `patience` seconds, where the call takes
    no token, and three times that where it may be long."""

    def __init__(
        self,
        services: Mapping[str, Mapping[str, Call]],
        *,
        patience: float,
        access: Access | None = None,
        access_log: bool = False,
    ) -> None:
        paths = {f"/{service}/{name}": call for service, calls in services.items() for name, call in calls.items()}
        self._strangers = _Messages(patience)
        known = _Messages(3 * patience)
        self._methods = {
            path: _Method(path, call, self._strangers if role_for("GRPC", path) is None else known)
            for path, call in paths.items()
        }
        self._access = access
        self._access_log = access_log

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        """What gRPC asks for each call, before it reads any message of it."""
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return None
        caller = None
        if method.role is None and self._strangers.awaited >= STRANGERS:
            error = Overloaded(f"{STRANGERS} calls that take no token have sent no message yet, which is the limit")
            return method.refusing(error, access_log=self._access_log)
        if self._access is not None and method.role is not None:
            try:
                caller = self._access.caller(_credential(handler_call_details.invocation_metadata), method.role)
            except EngineError as error:
                return method.refusing(error, access_log=self._access_log)
        if caller is None and not method.changes and not self._access_log:
            return method.handler
        return method.told(caller, access_log=self._access_log)


def _credential(metadata: Any) -> str:
    return next((value for key, value in metadata or () if key == "authorization" and isinstance(value, str)), "")


async def _end(path: str, context: Context, error: Exception) -> None:
    """Ends a call in an error."""
    if not isinstance(error, EngineError | CronError):
        logger.error("%s failed unexpectedly", path, exc_info=error)
    await refuse(context, error)
