"""Traces: the spans that a request through the server leaves behind, and those that it does not."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio
import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client.openmetrics import parser as openmetrics

from kapsl_scheduler import CronJob, CronScheduler
from kapsl_scheduler.server.inference import InferHead
from kapsl_scheduler.server.tracing import Tracing
from tests.server.api import Gate, Server, body_of, double, serving, until
from tests.server.grpc_api import grpc_serving, request_of
from tests.server.test_door import all_answered, infer, wired
from tests.server.text import Stream, serving_text

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ROUTE = "POST /v2/models/{model}/infer"
RPC = "inference.GRPCInferenceService/ModelInfer"
STREAM_RPC = "inference.GRPCInferenceService/ModelStreamInfer"


class Spans:
    """Where spans go, and those that came."""

    def __init__(self, **options: Any) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self.exporter), version="1.2.3", **options)

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def below(self, parent: ReadableSpan) -> list[str]:
        return [s.name for s in self.all if s.parent is not None and s.parent.span_id == parent.context.span_id]


def never() -> float:
    raise AssertionError("nobody asked whether to sample it")


async def traced(server: Server, traceparent: str, data: Any = (1, 2), **keys: Any) -> int:
    path, headers = "/v2/models/m/infer", {"traceparent": traceparent}
    return (await server.client.post(path, content=body_of(data, **keys), headers=headers)).status_code


async def test_a_request_is_one_tree_from_the_door_to_the_engine() -> None:
    spans = Spans()
    async with serving(tracing=spans.tracing) as server:
        answer = await server.infer(parameters={"priority": 2}, id="mine")
        assert (answer.status_code, answer.json()["id"]) == (200, "mine")

    root = spans.one(ROUTE)
    assert (root.kind, root.parent, root.status.status_code) == (SpanKind.SERVER, None, StatusCode.UNSET)
    assert dict(root.attributes or {}) == {
        "http.request.method": "POST",
        "http.route": "/v2/models/{model}/infer",
        "http.response.status_code": 200,
        "kapsl.model": "m",
        "kapsl.model.version": "3",
        "kapsl.priority": "throughput",
        "kapsl.rows": 1,
    }
    assert spans.below(root) == ["queue", "engine call"]
    queue, call, batch = spans.one("queue"), spans.one("engine call"), spans.one("batch")
    moments = [root.start_time, queue.start_time, queue.end_time, call.end_time, root.end_time]
    assert moments == sorted(moments, key=lambda moment: moment or 0)
    assert queue.end_time == call.start_time
    assert {span.context.trace_id for span in (queue, call)} == {root.context.trace_id}
    assert dict(call.attributes or {}) == {"kapsl.batch.rows": 1, "kapsl.batch.requests": 1}
    assert [link.context for link in batch.links] == [root.context]
    assert [link.context for link in call.links] == [batch.context]
    assert root.resource.attributes["service.version"] == "1.2.3"


async def test_a_batch_is_linked_to_all_that_it_served_and_they_to_it() -> None:
    gate, spans = Gate(), Spans()
    async with serving(gate, tracing=spans.tracing) as server:
        first = asyncio.create_task(server.infer())
        await gate.entered.wait()
        rest = [asyncio.create_task(server.infer()) for _ in range(3)]
        await until(lambda: server.scheduler.statistics().queued == 3)
        gate.open.set()
        await asyncio.gather(first, *rest)

    lone, shared = spans.named("batch")
    roots = {span.context.span_id for span in spans.named(ROUTE)}
    assert [len(batch.links) for batch in (lone, shared)] == [1, 3]
    assert {link.context.span_id for batch in (lone, shared) for link in batch.links} == roots
    assert (shared.attributes or {})["kapsl.batch.rows"] == 3
    calls = [span for span in spans.named("engine call") if span.links[0].context == shared.context]
    assert len({span.context.trace_id for span in calls}) == 3


@pytest.mark.parametrize("ratio", [0.0, 1.0])
@pytest.mark.parametrize("sampled", [True, False])
async def test_who_is_traced_by_its_caller_is_part_of_that_trace_or_not_sampled(ratio: float, sampled: bool) -> None:
    spans = Spans(sample_ratio=ratio, draw=never)
    async with serving(tracing=spans.tracing) as server:
        assert await traced(server, f"00-{TRACE}-{PARENT}-0{int(sampled)}") == 200

    if not sampled:
        assert spans.all == []
        return
    root = spans.one(ROUTE)
    assert root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert root.parent.is_remote
    assert len(spans.below(root)) == 2


@pytest.mark.parametrize("header", ["", "00-xyz", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", "ü"])
async def test_a_traceparent_that_is_none_is_passed_over(header: str) -> None:
    spans = Spans()
    async with serving(tracing=spans.tracing) as server:
        response = await server.client.post(
            "/v2/models/m/infer", content=body_of(), headers={b"traceparent": header.encode("latin-1")}
        )

    assert response.status_code == 200
    assert spans.one(ROUTE).parent is None


async def test_the_ratio_decides_over_the_others_and_those_left_out_make_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = iter([0.1, 0.6, 0.4, 0.9])
    spans = Spans(sample_ratio=0.5, draw=lambda: next(drawn))
    begun: list[str] = []
    start: Callable[..., Any] = spans.tracing.tracer.start_span

    def counted(name: str, *arguments: Any, **keys: Any) -> Any:
        begun.append(name)
        return start(name, *arguments, **keys)

    monkeypatch.setattr(spans.tracing.tracer, "start_span", counted)
    async with serving(tracing=spans.tracing) as server:
        for count in (4, 4, 8, 8):
            await server.infer()
            assert len(begun) == count
        assert server.scheduler.statistics().succeeded == 4


async def test_without_tracing_no_request_is_named_and_nobody_observes() -> None:
    async with serving() as server:
        assert server.api.inference.service.tracing is None
        assert server.scheduler._settlement._observer is None
        await server.infer()


async def test_a_failed_call_is_an_error_in_all_of_its_spans() -> None:
    async def broken(x: Any) -> Any:
        raise ValueError("no")

    spans = Spans()
    async with serving(broken, tracing=spans.tracing) as server:
        assert (await server.infer()).status_code == 500

    root = spans.one(ROUTE)
    assert (root.attributes or {})["error.type"] == "500"
    assert {spans.one(name).status.status_code for name in (ROUTE, "engine call", "batch")} == {StatusCode.ERROR}
    assert spans.tracing.active == {}


async def test_who_runs_again_after_a_failed_batch_has_a_span_for_each_call() -> None:
    gate = Gate()

    async def picky(x: Any) -> Any:
        await gate(x)
        if (x == 13).any() and len(x) > 1:
            raise ValueError("no")
        return x

    spans = Spans()
    async with serving(picky, tracing=spans.tracing) as server:
        first = asyncio.create_task(server.infer())
        await gate.entered.wait()
        rest = [asyncio.create_task(server.infer((value, value))) for value in (13, 2)]
        await until(lambda: server.scheduler.statistics().queued == 2)
        gate.open.set()
        assert {answer.status_code for answer in await asyncio.gather(first, *rest)} == {200}

    roots = {tuple(spans.below(root)) for root in spans.named(ROUTE)}
    assert roots == {("queue", "engine call"), ("queue", "engine call", "engine call")}
    assert len(spans.named("batch")) == 4
    for queue in spans.named("queue"):  # which ends where the first call begins
        calls = [span.start_time for span in spans.named("engine call") if span.parent == queue.parent]
        assert queue.end_time == min(start or 0 for start in calls)


@pytest.mark.parametrize(
    ("keys", "status", "below"),
    [({"data": "wrong"}, 400, []), ({"inputs": []}, 400, []), ({"parameters": {"timeout": 1}}, 504, ["queue"])],
)
async def test_who_never_reaches_the_engine_has_no_span_of_it(
    keys: dict[str, Any], status: int, below: list[str]
) -> None:
    spans = Spans()
    async with serving(tracing=spans.tracing) as server:
        assert (await server.infer(**keys)).status_code == status

    root = spans.one(ROUTE)
    assert (root.attributes or {})["http.response.status_code"] == status
    assert spans.below(root) == below


async def test_a_client_that_goes_away_ends_its_trace() -> None:
    gate, spans = Gate(), Spans()
    async with serving(gate, tracing=spans.tracing) as server:
        call = asyncio.create_task(server.api.inference.answer(InferHead("m", "", {}), body_of()))
        await gate.entered.wait()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        gate.open.set()

    root = spans.one(ROUTE)
    assert (root.attributes or {})["http.response.status_code"] == 499
    assert spans.below(root) == ["queue"]
    assert spans.tracing.active == {}


@pytest.mark.parametrize("header", [(), (b"content-encoding: gzip",)])
async def test_a_client_that_sends_and_goes_at_once_leaves_no_trace_open(header: tuple[bytes, ...]) -> None:
    spans, begun = Spans(), 0

    class Counting(SimpleSpanProcessor):
        def on_start(self, *arguments: Any, **options: Any) -> None:
            nonlocal begun
            begun += 1

    tracing = Tracing(Counting(spans.exporter), version="1.2.3")
    async with serving(tracing=tracing) as server, wired(server) as (connection, wire):
        connection.data_received(infer([1, 2], *header))
        wire.lost = True
        connection.connection_lost(None)
        await all_answered(connection, server)
    assert begun == len(spans.all)


async def test_a_sampled_request_is_refused_what_any_other_is() -> None:
    async with serving(tracing=Spans().tracing) as server:
        answer = await server.infer(outputs=[{"name": "z"}])
        assert server.scheduler.statistics().offered == 0
    assert answer.status_code == 400
    assert "output 'z' was asked for, expected one of 'y'" in answer.json()["error"]


async def test_a_sampled_stream_has_its_own_priority_and_timeout() -> None:
    async with grpc_serving(tracing=Spans().tracing) as port:
        streaming = await port.registry.load("s", counting)
        call = port.stream()
        await call.write(request_of((2, 0), model="s", parameters={"priority": {"int64_param": 3}}))
        await call.write(request_of((2, 0), model="s", parameters={"timeout": {"int64_param": 1}}))
        await call.done_writing()
        answers = [answer async for answer in call]
        figures: Any = streaming.scheduler.statistics()
    assert figures.classes["background"].succeeded == 1
    assert [bool(answer.error_message) for answer in answers].count(True) == 1


async def test_traced_answers_are_exemplars_of_their_buckets() -> None:
    spans = Spans()
    async with serving(tracing=spans.tracing) as server:
        await server.infer()
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        page = (await server.client.get("/metrics", headers=accept)).text
        plain = (await server.client.get("/metrics")).text

    families = {family.name: family for family in openmetrics.text_string_to_metric_families(page)}
    samples = families["kapsl_request_latency_seconds"].samples
    (sample,) = [sample for sample in samples if sample.exemplar is not None]
    trace_id = f"{spans.one(ROUTE).context.trace_id:032x}"
    assert sample.labels["class"] == "latency_critical"
    assert sample.exemplar.labels == {"trace_id": trace_id}
    assert 0 < sample.exemplar.value <= float(sample.labels["le"]) < 4 * sample.exemplar.value
    assert trace_id not in plain


async def test_a_run_of_a_job_is_a_span() -> None:
    spans = Spans()
    async with serving(double) as server, CronScheduler(server.scheduler) as cron:
        following = asyncio.create_task(spans.tracing.follow(cron.events()))
        await asyncio.sleep(0)
        await cron.register(CronJob("night", "0 0 3 * * *", [[1.0, 2.0]]))
        await cron.trigger("night")
        await until(lambda: cron.statistics().outcomes != {})
        run = (await cron.runs("night"))[0]
        await cron.close(0.0)
        await following

    span = spans.one("job night")
    attributes = dict(span.attributes or {})
    assert (attributes["kapsl.run"], attributes["kapsl.run.state"]) == (run.number, "succeeded")
    assert run.started is not None
    assert span.start_time == round(run.started.astimezone(dt.UTC).timestamp() * 1e6) * 1000
    assert span.status.status_code is StatusCode.UNSET


async def test_the_state_of_the_callers_trace_goes_with_it() -> None:
    spans = Spans()
    async with serving(tracing=spans.tracing) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=x"}
        await server.client.post("/v2/models/m/infer", content=body_of(), headers=headers)

    assert spans.one(ROUTE).context.trace_state.get("vendor") == "x"


async def test_a_batch_of_which_nobody_is_traced_has_no_span() -> None:
    drawn = iter([1.0, 0.0])
    gate, spans = Gate(), Spans(sample_ratio=0.5, draw=lambda: next(drawn))
    async with serving(gate, tracing=spans.tracing) as server:
        untraced = asyncio.create_task(server.infer())
        await gate.entered.wait()
        traced = asyncio.create_task(server.infer())
        await until(lambda: server.scheduler.statistics().queued == 1)
        gate.open.set()
        await asyncio.gather(untraced, traced)

    assert len(spans.named("batch")) == 1
    assert spans.one("batch").links[0].context == spans.one(ROUTE).context


async def test_a_run_that_fails_is_an_error_and_one_that_never_began_is_no_span() -> None:
    async def broken(x: Any) -> Any:
        raise ValueError("no")

    spans = Spans()
    async with serving(broken) as server, CronScheduler(server.scheduler) as cron:
        following = asyncio.create_task(spans.tracing.follow(cron.events()))
        await asyncio.sleep(0)
        await cron.register(CronJob("night", "0 0 3 * * *", [[1.0, 2.0]]))
        await cron.trigger("night")
        await until(lambda: cron.statistics().outcomes != {})
        (run,) = await cron.runs("night")
        await cron.close(0.0)
        await following
    spans.tracing._ran(msgspec.structs.replace(run, started=None))

    span = spans.one("job night")
    assert span.status.status_code is StatusCode.ERROR
    assert "no" in (span.status.description or "")
    assert len(spans.all) == 1


# ------------------------------------------------------------------------------------------- other ways to ask


async def test_a_call_over_grpc_is_the_same_tree_in_its_callers_trace() -> None:
    spans = Spans(draw=never)
    async with grpc_serving(tracing=spans.tracing) as port:
        metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"), ("tracestate", "vendor=x"))
        await port.infer(metadata=metadata, id="mine", parameters={"priority": {"int64_param": 2}})

    root = spans.one(RPC)
    assert root.parent is not None
    assert (f"{root.context.trace_id:032x}", f"{root.parent.span_id:016x}") == (TRACE, PARENT)
    assert root.context.trace_state.get("vendor") == "x"
    assert dict(root.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "kapsl.model": "m",
        "kapsl.model.version": "3",
        "kapsl.priority": "throughput",
        "kapsl.rows": 1,
    }
    assert spans.below(root) == ["queue", "engine call"]
    assert [link.context for link in spans.one("batch").links] == [root.context]


async def test_the_ratio_decides_over_calls_of_grpc_too() -> None:
    drawn = iter([0.6, 0.4])
    spans = Spans(sample_ratio=0.5, draw=lambda: next(drawn))
    async with grpc_serving(tracing=spans.tracing) as port:
        await port.infer()
        assert spans.all == []
        await port.infer()

    assert len(spans.named(RPC)) == 1


@pytest.mark.parametrize(
    ("asked", "code", "status"),
    [({"model": "nope"}, "NOT_FOUND", StatusCode.UNSET), ({"data": (13, 13)}, "INTERNAL", StatusCode.ERROR)],
)
async def test_a_call_over_grpc_that_fails_says_how(asked: dict[str, Any], code: str, status: StatusCode) -> None:
    async def broken(x: Any) -> Any:
        raise ValueError("no")

    spans = Spans()
    async with grpc_serving(broken, tracing=spans.tracing) as port:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await port.infer(**asked)

    root = spans.one(RPC)
    attributes = dict(root.attributes or {})
    assert caught.value.code().name == attributes["error.type"] == code
    assert attributes["rpc.grpc.status_code"] == caught.value.code().value[0]
    assert root.status.status_code is status
    assert spans.tracing.active == {}


async def counting(x: Any) -> AsyncIterator[Any]:
    for number in range(int(x[0, 0])):
        yield x * 0 + number


async def test_each_request_of_a_grpc_stream_is_a_tree_whether_it_has_one_answer_or_several() -> None:
    spans = Spans()
    async with grpc_serving(tracing=spans.tracing) as port:
        await port.registry.load("s", counting)
        call = port.stream()
        for model in ("m", "s", "nope"):
            await call.write(request_of((2, 2), model=model))
        await call.done_writing()
        assert len([answer async for answer in call]) == 4

    roots = {(span.attributes or {})["kapsl.model"]: span for span in spans.named(STREAM_RPC)}
    below = {model: spans.below(root) for model, root in roots.items()}
    assert below == {"m": ["queue", "engine call"], "s": ["queue", "engine call"], "nope": []}
    assert (roots["nope"].attributes or {})["error.type"] == "NOT_FOUND"


TEXTS: list[tuple[str, dict[str, Any]]] = [
    ("/v2/models/{model}/generate", {"text_input": "a", "temperature": 1.0, "max_tokens": 2}),
    ("/v2/models/{model}/generate_stream", {"text_input": "a", "temperature": 1.0, "max_tokens": 2}),
    ("/v1/chat/completions", {"model": "words", "messages": [{"role": "user", "content": "a"}]}),
    ("/v1/chat/completions", {"model": "words", "messages": [{"role": "user", "content": "a"}], "stream": True}),
]


@pytest.mark.parametrize(("route", "asked"), TEXTS)
async def test_a_request_for_text_is_the_same_tree(route: str, asked: dict[str, Any]) -> None:
    spans = Spans(draw=never)
    async with serving_text(spans.tracing) as server:
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        answer = await server.client.post(route.format(model="words"), json=asked, headers=headers)
        assert answer.status_code == 200

    root = spans.one(f"POST {route}")
    assert f"{root.context.trace_id:032x}" == TRACE
    attributes = dict(root.attributes or {})
    assert (attributes["http.response.status_code"], attributes["kapsl.model"]) == (200, "words")
    assert spans.below(root) == ["queue", "engine call"]


@pytest.mark.parametrize(
    ("path", "asked", "status"),
    [
        ("/v2/models/nope/generate", {}, 404),
        ("/v2/models/words/generate", {"text_input": 5}, 400),
        ("/v1/embeddings", {"model": "vectors", "input": "a"}, 200),
        ("/v1/embeddings", {"model": "words", "input": "a"}, 400),
    ],
)
async def test_a_request_for_text_tells_its_status(path: str, asked: dict[str, Any], status: int) -> None:
    spans = Spans()
    async with serving_text(spans.tracing) as server:
        assert (await server.client.post(path, json=asked)).status_code == status

    (root,) = [span for span in spans.all if span.kind is SpanKind.SERVER]
    assert (root.attributes or {})["http.response.status_code"] == status
    assert spans.below(root) == []


async def test_a_stream_of_text_that_its_client_leaves_ends_its_trace_and_waited_only_for_its_first_piece() -> None:
    spans = Spans()
    async with serving_text(spans.tracing) as server:
        server.words.gate = asyncio.Event()
        path, asked = TEXTS[1]
        stream = Stream(server.api, path.format(model="words"), json.dumps(asked).encode())
        await stream.until(b"a0 ")
        first = time.time_ns()
        stream.gone.set()
        await stream.task
        server.words.gate.set()

    root = spans.one(f"POST {path}")
    assert (root.attributes or {})["http.response.status_code"] == 499
    queue = spans.one("queue")
    assert spans.below(root) == ["queue"]
    assert queue.end_time is not None
    assert root.end_time is not None
    assert queue.end_time <= first < root.end_time
    assert spans.tracing.active == {}


async def test_a_request_for_text_that_finds_no_room_ends_its_trace() -> None:
    spans = Spans()
    async with serving_text(spans.tracing) as server:
        server.service.max_in_flight = 0
        assert (await server.client.post("/v2/models/words/generate", json={})).status_code == 429

    assert (spans.all[0].attributes or {})["http.response.status_code"] == 429
