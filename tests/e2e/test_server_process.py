"""The real process over real sockets: what clients see, and how it ends."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.errors import (
    DeadlineExceeded,
    InvalidInput,
    ModelLoadError,
    ModelNotLoaded,
    Overloaded,
    ResourceExhausted,
    Unavailable,
)
from kapsl_scheduler.packages import build_package
from kapsl_scheduler.server.oip_json import InferReply
from kapsl_scheduler.types import Priority
from tests.e2e.process import DIGITS, FOREVER, PATIENCE, build_working_model, counted, serving, start, until, work

pytestmark = pytest.mark.slow

LONG = 1600  # turns of the working model: some tenths of a second on an idle machine; no test counts on it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_working_model(tmp_path_factory.mktemp("model") / "work.onnx")


@asynccontextmanager
async def busy(client: Client) -> AsyncIterator[asyncio.Task[InferReply]]:
    """One call of the working model that is being made, and goes on for as long as the server lives."""
    running = asyncio.create_task(client.infer("work", work(1, FOREVER)))
    try:
        await until(counted(client, "calls_in_flight", 1))
        yield running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_several_models_are_served_under_their_names(model: Path) -> None:
    async with serving(model, f"other={DIGITS}") as server, Client(server.url) as client:
        assert server.first_line.startswith("listening on http://127.0.0.1:")
        assert server.first_line.endswith(" with other, work\n")

        reply = await client.infer("work", work(3.5, turns=1), priority=Priority.THROUGHPUT, timeout=10.0, id="7")
        digits = await client.infer("other", {"pixels": np.zeros((2, 64), np.float32)})

        assert (reply.model_name, reply.id, reply.outputs["y"].tolist()) == ("work", "7", [[3.5]])
        assert digits.outputs["probabilities"].shape == (2, 10)
        assert [entry["name"] for entry in await client.models()] == ["other", "work"]
        classes = (await client.stats("work"))["scheduler"]["classes"]
        assert (classes["throughput"]["succeeded"], classes["latency_critical"]["succeeded"]) == (1, 0)


async def test_a_model_is_replaced_while_requests_come_and_none_fails(model: Path, tmp_path: Path) -> None:
    package = build_package(model, tmp_path / "work.aimod", version="1")
    async with serving(package) as server, Client(server.url) as client:
        answers = []

        async def caller() -> None:
            while not answers or answers[-1].model_version == "1":
                answers.append(await client.infer("work", work(len(answers), turns=1)))

        async with asyncio.TaskGroup() as group:
            long = group.create_task(client.infer("work", work(5, LONG)))
            await until(counted(client, "calls_in_flight", 1))
            group.create_task(caller())
            build_package(model, package, version="2")
            loaded = await client.load("work")

            assert (loaded["version"], loaded["state"]) == ("2", "READY")
            assert ((await long).model_version, (await long).outputs["y"].item()) == ("1", 5)

        assert [answer.outputs["y"].item() for answer in answers] == list(range(len(answers)))
        package.write_bytes(b"no archive")
        with pytest.raises(ModelLoadError, match="not a readable"):
            await client.load("work")
        assert (await client.infer("work", work(1, turns=1))).model_version == "2"


async def test_a_signal_lets_the_requests_of_a_replaced_model_end(model: Path, tmp_path: Path) -> None:
    package = build_package(model, tmp_path / "work.aimod", version="1")
    async with serving(package, "--drain", "600") as server, Client(server.url) as client:
        long = asyncio.create_task(client.infer("work", work(5, LONG * 2)))
        await until(counted(client, "calls_in_flight", 1))
        loading = asyncio.create_task(client.load("work"))

        async def is_replaced() -> bool:
            return (await client.stats("work"))["scheduler"]["admitted"] == 0

        await until(is_replaced)
        server.send(signal.SIGTERM)

        assert (await long).outputs["y"].item() == 5
        assert (await loading)["state"] in ("READY", "UNAVAILABLE")
        assert await server.end() == (0, "")


async def test_errors_keep_their_types_and_the_connection(model: Path) -> None:
    async with serving(model, "--max-body-bytes", "2000") as server, Client(server.url) as client:
        with pytest.raises(InvalidInput, match="'x'"):
            await client.infer("work", {"x": np.zeros((1, 1), np.float64), "turns": np.array(1)})
        with pytest.raises(ModelNotLoaded, match="loaded: 'work'"):
            await client.infer("nope", {})
        with pytest.raises(ResourceExhausted, match="2000"):
            await client.infer("work", {"x": np.zeros((5000, 1), np.float32), "turns": np.array(1)})
        with pytest.raises(DeadlineExceeded):
            await client.infer("work", work(1, turns=LONG), timeout=0.001)

        assert (await client.infer("work", work(1, turns=1))).outputs["y"].tolist() == [[1]]


async def test_a_body_that_grows_too_large_is_cut_off(model: Path) -> None:
    async with serving(model, "--max-body-bytes", "20000") as server:
        host, port = urlsplit(server.url).netloc.split(":")
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(b"POST /v2/models/work/infer HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            writer.write(b"%x\r\n%b\r\n" % (10_000, b" " * 10_000))
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()

    assert head.startswith(b"HTTP/1.1 413 ")
    assert b"content-type: application/json\r\n" in head


async def test_an_independent_client_gets_json_and_plain_statuses(model: Path) -> None:
    async with serving(model) as server, httpx.AsyncClient(base_url=server.url) as client:
        body = b'{"inputs":[{"name":"x","shape":[1,1],"datatype":"FP32","data":[2]},' + (
            b'{"name":"turns","shape":[],"datatype":"INT64","data":[1]}]}'
        )
        answers = [
            await client.post("/v2/models/work/infer", content=body),
            await client.post("/v2/models/work/infer", content=b"{"),
            await client.get("/v2/health/ready"),
            await client.get("/nowhere"),
        ]

    assert [answer.status_code for answer in answers] == [200, 400, 200, 404]
    assert {answer.headers["content-type"] for answer in answers} == {"application/json"}
    assert answers[0].json()["outputs"][0]["data"] == [2.0]
    assert answers[2].json() == {"ready": True}


async def test_a_full_queue_refuses_with_429(model: Path) -> None:
    async with serving(model, "--max-queue-size", "1") as server, Client(server.url) as client, busy(client):
        queued = asyncio.create_task(client.infer("work", work(2, turns=1)))
        await until(counted(client, "queued", 1))

        with pytest.raises(Overloaded) as raised:
            await client.infer("work", work(3, turns=1))

        assert raised.value.retry_after is not None
        assert not queued.done()
        queued.cancel()


async def test_a_client_that_goes_away_cancels_its_queued_request(model: Path) -> None:
    async with serving(model) as server, Client(server.url) as client, busy(client) as running:
        leaving = asyncio.create_task(client.infer("work", work(2, turns=2)))
        await until(counted(client, "queued", 1))

        leaving.cancel()

        await until(counted(client, "cancelled", 1))
        stats = await client.stats("work")
        assert [stats["scheduler"][count] for count in ("queued", "running", "calls_in_flight")] == [0, 1, 1]
        assert stats["answers"]["499"] == 1
        assert not running.done()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_requests_in_flight_end(model: Path, number: signal.Signals) -> None:
    async with serving(model, "--drain", "600") as server, Client(server.url) as client:
        requests = [asyncio.create_task(client.infer("work", work(x, LONG + x))) for x in range(3)]
        await until(counted(client, "admitted", 3))

        server.send(number)

        answers = await asyncio.gather(*requests)
        assert [answer.outputs["y"].item() for answer in answers] == [0, 1, 2]
        assert await server.end() == (0, "")
        with pytest.raises(Unavailable):
            await client.models()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_while_models_load_ends_the_process_and_leaves_no_files(
    tmp_path: Path, number: signal.Signals
) -> None:
    temporary, slow = tmp_path / "temporary", tmp_path / "slow.aimod"
    temporary.mkdir()
    os.mkfifo(slow)  # a package that takes as long to read as the test wants
    process = await start("serve", "--port", "0", PACKAGE, f"slow={slow}", TMPDIR=str(temporary))
    async with asyncio.timeout(PATIENCE):
        writer = await asyncio.to_thread(slow.open, "wb")
        assert len(list(temporary.glob("kapsl-*/digits-*"))) == 1

        process.send_signal(number)
        with writer:
            await asyncio.to_thread(writer.write, PACKAGE.read_bytes())
        stdout, stderr = await process.communicate()

    assert (process.returncode, stdout, stderr) == (0, b"", b"")
    assert list(temporary.iterdir()) == []


async def test_beyond_the_requests_in_flight_there_is_429_and_health_is_answered(model: Path) -> None:
    async with serving(model, "--max-in-flight", "1") as server, Client(server.url) as client, busy(client) as running:
        with pytest.raises(Overloaded, match="1 inference request"):
            await client.infer("work", work(2, turns=1))
        assert await client.get("/v2/health/ready") == {"ready": True}
        assert not running.done()


async def test_who_is_not_done_when_the_drain_is_over_is_told_so(model: Path) -> None:
    async with serving(model, "--drain", "0.1") as server, Client(server.url) as client, busy(client) as running:
        queued = [asyncio.create_task(client.infer("work", work(2, turns=1))) for _ in range(3)]
        await until(counted(client, "queued", 3))

        server.send(signal.SIGTERM)

        for outcome in await asyncio.gather(running, *queued, return_exceptions=True):
            assert isinstance(outcome, Unavailable)
            assert "closed" in str(outcome)
        assert (await server.end())[0] == 0


async def test_a_second_signal_ends_the_process_at_once(model: Path) -> None:
    async with serving(model, "--drain", "600") as server, Client(server.url) as client, busy(client) as running:
        host, port = urlsplit(server.url).netloc.split(":")

        async def refuses() -> bool:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                return True
            writer.close()
            return False

        server.send(signal.SIGTERM)
        await until(refuses)
        server.send(signal.SIGTERM)

        with pytest.raises(Unavailable):
            await running
        assert await server.end() == (-signal.SIGTERM, "")
