"""Triton's own clients against the real server: HTTP and gRPC, blocking and asynchronous, and streams."""

from __future__ import annotations

import asyncio
import queue
import re
import signal
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc.aio
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.e2e.oip import DATATYPES, MIXED, OipServer, oip_serving, same_values
from tests.e2e.process import DIGITS, PATIENCE, serving

pytestmark = pytest.mark.slow

BRIEF = np.array([[1.5, -2], [3, 65536]], ml_dtypes.bfloat16)
KINDS = {
    "http": tritonclient.http,
    "http.aio": tritonclient.http.aio,
    "grpc": tritonclient.grpc,
    "grpc.aio": tritonclient.grpc.aio,
}


class Triton:
    """A client of one kind, as the others look. A blocking one has a thread of its own."""

    def __init__(self, kind: str, client: Any, thread: ThreadPoolExecutor) -> None:
        self.module: Any = KINDS[kind]
        self.is_grpc = kind.startswith("grpc")
        self._is_async = kind.endswith("aio")
        self._client = client
        self._thread = thread

    async def ask(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        call = partial(getattr(self._client, method), *arguments, **keywords)
        if self._is_async:
            return await call()
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    async def shown(self, method: str, *arguments: Any) -> Any:
        """What is described, as plain values."""
        return await self.ask(method, *arguments, **({"as_json": True} if self.is_grpc else {}))

    def inputs(self, arrays: dict[str, Any], datatypes: dict[str, str], **how: Any) -> list[Any]:
        made = []
        for name, array in arrays.items():
            made.append(self.module.InferInput(name, list(array.shape), datatypes[name]))
            made[-1].set_data_from_numpy(array, **how)
        return made

    def outputs(self, *names: str, **how: Any) -> list[Any]:
        return [self.module.InferRequestedOutput(name, **how) for name in names]


@asynccontextmanager
async def client_of(kind: str, server: OipServer) -> AsyncIterator[Triton]:
    with ThreadPoolExecutor(1) as thread:
        address = server.grpc if kind.startswith("grpc") else server.http
        make: Callable[[], Any] = partial(KINDS[kind].InferenceServerClient, address)
        loop = asyncio.get_running_loop()
        client = make() if kind.endswith("aio") else await loop.run_in_executor(thread, make)
        triton = Triton(kind, client, thread)
        try:
            yield triton
        finally:
            await triton.ask("close")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_is_answered(kind: str) -> None:
    async with oip_serving() as server, client_of(kind, server) as triton:
        assert await triton.ask("is_server_live")
        assert await triton.ask("is_server_ready")
        assert await triton.ask("is_model_ready", "mixed")
        assert not await triton.ask("is_model_ready", "nope")
        assert (await triton.shown("get_server_metadata"))["name"] == "kapsl-scheduler"
        metadata = await triton.shown("get_model_metadata", "mixed")
        assert {one["name"]: one["datatype"] for one in metadata["inputs"]} == DATATYPES
        config = await triton.shown("get_model_config", "count")
        config = config["config"] if triton.is_grpc else config
        assert config["model_transaction_policy"] == {"decoupled": True}
        index = await triton.shown("get_model_repository_index")
        listed = index["models"] if triton.is_grpc else index
        assert sorted(one["name"] for one in listed) == ["brief", "count", "mixed"]

        inputs = triton.inputs(MIXED, DATATYPES)
        answer = await triton.ask("infer", "mixed", inputs, request_id="7", priority=2, timeout=30_000_000)
        for name, array in MIXED.items():
            assert same_values(answer.as_numpy(f"{name}_out"), array)
        response = answer.get_response()
        assert (response.id if triton.is_grpc else response["id"]) == "7"

        brief = await triton.ask("infer", "brief", triton.inputs({"f": BRIEF}, {"f": "BF16"}))
        assert brief.as_numpy("f_out").tolist() == BRIEF.tolist()

        chosen = await triton.ask("infer", "mixed", inputs, outputs=triton.outputs("b_out", "x_out"))
        named = chosen.get_response().outputs if triton.is_grpc else chosen.get_response()["outputs"]
        assert [one.name if triton.is_grpc else one["name"] for one in named] == ["b_out", "x_out"]
        assert same_values(chosen.as_numpy("x_out"), MIXED["x"])

        statistics = await triton.shown("get_inference_statistics", "mixed")
        (figures,) = statistics["model_stats"]
        assert (figures["name"], int(figures["inference_count"])) == ("mixed", 4)
        assert int(figures["inference_stats"]["success"]["count"]) == 2
        assert await triton.shown("get_log_settings")
        assert await triton.shown("get_trace_settings", "mixed")


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_hears_what_is_wrong(kind: str) -> None:
    async with oip_serving() as server, client_of(kind, server) as triton:
        not_found, wrong = ("NOT_FOUND", "INVALID_ARGUMENT") if triton.is_grpc else ("404", "400")

        async def refused(
            model: str, arrays: dict[str, Any], datatypes: dict[str, str] = DATATYPES, **more: Any
        ) -> str:
            with pytest.raises(InferenceServerException) as raised:
                await triton.ask("infer", model, triton.inputs(arrays, datatypes), **more)
            return f"{raised.value.status()} {raised.value.message()}"

        missing = await refused("nope", MIXED)
        assert not_found in missing
        assert "model 'nope' is not loaded" in missing
        narrow = await refused("mixed", MIXED | {"x": MIXED["x"][:, :1]})
        assert wrong in narrow
        assert "input 'x'" in narrow
        halves = await refused("mixed", MIXED | {"x": BRIEF}, DATATYPES | {"x": "BF16"})
        assert wrong in halves
        assert "input 'x': dtype bfloat16, expected float32" in halves
        none = await refused("mixed", MIXED, outputs=triton.outputs("nope"))
        assert "output 'nope' was asked for" in none


@pytest.mark.parametrize("kind", ["http", "http.aio"])
async def test_a_client_may_ask_for_json_and_send_packed_bodies(kind: str) -> None:
    async with oip_serving() as server, client_of(kind, server) as triton:
        arrays = {name: MIXED[name] for name in ("x", "b")} | {"t": MIXED["t"]}
        inputs = triton.inputs(arrays, DATATYPES, binary_data=False)
        inputs += triton.inputs({"h": MIXED["h"]}, DATATYPES)
        outputs = triton.outputs("x_out", "t_out", binary_data=False)
        packing = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "deflate"}
        answer = await triton.ask("infer", "mixed", inputs, outputs=outputs, **packing)

        for name in ("x", "t"):
            assert same_values(answer.as_numpy(f"{name}_out"), MIXED[name])


@pytest.mark.parametrize("packing", [None, "gzip", "deflate"])
async def test_a_blocking_client_asks_without_waiting(packing: str | None) -> None:
    async with oip_serving() as server, client_of("grpc", server) as triton:
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()

        def heard(result: Any, error: Any) -> None:
            answers.put((result, error))

        for number in range(8):
            x = np.full((1, 2), number, np.float32)
            inputs = triton.inputs(MIXED | {"x": x} | {name: MIXED[name][:1] for name in ("t", "b", "h")}, DATATYPES)
            asked = {"request_id": str(number), "compression_algorithm": packing}
            await triton.ask("async_infer", "mixed", inputs, heard, **asked)
        for _ in range(8):
            result, error = await asyncio.to_thread(answers.get, True, PATIENCE)
            assert error is None
            assert result.as_numpy("x_out")[0, 0] == float(result.get_response().id)


NUMBER = {"n": "INT32"}


def seen(response: Any) -> tuple[str, bool, int]:
    return response.id, response.parameters["triton_final_response"].bool_param, len(response.outputs)


async def test_a_blocking_client_streams() -> None:
    async with oip_serving() as server, client_of("grpc", server) as triton:
        heard: list[tuple[Any, Any]] = []
        await triton.ask("start_stream", lambda result, error: heard.append((result, error)))
        for id, model, number in (("a", "count", 2), ("b", "nope", 1), ("c", "count", 0)):
            inputs = triton.inputs({"n": np.array([[number]], np.int32)}, NUMBER)
            more = {"request_id": id, "enable_empty_final_response": True}
            await triton.ask("async_stream_infer", model, inputs, **more)
        await triton.ask("stop_stream")

        got = [seen(result.get_response()) for result, error in heard if error is None]
        assert [one for one in got if one[0] == "a"] == [("a", False, 1), ("a", False, 1), ("a", True, 0)]
        assert [one for one in got if one[0] == "c"] == [("c", True, 0)]
        (error,) = [error for _, error in heard if error is not None]
        assert "model 'nope' is not loaded" in error.message()


async def test_an_asynchronous_client_streams() -> None:
    async with oip_serving() as server, client_of("grpc.aio", server) as triton:

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for number in (3, 1):
                inputs = triton.inputs({"n": np.array([[number]], np.int32)}, NUMBER)
                yield {"model_name": "count", "inputs": inputs, "request_id": str(number)}
            yield {"model_name": "mixed", "inputs": triton.inputs(MIXED, DATATYPES), "request_id": "m"}

        got: dict[str, list[Any]] = {}
        async for result, error in triton._client.stream_infer(requests()):
            assert error is None
            got.setdefault(result.get_response().id, []).append(result)

        assert [int(one.as_numpy("number").item()) for one in got["3"]] == [0, 1, 2]
        assert [int(one.as_numpy("number").item()) for one in got["1"]] == [0]
        (mixed,) = got["m"]
        assert seen(mixed.get_response()) == ("m", True, 4)


async def test_a_server_that_is_told_to_end_answers_streams_and_leaves() -> None:
    async with oip_serving() as server, client_of("grpc.aio", server) as triton:
        first, sent = asyncio.Event(), asyncio.Event()

        async def requests() -> AsyncIterator[dict[str, Any]]:
            yield {"model_name": "mixed", "inputs": triton.inputs(MIXED, DATATYPES), "request_id": "1"}
            await first.wait()
            server.send(signal.SIGTERM)
            await sent.wait()

        got = []

        async def read_all() -> None:
            async for result, _ in triton._client.stream_infer(requests()):
                got.append(result.get_response().id)
                first.set()

        with pytest.raises(grpc.aio.AioRpcError, match="the server is closing"):
            await read_all()
        sent.set()
        assert got == ["1"]
        assert await server.end() == (0, "")


async def test_the_page_about_grpc_has_a_program_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "grpc.md").read_text("utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    async with serving(f"digits={DIGITS}", "--no-cron", "--no-socket") as server:
        address = (await server.line()).split()[-1]
        names: dict[str, Any] = {}
        await asyncio.to_thread(exec, program.replace("127.0.0.1:8001", address), names)
        names["client"].close()
    assert len(capsys.readouterr().out.split()) >= 10
