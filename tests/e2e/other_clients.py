"""Clients of the Open Inference Protocol that need an environment of their own (`make clients`): run by its Python, and
importing nothing of ours. `rest`, `grpc` and `openapi` say which, an address where the server is; the answer is JSON.

Texts go to and fro as text, half precision as numbers.
"""

from __future__ import annotations

import asyncio
import json
import sys
import warnings
from typing import Any

import numpy as np

warnings.simplefilter("ignore")  # what others' packages say to their own authors

MIXED: dict[str, tuple[str, Any]] = {
    "x": ("FP32", np.array([[0.5, -1.5], [3, 4]], np.float32)),
    "t": ("BYTES", np.array(["é".encode(), b""], object)),
    "b": ("BOOL", np.array([True, False])),
    "h": ("FP16", np.array([[1, 2], [-3, 65504]], np.float16)),
}


def plain(values: Any) -> list[Any]:
    return [item.decode() if isinstance(item, bytes) else item for item in np.asarray(values).ravel().tolist()]


def request(model: str, *, binary: bool, wanted: tuple[str, ...] = (), **parameters: Any) -> Any:
    from kserve import InferInput, InferRequest
    from kserve.protocol.infer_type import RequestedOutput

    inputs = []
    for name, (datatype, array) in MIXED.items():
        inputs.append(InferInput(name, list(array.shape), datatype))
        inputs[-1].set_data_from_numpy(array, binary_data=binary or datatype == "FP16")
    outputs = [RequestedOutput(name, {"binary_data": True} if binary else None) for name in wanted] or None
    return InferRequest(model, inputs, request_id="7", parameters=parameters, request_outputs=outputs)


def shown(answer: Any) -> dict[str, Any]:
    return {
        "id": answer.id,
        "model": [answer.model_name, answer.model_version],
        "outputs": {output.name: plain(output.as_numpy()) for output in answer.outputs},
    }


async def rest(address: str) -> dict[str, Any]:
    from kserve import InferenceRESTClient
    from kserve.inference_client import RESTConfig

    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=0))
    told: dict[str, Any] = {
        "health": [
            await client.is_server_live(address),
            await client.is_server_ready(address),
            await client.is_model_ready(address, "mixed"),
        ]
    }
    outputs = tuple(f"{name}_out" for name in MIXED)
    told["answers"] = [
        shown(await client.infer(address, asked, model_name="mixed"))
        for asked in (
            request("mixed", binary=True, wanted=outputs, priority=1),
            request("mixed", binary=True),
            request("mixed", binary=False, timeout=30_000_000),
        )
    ]
    try:
        await client.infer(address, request("nope", binary=True), model_name="nope")
    except Exception as error:
        told["error"] = [type(error).__name__, str(error)]
    await client.close()
    return told


async def grpc(address: str) -> dict[str, Any]:
    from kserve import InferenceGRPCClient

    client = InferenceGRPCClient(address, retries=0, timeout=30.0)
    told: dict[str, Any] = {
        "health": [
            await client.is_server_live(),
            await client.is_server_ready(),
            await client.is_model_ready("mixed"),
        ],
        "answers": [shown(await client.infer(request("mixed", binary=True)))],
    }
    try:
        await client.infer(request("nope", binary=True))
    except Exception as error:
        told["error"] = [type(error).__name__, str(error)]
    await client.close()
    return told


async def openapi(address: str) -> dict[str, Any]:
    from open_inference.openapi.client import OpenInferenceClient
    from open_inference.openapi.core.api_error import ApiError
    from open_inference.openapi.types import InferenceRequest, RequestInput, RequestOutput

    client = OpenInferenceClient(base_url=address)
    client.check_server_liveness()
    client.check_server_readiness()
    client.check_model_readiness("mixed")
    inputs = [
        RequestInput(name=name, shape=list(array.shape), datatype=kind, data=plain(array), parameters=None)
        for name, (kind, array) in MIXED.items()
    ]
    outputs = [RequestOutput(name=f"{name}_out", parameters=None) for name in MIXED]
    asked = InferenceRequest(id="7", inputs=inputs, outputs=outputs, parameters=None)
    answer = client.model_infer("mixed", request=asked)
    told: dict[str, Any] = {
        "server": client.read_server_metadata().name,
        "inputs": [tensor.name for tensor in client.read_model_metadata("mixed").inputs],
        "answers": [
            {
                "id": answer.id,
                "model": [answer.model_name, answer.model_version],
                "outputs": {output.name: output.data.dict()["__root__"] for output in answer.outputs},
            }
        ],
    }
    try:
        client.model_infer("nope", request=asked)
    except ApiError as error:
        told["error"] = [type(error).__name__, str(error.body)]
    return told


if __name__ == "__main__":
    answered = asyncio.run({"rest": rest, "grpc": grpc, "openapi": openapi}[sys.argv[1]](sys.argv[2]))
    sys.stdout.write(json.dumps(answered) + "\n")
