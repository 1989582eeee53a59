"""The original's own client against the real server, over both kinds of sockets."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import PATIENCE, Process, run, serving, until

pytestmark = pytest.mark.slow
pytest.importorskip("kapsl_sdk")

PIXELS = np.linspace(0, 16, 64, dtype=np.float32).reshape(1, 64)
DIGIT = [[1, 64], "fp32", PIXELS.tobytes().hex()]


class KapslClient:
    """The client's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def send(self, method: str, *arguments: Any, **keywords: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([method, arguments, keywords]).encode() + b"\n")

    async def answer(self) -> Any:
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
        return json.loads(line)

    async def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        self.send(method, *arguments, **keywords)
        said = await self.answer()
        assert "error" not in said, said
        return said["answer"]

    async def error(self, method: str, *arguments: Any, **keywords: Any) -> str:
        self.send(method, *arguments, **keywords)
        said = await self.answer()
        assert said.get("type") == "RuntimeError", said
        text: str = said["error"]
        return text


@asynccontextmanager
async def client_of(endpoint: str, **keywords: Any) -> AsyncIterator[KapslClient]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.e2e.kapsl_client", json.dumps({"endpoint": endpoint, **keywords})),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        yield KapslClient(process)
    finally:
        process.kill()
        await process.communicate()


async def endpoints(server: Process) -> list[str]:
    """What the server says of its sockets, in its second line."""
    line = await server.line()
    assert line.startswith("for Kapsl clients on ")
    return line.removeprefix("for Kapsl clients on ").strip().split(", ")


@pytest.mark.parametrize("kind", ["unix", "tcp"])
async def test_the_client_is_answered(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "k.sock"
    arguments = ("--socket", path) if kind == "unix" else ("--no-socket", "--socket-port", "0")
    async with serving(PACKAGE, "--store", "memory", "--max-body-bytes", "10000", *arguments) as server:
        (endpoint,) = await endpoints(server)
        assert endpoint.startswith(f"{kind}://")
        async with client_of(endpoint) as kapsl, Client(server.url) as other:
            expected = (await other.infer("digits", {"pixels": PIXELS})).outputs["probabilities"]

            answer = await kapsl.call("infer", 0, *DIGIT)
            assert np.frombuffer(bytes.fromhex(answer), "<f4") == pytest.approx(expected[0], abs=1e-5)
            assert await kapsl.call("infer_tensor", 0, *DIGIT, session_id="s") == [answer, [1, 10], "float32"]
            assert await kapsl.call("stream", 0, *DIGIT) == [answer]

            assert await kapsl.error("infer", 7, *DIGIT) == "Model 7 not found"
            assert await kapsl.error("stream", 7, *DIGIT) == "Model 7 not found"
            wrong = "Invalid input: input: expected 256 bytes for float32 [1, 64], got 1"
            assert await kapsl.error("infer", 0, [1, 64], "fp32", "00") == wrong
            assert await kapsl.error("stream", 0, [1, 64], "fp32", "00") == wrong
            assert (await kapsl.error("infer", 0, *DIGIT, others={"z": [[1], "uint8", "00"]})).startswith(
                "Invalid input: input 'z' is not one of the model's"
            )
            large = await kapsl.error("infer", 0, [5000], "float32", bytes(20_000).hex())
            assert large.startswith("Resource exhausted: ")
            assert await kapsl.call("infer", 0, *DIGIT) == answer  # on the same connection

            answers = (await other.stats("digits"))["answers"]
            assert answers["200"] == 5
        server.send(signal.SIGTERM)
        assert await server.end() == (0, "")
    assert not path.exists()


async def test_streams_of_text_inputs_by_name_and_streams_that_end_early(tmp_path: Path) -> None:
    path = tmp_path / "k.sock"
    async with child(path) as server, client_of(f"unix://{path}") as kapsl, Client(server.url) as other:
        prompt = [[1, 1], "string", b"once again".hex()]
        three = {"max_tokens": [[1], "int32", "03000000"]}
        chunks = await kapsl.call("stream", 0, *prompt, others=three)
        assert [bytes.fromhex(chunk) for chunk in chunks] == [b"again0 ", b"again1 ", b"again2 "]
        assert await kapsl.error("stream", 0, [1, 1], "string", b"never".hex()) == "Inference error: the words are gone"

        assert len(await kapsl.call("stream", 0, *prompt, take=2)) == 2  # of a million

        async def is_taken_back() -> bool:
            counted: dict[str, int] = (await other.stats("words"))["answers"]
            return counted == {"200": 1, "499": 1, "500": 1}

        await until(is_taken_back)
        one, ten = (np.array([[n, n]], "<i8").tobytes().hex() for n in (1, 10))
        total = await kapsl.call("infer_tensor", 1, [1, 2], "i64", one, others={"b": [[1, 2], "int64", ten]})
        assert total == [np.array([[11, 11]], "<i8").tobytes().hex(), [1, 2], "int64"]
        missing = await kapsl.error("infer", 1, [1, 2], "i64", one)
        assert missing.startswith("Invalid input: input 'b' is missing")


async def test_many_clients_at_once_each_get_their_own_answers(tmp_path: Path) -> None:
    path = tmp_path / "k.sock"
    async with child(path):

        async def ask(number: int) -> None:
            async with client_of(f"unix://{path}") as kapsl:
                for turn in range(20):
                    mine = np.array([[number, turn]], "<i8").tobytes().hex()
                    total = await kapsl.call("infer", 1, [1, 2], "i64", mine, others={"b": [[1, 2], "int64", mine]})
                    assert np.frombuffer(bytes.fromhex(total), "<i8").tolist() == [2 * number, 2 * turn]

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(ask(number))


async def test_a_token_is_asked_for(tmp_path: Path) -> None:
    path, tokens = tmp_path / "k.sock", tmp_path / "tokens"
    code, text, _ = await run("token", "new", "--name", "ann", "--role", "reader", "--file", tokens)
    assert code == 0
    async with serving(PACKAGE, "--store", "memory", "--socket", path, "--tokens", tokens) as server:
        async with client_of(f"unix://{path}") as stranger, client_of(f"unix://{path}", api_token=text.strip()) as ann:
            assert await stranger.error("infer", 0, *DIGIT) == "Unauthorized"
            assert await stranger.error("stream", 0, *DIGIT) == "Unauthorized"
            assert len(await ann.call("infer", 0, *DIGIT)) == 80
            assert len(await ann.call("stream", 0, *DIGIT)) == 1
        mine = {"authorization": f"Bearer {text.strip()}"}
        async with httpx.AsyncClient(base_url=server.url) as http:
            assert (await http.get("/api/health")).status_code == 200
            assert (await http.get("/api/models")).status_code == 401
            assert (await http.get("/api/models", headers=mine)).json()[0]["name"] == "digits"
            infer = {"input": {"shape": [1, 64], "dtype": "float32", "data": list(PIXELS.tobytes())}}
            assert (await http.post("/api/models/0/infer", headers=mine, json=infer)).status_code == 200
            assert (await http.post("/api/models/0/stop", headers=mine)).status_code == 403


async def test_clients_go_on_with_the_server_that_comes_after(tmp_path: Path) -> None:
    path = tmp_path / "k.sock"
    arguments = (PACKAGE, "--store", "memory", "--socket", path)
    async with client_of(f"unix://{path}") as kapsl:
        async with serving(*arguments) as server:
            first = await kapsl.call("infer", 0, *DIGIT)
            os.kill(server.pid, signal.SIGKILL)
            await server.end()
        assert path.is_socket()  # left behind
        async with serving(*arguments) as server:
            assert await kapsl.call("infer", 0, *DIGIT) == first  # by a connection that it makes anew
            server.send(signal.SIGTERM)
            assert await server.end() == (0, "")
        assert not path.exists()
        kapsl.send("infer", 0, *DIGIT)
        assert (await kapsl.answer())["type"] == "ConnectionError"


async def test_one_server_has_the_socket_and_another_does_without_or_says_that_it_cannot(tmp_path: Path) -> None:
    path = tmp_path / "kapsl.sock"  # in the directory that these processes have for such things
    async with serving(PACKAGE, "--store", "memory") as first:
        assert await endpoints(first) == [f"unix://{path}"]
        async with serving(PACKAGE, "--store", "memory") as second, Client(second.url) as other:
            assert [model["name"] for model in await other.models()] == ["digits"]
            second.send(signal.SIGTERM)
            code, said = await second.end()
        assert code == 0
        assert f"no Kapsl socket: cannot listen on {path}: another server listens there; --socket PATH" in said
        code, _, said = await run("serve", PACKAGE, "--port", "0", "--store", "memory", "--socket", path)
        assert (code, said) == (1, f"Error: cannot listen on {path}: another server listens there\n")
        async with client_of(f"unix://{path}") as kapsl:
            assert len(await kapsl.call("infer", 0, *DIGIT)) == 80


@asynccontextmanager
async def child(path: Path) -> AsyncIterator[Process]:
    """The server of a program's own models."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(Path(__file__).with_name("kapsl_child.py")), str(path)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            server = Process(process, (await process.stdout.readline()).decode())
        yield server
        server.send(signal.SIGTERM)
        code, said = await server.end()
        assert code == 0
        assert "Traceback" not in said
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
