"""gRPC of the real process: beside HTTP, with its tokens and certificates, and to its end."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import trustme

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.server.oip_proto import Message, message_class
from tests.e2e.process import FOREVER, Process, build_working_model, counted, run, serving, until, work

pytestmark = pytest.mark.slow

SERVICE = "inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_working_model(tmp_path_factory.mktemp("model") / "work.onnx")


async def address_of(server: Process) -> str:
    """What the server says of gRPC, in its second line where it has no Kapsl socket."""
    line = await server.line()
    assert line.startswith("for gRPC clients on 127.0.0.1:")
    return line.split()[-1]


@asynccontextmanager
async def both(server: Process) -> AsyncIterator[tuple[Client, grpc.aio.Channel]]:
    """A client over HTTP, and a channel for gRPC."""
    async with Client(server.url) as client, grpc.aio.insecure_channel(await address_of(server)) as channel:
        yield client, channel


def asked(model: str, inputs: dict[str, Any]) -> bytes:
    names = {"float32": "FP32", "int64": "INT64"}
    tensors = [
        {"name": name, "datatype": names[str(array.dtype)], "shape": array.shape} for name, array in inputs.items()
    ]
    raws = [array.tobytes() for array in inputs.values()]
    request = message_class("inference.ModelInferRequest")(model_name=model, inputs=tensors, raw_input_contents=raws)
    data: bytes = request.SerializeToString()
    return data


def call(channel: grpc.aio.Channel, name: str, request: bytes = b"", **options: Any) -> Any:
    answer = message_class(f"inference.{name}Response")
    ask = channel.unary_unary(f"/{SERVICE}/{name}", response_deserializer=answer.FromString)
    return ask(request, **options)


def infer(channel: grpc.aio.Channel, model: str, inputs: dict[str, Any], **options: Any) -> Any:
    return call(channel, "ModelInfer", asked(model, inputs), **options)


def value(answer: Message) -> float:
    return float(np.frombuffer(answer.raw_output_contents[0], "<f4")[0])


async def refusal(asking: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await asking
    return raised.value.code(), raised.value.details() or ""


async def test_grpc_and_http_are_two_doors_of_one_server(model: Path) -> None:
    async with serving(model, "--no-socket", "--no-cron") as server, both(server) as (client, channel):
        assert value(await infer(channel, "work", work(2.5, turns=1))) == 2.5
        assert (await client.infer("work", work(1, turns=1))).outputs["y"].item() == 1
        stats = await client.stats("work")
        assert (stats["inference_stats"]["success"]["count"], stats["answers"]) == (2, {"200": 2})
        late = await refusal(infer(channel, "work", work(1, FOREVER), timeout=0.2))
        assert late[0] is grpc.StatusCode.DEADLINE_EXCEEDED

        queued = infer(channel, "work", work(2, turns=1))  # behind the call that nobody waits for any more
        await until(counted(client, "queued", 1))
        queued.cancel()
        await until(counted(client, "cancelled", 1))


async def test_a_signal_lets_calls_in_flight_end_and_tells_those_who_watch(model: Path) -> None:
    arguments = ("--no-socket", "--no-cron", "--drain", "600")
    async with serving(model, *arguments) as server, both(server) as (client, channel):
        answer = message_class("grpc.health.v1.HealthCheckResponse")
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch", response_deserializer=answer.FromString)(b"")
        assert (await watch.read()).status == answer.SERVING
        running = infer(channel, "work", work(5, turns=1600))
        await until(counted(client, "calls_in_flight", 1))

        server.send(signal.SIGTERM)

        assert (await watch.read()).status == answer.NOT_SERVING
        assert await watch.read() is grpc.aio.EOF
        assert value(await running) == 5
        assert await server.end() == (0, "")


async def test_a_call_that_outlasts_the_drain_hears_why_it_failed(model: Path) -> None:
    arguments = ("--no-socket", "--no-cron", "--drain", "0.1")
    async with serving(model, *arguments) as server, both(server) as (client, channel):
        running = asyncio.ensure_future(refusal(infer(channel, "work", work(5, FOREVER))))
        await until(counted(client, "calls_in_flight", 1))
        server.send(signal.SIGTERM)

        code, said = await running
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "clos" in said
        assert (await server.end())[0] == 0


async def test_tokens_roles_and_the_audit_are_those_of_http(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    made: dict[str, list[tuple[str, str]]] = {}
    for name, role in (("ann", "reader"), ("eve", "admin")):
        text = (await run("token", "new", "--name", name, "--role", role, "--file", tokens))[1].strip()
        made[name] = [("authorization", f"Bearer {text}")]
    arguments = ("--no-socket", "--no-cron", "--tokens", tokens, "--access-log")
    digit = {"pixels": np.zeros((1, 64), np.float32)}
    unload = message_class("inference.RepositoryModelUnloadRequest")(model_name="digits").SerializeToString()
    async with serving(f"digits={PACKAGE}", *arguments) as server:
        async with grpc.aio.insecure_channel(await address_of(server)) as channel:
            assert (await call(channel, "ServerReady")).ready
            assert (await refusal(infer(channel, "digits", digit)))[0] is grpc.StatusCode.UNAUTHENTICATED
            assert (await infer(channel, "digits", digit, metadata=made["ann"])).model_name == "digits"
            denied = await refusal(call(channel, "RepositoryModelUnload", unload, metadata=made["ann"]))
            assert denied[0] is grpc.StatusCode.PERMISSION_DENIED
            await call(channel, "RepositoryModelUnload", unload, metadata=made["eve"])
            assert (await refusal(infer(channel, "digits", digit, metadata=made["ann"])))[
                0
            ] is grpc.StatusCode.NOT_FOUND
        server.send(signal.SIGTERM)
        code, log = await server.end()
    assert code == 0
    lines = [
        (name, json.loads("{" + line.split("{", 1)[1]))
        for line in log.splitlines()
        if "{" in line
        for name in ("audit", "access")
        if f"kapsl_scheduler.{name}:" in line
    ]
    audit = [(line["who"], line["path"].rsplit("/", 1)[-1], line["status"]) for name, line in lines if name == "audit"]
    assert audit == [("", "RepositoryModelUnload", 403), ("eve", "digits", 200)]
    told = [(line["who"], line["method"], line["status"]) for name, line in lines if name == "access"]
    assert told == [
        ("", "GRPC", 200),
        ("", "GRPC", 401),
        ("ann", "GRPC", 200),
        ("", "GRPC", 403),
        ("eve", "GRPC", 200),
        ("ann", "GRPC", 404),
    ]
    assert not any(text.split()[-1] in log for ((_, text),) in made.values())


async def test_certificates_are_those_of_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued, own = authority.issue_cert("127.0.0.1"), authority.issue_cert("ann@example")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    issued.cert_chain_pems[0].write_to_path(files["cert"])
    issued.private_key_pem.write_to_path(files["key"])
    arguments = ["--no-socket", "--no-cron", "--tls-cert", files["cert"], "--tls-key", files["key"]]
    root = authority.cert_pem.bytes()
    bare = grpc.ssl_channel_credentials(root)
    full = grpc.ssl_channel_credentials(root, own.private_key_pem.bytes(), own.cert_chain_pems[0].bytes())
    for more, good in (([], bare), (["--tls-client-ca", files["ca"]], full)):
        async with serving(PACKAGE, *arguments, *more) as server:
            address = await address_of(server)
            async with grpc.aio.secure_channel(address, good) as channel:
                assert (await call(channel, "ServerReady")).ready
            async with grpc.aio.insecure_channel(address) as channel:
                assert (await refusal(call(channel, "ServerReady")))[0] is grpc.StatusCode.UNAVAILABLE
            if more:
                async with grpc.aio.secure_channel(address, bare) as channel:
                    assert (await refusal(call(channel, "ServerReady")))[0] is grpc.StatusCode.UNAVAILABLE


async def test_the_settings_are_shown_and_a_port_that_is_taken_is_said() -> None:
    code, shown, _ = await run("config", "show", "--grpc-port", "9001", KAPSL_GRPC_ENABLED="false")
    assert code == 0
    lines = [line.split() for line in shown.splitlines() if line.startswith("server.grpc_")]
    assert lines == [
        ["server.grpc_enabled", "false", "KAPSL_GRPC_ENABLED"],
        ["server.grpc_port", "9001", "--grpc-port"],
    ]
    async with serving(PACKAGE, "--no-socket", "--no-cron") as server:
        port = (await address_of(server)).rpartition(":")[2]
        code, _, said = await run("serve", PACKAGE, "--port", "0", "--no-socket", "--no-cron", "--grpc-port", port)
    assert code == 1
    assert f"cannot listen on 127.0.0.1:{port}" in said
    assert "another --grpc-port" in said
