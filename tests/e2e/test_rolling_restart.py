"""Servers that end while their clients follow readiness: nobody loses a request."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.errors import EngineError
from tests.e2e.process import PATIENCE, Process, build_working_model, serving, until, work

pytestmark = pytest.mark.slow

GRACE = 0.6  # seconds: a few looks at readiness
RESTARTED = ("--ready-grace", str(GRACE), "--no-socket")  # only one server could have the socket
LOOK_EVERY = 0.15  # longer than a server without grace takes to close its door
LONG = 1600  # turns of the working model: some tenths of a second


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_working_model(tmp_path_factory.mktemp("model") / "work.onnx")


class Balancer:
    """Sends each request to the next server that was ready when it last looked, and never a second time."""

    def __init__(self, clients: Sequence[Client]) -> None:
        self._clients = clients
        self._turn = 0
        self.ready: set[int] = set()
        self.answered = [0] * len(clients)
        self.values: list[float] = []
        self.running = True
        self._moved = asyncio.Event()

    async def watch(self, number: int) -> None:
        while self.running:
            try:
                await self._clients[number].get("/v2/health/ready")
            except EngineError:
                self.ready.discard(number)
            else:
                self.ready.add(number)
            self._moved.set()
            await asyncio.sleep(LOOK_EVERY)

    async def send(self, first: int, step: int) -> None:
        """One caller: distinct values, whose answers are kept."""
        value = first
        while self.running:
            if not self.ready:
                raise AssertionError("no server is ready")
            self._turn += 1
            ready = sorted(self.ready)
            number = ready[self._turn % len(ready)]
            reply = await self._clients[number].infer("work", work(value, turns=2))
            assert reply.outputs["y"].item() == value
            self.answered[number] += 1
            self.values.append(value)
            self._moved.set()
            value += step

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._moved.clear()
                await self._moved.wait()

    async def until_answered(self, number: int, more: int) -> None:
        enough = self.answered[number] + more
        await self.until(lambda: self.answered[number] >= enough)


@asynccontextmanager
async def balanced(urls: Sequence[str], callers: int) -> AsyncIterator[Balancer]:
    async with AsyncExitStack() as stack:
        balancer = Balancer([await stack.enter_async_context(Client(url)) for url in urls])
        async with asyncio.TaskGroup() as group:
            for number in range(len(urls)):
                group.create_task(balancer.watch(number))
            await balancer.until(lambda: len(balancer.ready) == len(urls))
            for caller in range(callers):
                group.create_task(balancer.send(caller, callers))
            try:
                yield balancer
            finally:
                balancer.running = False


async def test_readiness_ends_first_and_requests_are_taken_for_the_grace(model: Path) -> None:
    async with serving(model, "--ready-grace", "600") as server, Client(server.url) as client:
        server.send(signal.SIGTERM)

        async def is_unready() -> bool:
            try:
                await client.get("/v2/health/ready")
            except EngineError:
                return True
            return False

        await until(is_unready)
        for value in range(3):
            async with Client(server.url) as another:  # a connection that is opened after the last answer
                assert (await another.infer("work", work(value, LONG))).outputs["y"].item() == value
                assert await another.get("/v2/health/live") == {"live": True}
        server.send(signal.SIGTERM)
        assert await server.end() == (-signal.SIGTERM, "")


async def test_a_client_that_follows_readiness_loses_nothing_when_its_server_ends(model: Path) -> None:
    async with serving(model, *RESTARTED) as going, serving(model, *RESTARTED) as staying:
        async with balanced([going.url, staying.url], callers=4) as balancer:
            await balancer.until_answered(0, 20)
            going.send(signal.SIGTERM)
            assert await going.end() == (0, "")
            await balancer.until_answered(1, 20)

        assert len(set(balancer.values)) == len(balancer.values) == sum(balancer.answered)


async def test_servers_that_are_restarted_in_turn_lose_nothing_under_load(model: Path) -> None:
    async with AsyncExitStack() as stack:
        servers: list[Process] = [await stack.enter_async_context(serving(model, *RESTARTED)) for _ in range(2)]
        urls = [server.url for server in servers]
        async with balanced(urls, callers=6) as balancer:
            await balancer.until_answered(0, 20)
            for number in range(2):
                servers[number].send(signal.SIGTERM)
                assert await servers[number].end() == (0, "")
                assert number not in balancer.ready
                port = urls[number].rpartition(":")[2]
                again = serving(model, *RESTARTED, "--port", port)
                servers[number] = await stack.enter_async_context(again)
                await balancer.until_answered(number, 20)
        for server in servers:
            with suppress(ProcessLookupError):
                server.send(signal.SIGTERM)

    sent = len(balancer.values)
    assert sent == len(set(balancer.values)) == sum(balancer.answered)
    assert min(balancer.answered) >= 40
