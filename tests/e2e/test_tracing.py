"""Spans leave the real process by OTLP, and reach a collector."""

from __future__ import annotations

import asyncio
import gzip
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import run, serving

pytestmark = pytest.mark.slow

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Takes what is sent to it, as far as an exporter of traces needs."""

    def __init__(self) -> None:
        self.url = ""
        self.paths: set[str] = set()
        self.spans: list[Span] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                start, *lines = head.strip().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(headers["content-length"]))
                if headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                self.paths.add(start.split()[1])
                for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for of_scope in of_resource.scope_spans:
                        self.spans += of_scope.spans
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
        except asyncio.IncompleteReadError:
            writer.close()


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    server = await asyncio.start_server(collector.answer, "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        collector.url = f"http://{host}:{port}/v1/traces"
        yield collector


async def test_the_spans_of_a_request_reach_a_collector_before_the_process_ends() -> None:
    body = b'{"inputs":[{"name":"pixels","shape":[1,64],"datatype":"FP32","data":[' + b"0," * 63 + b"0]}]}"
    async with collecting() as collector:
        options = ("--tracing-exporter", "otlp", "--tracing-endpoint", collector.url, "--cron-store", "memory")
        async with serving(PACKAGE, *options, "--tracing-sample-ratio", "0") as server:
            async with httpx.AsyncClient(base_url=server.url) as client:
                for flags in ("00", "01"):
                    headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
                    answer = await client.post("/v2/models/digits/infer", content=body, headers=headers)
                    assert answer.status_code == 200
            server.send(signal.SIGTERM)
            assert await server.end() == (0, "")

    assert collector.paths == {"/v1/traces"}
    by_name = {span.name: span for span in collector.spans}
    assert sorted(by_name) == ["POST /v2/models/{model}/infer", "batch", "engine call", "queue"]
    assert len(collector.spans) == 4
    root = by_name["POST /v2/models/{model}/infer"]
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    assert by_name["queue"].parent_span_id == by_name["engine call"].parent_span_id == root.span_id
    assert [link.span_id for link in by_name["batch"].links] == [root.span_id]


async def test_a_collector_that_is_not_there_harms_no_request_and_does_not_keep_the_process() -> None:
    async with collecting() as collector:
        nowhere = collector.url
    options = ("--tracing-exporter", "otlp", "--tracing-endpoint", nowhere, "--cron-store", "memory")
    async with serving(PACKAGE, *options) as server:
        async with httpx.AsyncClient(base_url=server.url) as client:
            assert (await client.post("/v2/models/digits/infer", content=b"{}")).status_code == 400
        server.send(signal.SIGTERM)
        code, written = await server.end()

    assert code == 0
    assert "Failed to export" in written


async def test_a_server_that_traces_to_its_console_says_so_and_an_unknown_exporter_is_refused() -> None:
    async with serving(PACKAGE, "--tracing-exporter", "console", "--cron-store", "memory") as server:
        async with httpx.AsyncClient(base_url=server.url) as client:
            await client.post("/v2/models/digits/infer", content=b"{}")
        server.send(signal.SIGTERM)
        code, written = await server.end()
    assert code == 0
    assert '"http.response.status_code": 400' in written

    code, _, written = await run("serve", PACKAGE, "--tracing-exporter", "smoke")
    assert code == 2
    assert "--tracing-exporter: Expected one of none, console, otlp, got 'smoke'" in written
