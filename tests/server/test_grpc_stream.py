"""`ModelStreamInfer` in process: one answer and several, errors within a stream, order, bounds, the end."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from kapsl_scheduler.server import oip_stream
from kapsl_scheduler.server.access import Role
from kapsl_scheduler.server.oip_proto import Message
from tests.server.api import Gate, settled
from tests.server.grpc_api import SERVICE, grpc_serving, request_of, values
from tests.server.test_grpc import access_of

EMPTY = {"triton_enable_empty_final_response": {"bool_param": True}}


def final(answer: Message) -> bool:
    said: bool = answer.infer_response.parameters["triton_final_response"].bool_param
    return said


async def answers(call: Any, *requests: Message) -> list[Message]:
    """Those of a stream that sends these requests and then no more."""
    for request in requests:
        await call.write(request)
    await call.done_writing()
    return [answer async for answer in call]


async def test_requests_are_answered_in_their_order_each_with_its_last_answer() -> None:
    async with grpc_serving(max_batch_size=1) as port:
        got = await answers(port.stream(), *(request_of((n, n), id=str(n)) for n in range(20)))

        assert [(one.infer_response.id, values(one.infer_response)) for one in got] == [
            (str(n), [[2 * n, 2 * n]]) for n in range(20)
        ]
        assert all(final(one) for one in got)
        assert port.service.figures("m").success == 20


async def test_a_streamed_request_has_its_own_priority_and_timeout() -> None:
    async with grpc_serving() as port:
        streaming = await port.registry.load("s", counting)
        asked: dict[str, Any] = {"priority": {"int64_param": 3}}
        assert len(await answers(port.stream(), request_of((2, 0), model="s", parameters=asked))) >= 2
        figures: Any = streaming.scheduler.statistics()
        assert figures.classes["background"].succeeded == 1
        asked = {"timeout": {"int64_param": 1}}
        late = await answers(port.stream(), request_of((2, 0), model="s", parameters=asked))
        assert "deadline" in late[-1].error_message


async def test_an_answer_that_is_ready_early_waits_for_those_before_it() -> None:
    gate = Gate()
    order: list[float] = []

    async def noted(x: Any) -> Any:
        order.append(float(x[0, 0]))
        return await gate(x)

    async with grpc_serving(noted, max_batch_size=1) as port:
        await port.registry.load("s", counting)
        call = port.stream()
        await call.write(request_of((1, 1), id="first"))
        await gate.entered.wait()
        await call.write(request_of((2, 2), id="last", parameters={"priority": {"int64_param": 3}}))
        await call.write(request_of((1, 0), id="streamed", model="s"))  # which keeps no order, and changes none
        await call.write(request_of((3, 3), id="live", parameters={"priority": {"int64_param": 1}}))
        await call.write(request_of(id="wrong", model="nope"))
        await settled(lambda: port.http.scheduler.statistics().queued == 2)
        assert (await call.read()).infer_response.id == "streamed"
        gate.open.set()
        await call.done_writing()

        assert [(await call.read()).infer_response.id for _ in range(4)] == ["first", "last", "live", "wrong"]
        assert order == [1, 3, 2]


async def counting(x: Any) -> AsyncIterator[Any]:
    for number in range(int(x[0, 0])):
        yield x * 0 + number


async def test_a_model_that_streams_answers_several_times_and_then_says_that_it_is_done() -> None:
    async with grpc_serving(counting) as port:
        config = (await port.ask("ModelConfig", name="m")).config
        assert config.model_transaction_policy.decoupled

        got = await answers(port.stream(), request_of((3, 0), id="7", parameters=EMPTY))

        assert [values(one.infer_response) for one in got[:-1]] == [[[0, 0]], [[1, 1]], [[2, 2]]]
        assert [final(one) for one in got] == [False, False, False, True]
        assert (got[-1].infer_response.id, len(got[-1].infer_response.outputs)) == ("7", 0)
        assert (port.service.figures("m").success, port.service.figures("m").fail) == (1, 0)


async def test_the_empty_last_answer_is_only_for_those_who_ask_for_it() -> None:
    async with grpc_serving(counting) as port:
        got = await answers(port.stream(), request_of((2, 0)))

        assert [final(one) for one in got] == [False, False]


async def test_what_is_wrong_with_a_request_is_an_answer_and_the_stream_goes_on() -> None:
    async with grpc_serving() as port:
        got = await answers(
            port.stream(),
            request_of(id="1", model="nope"),
            request_of(id="2", outputs=[{"name": "z"}]),
            request_of(id="3"),
        )

        assert [(one.infer_response.id, final(one)) for one in got] == [("1", True), ("2", True), ("3", True)]
        assert [bool(one.error_message) for one in got] == [True, True, False]
        assert "model 'nope' is not loaded" in got[0].error_message
        codes = [one.infer_response.parameters["kapsl_code"].string_param for one in got[:2]]
        assert codes == ["model_not_loaded", "invalid_input"]
        assert port.service.figures("m").answers == {400: 1, 200: 1}


async def test_a_wrong_output_of_a_stream_is_refused_before_it_begins() -> None:
    async with grpc_serving(counting) as port:
        (got,) = await answers(port.stream(), request_of((2, 0), outputs=[{"name": "z"}]))

        assert "output 'z' was asked for" in got.error_message
        assert port.http.scheduler.statistics().admitted == 0


async def test_an_error_in_the_middle_of_an_answer_ends_that_answer() -> None:
    async def broken(x: Any) -> AsyncIterator[Any]:
        yield x
        raise RuntimeError("the disk is full")

    async with grpc_serving(broken) as port:
        first, second = await answers(port.stream(), request_of(parameters=EMPTY))

        assert (values(first.infer_response), final(first)) == ([[1, 2]], False)
        assert ("the disk is full" in second.error_message, final(second)) == (True, True)
        assert port.service.figures("m").fail == 1


async def test_what_is_no_error_of_ours_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret")

    monkeypatch.setattr(oip_stream, "encode_response", broken)
    async with grpc_serving() as port:
        (got,) = await answers(port.stream(), request_of())

        assert got.error_message == "the server failed; its log says why"
        assert "secret" in caplog.text


async def test_a_stream_is_read_no_further_than_so_many_requests_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_stream, "AHEAD", 2)
    gate = Gate()
    async with grpc_serving(gate) as port:
        call = port.stream()
        for number in range(5):
            await call.write(request_of(id=str(number)))
        await settled(lambda: port.service.in_flight == 2)
        await port.ask("ServerLive")  # what was sent before has arrived by now
        assert port.service.in_flight == 2
        gate.open.set()
        await call.done_writing()

        assert [answer.infer_response.id async for answer in call] == ["0", "1", "2", "3", "4"]


async def test_a_client_that_goes_away_takes_its_requests_back() -> None:
    gate = Gate()
    async with grpc_serving(gate) as port:
        call = port.stream()
        await call.write(request_of())
        await gate.entered.wait()
        await call.write(request_of())
        await settled(lambda: port.service.in_flight == 2)
        call.cancel()
        await settled(lambda: port.service.in_flight == 0)
        gate.open.set()

        assert port.service.figures("m").answers == {499: 2}


async def test_a_client_that_leaves_a_model_streaming_ends_its_stream() -> None:
    closed = asyncio.Event()

    async def endless(x: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield x
                await asyncio.sleep(0)
        finally:
            closed.set()

    async with grpc_serving(endless) as port:
        call = port.stream()
        await call.write(request_of())
        assert values((await call.read()).infer_response) == [[1, 2]]
        call.cancel()
        async with asyncio.timeout(5.0):
            await closed.wait()
        await settled(lambda: port.service.in_flight == 0)


async def test_closing_answers_what_has_come_and_then_ends_the_stream() -> None:
    gate = Gate()
    async with grpc_serving(gate) as port:
        call = port.stream()
        await call.write(request_of(id="7"))
        await gate.entered.wait()
        port.service.draining = True
        closing = asyncio.create_task(port.server.close(30.0))
        gate.open.set()

        assert (await call.read()).infer_response.id == "7"
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is closing")
        await closing


async def test_a_stream_may_begin_while_the_server_only_says_that_it_is_not_ready() -> None:
    async with grpc_serving() as port:
        port.service.draining = True
        call = port.stream()
        await call.write(request_of(id="7"))
        assert (await call.read()).infer_response.id == "7"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_streams_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_stream, "MOST", 1)
    async with grpc_serving() as port:
        first = port.stream()
        await first.write(request_of())
        await first.read()
        second = port.stream()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await second.read()
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await first.done_writing()
        assert await first.read() is grpc.aio.EOF


async def test_a_tokens_limits_hold_for_each_request_of_a_stream(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kapsl_scheduler.access")
    access, tokens = access_of("rate=1", ann=Role.READER)
    async with grpc_serving(access=access, access_log=True) as port:
        got = await answers(port.stream(metadata=tokens["ann"]), request_of(id="1"), request_of(id="2"))

        assert [one.error_message for one in got] == ["", "'ann' may ask 1 times a second"]
        await settled(lambda: len(caplog.records) == 3)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    path = f"/{SERVICE}/ModelStreamInfer"
    assert sorted((line["who"], line["path"], line["status"]) for line in lines) == [
        ("ann", path, 200),
        ("ann", f"{path}/m", 200),
        ("ann", f"{path}/m", 429),
    ]


async def test_a_long_message_is_read_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oip_stream, "LONG_BODY", 10)
    monkeypatch.setattr("kapsl_scheduler.server.oip_grpc.LONG_BODY", 10)
    async with grpc_serving() as port:
        (got,) = await answers(port.stream(), request_of())
        assert values(got.infer_response) == [[2, 4]]
        assert values(await port.infer(np.ones((3, 2)))) == [[2, 2]] * 3
