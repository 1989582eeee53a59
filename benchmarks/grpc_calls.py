"""Suite `grpc`: the digits model over gRPC, one digit a call, by the real server in a process of its own, against a
bare `grpc.aio` server that answers as many bytes without looking at what it is asked.

Client and servers share the cores. Each server answers the same client, `grpc.aio` too, which neither makes nor reads
messages, over one channel with 1, 32 and 128 calls at a time. The client takes about as long for a call as the servers,
so what a call costs a server is measured as well: the time that its process was on a core.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import grpc
import grpc.aio
import msgspec
import numpy as np

from benchmarks.devices import DIGITS
from benchmarks.loops import in_turns, run_on
from benchmarks.report import Label, Report
from benchmarks.stats import percentile
from kapsl_scheduler.server.oip_proto import message_class

__all__ = ["Options", "run"]

CALLERS: Final = (1, 32, 128)
METHOD: Final = "/inference.GRPCInferenceService/ModelInfer"


ECHO: Final = """
import asyncio
import grpc
import grpc.aio
import uvloop

ANSWER = bytes({size})

async def answer(body, context):
    return ANSWER

async def main():
    server = grpc.aio.server()
    handlers = {{"ModelInfer": grpc.unary_unary_rpc_method_handler(answer)}}
    service = "inference.GRPCInferenceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    print("on", server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """`seconds` is how long each server is asked by so many callers in a round."""

    loop: str = "uvloop"
    rounds: int = 5
    seconds: float = 3.0


class _Server(NamedTuple):
    address: str
    pid: int


class _Trial(NamedTuple):
    rate: float
    latencies: list[float]
    cpu: float


def run(options: Options) -> Report:
    """Every server with every number of callers, round after round."""
    settings: dict[str, Label | list[Label]] = {
        "rounds": options.rounds,
        "seconds": options.seconds,
        "loop": options.loop,
        "callers": list(CALLERS),
    }
    report = Report.begin("grpc", settings)
    request = _digit()
    with _servers(options.loop, request) as servers:
        cases = [(name, callers) for callers in CALLERS for name in servers]

        async def trial(case: tuple[str, int], _: int) -> _Trial:
            name, callers = case
            return await _trial(servers[name], request, callers, options.seconds)

        trials = in_turns(options.loop, cases, options.rounds, trial)
    for (name, callers), done in trials.items():
        labels: dict[str, Label] = {"asked": name, "callers": callers}
        report.add(labels, "calls", "1/s", [trial.rate for trial in done], "higher")
        report.add(labels, "p50", "ms", [percentile(trial.latencies, 50) * 1e3 for trial in done], "lower")
        report.add(labels, "p99", "ms", [percentile(trial.latencies, 99) * 1e3 for trial in done], "lower")
        report.add(labels, "server's time", "µs", [trial.cpu * 1e6 for trial in done], "lower")
    for callers in CALLERS:
        ours, echo = (report.find("calls", {"asked": name, "callers": callers}).value for name in ("digits", "echo"))
        report.at_least(f"calls over those of the echo, {callers} callers", ours / echo, 0.9)
    return report


def _digit() -> bytes:
    digit = np.random.default_rng(0).random((1, 64)).astype(np.float32)
    request = message_class("inference.ModelInferRequest")(
        model_name="digits",
        inputs=[{"name": "pixels", "datatype": "FP32", "shape": [1, 64]}],
        raw_input_contents=[digit.tobytes()],
    )
    data: bytes = request.SerializeToString()
    return data


@contextlib.contextmanager
def _servers(loop: str, request: bytes) -> Iterator[Mapping[str, _Server]]:
    """What can be asked, while the servers run. The echo answers as many bytes as ours."""
    serve = ("-m", "kapsl_scheduler", "serve", "--no-cron", "--no-socket", "--port", "0", str(DIGITS))
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(_process(*serve))

        async def size() -> int:
            async with _calling(ours) as call:
                return len(await call(request))

        echo = stack.enter_context(_process("-c", ECHO.format(size=run_on(loop, size()))))
        yield {"digits": ours, "echo": echo}


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[_Server]:
    """A server that runs meanwhile. It says where on a line that ends in the port."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = ""
        while not line.startswith(("on ", "for gRPC clients on ")):
            line = process.stdout.readline()
            if not line:
                raise RuntimeError("a server ended before it said where it listens; is grpcio installed?")
        yield _Server(f"127.0.0.1:{line.rsplit(':', 1)[-1].rsplit(' ', 1)[-1].strip()}", process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.asynccontextmanager
async def _calling(server: _Server) -> Any:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield channel.unary_unary(METHOD)


async def _trial(server: _Server, request: bytes, callers: int, seconds: float) -> _Trial:
    latencies: list[float] = []
    async with _calling(server) as call:
        await _ask(call, request, callers, seconds / 8, [])
        spent, begun = _spent(server.pid), time.perf_counter()
        await _ask(call, request, callers, seconds, latencies)
        rate = len(latencies) / (time.perf_counter() - begun)
    return _Trial(rate, latencies, (_spent(server.pid) - spent) / len(latencies))


async def _ask(
    call: Callable[[bytes], Awaitable[bytes]], request: bytes, callers: int, seconds: float, latencies: list[float]
) -> None:
    end = time.perf_counter() + seconds

    async def ask() -> None:
        while (asked := time.perf_counter()) < end:
            await call(request)
            latencies.append(time.perf_counter() - asked)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(ask())


def _spent(pid: int) -> float:
    """Seconds that a process has been on a core, in user mode and in the kernel; NaN where nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
