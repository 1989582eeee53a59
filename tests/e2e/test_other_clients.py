"""Clients of the Open Inference Protocol that need an environment of their own, against the real server: KServe's, over
REST in JSON and in bytes and over gRPC, and one that was generated from the protocol's OpenAPI description."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.oip import MIXED, oip_serving
from tests.e2e.other_clients import plain
from tests.e2e.process import PATIENCE

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="kserve and open-inference-openapi: `make clients` installs them"),
]

OUTPUTS = {f"{name}_out": plain(array) for name, array in MIXED.items()}


async def told(kind: str, address: str) -> dict[str, Any]:
    """What a client of that kind was answered."""
    process = await asyncio.create_subprocess_exec(
        *(PYTHON, ROOT / "tests" / "e2e" / "other_clients.py", kind, address),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(2 * PATIENCE):
        answer, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    heard: dict[str, Any] = json.loads(answer)
    return heard


@pytest.mark.parametrize("kind", ["rest", "grpc"])
async def test_kserves_client_is_answered(kind: str) -> None:
    async with oip_serving() as server:
        heard = await told(kind, server.url if kind == "rest" else server.grpc)

    assert heard["health"] == [True, True, True]
    assert len(heard["answers"]) == (3 if kind == "rest" else 1)
    for answer in heard["answers"]:
        assert (answer["id"], answer["model"][0], answer["outputs"]) == ("7", "mixed", OUTPUTS)
    name, text = heard["error"]
    assert name == ("HTTPStatusError" if kind == "rest" else "AioRpcError")
    assert "model 'nope' is not loaded" in text


async def test_a_client_made_of_the_openapi_description_is_answered() -> None:
    async with oip_serving() as server:
        heard = await told("openapi", server.url)

    assert heard["server"] == "kapsl-scheduler"
    assert sorted(heard["inputs"]) == sorted(MIXED)
    assert heard["answers"] == [{"id": "7", "model": ["mixed", "1"], "outputs": OUTPUTS}]
    name, text = heard["error"]
    assert name == "ApiError"
    assert "model 'nope' is not loaded" in text
