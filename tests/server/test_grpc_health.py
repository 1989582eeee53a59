"""What gRPC's own tools ask the port: health and reflection."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from kapsl_scheduler.server import grpc_health
from kapsl_scheduler.server.oip_proto import Message, message_class
from tests.server.grpc_api import HEALTH, SERVICE, Port, grpc_serving, status_name
from tests.server.test_grpc import failure


async def test_health_is_that_of_the_server_of_its_services_and_of_each_model() -> None:
    async with grpc_serving() as port:
        for name in ("", SERVICE, "m"):
            assert await port.health(name) == "SERVING"
        unknown = await failure(port.health("nope"))
        assert unknown.code() is grpc.StatusCode.NOT_FOUND
        assert unknown.details() == "no service or model has that name"  # and not which there are: anybody may ask

        await port.http.scheduler.close(0.0)
        for name in ("", SERVICE, "m"):
            assert await port.health(name) == "NOT_SERVING"


async def test_a_server_that_drains_is_not_serving() -> None:
    async with grpc_serving() as port:
        port.service.draining = True

        for name in ("", "m"):
            assert await port.health(name) == "NOT_SERVING"
        assert not (await port.ask("ModelReady", name="m")).ready


async def test_who_watches_hears_of_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_health, "LOOK_AGAIN", 0.001)
    async with grpc_serving() as port:
        model, later = port.watch("m"), port.watch("later")
        assert status_name(await model.read()) == "SERVING"
        assert status_name(await later.read()) == "SERVICE_UNKNOWN"

        await port.registry.load("later", lambda x: x)
        assert status_name(await later.read()) == "SERVING"
        await port.registry.unload("m")
        assert status_name(await model.read()) == "SERVICE_UNKNOWN"
        model.cancel()
        later.cancel()


async def test_closing_is_told_to_those_who_watch_at_once_and_ends_their_calls() -> None:
    async with grpc_serving() as port:
        watching = port.watch()
        assert status_name(await watching.read()) == "SERVING"
        port.service.draining = True
        await port.server.close(30.0)

        assert status_name(await watching.read()) == "NOT_SERVING"
        assert await watching.read() is grpc.aio.EOF
        assert await watching.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("call", ["health", "watch"])
async def test_a_question_is_short(call: str) -> None:
    async with grpc_serving() as port:
        ask = getattr(port, call)("n" * 5000)
        refused = await failure(ask if call == "health" else ask.read())
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "expected at most 4096" in (refused.details() or "")


@pytest.mark.parametrize("bound", ["MOST", "EACH"])
async def test_watches_are_bounded_all_together_and_of_each_connection(
    monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(grpc_health, bound, 1)
    async with grpc_serving() as port:
        first = port.watch()
        assert status_name(await first.read()) == "SERVING"
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await port.watch().read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()

        async with asyncio.timeout(5.0):
            while not await is_answered(port.watch()):
                pass  # until the server has heard that the first is cancelled


async def is_answered(watch: Any) -> bool:
    try:
        return await watch.read() is not grpc.aio.EOF
    except grpc.aio.AioRpcError:
        return False


# --------------------------------------------------------------------------------------------- reflection


async def reflected(port: Port, version: str, *requests: dict[str, str]) -> list[Message]:
    kind = message_class(f"grpc.reflection.{version}.ServerReflectionRequest")
    answer = message_class(f"grpc.reflection.{version}.ServerReflectionResponse")
    call = port.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda request: request.SerializeToString(),
        response_deserializer=answer.FromString,
    )
    return [one async for one in call(iter([kind(**request) for request in requests]))]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_a_tool_learns_services_and_messages_from_the_server(version: str) -> None:
    async with grpc_serving() as port:
        (listed,) = await reflected(port, version, {"list_services": "*"})
        names = [service.name for service in listed.list_services_response.service]
        assert SERVICE in names
        assert HEALTH in names
        assert f"grpc.reflection.{version}.ServerReflection" in names

        described = await reflected(port, version, *({"file_containing_symbol": name} for name in names))
        pool = descriptor_pool.DescriptorPool()
        for one in described:
            (file,) = one.file_descriptor_response.file_descriptor_proto
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(file))
        for name in names:
            assert pool.FindServiceByName(name).methods
        infer = pool.FindServiceByName(SERVICE).FindMethodByName("ModelInfer")
        assert infer.input_type.full_name == "inference.ModelInferRequest"


@pytest.mark.parametrize(
    ("request_", "kind"),
    [
        ({"file_containing_symbol": "nope"}, "file_containing_symbol"),
        ({"file_by_filename": "nope.proto"}, "file_by_filename"),
        ({"file_containing_extension": {"containing_type": SERVICE}}, "file_containing_extension"),
        ({"all_extension_numbers_of_type": "nope"}, "all_extension_numbers_of_type"),
    ],
)
async def test_what_is_not_there_is_said_in_the_answer(request_: Any, kind: str) -> None:
    async with grpc_serving() as port:
        (answer,) = await reflected(port, "v1", request_)

        assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
        assert answer.error_response.error_message == f"nothing is known by that {kind}"
        assert answer.original_request.WhichOneof("message_request") == kind


async def test_files_are_found_by_name_and_messages_have_no_extensions() -> None:
    async with grpc_serving() as port:
        by_name, extensions = await reflected(
            port,
            "v1",
            {"file_by_filename": "inference.proto"},
            {"all_extension_numbers_of_type": "inference.ModelInferRequest"},
        )

        assert len(by_name.file_descriptor_response.file_descriptor_proto) == 1
        found = extensions.all_extension_numbers_response
        assert (found.base_type_name, list(found.extension_number)) == ("inference.ModelInferRequest", [])
