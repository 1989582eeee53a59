"""Engines without a model: they echo or apply a function, take their time, fail as planned, record every
call.

Both satisfy the engine contract. What goes wrong, and when, is said in `testing.faults`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Final

from kapsl_scheduler.engines.tally import CallTally, RowCounter
from kapsl_scheduler.errors import ModelNotLoaded, Unavailable
from kapsl_scheduler.testing.faults import Fault, FaultPlan
from kapsl_scheduler.types import EngineMetrics, ModelInfo, Tensors, TensorSpec

__all__ = ["FAKE_INFO", "FakeAsyncEngine", "FakeCall", "FakeEngine", "spin"]

# x: float32 [batch, width] -> y: the same.
FAKE_INFO: Final = ModelInfo(
    name="fake",
    inputs=(TensorSpec("x", "float32", ("batch", "width"), 0),),
    outputs=(TensorSpec("y", "float32", ("batch", "width"), 0),),
    framework="fake",
    batchable=True,
)


def spin(seconds: float) -> None:
    """Use the processor, and hold the interpreter, for `seconds`: what an engine of pure Python does."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@dataclass(slots=True, eq=False)
class FakeCall:
    """One call (or stream) of a fake engine: recorded when it starts, completed when it ends.

    `number` counts from 1 in the order of starting; `shapes` are the inputs' shapes; `thread` is the identity
    of the calling thread; `in_slot` is False for a stream beside the calls (`max_streams`); `started` and
    `ended` are seconds of the engine's clock, `ended` None while it runs; `error` is what it raised.
    """

    number: int
    inputs: Tensors
    rows: int
    shapes: dict[str, tuple[int, ...]]
    thread: int
    started: float
    in_slot: bool
    ended: float | None = None
    error: BaseException | None = field(default=None, repr=False)


class _Fake:
    """What both fakes have in common: the record, the plan, and the answers. It never waits."""

    def __init__(
        self,
        function: Callable[[Tensors], Tensors] | None,
        info: ModelInfo,
        cost: Callable[[int], float] | None,
        faults: FaultPlan | None,
        chunks: int,
    ) -> None:
        self.retry = True
        self.bounded_call = False
        self.max_streams = 0
        self.cpu: Any = self
        self.calls: list[FakeCall] = []
        self.loads = 0
        self.in_flight = 0
        self.max_in_flight = 0
        self._function = function or self._echo
        self._info = info
        self._cost = cost
        self._faults = faults
        self._chunks = chunks
        self._loaded = False
        self._failing_checks = 0
        self._lost = False
        self._rows = RowCounter(info)
        self._tally = CallTally()
        self._lock = threading.Lock()

    # ------------------------------------------------------------------------------------- for tests

    @property
    def loaded(self) -> bool:
        """Between `load` and `unload`."""
        return self._loaded

    @property
    def batch_rows(self) -> list[int]:
        """The rows of every call so far, in order of starting."""
        return [call.rows for call in self.calls]

    def lose(self, *, failed_checks: int = 1) -> None:
        """Lose the engine: its calls raise `Unavailable`, until `failed_checks` health checks have failed."""
        with self._lock:
            self._lost, self._failing_checks = True, failed_checks

    def recover(self) -> None:
        """A lost engine works again."""
        with self._lock:
            self._lost, self._failing_checks = False, 0

    # ----------------------------------------------------------------------------------------- port

    def metrics(self) -> EngineMetrics:
        """Counts of the calls and streams that have ended since `load`."""
        return self._tally.total()

    def model_info(self) -> ModelInfo:
        """The `info` it was made with."""
        return self._info

    def for_cpu(self) -> Any:
        """Its attribute `cpu`: by default itself."""
        return self.cpu

    # -------------------------------------------------------------------------------------- inside

    def _mark_loaded(self) -> None:
        if not self._loaded:
            self._loaded = True
            self.loads += 1
            self._tally.reset()

    def _mark_unloaded(self) -> None:
        self._loaded = False

    def _check(self) -> bool:
        with self._lock:
            if not self._lost:
                return self._loaded
            if self._failing_checks > 0:
                self._failing_checks -= 1
                return False
            self._lost = False
            return self._loaded

    def _start(self, inputs: Tensors, now: float, *, stream: bool = False) -> tuple[FakeCall, Fault | None, float]:
        """Record a call. Returns it, the fault it is to have, and the seconds it is to take."""
        if not self._loaded:
            raise ModelNotLoaded(f"{self._info.name}: the fake engine is not loaded")
        if self._lost:
            raise Unavailable(f"{self._info.name}: the fake engine is lost")
        rows = self._rows(inputs)
        fault = self._faults.next_call(inputs) if self._faults else None
        seconds = (self._cost(rows) if self._cost else 0.0) + (fault.delay if fault else 0.0)
        shapes = {name: array.shape for name, array in inputs.items()}
        with self._lock:
            call = FakeCall(
                number=len(self.calls) + 1,
                inputs=inputs,
                rows=rows,
                shapes=shapes,
                thread=threading.get_ident(),
                started=now,
                in_slot=not (stream and self.max_streams),
            )
            self.calls.append(call)
            self.in_flight += call.in_slot
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
        return call, fault, seconds

    def _end(self, call: FakeCall, now: float, error: BaseException | None = None) -> None:
        with self._lock:
            call.ended, call.error = now, error
            self.in_flight -= call.in_slot
        self._tally.add(call.rows, now - call.started, failed=error is not None)

    def _answer(self, inputs: Tensors, fault: Fault | None) -> Tensors:
        error = fault.exception() if fault else None
        if fault and error:
            if isinstance(error, Unavailable):
                self.lose(failed_checks=fault.failed_checks)
            raise error
        return self._function(inputs)

    def _echo(self, inputs: Tensors) -> Tensors:
        """Each output is the input in its place; with nothing declared, every input under its name."""
        if not self._info.outputs:
            return dict(inputs)
        pairs = zip(self._info.outputs, self._info.inputs, strict=False)
        return {output.name: inputs[source.name] for output, source in pairs}


class FakeEngine(_Fake):
    """A synchronous engine without a model.

    `function` maps a batch's inputs to its outputs (default: an echo). `info` is what `model_info` says
    (default: `x` float32 [batch, width] to `y` of the same shape). `cost` gives the seconds that a call of so
    many rows takes; `spend` passes them: `time.sleep` frees the interpreter meanwhile, `spin` holds it, a
    `VirtualClock`'s `advance` (with that clock as `clock`) takes virtual time. `faults` says what goes wrong.
    A stream yields the answer `chunks` times, each at the cost of a call.

    Attributes to set: `retry`, `bounded_call`, `max_streams`, and `cpu`, what `for_cpu` returns. Attributes
    to read: `calls`, streams among them, `batch_rows`, `in_flight` and `max_in_flight` (without streams
    beside the calls), `loads`, `loaded`.
    """

    def __init__(
        self,
        function: Callable[[Tensors], Tensors] | None = None,
        *,
        info: ModelInfo = FAKE_INFO,
        cost: Callable[[int], float] | None = None,
        spend: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.perf_counter,
        faults: FaultPlan | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__(function, info, cost, faults, chunks)
        self._spend = spend
        self._clock = clock
        self._released = threading.Event()

    def load(self) -> None:
        """Ready for calls; again a no-op."""
        self._mark_loaded()

    def warmup(self) -> None:
        """Nothing to do, and nothing is recorded."""

    def unload(self) -> None:
        """Calls raise `ModelNotLoaded` from here on; what was recorded stays."""
        self._mark_unloaded()

    def health_check(self) -> bool:
        """Whether it is loaded and not lost."""
        return self._check()

    def release(self) -> None:
        """Let hanging calls go on, and later ones not hang."""
        self._released.set()

    def infer(self, inputs: Tensors) -> Tensors:
        """Spend the cost, fail as planned, else answer."""
        call, fault, seconds = self._start(inputs, self._clock())
        try:
            outputs = self._run(inputs, fault, seconds)
        except BaseException as error:
            self._end(call, self._clock(), error)
            raise
        self._end(call, self._clock())
        return outputs

    def infer_stream(self, inputs: Tensors) -> Generator[Tensors, None, None]:
        """The answer, `chunks` times. A planned fault strikes the first chunk."""
        call, fault, seconds = self._start(inputs, self._clock(), stream=True)
        try:
            for number in range(self._chunks):
                yield self._run(inputs, fault if number == 0 else None, seconds)
        except GeneratorExit:
            self._end(call, self._clock())
            raise
        except BaseException as error:
            self._end(call, self._clock(), error)
            raise
        self._end(call, self._clock())

    def _run(self, inputs: Tensors, fault: Fault | None, seconds: float) -> Tensors:
        if seconds > 0:
            self._spend(seconds)
        if fault and fault.hang:
            self._released.wait()
        return self._answer(inputs, fault)


class FakeAsyncEngine(_Fake):
    """The same engine in coroutine functions: it waits with `asyncio.sleep`, so it is exact in virtual time.

    Parameters and attributes as for `FakeEngine`; the time is the running loop's. A call that costs nothing
    answers without giving way to the loop.
    """

    def __init__(
        self,
        function: Callable[[Tensors], Tensors] | None = None,
        *,
        info: ModelInfo = FAKE_INFO,
        cost: Callable[[int], float] | None = None,
        faults: FaultPlan | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__(function, info, cost, faults, chunks)
        self._released = asyncio.Event()

    async def load(self) -> None:
        """Ready for calls; again a no-op."""
        self._mark_loaded()

    async def warmup(self) -> None:
        """Nothing to do, and nothing is recorded."""

    async def unload(self) -> None:
        """Calls raise `ModelNotLoaded` from here on; what was recorded stays."""
        self._mark_unloaded()

    async def health_check(self) -> bool:
        """Whether it is loaded and not lost."""
        return self._check()

    def release(self) -> None:
        """Let hanging calls go on, and later ones not hang. From the loop's thread only."""
        self._released.set()

    async def infer(self, inputs: Tensors) -> Tensors:
        """Sleep for the cost, fail as planned, else answer."""
        now = asyncio.get_running_loop().time
        call, fault, seconds = self._start(inputs, now())
        try:
            outputs = await self._run(inputs, fault, seconds)
        except BaseException as error:
            self._end(call, now(), error)
            raise
        self._end(call, now())
        return outputs

    async def infer_stream(self, inputs: Tensors) -> AsyncGenerator[Tensors, None]:
        """The answer, `chunks` times. A planned fault strikes the first chunk."""
        now = asyncio.get_running_loop().time
        call, fault, seconds = self._start(inputs, now(), stream=True)
        try:
            for number in range(self._chunks):
                yield await self._run(inputs, fault if number == 0 else None, seconds)
        except GeneratorExit:
            self._end(call, now())
            raise
        except BaseException as error:
            self._end(call, now(), error)
            raise
        self._end(call, now())

    async def _run(self, inputs: Tensors, fault: Fault | None, seconds: float) -> Tensors:
        if seconds > 0:
            await asyncio.sleep(seconds)
        if fault and fault.hang:
            await self._released.wait()
        return self._answer(inputs, fault)
