"""Clients of the Open Inference Protocol that need environments of their own, against the real server: KServe's, over
REST in JSON and in bytes and over gRPC, one that was generated from the protocol's OpenAPI description, and the batch
client of MLServer's command line."""

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

MLSERVER = ROOT / ".venv-mlserver" / "bin" / "mlserver"

pytestmark = pytest.mark.slow
clients = pytest.mark.skipif(
    not PYTHON.exists(), reason="kserve and open-inference-openapi: `make clients` installs them"
)

OUTPUTS = {f"{name}_out": plain(array) for name, array in MIXED.items()}


async def told(kind: str, address: str) -> dict[str, Any]:
    """What a client of that kind was answered."""
    heard: dict[str, Any] = json.loads(await run(PYTHON, ROOT / "tests" / "e2e" / "other_clients.py", kind, address))
    return heard


async def run(*command: str | Path) -> bytes:
    """What it says when it has ended well."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(2 * PATIENCE):
        answer, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    return answer


@clients
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


@clients
async def test_a_client_made_of_the_openapi_description_is_answered() -> None:
    async with oip_serving() as server:
        heard = await told("openapi", server.url)

    assert heard["server"] == "kapsl-scheduler"
    assert sorted(heard["inputs"]) == sorted(MIXED)
    assert heard["answers"] == [{"id": "7", "model": ["mixed", "1"], "outputs": OUTPUTS}]
    name, text = heard["error"]
    assert name == "ApiError"
    assert "model 'nope' is not loaded" in text


@pytest.mark.skipif(not MLSERVER.exists(), reason="mlserver: `make clients` installs it")
@pytest.mark.parametrize("options", [(), ("--binary-data",), ("--batch-size", "4")], ids=["one", "bytes", "four"])
async def test_mlservers_batch_client_is_answered(options: tuple[str, ...], tmp_path: Path) -> None:
    rows = {str(number): [number + 0.5, -number] for number in range(10)}
    asked, answered = tmp_path / "asked.jsonl", tmp_path / "answered.jsonl"
    asked.write_text("".join(f"{json.dumps(asking(id, row))}\n" for id, row in rows.items()), "utf-8")
    async with oip_serving() as server:
        await run(
            *(MLSERVER, "infer", "--url", server.http, "--model-name", "mixed", "--workers", "3", *options),
            *("--input-data-path", asked, "--output-data-path", answered),
        )
    heard = [json.loads(line) for line in answered.read_text("utf-8").splitlines()]
    found = {}
    for answer in heard:
        outputs = {output["name"]: output["data"] for output in answer["outputs"]}
        found[list(rows)[answer["parameters"]["batch_index"]]] = outputs["x_out"]
        assert (outputs["t_out"], outputs["b_out"]) == (["é"], [True])
    assert found == rows


def asking(id: str, row: list[float]) -> dict[str, Any]:
    """A line of the batch client's input."""
    values = {
        "x": ("FP32", [1, 2], row),
        "t": ("BYTES", [1], ["é"]),
        "b": ("BOOL", [1], [True]),
        "h": ("FP16", [1, 2], row),
    }
    inputs = [
        {"name": name, "datatype": datatype, "shape": shape, "data": data}
        for name, (datatype, shape, data) in values.items()
    ]
    return {"id": id, "inputs": inputs}
