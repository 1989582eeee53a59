"""The server of `oip_child` as a process, and its answers as every client of the protocol is to see them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from tests.e2e.process import PATIENCE, Process

MIXED: dict[str, np.ndarray[Any, Any]] = {
    "x": np.array([[0.5, -1.5], [3, 4]], np.float32),
    "t": np.array(["é".encode(), b""], object),
    "b": np.array([True, False]),
    "h": np.array([[1, 2], [-3, 65504]], np.float16),
}
DATATYPES = {"x": "FP32", "t": "BYTES", "b": "BOOL", "h": "FP16"}


class OipServer(Process):
    """Where it is, for HTTP without the scheme, as some clients take it."""

    @property
    def http(self) -> str:
        return self.url.removeprefix("http://")

    @property
    def grpc(self) -> str:
        return self.first_line.split()[4]


@asynccontextmanager
async def oip_serving(*settings: str) -> AsyncIterator[OipServer]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KAPSL_")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.e2e.oip_child", *settings),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(PATIENCE):
            line = (await process.stdout.readline()).decode()
        if not line:
            raise AssertionError((await process.communicate())[1].decode())
        yield OipServer(process, line)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


def same_values(came: Any, sent: np.ndarray[Any, Any]) -> bool:
    """Whether an output has the values and the dtype of an input; texts may come as text."""
    came = np.asarray(came)
    if sent.dtype.kind == "O":
        return [item.encode() if isinstance(item, str) else item for item in came.tolist()] == sent.tolist()
    return came.dtype == sent.dtype and bool(np.array_equal(came, sent))
