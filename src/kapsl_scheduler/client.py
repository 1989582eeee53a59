"""A small asynchronous client of the server's JSON protocol, for the command line, tests and load generation.

One HTTP/1.1 connection per call in flight, kept alive between calls. It speaks HTTP through httptools because
a load generator that shares a machine with the server must cost less than the server does. What is not here:
retries (a call whose connection is lost may have run) and streaming.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeVar, cast
from urllib.parse import quote, urlencode, urlsplit

import httptools
import msgspec
import numpy as np

from kapsl_scheduler import errors
from kapsl_scheduler.server.oip import InferCall, numpy_dtype_of
from kapsl_scheduler.server.oip_json import InferReply, decode_reply, decode_request, encode_request
from kapsl_scheduler.types import Array, InferenceRequest, Priority, Tensors

__all__ = ["Client", "LoadTally", "closed_loop", "fit_inputs", "random_inputs", "read_call"]

_ERRORS: Final[Mapping[str, type[errors.EngineError]]] = {
    error.code: error
    for error in (
        errors.Backend,
        errors.Cancelled,
        errors.DeadlineExceeded,
        errors.Forbidden,
        errors.InferenceError,
        errors.InvalidInput,
        errors.ModelLoadError,
        errors.ModelNotLoaded,
        errors.Overloaded,
        errors.ResourceExhausted,
        errors.Unauthorized,
        errors.Unavailable,
    )
}
_PLAIN_CRON_ERRORS: Final[Mapping[str, type[errors.CronError]]] = {
    error.code: error for error in (errors.CronError, errors.DuplicateId, errors.NotFound, errors.StoreError)
}


Decoded = TypeVar("Decoded")


class _ErrorBody(msgspec.Struct):
    error: str = ""
    code: str = ""
    retry_after: float | None = None
    faults: tuple[str, ...] = ()
    # of an expression: where it is wrong
    text: str = ""
    field: str | None = None
    token: str = ""
    position: int = 0
    hint: str | None = None


class _Answer(NamedTuple):
    status: int
    body: bytes


class Client:
    """Calls a server at `url` (`http://` or `https://`, and a path if the server is behind one).

    `token` is who asks, where the server wants to know.

    Every method raises the error that the server named, with its type (an `EngineError` or a `CronError`), and
    `Unavailable` where there is no server or where it went away. Cancelling a call closes its connection, which
    cancels it on the server.
    """

    def __init__(self, url: str, *, token: str | None = None) -> None:
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise errors.InvalidInput(f"{url!r} is no server address: {error}") from None
        extra = parts.query or parts.fragment or parts.username or parts.password
        if parts.scheme not in ("http", "https") or not parts.hostname or extra:
            raise errors.InvalidInput(f"{url!r} is no server address, expected one like http://127.0.0.1:8080")
        self._base = quote(parts.path.rstrip("/"), safe="/%")
        self.url = f"{parts.scheme}://{parts.netloc}{self._base}"
        self._host = parts.hostname
        self._port = port or (443 if parts.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._authority = parts.netloc.encode()
        if token is not None and not (token.isascii() and token.isprintable()):
            raise errors.InvalidInput("the token has characters that no token has")
        self._credential = b"" if token is None else b"authorization: Bearer %b\r\n" % token.strip().encode()
        self._idle: list[_Connection] = []

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the idle connections. The client may be used again."""
        while self._idle:
            self._idle.pop().close()

    async def infer(
        self,
        model: str,
        inputs: Tensors,
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] | None = None,
        id: str = "",
    ) -> InferReply:
        """One inference. `inputs` carry their batch axis; `timeout` is in seconds, kept by the server."""
        body = encode_request(inputs, id=id, priority=priority, timeout=timeout, outputs=outputs)
        return decode_reply(await self.post(_model_path(model, "/infer"), body))

    def prepare(
        self,
        model: str,
        inputs: Tensors,
        *,
        priority: Priority | None = None,
        timeout: float | None = None,
        outputs: Sequence[str] | None = None,
    ) -> Callable[[], Awaitable[bytes]]:
        """The same inference, encoded once and sent at every call; the answer is not decoded. For load."""
        body = encode_request(inputs, priority=priority, timeout=timeout, outputs=outputs)
        return lambda: self.post(_model_path(model, "/infer"), body)

    async def models(self) -> list[dict[str, Any]]:
        """The loaded models: name, version, state."""
        return self._decoded(await self.post("/v2/repository/index", b"{}"), list[dict[str, Any]])

    async def load(self, model: str) -> dict[str, Any]:
        """Makes the server read a model's file again and put it in the place of what it serves, without a gap. The
        answer, which comes when the old model has ended its requests, is as one of `models`."""
        return self._decoded(await self.post(_repository_path(model, "/load"), b""), dict[str, Any])

    async def unload(self, model: str) -> None:
        """Takes a model and the jobs of its package out of service; the answer comes when it has ended its requests."""
        await self.post(_repository_path(model, "/unload"), b"")

    async def metadata(self, model: str) -> dict[str, Any]:
        """Name, versions, platform, inputs and outputs of one model."""
        return await self.get(_model_path(model))

    async def stats(self, model: str) -> dict[str, Any]:
        """The statistics of one model."""
        answer = await self.get(_model_path(model, "/stats"))
        statistics: dict[str, Any] = answer["model_stats"][0]
        return statistics

    async def all_stats(self) -> list[dict[str, Any]]:
        """The statistics of every version of every model."""
        statistics: list[dict[str, Any]] = (await self.get("/v2/models/stats"))["model_stats"]
        return statistics

    # ---------------------------------------------------------------------------------------------- jobs

    async def jobs(self) -> list[dict[str, Any]]:
        """All jobs by id, with what has become of their firings."""
        found: list[dict[str, Any]] = []
        after = ""
        while True:
            page = await self.get("/v2/cron/jobs" + _query(limit=1000, after=after))
            found += page["jobs"]
            if page["next"] is None:
                return found
            after = page["next"]

    async def job(self, id: str) -> dict[str, Any]:
        """One job, with its `definition`."""
        return await self.get(_job_path(id))

    async def put_job(self, id: str, definition: bytes) -> dict[str, Any]:
        """Makes a job as its definition (JSON text) says, or puts that in the place of the one it has."""
        return self._decoded(await self._call(b"PUT", _job_path(id), definition), dict[str, Any])

    async def remove_job(self, id: str, *, cancel: bool = False) -> None:
        """Forgets a job; what runs goes on to its end, or with `cancel` is cancelled."""
        await self._call(b"DELETE", _job_path(id) + _query(cancel=cancel), b"")

    async def pause_job(self, id: str, reason: str = "") -> dict[str, Any]:
        """Lets a job fire no more until it is resumed."""
        return await self._order(id, "/pause", {"reason": reason})

    async def resume_job(self, id: str, *, catch_up: bool = False) -> dict[str, Any]:
        """Lets a job fire again; with `catch_up` also for what was due meanwhile, by its misfire rule."""
        return await self._order(id, "/resume", {"catch_up": catch_up})

    async def trigger_job(self, id: str, origin: str | None = None) -> dict[str, Any]:
        """Lets a job fire once, now; asked for twice under one `origin` it is one run. Returns the run."""
        return await self._order(id, "/trigger", {"origin": origin})

    async def backfill_job(
        self, id: str, start: dt.datetime, end: dt.datetime, *, concurrency: int = 1, origin: str | None = None
    ) -> dict[str, Any]:
        """Lets a job fire for every occurrence from `start` to before `end`. Returns the origin of the runs and their
        number."""
        order = {"start": start, "end": end, "concurrency": concurrency, "origin": origin}
        return await self._order(id, "/backfill", order)

    async def preview_job(self, id: str, number: int = 5) -> list[str]:
        """When a job is due next."""
        times: list[str] = (await self.get(_job_path(id, "/preview") + _query(n=number)))["next"]
        return times

    async def runs(
        self,
        id: str | None = None,
        *,
        limit: int = 100,
        before: int | None = None,
        states: Sequence[str] = (),
        origin: str | None = None,
    ) -> list[dict[str, Any]]:
        """The runs of a job, or of all, the newest first."""
        query = _query(limit=limit, before=before, state=",".join(states), origin=origin)
        answer = await self.get(("/v2/cron/runs" if id is None else _job_path(id, "/runs")) + query)
        runs: list[dict[str, Any]] = answer["runs"]
        return runs

    async def _order(self, id: str, what: str, order: dict[str, Any]) -> dict[str, Any]:
        return self._decoded(await self.post(_job_path(id, what), msgspec.json.encode(order)), dict[str, Any])

    # ------------------------------------------------------------------------------------------ any route

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at a path."""
        return self._decoded(await self._call(b"GET", path, b""), dict[str, Any])

    async def post(self, path: str, body: bytes) -> bytes:
        """The body that answers a body."""
        return await self._call(b"POST", path, body)

    def _decoded(self, body: bytes, kind: type[Decoded]) -> Decoded:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            message = f"what answers at {self.url} does not speak the Open Inference Protocol: {error}"
            raise errors.Unavailable(message) from error

    async def _call(self, method: bytes, path: str, body: bytes) -> bytes:
        head = b"%b %b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n"
        request = head % (method, (self._base + path).encode(), self._authority, self._credential, len(body)) + body
        connection = await self._connect()
        try:
            answer = await connection.exchange(request)
        except BaseException:
            connection.close()
            raise
        if connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        if answer.status >= 400:
            raise _error(answer)
        return answer.body

    async def _connect(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise errors.Unavailable(f"no server answers at {self.url}: {error}") from error
        return connection


def _model_path(model: str, rest: str = "") -> str:
    return f"/v2/models/{quote(model, safe='')}{rest}"


def _repository_path(model: str, rest: str) -> str:
    return f"/v2/repository/models/{quote(model, safe='')}{rest}"


def _job_path(id: str, rest: str = "") -> str:
    return f"/v2/cron/jobs/{quote(id, safe='')}{rest}"


def _query(**parameters: Any) -> str:
    given = {
        name: str(value).lower() if isinstance(value, bool) else value
        for name, value in parameters.items()
        if value not in (None, "")
    }
    return f"?{urlencode(given)}" if given else ""


def _error(answer: _Answer) -> errors.EngineError | errors.CronError:
    try:
        said = msgspec.json.decode(answer.body, type=_ErrorBody)
    except msgspec.DecodeError:
        said = _ErrorBody()
    message = said.error or f"the server answered with status {answer.status}"
    if said.code == errors.InvalidPackage.code:
        return errors.ModelLoadError(message)  # its faults are in its text
    if said.code == errors.InvalidJob.code:
        return errors.InvalidJob(said.faults or (message,))
    if said.code == errors.InvalidExpression.code:
        where = {"field": said.field, "token": said.token, "position": said.position}
        return errors.InvalidExpression(
            message.removesuffix(f"; {said.hint}"),
            text=said.text,
            hint=said.hint,
            **where,  # type: ignore[arg-type]
        )
    if (kind := _PLAIN_CRON_ERRORS.get(said.code)) is not None:
        return kind(message)
    return _ERRORS.get(said.code, errors.EngineError)(message, retry_after=said.retry_after)


class _Connection(asyncio.Protocol):
    """One connection: one request, then its answer, then perhaps the next. The httptools parser calls the
    `on_` methods."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._parser = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[_Answer] | None = None
        self._body: list[bytes] = []
        self.reusable = False

    async def exchange(self, request: bytes) -> _Answer:
        """Sends a request and waits for its answer. Raises `Unavailable` if the connection is lost first."""
        self._waiter = asyncio.get_running_loop().create_future()
        self._body = []
        self._transport.write(request)
        return await self._waiter

    def close(self) -> None:
        self.reusable = False
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.reusable = True

    def connection_lost(self, error: Exception | None) -> None:
        self.reusable = False
        self._fail(f"the server closed the connection: {error or 'no answer came'}")

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"the server's answer is not HTTP: {error}")
            self.close()

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(_Answer(self._parser.get_status_code(), b"".join(self._body)))

    def _fail(self, message: str) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(errors.Unavailable(message))


# ------------------------------------------------------------------------------------------------ inputs


def read_call(given: Any, metadata: Mapping[str, Any]) -> InferCall:
    """What a person wrote as a call: a whole request of the protocol, decoded from JSON, or else what `fit_inputs`
    takes. Raises `InvalidInput`."""
    inputs = given.get("inputs") if isinstance(given, Mapping) else None
    if isinstance(inputs, list) and inputs and all(isinstance(tensor, Mapping) for tensor in inputs):
        return decode_request(msgspec.json.encode(given))
    return InferCall(InferenceRequest(fit_inputs(given, metadata)))


def fit_inputs(given: Any, metadata: Mapping[str, Any]) -> dict[str, Array]:
    """What a person wrote as the inputs that a model's metadata describes: `{name: value}`, or one value for a
    model with one input, as arrays or nested lists. A value that lacks just a leading batch axis is one row.

    Raises `InvalidInput` for names that do not fit, and for values that the datatype or JSON cannot hold.
    """
    specs = {spec["name"]: spec for spec in metadata["inputs"]}
    if not isinstance(given, Mapping):
        if len(specs) != 1:
            raise errors.InvalidInput(f"one unnamed input came, expected {', '.join(specs)} by name")
        given = {next(iter(specs)): given}
    inputs = {}
    for name, value in given.items():
        if name not in specs:
            raise errors.InvalidInput(f"input {name!r} came, expected one of {', '.join(specs)}")
        datatype, shape = specs[name]["datatype"], specs[name]["shape"]
        array = _fit(name, value, datatype)
        lacks_batch_axis = shape[:1] == [-1] and array.ndim == len(shape) - 1
        inputs[name] = array[np.newaxis] if lacks_batch_axis else array
    return inputs


_FLOATS: Final = "fV"  # V is bfloat16, which numpy knows by way of ml_dtypes


def _fit(name: str, value: Any, datatype: str) -> Array:
    dtype = numpy_dtype_of(datatype)
    try:
        natural = np.asarray(value)
        if natural.dtype.kind in "cmM":  # numpy would drop what is imaginary, and count days
            raise TypeError(f"{natural.dtype.name} came")
        with np.errstate(over="raise"):
            array = np.asarray(value, dtype)
    except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
        raise errors.InvalidInput(f"input {name!r}: not convertible to {datatype}: {error}") from error
    if natural.size and (natural.dtype.kind in "US") != (dtype.kind == "O"):
        raise errors.InvalidInput(f"input {name!r}: not convertible to {datatype}: {natural.dtype.name} came")
    # numpy would cut 1.5 down to 1, and call it true.
    if dtype.kind in "iub" and not np.array_equal(natural, array):
        raise errors.InvalidInput(f"input {name!r}: values came that {datatype} cannot hold")
    if dtype.kind in _FLOATS and not np.isfinite(array).all():
        raise errors.InvalidInput(f"input {name!r}: NaN or infinity came, which JSON cannot carry")
    return array


def random_inputs(metadata: Mapping[str, Any], rows: int) -> dict[str, Array]:
    """Inputs of the shapes that a model's metadata describes, every open dimension with `rows`."""
    rng = np.random.default_rng(0)
    inputs = {}
    for spec in metadata["inputs"]:
        shape = [rows if size < 0 else size for size in spec["shape"]]
        dtype = numpy_dtype_of(spec["datatype"])
        if dtype.kind == "O":
            inputs[spec["name"]] = np.full(shape, "text", object)
        elif dtype.kind in _FLOATS:
            inputs[spec["name"]] = rng.random(shape).astype(dtype)
        else:
            inputs[spec["name"]] = rng.integers(0, 2, shape).astype(dtype)
    return inputs


# -------------------------------------------------------------------------------------------------- load


class LoadTally:
    """What callers saw: seconds by successful call, and errors by their code."""

    def __init__(self) -> None:
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()

    def percentile(self, percent: float) -> float | None:
        """Seconds; None without a successful call."""
        return float(np.percentile(self.latencies, percent)) if self.latencies else None

    def summary(self, seconds: float) -> dict[str, Any]:
        """Requests per second over `seconds`, p50 and p99 in seconds, errors by code."""
        return {
            "requests": len(self.latencies),
            "requests_per_second": len(self.latencies) / seconds,
            "p50": self.percentile(50),
            "p99": self.percentile(99),
            "errors": dict(self.errors),
        }

    async def measure(self, call: Callable[[], Awaitable[Any]], started: float | None = None) -> None:
        """One call, counted from `started` (`time.perf_counter()`, now if None)."""
        started = time.perf_counter() if started is None else started
        try:
            await call()
        except errors.EngineError as error:
            self.errors[error.code] += 1
        else:
            self.latencies.append(time.perf_counter() - started)


async def closed_loop(call: Callable[[], Awaitable[Any]], *, callers: int, seconds: float) -> LoadTally:
    """`callers` that each call again as soon as they have their answer, for `seconds`."""
    tally = LoadTally()
    end = time.perf_counter() + seconds

    async def caller() -> None:
        while time.perf_counter() < end:
            await tally.measure(call)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return tally
