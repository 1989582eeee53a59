"""The Kapsl socket in process: requests in turn, streams, bounds, clients that go, bytes that are no request."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler import Priority, QueueOverflowPolicy, QueuePolicy, Scheduler
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import InferenceError
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.access import Access, Role, made_token, tokens_of
from kapsl_scheduler.server.kapsl_listen import listening_at
from kapsl_scheduler.server.kapsl_socket import AHEAD, KapslSocket
from kapsl_scheduler.server.model_ids import ModelIds
from kapsl_scheduler.server.service import Service
from tests.protocol.kapsl import CHUNK, ERR, OK, Client, Meta, floats, packet, payload, read_packet
from tests.server.api import Gate, double, settled
from tests.server.text import Words

Function = Callable[..., Any]
LONG_AGO = 3600.0

ONE_TWO = payload(floats(1, 2))


class Served:
    """The socket over models, in the order of their ids."""

    def __init__(self, service: Service, kapsl: KapslSocket, path: Path) -> None:
        self.service = service
        self.kapsl = kapsl
        self.path = path
        self._clients: list[Client] = []

    async def connect(self) -> Client:
        client = Client(*await asyncio.open_unix_connection(self.path))
        self._clients.append(client)
        return client

    def figures(self, name: str = "m") -> dict[int, int]:
        return dict(self.service.figures(name).answers)

    def scheduler(self, name: str = "m") -> Any:
        return self.service.registry.get(name).scheduler

    async def close(self) -> None:
        for client in self._clients:
            client.writer.close()
        await self.kapsl.close(5.0)


def numbers(function: Function) -> CallableEngine:
    return CallableEngine(
        function, name="m", version="3", inputs={"x": ("float32", (None, 2))}, outputs={"y": ("float32", (None, 2))}
    )


@asynccontextmanager
async def serving(
    path: Path, *engines: CallableEngine, max_in_flight: int = 64, queue: int = 64, **limits: Any
) -> AsyncIterator[Served]:
    async def start(engine: CallableEngine) -> Scheduler:
        policy = QueuePolicy(max_size=queue, overflow=QueueOverflowPolicy.DROP_NEWEST)
        return await Scheduler([engine], queue=policy).__aenter__()

    ids = ModelIds({"words": 7})
    async with ModelRegistry(start) as registry:
        for engine in engines or (numbers(double),):
            name = engine.model_info().name
            await registry.load(name, engine)
            ids.assign(name)
        service = Service(registry, version="1", max_in_flight=max_in_flight)
        kapsl = KapslSocket(service, ids, **({"max_body_bytes": 10_000} | limits))
        with listening_at(path / "kapsl.sock") as listener:
            await kapsl.start([listener])
            served = Served(service, kapsl, path / "kapsl.sock")
            try:
                yield served
            finally:
                await served.close()
        assert not kapsl.tasks
        assert service.in_flight == 0


async def test_requests_are_answered_on_one_connection(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await served.connect()

        assert read_packet((await client.ask(0, ONE_TWO))[1]) == ((1, 2), "float32", struct.pack("<2f", 2, 4))
        assert await client.values(0, payload(floats(3, 4), version_1=True)) == [6, 8]
        assert await client.values(0, payload(floats(5, 6), session_id="s", metadata=Meta(request_id="r"))) == [10, 12]
        assert served.figures() == {200: 3}


async def test_tcp_has_the_same_bytes(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        listener = socket.create_server(("127.0.0.1", 0))
        await served.kapsl.start([listener])
        client = Client(*await asyncio.open_connection(*listener.getsockname()))

        over_tcp = await client.ask(0, ONE_TWO)

        client.writer.close()
        assert over_tcp == await (await served.connect()).ask(0, ONE_TWO)


async def test_requests_sent_ahead_are_answered_in_their_order(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate)) as served:
        client = await served.connect()
        for number in range(20):
            client.send(number % 2, payload(floats(number, 0)))
        await gate.entered.wait()
        gate.open.set()

        for number in range(20):
            status, raw = await client.answer()
            if number % 2:
                assert (status, raw) == (ERR, b"Model 1 not found")
            else:
                assert struct.unpack("<2f", read_packet(raw)[2]) == (number * 2, 0)


async def test_a_request_may_come_byte_by_byte(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await served.connect()
        for byte in struct.pack("<III", 0, 1, len(ONE_TWO)) + ONE_TWO:
            client.writer.write(bytes([byte]))
            await asyncio.sleep(0)

        assert (await client.answer())[0] == OK


@pytest.mark.parametrize(
    ("model", "op", "body", "text"),
    [
        (7, 1, ONE_TWO, "Model 7 not found"),
        (0, 3, b"", "Invalid input: op: 3 came, expected 1 (infer) or 2 (stream)"),
        (0, 4, bytes(40), "Invalid input: op: 4 came, expected 1 (infer) or 2 (stream)"),
        (0, 1, b"", "Deserialization error: input.shape: 8 bytes are due, and 0 are left"),
        (0, 2, ONE_TWO[:-9], "Deserialization error: additional_inputs: 8 bytes are due, and 1 are left"),
        (
            0,
            1,
            payload(packet([1, 2], "float32", b"")),
            "Invalid input: input: expected 8 bytes for float32 [1, 2], got 0",
        ),
        (0, 1, payload(floats(1, 2, 3)), "Invalid input: input 'x': axis 1 is 3"),
        (0, 1, payload(floats(1, 2), [("x", floats(1, 2))]), "Invalid input: additional_inputs: 'x' came, which is"),
        (
            0,
            1,
            payload(floats(1, 2), [("z", floats(1)), ("z", floats(1))]),
            "Invalid input: additional_inputs: 'z' came",
        ),
        (0, 1, payload(floats(1, 2), [("z", floats(1))]), "Invalid input: input 'z' is not one of the model's"),
        (0, 2, payload(floats(1, 2, 3)), "Invalid input: input 'x': axis 1 is 3"),
        (0, 1, payload(floats(1, 2), metadata=Meta(timeout_ms=0)), "Invalid input: metadata.timeout_ms: expected 1"),
        (0, 1, payload(floats(1, 2), metadata=Meta(model_version="2")), "Model 0 not found: version '2' of model 'm'"),
        (0, 1, bytes(10_001), "Resource exhausted: the request body has 10001 bytes or more, expected at most 10000"),
    ],
)
async def test_errors_say_what_is_wrong_and_leave_the_connection_open(
    tmp_path: Path, model: int, op: int, body: bytes, text: str
) -> None:
    async with serving(tmp_path) as served:
        client = await served.connect()

        assert (await client.error(model, body, op)).startswith(text)
        assert await client.values(0, ONE_TWO) == [2, 4]


async def test_a_model_that_was_taken_out_is_not_found(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await served.connect()
        assert await client.values(0, ONE_TWO) == [2, 4]
        await served.service.registry.unload("m")

        assert await client.error(0, ONE_TWO) == "Model 0 not found"


async def test_what_the_engine_says_is_told_and_what_it_raises_otherwise_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(x: Any) -> Any:
        raise InferenceError("no luck") if x[0, 0] else RuntimeError("secret")

    async with serving(tmp_path, numbers(fail)) as served:
        client = await served.connect()
        with caplog.at_level(logging.CRITICAL):
            assert await client.error(0, ONE_TWO) == "Inference error: no luck"
            assert (await client.error(0, payload(floats(0, 0)))).startswith("Inference error: ")
        assert served.figures() == {500: 2}


async def test_a_full_queue_and_a_late_answer_have_the_words_of_the_original(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate), queue=1) as served:
        first, second, third = [await served.connect() for _ in range(3)]
        first.send(0, ONE_TWO)
        await gate.entered.wait()
        second.send(0, payload(floats(1, 2), metadata=Meta(timeout_ms=50)))
        await settled(lambda: served.scheduler().statistics().queued == 1)

        assert (await third.error(0, ONE_TWO)).startswith("System overloaded: ")
        status, raw = await second.answer()
        assert (status, raw.split(b":")[0]) == (ERR, b"Timeout")
        gate.open.set()
        assert (await first.answer())[0] == OK


@pytest.mark.parametrize(
    ("op", "priority", "expected"),
    [
        (1, None, Priority.THROUGHPUT),
        (2, None, Priority.LATENCY_CRITICAL),
        (1, 0, Priority.LATENCY_CRITICAL),
        (2, 1, Priority.THROUGHPUT),
        (1, 2, Priority.BACKGROUND),
        (2, 255, Priority.BACKGROUND),
    ],
)
async def test_classes_are_counted_from_0(tmp_path: Path, op: int, priority: int | None, expected: Priority) -> None:
    async with serving(tmp_path) as served:
        client = await served.connect()
        body = payload(floats(1, 2), metadata=Meta(priority=priority, timeout_ms=2**64 - 1))

        assert (await client.ask(0, body, op))[0] == (OK if op == 1 else CHUNK)

        await settled(lambda: served.figures() == {200: 1})
        classes = served.scheduler().statistics().classes
        assert [name for name, books in classes.items() if books.succeeded] == [expected.name.lower()]


async def test_force_cpu_is_asked_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = numbers(double)
    monkeypatch.setattr(engine, "for_cpu", lambda: None)
    async with serving(tmp_path, engine) as served:
        client = await served.connect()
        said = await client.error(0, payload(floats(1, 2), metadata=Meta(force_cpu=True)))

        assert await client.values(0, payload(floats(1, 2), metadata=Meta(force_cpu=False))) == [2, 4]
        assert said == "Invalid input: force_cpu: the engine has no variant for the CPU"


# --------------------------------------------------------------------------------------------- streams


async def count(x: Any) -> AsyncIterator[Any]:
    for number in range(int(x[0, 0])):
        if number == x[0, 1]:
            raise InferenceError("enough")
        yield np.array([[number, number]], np.float32)


async def test_a_stream_is_chunks_and_an_end(tmp_path: Path) -> None:
    async with serving(tmp_path, numbers(count)) as served:
        client = await served.connect()

        chunks, failure = await client.stream(0, payload(floats(3, -1)))
        assert [struct.unpack("<2f", data)[0] for _, _, data in chunks] == [0, 1, 2]
        assert failure is None
        assert await client.stream(0, payload(floats(3, 2))) == (chunks[:2], "Inference error: enough")
        assert await client.stream(0, payload(floats(3, 0))) == ([], "Inference error: enough")
        assert await client.stream(9, payload(floats(3, 0))) == ([], "Model 9 not found")
        assert await client.stream(0, payload(floats(3, -1))) == (chunks, None)
        await settled(lambda: served.figures() == {200: 2, 500: 2})


async def test_a_prompt_is_answered_by_a_model_of_text_with_its_options(tmp_path: Path) -> None:
    words = Words()
    engine = CallableEngine(
        words,
        name="words",
        inputs={"text_input": ("string", (1,)), "temperature": ("float32", (1,)), "max_tokens": ("int32", (1,))},
        outputs={"text_output": ("string", (1,))},
        batched=False,
    )
    async with serving(tmp_path, engine) as served:
        client = await served.connect()
        prompt = packet([1, 1], "string", b"say hello")

        chunks, failure = await client.stream(7, payload(prompt))
        assert ([data for _, _, data in chunks], failure) == ([b"hello0 ", b"hello1 ", b"hello2 "], None)
        meta = Meta(max_new_tokens=1, temperature=0.5)
        assert len((await client.stream(7, payload(prompt, metadata=meta)))[0]) == 1
        option = packet([1], "int32", struct.pack("<i", 2))
        assert len((await client.stream(7, payload(prompt, [("max_tokens", option)])))[0]) == 2
        assert words.asked[1] == {"temperature": 0.5, "max_tokens": 1}
        assert words.prompts == ["say hello"] * 3


async def test_a_client_that_goes_takes_its_requests_back(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate)) as served:
        first, second = await served.connect(), await served.connect()
        first.send(0, ONE_TWO)
        await gate.entered.wait()
        second.send(0, ONE_TWO)
        await settled(lambda: served.scheduler().statistics().queued == 1)
        for client in (first, second):
            client.writer.close()

        await settled(lambda: served.figures() == {499: 2})
        assert served.scheduler().statistics().queued == 0
        gate.open.set()
        assert await (await served.connect()).values(0, ONE_TWO) == [2, 4]
        assert gate.calls == 2


async def test_a_client_that_leaves_a_stream_ends_it(tmp_path: Path) -> None:
    closed = asyncio.Event()

    async def endless(x: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield np.zeros((1, 2), np.float32)
                await asyncio.sleep(0)
        finally:
            closed.set()

    async with serving(tmp_path, numbers(endless)) as served:
        client = await served.connect()
        client.send(0, ONE_TWO, op=2)
        assert (await client.answer())[0] == CHUNK
        client.writer.close()

        async with asyncio.timeout(5.0):
            await closed.wait()
        await settled(lambda: served.figures() == {499: 1})


async def test_a_stream_waits_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    made = 0

    async def large(x: Any) -> AsyncIterator[Any]:
        nonlocal made
        for _ in range(200):
            made += 1
            yield np.zeros((1, 20_000), np.float32)

    engine = CallableEngine(
        large, name="m", inputs={"x": ("float32", (None, 2))}, outputs={"y": ("float32", (None, None))}
    )
    async with serving(tmp_path, engine) as served:
        client = await served.connect()
        client.send(0, ONE_TWO, op=2)
        (connection,) = await one_connection(served)
        await settled(lambda: not connection._writable.is_set())
        before = made
        for _ in range(100):
            await asyncio.sleep(0)

        assert made <= before + 16 < 200  # the buffer between the engine and its reader
        received = 0
        while (await client.answer())[0] == CHUNK:
            received += 1
        assert received == 200


# ---------------------------------------------------------------------------------------------- bounds


async def test_what_is_in_flight_is_bounded_and_what_is_too_much_is_refused(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate), max_in_flight=1) as served:
        first, second = await served.connect(), await served.connect()
        first.send(0, ONE_TWO)
        await gate.entered.wait()

        assert (await second.error(0, ONE_TWO)).startswith("System overloaded: 1 inference requests are in flight")
        gate.open.set()
        assert (await first.answer())[0] == OK
        assert await second.values(0, ONE_TWO) == [2, 4]


async def test_a_request_counts_from_its_head_on(tmp_path: Path) -> None:
    async with serving(tmp_path, max_in_flight=1) as served:
        slow, other = await served.connect(), await served.connect()
        slow.writer.write(struct.pack("<III", 0, 1, len(ONE_TWO)))
        await settled(lambda: served.service.in_flight == 1)

        assert (await other.error(0, ONE_TWO)).startswith("System overloaded: ")
        slow.writer.close()
        await settled(lambda: served.service.in_flight == 0)
        assert await other.values(0, ONE_TWO) == [2, 4]


async def test_a_payload_beyond_the_bound_is_not_kept(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        client = await served.connect()
        client.writer.write(struct.pack("<III", 0, 1, 2**32 - 1) + bytes(1 << 20))
        (connection,) = await one_connection(served)
        await settled(lambda: connection._frame is not None and connection._frame.missing == 2**32 - 1 - (1 << 20))

        assert connection._frame.pieces == []
        assert served.service.in_flight == 0


async def test_what_is_sent_ahead_is_bounded(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate)) as served:
        client = await served.connect()
        for _ in range(200):
            client.send(0, payload(floats(1, 2), metadata=Meta(request_id="r" * 2000)))
        await gate.entered.wait()
        (connection,) = await one_connection(served)
        await settled(lambda: not connection._transport.is_reading())

        assert AHEAD <= len(connection._ahead) < AHEAD + (256 << 10)
        gate.open.set()
        for _ in range(200):
            assert (await client.answer())[0] == OK


async def test_a_connection_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate)) as served:
        half, busy = await served.connect(), await served.connect()
        half.writer.write(struct.pack("<III", 0, 1, 9_000) + bytes(8_000))
        busy.writer.write(2 * (struct.pack("<III", 0, 1, len(ONE_TWO)) + ONE_TWO))
        await gate.entered.wait()
        connections: list[Any] = list(served.kapsl.connections)
        await settled(lambda: any(one._frame and one._frame.pieces for one in connections))
        await settled(lambda: any(one._ahead for one in connections))
        for client in (half, busy):
            client.writer.close()
        await settled(lambda: served.service.in_flight == 0)

        assert [(one._head, one._frame, one._ahead, one._task) for one in connections] == [(b"", None, b"", None)] * 2
        gate.open.set()


async def test_connections_beyond_the_bound_hear_so_and_are_closed(tmp_path: Path) -> None:
    async with serving(tmp_path, max_connections=1) as served:
        first = await served.connect()
        assert await first.values(0, ONE_TWO) == [2, 4]
        second = await served.connect()

        said = await second.error(0, ONE_TWO)
        assert said == "System overloaded: 1 connections are open, which is the limit"
        assert await second.reader.read() == b""
        third = await served.connect()
        await settled(lambda: len(served.kapsl.connections) == 2)
        fourth = await served.connect()
        assert await fourth.reader.read() == b""  # more would be too many to be turned away one by one
        third.writer.close()
        await settled(lambda: len(served.kapsl.connections) == 1)
        assert await first.values(0, ONE_TWO) == [2, 4]


async def test_clients_that_stall_are_let_go(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate), max_connections=4) as served:
        idle, waiting, half_a_head, half_a_body, turned_away = [await served.connect() for _ in range(5)]
        waiting.send(0, ONE_TWO)
        half_a_head.writer.write(b"\x00")
        half_a_body.writer.write(struct.pack("<III", 0, 1, 100))
        await gate.entered.wait()
        await settled(lambda: served.service.in_flight == 2)
        await settled(lambda: any(connection._head for connection in served.kapsl.connections))

        served.kapsl.close_stalled(LONG_AGO)
        assert len(served.kapsl.connections) == 5
        served.kapsl.close_stalled(0.0)

        for client in (half_a_head, half_a_body, turned_away):
            assert await client.reader.read() == b""
        gate.open.set()
        assert (await waiting.answer())[0] == OK
        assert await idle.values(0, ONE_TWO) == [2, 4]


async def test_a_client_that_takes_nothing_is_let_go_and_one_that_takes_something_is_not(tmp_path: Path) -> None:
    async def large(x: Any) -> Any:
        return np.zeros((len(x), 2_000_000), np.float32)

    engine = CallableEngine(
        large, name="m", inputs={"x": ("float32", (None, 2))}, outputs={"y": ("float32", (None, None))}
    )
    async with serving(tmp_path, engine) as served:
        client = await served.connect()
        client.send(0, ONE_TWO)
        (connection,) = await one_connection(served)
        await settled(lambda: not connection._writable.is_set())

        served.kapsl.close_stalled(0.001)  # takes note of how much is unsent
        await client.reader.readexactly(200_000)
        await settled(lambda: connection._transport.get_write_buffer_size() < connection._unsent)
        served.kapsl.close_stalled(0.001)
        assert not connection._transport.is_closing()

        def is_let_go() -> bool:
            served.kapsl.close_stalled(0.001)
            return served.figures() == {499: 1}

        await settled(is_let_go)  # once nothing more goes into the buffers between them


# ---------------------------------------------------------------------------------------------- access


async def test_a_token_is_asked_for_in_each_request(tmp_path: Path) -> None:
    text, line = made_token("ann", Role.READER)
    gate = Gate()
    async with serving(
        tmp_path, numbers(gate), access=Access(tokens_of(f"{line} in_flight=1", "x")), access_log=True
    ) as served:
        client, other = await served.connect(), await served.connect()
        mine = payload(floats(1, 2), metadata=Meta(auth_token=text))

        assert await client.error(0, ONE_TWO) == "Unauthorized"
        assert await client.error(9, ONE_TWO) == "Unauthorized"  # nobody else hears which models there are
        assert await client.error(0, payload(floats(1, 2), metadata=Meta(auth_token=text + "x"))) == "Unauthorized"
        client.send(0, mine)
        await gate.entered.wait()
        assert (await other.error(0, mine)).startswith("System overloaded: 1 requests of 'ann' are in flight")
        gate.open.set()
        assert (await client.answer())[0] == OK
        assert await other.values(0, mine) == [2, 4]


async def test_requests_are_logged_where_that_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kapsl_scheduler.access"):
        async with serving(tmp_path, access_log=True) as served:
            client = await served.connect()
            await client.ask(0, ONE_TWO)
            await client.ask(3, ONE_TWO, op=2)

    assert [line.partition(',"ms"')[0] for line in caplog.messages] == [
        '{"who":"","method":"KAPSL","path":"/models/0/infer","status":200',
        '{"who":"","method":"KAPSL","path":"/models/3/stream","status":404',
    ]


# ------------------------------------------------------------------------------------------- the end


async def test_closing_lets_requests_end_and_takes_no_more(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate)) as served:
        busy, idle, half = [await served.connect() for _ in range(3)]
        busy.send(0, ONE_TWO)
        half.writer.write(bytes(5))
        await gate.entered.wait()
        await settled(lambda: len(served.kapsl.connections) == 3)
        closing = asyncio.create_task(served.kapsl.close(5.0))

        assert await idle.reader.read() == b""
        assert await half.reader.read() == b""
        with pytest.raises(OSError, match=r"refused|No such file"):
            await served.connect()
        gate.open.set()
        assert (await busy.answer())[0] == OK
        assert await busy.reader.read() == b""
        await closing


async def test_closing_has_an_end(tmp_path: Path) -> None:
    gate = Gate()
    async with serving(tmp_path, numbers(gate)) as served:
        client = await served.connect()
        client.send(0, ONE_TWO)
        await gate.entered.wait()

        await served.kapsl.close(0.0)

        assert await client.reader.read() == b""
        assert served.figures() == {499: 1}
        gate.open.set()


# ---------------------------------------------------------------------------------------- hostile bytes


@given(pieces=st.lists(st.binary(max_size=60), max_size=6), size=st.integers(0, 200))
@pytest.mark.slow
def test_a_connection_survives_any_bytes_and_others_are_served(pieces: list[bytes], size: int) -> None:
    """Random frames, each announced as what it is or as longer; then one connection more."""

    async def play(folder: Path) -> None:
        async with serving(folder, max_in_flight=8) as served:
            client = await served.connect()
            for number, piece in enumerate(pieces):
                status, raw = await client.ask(number % 2, piece, op=number)
                assert status == ERR
                assert raw
            client.writer.write(struct.pack("<III", 0, 1, len(ONE_TWO) + size) + ONE_TWO)
            if size == 0:
                assert (await client.answer())[0] == OK
            client.writer.write(bytes(pieces[0] if pieces else b""))
            client.writer.close()
            assert await (await served.connect()).values(0, ONE_TWO) == [2, 4]
            await settled(lambda: served.service.in_flight == 0)

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(play(Path(folder)))


# --------------------------------------------------------------------------------------------- uvloop


@pytest.mark.parametrize(
    "scenario",
    [
        test_requests_are_answered_on_one_connection,
        test_tcp_has_the_same_bytes,
        test_requests_sent_ahead_are_answered_in_their_order,
        test_a_stream_is_chunks_and_an_end,
        test_a_client_that_goes_takes_its_requests_back,
        test_a_client_that_leaves_a_stream_ends_it,
        test_a_stream_waits_for_a_client_that_does_not_read,
        test_what_is_sent_ahead_is_bounded,
        test_connections_beyond_the_bound_hear_so_and_are_closed,
        test_clients_that_stall_are_let_go,
        test_a_client_that_takes_nothing_is_let_go_and_one_that_takes_something_is_not,
        test_closing_lets_requests_end_and_takes_no_more,
        test_closing_has_an_end,
    ],
)
def test_the_same_on_the_loop_of_a_server(
    scenario: Callable[[Path], Coroutine[Any, Any, None]], tmp_path: Path
) -> None:
    """Connections are the loop's business, and a server has another loop than these tests."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(tmp_path))


async def one_connection(served: Served) -> list[Any]:
    await settled(lambda: len(served.kapsl.connections) == 1)
    return list(served.kapsl.connections)
