"""The gRPC port in process: what each call answers, errors and their statuses, bounds, deadlines, who may ask, what is
told, certificates and the end. Streams are in `test_grpc_stream`, health and reflection in `test_grpc_health`."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import trustme

from kapsl_scheduler import errors
from kapsl_scheduler.errors import (
    DeadlineExceeded,
    EngineError,
    Forbidden,
    InferenceError,
    InvalidInput,
    ModelLoadError,
    ModelNotLoaded,
    Overloaded,
    ResourceExhausted,
    StoreError,
    Unauthorized,
    Unavailable,
)
from kapsl_scheduler.server import grpc_door, oip_grpc
from kapsl_scheduler.server.access import Access, Role, made_token, role_for, tokens_of
from kapsl_scheduler.server.answers import grpc_status_of, status_of
from kapsl_scheduler.server.grpc_server import Certificates, GrpcServer
from tests.server.api import Gate, double, settled, until
from tests.server.grpc_api import HEALTH, SERVICE, Port, grpc_serving, request_of, trailing, values

Code = grpc.StatusCode


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


# ------------------------------------------------------------------------------------------------ answers


async def test_an_inference_is_answered() -> None:
    async with grpc_serving() as port:
        answer = await port.infer([(1, 2), (3, 4)], id="7")

        assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", "7")
        assert [(output.name, output.datatype, list(output.shape)) for output in answer.outputs] == [
            ("y", "FP32", [2, 2])
        ]
        assert values(answer) == [[2, 4], [6, 8]]
        figures = port.service.figures("m")
        assert (figures.success, figures.fail, figures.answers[200]) == (1, 0, 1)
        assert figures.success_ns >= figures.read_ns > 0


async def test_the_server_and_its_models_are_described() -> None:
    async with grpc_serving() as port:
        assert (await port.ask("ServerLive")).live
        assert (await port.ask("ServerReady")).ready
        assert (await port.ask("ModelReady", name="m")).ready
        assert not (await port.ask("ModelReady", name="nope")).ready
        server = await port.ask("ServerMetadata")
        assert (server.name, server.version) == ("kapsl-scheduler", "1.2.3")
        assert "binary_tensor_data" in server.extensions
        model = await port.ask("ModelMetadata", name="m", version="3")
        assert (model.name, list(model.versions), model.platform) == ("m", ["3"], "python")
        assert [(one.name, one.datatype, list(one.shape)) for one in model.inputs] == [("x", "FP32", [-1, 2])]
        config = (await port.ask("ModelConfig", name="m")).config
        assert (config.name, config.max_batch_size, list(config.input[0].dims)) == ("m", 32, [2])
        assert not config.model_transaction_policy.decoupled
        (listed,) = (await port.ask("RepositoryIndex")).models
        assert (listed.name, listed.version, listed.state) == ("m", "3", "READY")


async def test_readiness_follows_the_server_and_the_index_can_leave_out_what_is_not_ready() -> None:
    async with grpc_serving() as port:
        await port.http.scheduler.close(0.0)

        assert not (await port.ask("ServerReady")).ready
        assert not (await port.ask("ModelReady", name="m")).ready
        assert len((await port.ask("RepositoryIndex")).models) == 1
        assert len((await port.ask("RepositoryIndex", ready=True)).models) == 0


async def test_statistics_grow_with_each_inference() -> None:
    async with grpc_serving() as port:
        for _ in range(3):
            await port.infer()
        for fields in ({"name": "m", "version": "3"}, {}):
            (statistics,) = (await port.ask("ModelStatistics", **fields)).model_stats
            assert (statistics.name, statistics.version, statistics.inference_count) == ("m", "3", 3)
            assert statistics.inference_stats.success.count == 3
            assert statistics.batch_stats[0].compute_infer.count == statistics.execution_count


async def test_settings_of_logs_and_traces_are_shown_and_set() -> None:
    logger = logging.getLogger("kapsl_scheduler")
    before = logger.level
    try:
        async with grpc_serving() as port:
            shown = (await port.ask("LogSettings", settings={"log_info": {"bool_param": True}})).settings
            assert shown["log_info"].bool_param
            assert shown["log_verbose_level"].uint32_param == 0
            assert logger.level == logging.INFO
            wrong = await failure(port.ask("LogSettings", settings={"log_file": {"string_param": "x"}}))
            assert (wrong.code(), "log_file: cannot be set" in wrong.details()) == (Code.INVALID_ARGUMENT, True)
    finally:
        logger.setLevel(before)
    async with grpc_serving() as port:
        traces = (await port.ask("TraceSetting", model_name="m")).settings
        assert list(traces["trace_level"].value) == ["OFF"]
        assert (await port.ask("TraceSetting", settings={"trace_rate": {"value": ["0"]}})).settings
        wrong = await failure(port.ask("TraceSetting", settings={"trace_level": {"value": ["TIMESTAMPS"]}}))
        assert wrong.code() is Code.INVALID_ARGUMENT
        assert (await failure(port.ask("TraceSetting", model_name="no"))).code() is Code.NOT_FOUND


async def test_models_are_loaded_and_unloaded_by_name() -> None:
    done: list[tuple[str, str]] = []

    async def reload(name: str) -> Any:
        done.append(("load", name))
        if name == "broken":
            raise ModelLoadError("no such file")
        if name == "busy":
            raise StoreError("the store is locked")

    async def unload(name: str) -> None:
        done.append(("unload", name))

    async with grpc_serving(reload=reload, unload=unload) as port:
        await port.ask("RepositoryModelLoad", model_name="m")
        unload_dependents = {"unload_dependents": {"bool_param": True}}
        await port.ask("RepositoryModelUnload", model_name="m", parameters=unload_dependents)
        assert done == [("load", "m"), ("unload", "m")]
        broken = await failure(port.ask("RepositoryModelLoad", model_name="broken"))
        assert (broken.code(), broken.details()) == (Code.INTERNAL, "no such file")
        busy = await failure(port.ask("RepositoryModelLoad", model_name="busy"))
        assert (busy.code(), trailing(busy)["kapsl-code"]) == (Code.UNAVAILABLE, "store_error")
        said = await failure(
            port.ask("RepositoryModelLoad", model_name="m", parameters={"config": {"string_param": "{}"}})
        )
        assert (said.code(), "config came, expected none" in said.details()) == (Code.INVALID_ARGUMENT, True)
    async with grpc_serving() as port:
        for call in ("RepositoryModelLoad", "RepositoryModelUnload"):
            assert (await failure(port.ask(call, model_name="m"))).code() is Code.UNIMPLEMENTED


@pytest.mark.parametrize("kind", ["System", "Cuda"])
async def test_shared_memory_is_not_offered(kind: str) -> None:
    async with grpc_serving() as port:
        for call in ("Status", "Register", "Unregister"):
            ask = port.channel.unary_unary(f"/{SERVICE}/{kind}SharedMemory{call}")
            refused = await failure(ask(b""))
            assert (refused.code(), "send tensors" in refused.details()) == (Code.UNIMPLEMENTED, True)


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("x"), Code.INVALID_ARGUMENT),
        (ModelNotLoaded("x"), Code.NOT_FOUND),
        (ResourceExhausted("x"), Code.RESOURCE_EXHAUSTED),
        (Overloaded("x"), Code.RESOURCE_EXHAUSTED),
        (Unavailable("x"), Code.UNAVAILABLE),
        (DeadlineExceeded("x"), Code.DEADLINE_EXCEEDED),
        (Unauthorized("x"), Code.UNAUTHENTICATED),
        (Forbidden("x"), Code.PERMISSION_DENIED),
        (errors.Cancelled("x"), Code.CANCELLED),
        (InferenceError("x"), Code.INTERNAL),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_an_error_keeps_its_type_and_its_words(error: EngineError, code: Code) -> None:
    async def broken(x: Any) -> Any:
        raise error

    async with grpc_serving(broken) as port:
        said = await failure(port.infer())

        assert (said.code(), said.details()) == (code, "x")
        assert trailing(said)["kapsl-code"] == error.code
        assert ("retry-after" in trailing(said)) == isinstance(error, Overloaded | Unavailable)
        figures = port.service.figures("m")
        assert (figures.fail, figures.answers[status_of(error)]) == (1, 1)


def test_every_class_of_error_has_a_status_of_both_protocols() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 15
    for kind in kinds:
        error = kind.__new__(kind)
        assert 400 <= status_of(error) < 600
        assert grpc_status_of(error) in Code.__members__


async def test_when_to_ask_again_travels_behind_the_status() -> None:
    async def broken(x: Any) -> Any:
        error = Overloaded("x")
        error.retry_after = 1.25
        raise error

    async with grpc_serving(broken) as port:
        told = trailing(await failure(port.infer()))

        assert (told["retry-after"], told["grpc-retry-pushback-ms"]) == ("2", "1250")


async def test_what_is_no_error_of_ours_is_logged_and_not_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(oip_grpc, "encode_response", broken)
    async with grpc_serving() as port:
        said = await failure(port.infer())

        assert (said.code(), said.details()) == (Code.INTERNAL, "the server failed; its log says why")
        assert trailing(said)["kapsl-code"] == "internal"
        assert "secret" in caplog.text
        assert port.service.figures("m").answers[500] == 1


async def test_unknown_models_and_bytes_that_are_no_message_are_refused() -> None:
    async with grpc_serving() as port:
        unknown = await failure(port.infer(model="nope"))
        assert (unknown.code(), "loaded: 'm'" in unknown.details()) == (Code.NOT_FOUND, True)
        assert (await failure(port.infer(model_version="9"))).code() is Code.NOT_FOUND
        garbled = await failure(port.call("ModelInfer", b"\xff"))
        assert (garbled.code(), "no ModelInferRequest" in garbled.details()) == (Code.INVALID_ARGUMENT, True)
        asked = await failure(port.infer(outputs=[{"name": "z"}]))
        assert (asked.code(), "output 'z' was asked for" in asked.details()) == (Code.INVALID_ARGUMENT, True)


async def test_a_long_text_of_an_error_still_comes_through() -> None:
    async with grpc_serving() as port:
        for name in ("n" * 9000, "é" * 4500):
            said = await failure(port.infer(model=name))
            assert said.code() is Code.NOT_FOUND
            assert said.details().startswith(f"model '{name[:100]}")
            assert said.details().endswith("…")


# ------------------------------------------------------------------------------------- bounds, deadlines


async def test_messages_beyond_the_bound_are_refused_before_they_are_decoded() -> None:
    async with grpc_serving(max_body_bytes=10_000, max_batch_size=2000) as port:
        assert len(values(await port.infer(np.zeros((1000, 2))))) == 1000
        refused = await failure(port.infer(np.zeros((20_000, 2))))

        assert refused.code() is Code.RESOURCE_EXHAUSTED
        assert port.service.figures("m").fail == 0
        assert values(await port.infer()) == [[2, 4]]


async def test_a_packed_message_may_not_unpack_to_more_than_the_bound() -> None:
    async with grpc_serving(max_body_bytes=10_000, max_batch_size=2000) as port:
        small = port.channel.unary_unary(f"/{SERVICE}/ModelInfer")
        packed = request_of(np.ones((1000, 2))).SerializeToString()
        assert await small(packed, compression=grpc.Compression.Gzip)
        bomb = request_of(np.zeros((1_000_000, 2))).SerializeToString()
        refused = await failure(small(bomb, compression=grpc.Compression.Gzip))

        assert refused.code() is Code.RESOURCE_EXHAUSTED
        assert port.service.figures("m").success == 1


async def test_requests_beyond_the_bound_in_flight_are_refused() -> None:
    gate = Gate()
    async with grpc_serving(gate, max_in_flight=1) as port:
        first = port.infer()
        await gate.entered.wait()
        refused = await failure(port.infer())
        gate.open.set()

        assert (refused.code(), "1 inference requests are in flight" in refused.details()) == (
            Code.RESOURCE_EXHAUSTED,
            True,
        )
        assert values(await first) == [[2, 4]]
        assert values(await port.infer()) == [[2, 4]]


async def test_a_client_that_cancels_takes_its_request_back() -> None:
    gate = Gate()
    async with grpc_serving(gate) as port:
        first = port.infer()
        await gate.entered.wait()
        second = port.infer()
        await settled(lambda: port.http.scheduler.statistics().queued == 1)
        second.cancel()
        await settled(lambda: port.http.scheduler.statistics().cancelled == 1)
        gate.open.set()

        assert values(await first) == [[2, 4]]
        await settled(lambda: port.service.in_flight == 0)
        assert port.service.figures("m").answers == {200: 1, 499: 1}


async def test_the_clients_deadline_is_the_requests_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    timeouts: list[float | None] = []
    async with grpc_serving() as port:
        infer = port.http.scheduler.infer

        async def noted(asked: Any, **options: Any) -> Any:
            timeouts.append(options["timeout"])
            return await infer(asked, **options)

        monkeypatch.setattr(port.http.scheduler, "infer", noted)
        await port.infer(timeout=50.0)
        await port.infer(timeout=50.0, parameters={"timeout": {"int64_param": 2_000_000}})
        await port.infer(timeout=2.0, parameters={"timeout": {"int64_param": 50_000_000}})
        await port.infer(parameters={"timeout": {"int64_param": 3_000_000}})
        await port.infer()

    first, second, third, fourth, fifth = timeouts
    assert first is not None
    assert 10.0 < first < 51.0
    assert second == 2.0
    assert third is not None
    assert 0.0 < third < 2.5  # gRPC sends it rounded
    assert (fourth, fifth) == (3.0, None)


async def test_a_request_whose_deadline_passes_is_counted_as_late() -> None:
    gate = Gate()
    async with grpc_serving(gate) as port:
        late = await failure(port.infer(timeout=0.05))
        assert late.code() is Code.DEADLINE_EXCEEDED
        await settled(lambda: port.service.in_flight == 0)
        assert port.service.figures("m").answers == {504: 1}
        gate.open.set()


# ---------------------------------------------------------------------------------------------- who may ask


def access_of(limits: str = "", **roles: Role) -> tuple[Access, dict[str, list[tuple[str, str]]]]:
    """Tokens by name, as metadata, and what knows them."""
    made = {name: made_token(name, role) for name, role in roles.items()}
    access = Access(tokens_of("\n".join(f"{line} {limits}" for _, line in made.values()), "here"))
    return access, {name: [("authorization", f"Bearer {text}")] for name, (text, _) in made.items()}


def test_each_call_takes_a_role() -> None:
    expected = {
        **dict.fromkeys(("ServerLive", "ServerReady"), None),
        **dict.fromkeys(("ModelReady", "ServerMetadata", "ModelMetadata", "ModelConfig"), Role.READER),
        **dict.fromkeys(("ModelInfer", "ModelStreamInfer", "ModelStatistics", "RepositoryIndex"), Role.READER),
        **dict.fromkeys(("RepositoryModelLoad", "RepositoryModelUnload", "LogSettings", "TraceSetting"), Role.ADMIN),
    }
    assert {name: role_for("GRPC", f"/{SERVICE}/{name}") for name in expected} == expected
    assert role_for("GRPC", "/grpc.health.v1.Health/Check") is None
    assert role_for("GRPC", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo") is Role.READER


async def test_tokens_are_asked_for_as_over_http() -> None:
    access, tokens = access_of(ann=Role.READER, eve=Role.ADMIN)
    unloaded: list[str] = []

    async def unload(name: str) -> None:
        unloaded.append(name)

    async with grpc_serving(access=access, unload=unload) as port:
        assert (await port.ask("ServerLive")).live
        assert await port.health() == "SERVING"
        nobody = await failure(port.infer())
        assert (nobody.code(), "a token is needed" in nobody.details()) == (Code.UNAUTHENTICATED, True)
        wrong = await failure(port.infer(metadata=[("authorization", "Bearer kapsl_x")]))
        assert (wrong.code(), trailing(wrong)["kapsl-code"]) == (Code.UNAUTHENTICATED, "unauthorized")
        assert values(await port.infer(metadata=tokens["ann"])) == [[2, 4]]
        reader = await failure(port.ask("RepositoryModelUnload", metadata=tokens["ann"], model_name="m"))
        assert (reader.code(), "'ann' is a reader" in reader.details()) == (Code.PERMISSION_DENIED, True)
        assert unloaded == []
        await port.ask("RepositoryModelUnload", metadata=tokens["eve"], model_name="m")
        assert unloaded == ["m"]
        assert port.service.figures("m").fail == 0


async def test_who_may_not_ask_is_refused_before_the_message_is_there() -> None:
    access, _ = access_of(ann=Role.READER)
    async with grpc_serving(access=access) as port:
        call = port.channel.stream_unary(f"/{SERVICE}/ModelInfer")()  # opens the call, and sends no message

        assert (await failure(call)).code() is Code.UNAUTHENTICATED


@pytest.mark.parametrize("path", [f"/{HEALTH}/Check", f"/{HEALTH}/Watch", f"/{SERVICE}/ModelInfer"])
async def test_a_call_whose_message_does_not_come_is_ended(path: str) -> None:
    async with grpc_serving(patience=0.01) as port:
        ended = await failure(silent(port, path))
        assert ended.code() is Code.DEADLINE_EXCEEDED
        assert "the message of the call did not come within 0.0" in (ended.details() or "")
        assert await port.health() == "SERVING"


async def test_each_call_whose_message_does_not_come_is_ended_whenever_it_began() -> None:
    async with grpc_serving(patience=0.01) as port:
        for _ in range(2):  # the timer is the calls' in common, and rests when there are none
            calls = [silent(port, f"/{HEALTH}/Check"), silent(port, f"/{SERVICE}/ServerLive")]
            assert {(await failure(call)).code() for call in calls} == {Code.DEADLINE_EXCEEDED}


async def test_the_timer_of_one_call_goes_on_for_those_that_began_later() -> None:
    async with grpc_serving(patience=0.05) as port:
        first = silent(port, f"/{HEALTH}/Check")
        for _ in range(3):
            assert await port.health() == "SERVING"  # some time passes
        second = silent(port, f"/{HEALTH}/Check")
        assert [(await failure(call)).code() for call in (first, second)] == [Code.DEADLINE_EXCEEDED] * 2


@pytest.mark.parametrize(
    ("happens", "heard", "cancelled"),
    [
        (["message"], b"asked", 0),
        (["time"], "DeadlineExceeded", 0),
        (["gone"], "CancelledError", 1),
        (["time", "gone"], "CancelledError", 1),
        (["gone", "time"], "CancelledError", 1),
        (["message", "gone"], "CancelledError", 1),
    ],
)
async def test_who_ends_the_wait_for_a_message_is_told_apart(happens: list[str], heard: Any, cancelled: int) -> None:
    """Also where both come in one pass of the loop."""
    messages, came = grpc_door._Messages(1000.0), asyncio.get_running_loop().create_future()
    found: list[Any] = []

    class Context:
        async def read(self) -> Any:
            return await came

    async def call() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            found.append(await messages.one(Context()))
        except BaseException as error:
            found.append(type(error).__name__)
        found.append(task.cancelling())

    task = asyncio.create_task(call())
    await until(lambda: messages.awaited == 1)
    for what in happens:
        if what == "message":
            came.set_result(b"asked")
        elif what == "gone":
            task.cancel()
        else:
            messages._until[task] = 0.0
            messages._ring(asyncio.get_running_loop())
    await asyncio.wait([task])
    assert found == [heard, cancelled]
    assert messages.awaited == 0


async def test_a_call_that_ends_without_its_message_is_told_so() -> None:
    async with grpc_serving() as port:
        call = silent(port, f"/{SERVICE}/ModelInfer")
        await call.done_writing()
        ended = await failure(call)
        assert (ended.code(), ended.details()) == (Code.INVALID_ARGUMENT, "the call has no message, expected one")


async def test_strangers_who_send_no_message_keep_nobody_out_but_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grpc_door, "STRANGERS", 3)
    access, tokens = access_of(ann=Role.READER)
    async with grpc_serving(access=access, max_in_flight=1) as port:
        silent_ones = [silent(port, f"/{HEALTH}/Check") for _ in range(3)]
        async with asyncio.timeout(5.0):
            while (refused := await outcome(port.health())) == "SERVING":
                pass  # until the server has heard of all three
        assert refused.code() is Code.RESOURCE_EXHAUSTED
        assert values(await port.infer(metadata=tokens["ann"])) == [[2, 4]]
        for call in silent_ones:
            call.cancel()
        async with asyncio.timeout(5.0):
            while await outcome(port.health()) != "SERVING":
                pass


def silent(port: Port, path: str) -> Any:
    """A call that is begun, and sends no message."""
    return port.channel.stream_unary(path)()


async def outcome(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        return error


async def test_a_tokens_own_limits_hold() -> None:
    access, tokens = access_of("in_flight=1", ann=Role.READER)
    gate = Gate()
    async with grpc_serving(gate, access=access) as port:
        first = port.infer(metadata=tokens["ann"])
        await gate.entered.wait()
        second = await failure(port.infer(metadata=tokens["ann"]))
        assert (second.code(), "1 requests of 'ann' are in flight" in second.details()) == (
            Code.RESOURCE_EXHAUSTED,
            True,
        )
        assert port.service.in_flight == 1
        gate.open.set()
        await first
        assert values(await port.infer(metadata=tokens["ann"])) == [[2, 4]]


def told(caplog: pytest.LogCaptureFixture, logger: str) -> list[tuple[str, str, str, int]]:
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == logger]
    return [(line["who"], line["method"], line["path"], line["status"]) for line in lines]


async def test_calls_and_changes_are_told_without_what_is_in_them(caplog: pytest.LogCaptureFixture) -> None:
    access, tokens = access_of(ann=Role.READER, eve=Role.ADMIN)
    caplog.set_level(logging.INFO, "kapsl_scheduler.access")
    caplog.set_level(logging.INFO, "kapsl_scheduler.audit")

    async def unload(name: str) -> None:
        raise ModelNotLoaded(name)

    gate = Gate()
    async with grpc_serving(gate, access=access, access_log=True, unload=unload) as port:
        gone = port.infer(metadata=tokens["ann"])
        await gate.entered.wait()
        gone.cancel()
        await settled(lambda: len(told(caplog, "kapsl_scheduler.access")) == 1)
        gate.open.set()
        await port.infer(metadata=tokens["ann"])
        await failure(port.infer())
        await failure(port.ask("RepositoryModelUnload", metadata=tokens["eve"], model_name="m"))
        await failure(port.ask("RepositoryModelUnload", metadata=tokens["ann"], model_name="m"))
        await failure(port.channel.unary_unary(f"/{SERVICE}/CudaSharedMemoryStatus")(b"", metadata=tokens["ann"]))
        await settled(lambda: len(told(caplog, "kapsl_scheduler.access")) == 6)

    unloading = f"/{SERVICE}/RepositoryModelUnload"
    changes = [("eve", "GRPC", f"{unloading}/m", 404), ("", "GRPC", unloading, 403)]
    assert told(caplog, "kapsl_scheduler.audit") == changes
    assert told(caplog, "kapsl_scheduler.access") == [
        ("ann", "GRPC", f"/{SERVICE}/ModelInfer/m", 499),
        ("ann", "GRPC", f"/{SERVICE}/ModelInfer/m", 200),
        ("", "GRPC", f"/{SERVICE}/ModelInfer", 401),
        *changes,
        ("ann", "GRPC", f"/{SERVICE}/CudaSharedMemoryStatus", 501),
    ]


# ---------------------------------------------------------------------------------- certificates, the end


@pytest.mark.slow
async def test_certificates_are_those_of_https() -> None:
    authority, other = trustme.CA(), trustme.CA()
    issued, client = authority.issue_cert("127.0.0.1"), authority.issue_cert("ann@example")
    chain, key = issued.cert_chain_pems[0].bytes(), issued.private_key_pem.bytes()
    root = authority.cert_pem.bytes()
    trusting = grpc.ssl_channel_credentials(root)
    async with grpc_serving(certificates=Certificates(chain, key), credentials=trusting) as port:
        assert values(await port.infer()) == [[2, 4]]
        async with (
            grpc.aio.secure_channel(port.server.address, grpc.ssl_channel_credentials(other.cert_pem.bytes())) as wary,
            grpc.aio.insecure_channel(port.server.address) as plain,
        ):
            for channel in (wary, plain):
                assert (await failure(Port(port.http, port.service, port.server, channel).infer())).code() is (
                    Code.UNAVAILABLE
                )
    shown = grpc.ssl_channel_credentials(root, client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes())
    async with grpc_serving(certificates=Certificates(chain, key, root), credentials=shown) as port:
        assert values(await port.infer()) == [[2, 4]]
        async with grpc.aio.secure_channel(port.server.address, trusting) as bare:
            assert (await failure(Port(port.http, port.service, port.server, bare).infer())).code() is Code.UNAVAILABLE


async def test_closing_lets_calls_in_flight_end_and_takes_no_more() -> None:
    gate = Gate()
    async with grpc_serving(gate) as port:
        running = port.infer()
        await gate.entered.wait()
        closing = asyncio.create_task(port.server.close(30.0))
        async with grpc.aio.insecure_channel(port.server.address) as late:
            refused = await failure(Port(port.http, port.service, port.server, late).infer())
        assert refused.code() in (Code.UNAVAILABLE, Code.CANCELLED)  # as far as its connection has come
        assert not closing.done()
        gate.open.set()

        assert values(await running) == [[2, 4]]
        await closing


async def test_what_is_not_done_in_time_is_cut_off() -> None:
    gate = Gate()
    async with grpc_serving(gate) as port:
        running = port.infer()
        await gate.entered.wait()
        await port.server.close(0.01)

        assert (await failure(running)).code() in (Code.UNAVAILABLE, Code.CANCELLED)
        await settled(lambda: port.service.in_flight == 0)
        gate.open.set()


async def test_two_servers_do_not_share_a_port() -> None:
    async with GrpcServer("127.0.0.1", 0) as server:
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{server.port} for gRPC"):
            GrpcServer("127.0.0.1", server.port)


async def test_an_address_of_ipv6_is_written_as_such() -> None:
    try:
        server = GrpcServer("::1", 0)
    except OSError:
        pytest.skip("this machine has no IPv6")
    async with server:
        assert server.address == f"[::1]:{server.port}"


def test_every_call_of_the_protocol_is_offered() -> None:
    from kapsl_scheduler.server.oip_proto import POOL

    methods = {method.name for method in POOL.FindServiceByName(SERVICE).methods}
    offered = set(oip_grpc.OipGrpc(None, reload=double, unload=double).calls())  # type: ignore[arg-type]  # not asked
    memory = {f"{kind}SharedMemory{do}" for kind in ("System", "Cuda") for do in ("Status", "Register", "Unregister")}
    assert offered == (methods - {"ModelStreamInfer"}) | memory
