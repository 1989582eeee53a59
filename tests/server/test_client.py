"""The client against servers that misbehave, and what it makes of inputs that people write."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from kapsl_scheduler.client import Client, LoadTally, closed_loop, fit_inputs, random_inputs, read_call
from kapsl_scheduler.errors import (
    CronError,
    DuplicateId,
    EngineError,
    InvalidExpression,
    InvalidInput,
    InvalidJob,
    ModelNotLoaded,
    NotFound,
    Overloaded,
    StoreError,
    Unavailable,
)
from kapsl_scheduler.types import Priority

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Peer:
    """Answers each request with the next of `answers`, byte by byte as given; empty bytes close the connection."""

    def __init__(self, answers: list[bytes]) -> None:
        self.answers = answers
        self.requests: list[bytes] = []
        self.connections = 0
        self.asked = asyncio.Event()
        self.closed = asyncio.Event()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while self.answers:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
                self.requests.append(head + await reader.readexactly(length))
                self.asked.set()
                answer = self.answers.pop(0)
                if not answer:
                    break
                writer.write(answer)
            else:
                await reader.read()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()
            self.closed.set()


@asynccontextmanager
async def talking_to(*answers: bytes) -> AsyncIterator[tuple[Client, Peer]]:
    peer = Peer(list(answers))
    server = await asyncio.start_server(peer, "127.0.0.1", 0)
    try:
        async with server, Client(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
            yield client, peer
    finally:
        if peer.connections:
            await peer.closed.wait()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def test_a_connection_is_used_again() -> None:
    async with talking_to(answer(b'{"a":1}'), answer(b'{"a":2}')) as (client, peer):
        assert [await client.get("/1"), await client.get("/2")] == [{"a": 1}, {"a": 2}]

    assert peer.connections == 1
    assert peer.requests[1].startswith(b"GET /2 HTTP/1.1\r\nhost: 127.0.0.1:")


async def test_a_connection_that_the_server_will_close_is_closed_and_not_used_again() -> None:
    async with talking_to(answer(b"{}", "200 OK", "connection: close"), answer(b"{}")) as (client, peer):
        await client.get("/")
        async with asyncio.timeout(5.0):
            await peer.closed.wait()  # though this server waits for the client to do it
        await client.get("/")

    assert peer.connections == 2


async def test_names_are_escaped_in_paths() -> None:
    async with talking_to(answer(b"{}")) as (client, peer):
        await client.metadata("a b/c")

    assert peer.requests[0].startswith(b"GET /v2/models/a%20b%2Fc HTTP/1.1\r\n")


async def test_an_error_keeps_its_type_and_its_time() -> None:
    said = b'{"error":"full","code":"overloaded","retry_after":0.25}'
    async with talking_to(answer(said, "429 Too Many Requests")) as (client, _):
        with pytest.raises(Overloaded, match="full") as raised:
            await client.get("/")

    assert raised.value.retry_after == 0.25


@pytest.mark.parametrize("body", [b"oh no", b'{"error": 1}', b""])
async def test_an_error_of_another_kind_of_server_is_an_engine_error(body: bytes) -> None:
    async with talking_to(answer(body, "502 Bad Gateway")) as (client, _):
        with pytest.raises(EngineError, match="status 502"):
            await client.get("/")


@pytest.mark.parametrize("reply", [b"", b"SMTP ready\r\n"])
async def test_a_server_that_hangs_up_or_speaks_something_else_is_unavailable(reply: bytes) -> None:
    async with talking_to(reply) as (client, _):
        with pytest.raises(Unavailable):
            await client.get("/")


@pytest.mark.parametrize("body", [b"<html>", b"", b"\xff", b"3", b'["a"]'])
async def test_a_server_of_another_kind_is_named_as_such(body: bytes) -> None:
    async with talking_to(answer(body), answer(body), answer(body)) as (client, _):
        for asked in (client.models(), client.metadata("m"), client.load("m")):
            with pytest.raises(Unavailable, match=r"at http://127.* does not speak the Open Inference Protocol"):
                await asked


async def test_no_server_is_unavailable() -> None:
    async with talking_to() as (client, _):
        pass
    with pytest.raises(Unavailable, match="no server answers"):
        await client.get("/")


async def test_a_cancelled_call_closes_its_connection() -> None:
    async with talking_to(b"HTTP/1.1 200 OK\r\n", b"unused") as (client, peer):
        call = asyncio.create_task(client.get("/"))
        await peer.asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await peer.closed.wait()


@pytest.mark.parametrize("base", ["/models", "/models/", "models a"])
async def test_a_server_may_be_behind_a_path(base: str) -> None:
    async with talking_to(answer(b"{}")) as (client, peer):
        behind = Client(f"{client.url}/{base.lstrip('/')}")
        await behind.metadata("m")
        behind.close()

    path = peer.requests[0].split(b" ")[1]
    assert path == f"/{base.strip('/').replace(' ', '%20')}/v2/models/m".encode()


@pytest.mark.parametrize(
    "url",
    [
        *("ftp://host", "http://", "", "http://host:99999", "http://host:port", "http://[::1"),
        *("http://user:secret@host", "http://host/?model=m"),
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidInput, match="no server address"):
        Client(url)


async def test_a_closed_loop_counts_answers_and_errors() -> None:
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        fails = calls % 2
        await asyncio.sleep(0)
        if fails:
            raise ModelNotLoaded("gone")

    tally = await closed_loop(call, callers=3, seconds=0.01)

    assert len(tally.latencies) + tally.errors["model_not_loaded"] == calls
    assert abs(len(tally.latencies) - tally.errors["model_not_loaded"]) <= 1


def test_a_summary_of_nothing_has_no_percentiles() -> None:
    assert LoadTally().summary(2.0) == {
        "requests": 0,
        "requests_per_second": 0.0,
        "p50": None,
        "p99": None,
        "errors": {},
    }


# ---------------------------------------------------------------------------------------------- inputs

ONE = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}]}
TWO = {
    "inputs": [
        {"name": "text", "datatype": "BYTES", "shape": [-1, 1]},
        {"name": "rate", "datatype": "INT64", "shape": []},
    ]
}


@pytest.mark.parametrize("given", [[1, 2], [[1, 2]], {"x": [1, 2]}, {"x": np.array([[1, 2]], np.float64)}])
def test_inputs_are_fitted_to_the_model(given: Any) -> None:
    x = fit_inputs(given, ONE)["x"]

    assert x.dtype == np.float32
    assert x.tolist() == [[1, 2]]


def test_several_inputs_go_by_name() -> None:
    inputs = fit_inputs({"text": ["a"], "rate": 8}, TWO)

    assert inputs["text"].tolist() == [["a"]]
    assert (inputs["rate"].dtype, inputs["rate"].shape) == (np.int64, ())
    with pytest.raises(InvalidInput, match="expected text, rate by name"):
        fit_inputs([1], TWO)


def inputs_of(datatype: str) -> dict[str, Any]:
    return {"inputs": [{"name": "x", "datatype": datatype, "shape": [-1]}]}


@pytest.mark.parametrize(
    ("datatype", "given", "said"),
    [
        ("FP32", {"y": 1}, "'y' came, expected one of x"),
        ("FP32", ["a"], "'x': not convertible to FP32"),
        ("FP32", ["1.5"], "'x': not convertible to FP32: str"),
        ("FP32", [[1], [1, 2]], "'x'"),
        ("FP32", [1e39], "'x': not convertible to FP32"),
        ("FP16", [1.0, None], "'x': NaN or infinity came"),
        ("FP64", np.array([np.nan]), "'x': NaN or infinity came"),
        ("INT64", [1, 1.5], "'x': values came that INT64 cannot hold"),
        ("UINT8", np.array([1, 256]), "'x': values came that UINT8 cannot hold"),
        ("BOOL", [0.5], "'x': values came that BOOL cannot hold"),
        ("BOOL", ["false"], "'x': not convertible to BOOL: str"),
        ("BYTES", [1], "'x': not convertible to BYTES: int64 came"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(datatype: str, given: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        fit_inputs(given, inputs_of(datatype))


@pytest.mark.parametrize(
    ("datatype", "given"),
    [
        *(("BOOL", [0, 1, True]), ("INT8", [-128, 127]), ("INT64", [1.0, -(2.0**60)]), ("UINT64", [1, 2**64 - 1])),
        *(("FP16", [1, 2.5]), ("FP32", [2**70]), ("BYTES", ["a", "ä"]), ("BYTES", []), ("FP32", [])),
    ],
)
def test_values_that_the_datatype_can_hold_stay_what_they_are(datatype: str, given: list[Any]) -> None:
    assert fit_inputs(given, inputs_of(datatype))["x"].tolist() == given


def test_a_whole_request_keeps_what_it_says() -> None:
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    parameters = {"priority": 2, "timeout": 500_000}

    call = read_call({"id": "7", "inputs": [tensor], "outputs": [{"name": "y"}], "parameters": parameters}, ONE)

    assert (call.id, call.priority, call.timeout, call.outputs) == ("7", Priority.THROUGHPUT, 0.5, ("y",))
    assert call.request.inputs["x"].tolist() == [[1, 2]]
    with pytest.raises(InvalidInput, match="'x': data has 1 elements"):
        read_call({"inputs": [tensor | {"data": [1]}]}, ONE)


def test_an_input_may_be_called_inputs() -> None:
    metadata = {"inputs": [{"name": "inputs", "datatype": "FP32", "shape": [-1, 2]}]}

    assert read_call({"inputs": [[1, 2]]}, metadata).request.inputs["inputs"].tolist() == [[1, 2]]
    assert read_call([1, 2], metadata).request.inputs["inputs"].tolist() == [[1, 2]]


def test_random_inputs_have_the_shapes_of_the_model() -> None:
    assert random_inputs(ONE, 3)["x"].shape == (3, 2)
    assert random_inputs(TWO, 3)["text"].tolist() == [["text"]] * 3
    assert random_inputs(TWO, 3)["rate"].shape == ()


# -------------------------------------------------------------------------------------------------- jobs


def refusal(code: str, **details: object) -> bytes:
    return answer(msgspec.json.encode({"error": "it is so", "code": code, **details}), "400 Bad Request")


@pytest.mark.parametrize(
    ("code", "kind"),
    [("not_found", NotFound), ("duplicate_id", DuplicateId), ("store_error", StoreError), ("cron_error", CronError)],
)
async def test_errors_of_jobs_have_their_types(code: str, kind: type[CronError]) -> None:
    async with talking_to(refusal(code)) as (client, _):
        with pytest.raises(kind, match=r"^it is so$") as raised:
            await client.job("a")

    assert type(raised.value) is kind


async def test_faults_of_a_job_and_the_place_of_a_wrong_token_come_whole() -> None:
    place = {"text": "0 61 * * * *", "field": "minute", "token": "61", "position": 2, "hint": "so"}
    async with talking_to(
        refusal("invalid_job", faults=["a: x", "b: y"]), refusal("invalid_job"), refusal("invalid_expression", **place)
    ) as (client, _):
        with pytest.raises(InvalidJob) as job:
            await client.put_job("a", b"{}")
        with pytest.raises(InvalidJob) as bare:
            await client.put_job("a", b"{}")
        with pytest.raises(InvalidExpression) as expression:
            await client.put_job("a", b"{}")

    assert (job.value.faults, bare.value.faults) == (("a: x", "b: y"), ("it is so",))
    assert {key: getattr(expression.value, key) for key in place} == place
    assert str(expression.value) == "it is so; so"


async def test_jobs_are_gathered_page_by_page_and_ids_are_encoded() -> None:
    pages = [{"jobs": [{"id": "a"}, {"id": "b:c"}], "next": "b:c"}, {"jobs": [{"id": "d"}], "next": None}]
    answers = [answer(msgspec.json.encode(page)) for page in pages]
    async with talking_to(*answers, answer(b"{}"), answer(b"{}")) as (client, peer):
        assert [job["id"] for job in await client.jobs()] == ["a", "b:c", "d"]
        await client.job("a/b:c d")
        await client.remove_job("x", cancel=True)

    heads = [request.split(b" HTTP")[0] for request in peer.requests]
    assert heads == [
        b"GET /v2/cron/jobs?limit=1000",
        b"GET /v2/cron/jobs?limit=1000&after=b%3Ac",
        b"GET /v2/cron/jobs/a%2Fb%3Ac%20d",
        b"DELETE /v2/cron/jobs/x?cancel=true",
    ]
