"""The real server as a process, and a model that takes as long as its caller asks for."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kapsl_scheduler.client import Client

PATIENCE = 30.0  # seconds; only a failure waits this long
DIGITS = Path(__file__).parents[2] / "models" / "digits" / "digits.onnx"
SIDE = 256
FOREVER = 10**9  # turns of the working model: a day


def build_working_model(path: Path) -> Path:
    """`y = x` after `turns` products of two 256 x 256 matrices, about a millisecond each.

    The open width keeps its calls off the event loop's thread: their time is not bounded by their shapes.
    """
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state_in", "identity"], ["state_out"]),
            helper.make_node("Identity", ["condition_in"], ["condition_out"]),
        ],
        "turn",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("condition_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_in", TensorProto.FLOAT, [SIDE, SIDE]),
        ],
        [
            helper.make_tensor_value_info("condition_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, [SIDE, SIDE]),
        ],
    )
    identity = np.eye(SIDE, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Loop", ["turns", "", "identity"], ["state"], body=body),
            helper.make_node("ReduceMax", ["state"], ["one"], keepdims=0),
            helper.make_node("Mul", ["x", "one"], ["y"]),
        ],
        "work",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "width"]),
            helper.make_tensor_value_info("turns", TensorProto.INT64, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "width"])],
        [numpy_helper.from_array(identity, "identity")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def work(x: float, turns: int) -> dict[str, Any]:
    """Inputs of the working model: one row."""
    return {"x": np.array([[x]], np.float32), "turns": np.array(turns)}


class Process:
    """A `kapsl_scheduler` process, what it printed first, and what else by its end."""

    def __init__(self, process: asyncio.subprocess.Process, first_line: str) -> None:
        self.first_line = first_line
        self.last_lines = ""
        self._process = process

    @property
    def url(self) -> str:
        return self.first_line.split()[2]

    @property
    def pid(self) -> int:
        return self._process.pid

    async def line(self) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            return (await self._process.stdout.readline()).decode()

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def end(self) -> tuple[int, str]:
        """Waits for the end: the exit code and what was written to stderr."""
        async with asyncio.timeout(PATIENCE):
            stdout, stderr = await self._process.communicate()
        assert self._process.returncode is not None
        self.last_lines = stdout.decode()
        return self._process.returncode, stderr.decode()


ALSO: dict[str, str] = {}
"""What every process finds in its environment besides."""


async def start(*arguments: str | Path, **environment: str) -> asyncio.subprocess.Process:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("KAPSL_")} | ALSO
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "kapsl_scheduler"),
        *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=inherited | environment,
    )


async def run(*arguments: str | Path, **environment: str) -> tuple[int, str, str]:
    """Runs a command to its end: exit code, stdout, stderr."""
    process = await start(*arguments, **environment)
    async with asyncio.timeout(PATIENCE):
        stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


@asynccontextmanager
async def serving(*arguments: str | Path) -> AsyncIterator[Process]:
    """`serve` on a port of its own, ready once it has said so. Killed at the end if it is still there."""
    process = await start("serve", "--port", "0", *arguments)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            first_line = (await process.stdout.readline()).decode()
        if not first_line:
            raise AssertionError((await process.communicate())[1].decode())
        yield Process(process, first_line)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Asks until the answer is yes."""
    async with asyncio.timeout(PATIENCE):
        while not await condition():
            pass


def counted(client: Client, count: str, value: int) -> Callable[[], Awaitable[bool]]:
    """Whether a figure of the working model's scheduler has reached a value."""

    async def reached() -> bool:
        figure: int = (await client.stats("work"))["scheduler"][count]
        return figure >= value

    return reached
