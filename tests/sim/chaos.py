"""A scheduler in virtual time under random load and faults, watched by callers who keep books of their own.

Nothing here trusts the scheduler: every caller notes what it heard, the engines note what they were given, and the
scheduler's statistics must agree with both. What happens, and how often: `scenario`.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from kapsl_scheduler import InferenceRequest, Priority, QueueOverflowPolicy, RequestMetadata, Scheduler
from kapsl_scheduler.errors import (
    DeadlineExceeded,
    EngineError,
    InferenceError,
    InvalidInput,
    Overloaded,
    ResourceExhausted,
    Unavailable,
)
from kapsl_scheduler.testing import FakeAsyncEngine, FaultPlan
from kapsl_scheduler.testing.engines import FAKE_INFO
from kapsl_scheduler.types import InferenceResponse, Tensors
from tests.sim.scenario import POISON, PoisonError, draw

__all__ = ["Chaos"]

PATIENCE = 600.0
"""Virtual seconds after the last arrival in which every caller must have heard: far beyond every timeout."""
RETRIES_SAVED_UP = 100
"""Retries that are always granted: with fewer, nobody fails for another's sake."""


@dataclass(eq=False)
class Caller:
    """One request, and what became of it. `x` is what it sends: its number, the number of the row, poison or none."""

    number: int
    x: Any
    options: dict[str, Any]
    deadline: float = math.inf
    ended: bool = False
    runs: int = 0

    @property
    def poisonous(self) -> bool:
        return bool(self.x.ravel()[2] == POISON)


@dataclass
class Tally:
    """What the callers heard. `either`: `Unavailable` and the like, heard later than at the call: refused while it
    waited for room, or failed."""

    count: Counter[str] = field(default_factory=Counter)

    def __getattr__(self, name: str) -> int:
        return self.count[name]


class WatchedEngine(FakeAsyncEngine):
    """Tells the run of every call before it starts."""

    def __init__(self, run: Chaos, **parameters: Any) -> None:
        super().__init__(doubled, **parameters)
        self._run_watching = run

    async def infer(self, inputs: Tensors) -> Tensors:
        self._run_watching.on_call(inputs)
        return await super().infer(inputs)

    async def infer_stream(self, inputs: Tensors) -> AsyncIterator[Tensors]:
        self._run_watching.on_call(inputs)
        async with aclosing(super().infer_stream(inputs)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                yield chunk


def doubled(inputs: Tensors) -> Tensors:
    return {"y": inputs["x"] * 2}


class Chaos:
    """One run. `violations` are the rules that were seen broken; empty after a good run."""

    def __init__(self, seed: int, arrivals: int) -> None:
        self.rng = random.Random(seed)
        self.scenario = draw(self.rng)
        self.violations: list[str] = []
        self.heard = Tally()
        self._arrivals = arrivals
        self._callers: list[Caller] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._seed = seed
        self._open = True
        self._innocent: list[int] = []  # who heard of others' poison

    # -------------------------------------------------------------------------------------------- the run

    async def run(self) -> None:
        """From the first arrival to the closed scheduler; afterwards everything is compared."""
        scenario = self.scenario
        self.loop = asyncio.get_running_loop()
        self.engines = [self._engine(number) for number in range(scenario.engines)]
        self.every_engine = [*self.engines]
        if scenario.cpu == "own":
            cpu = self._engine(scenario.engines)
            self.every_engine.append(cpu)
        for engine in self.engines:
            engine.cpu = {"self": engine, "none": None, "own": self.every_engine[-1]}[scenario.cpu]
        self.scheduler = Scheduler(
            self.engines,
            batch=scenario.batch,
            queue=scenario.queue,
            workers_per_engine=scenario.workers,
            cpu_workers=scenario.workers,
            enable_fallback=scenario.fallback,
            clock=self.loop.time,
        )
        async with self.scheduler:
            await self._arrive()
            if scenario.released:
                for engine in self.every_engine:
                    engine.release()
                await self._all_have_heard()
            await self.scheduler.close(drain=1.0)
        await self._all_have_heard()
        self._compare()

    def _engine(self, number: int) -> WatchedEngine:
        scenario = self.scenario
        engine = WatchedEngine(
            self,
            info=FAKE_INFO if scenario.batchable else _alone(),
            cost=lambda rows: scenario.call_time + rows * scenario.row_time,
            faults=FaultPlan(*scenario.faults, seed=self._seed * 10 + number),
            chunks=scenario.chunks,
        )
        engine.retry, engine.max_streams = scenario.retry, scenario.max_streams
        return engine

    async def _arrive(self) -> None:
        scenario, rng = self.scenario, self.rng
        slots = scenario.engines * scenario.workers
        rows = scenario.batch.max_batch_size if scenario.batchable else 1
        capacity = slots * rows / (scenario.call_time + rows * scenario.row_time)
        gap = scenario.burst * (1 + scenario.max_rows) / 2 / (scenario.load * capacity)
        closing = None if scenario.closed_at is None else int(scenario.closed_at * self._arrivals)
        number = 0
        while number < self._arrivals:
            for _ in range(min(scenario.burst, self._arrivals - number)):
                number += self._start(number)
                if closing is not None and number >= closing and self._open:
                    self._open = False
                    self._tasks.append(self.loop.create_task(self.scheduler.close(drain=scenario.drain)))
            self.check()
            await asyncio.sleep(rng.expovariate(1 / gap))

    async def _all_have_heard(self) -> None:
        _, pending = await asyncio.wait(self._tasks, timeout=PATIENCE)
        if pending:
            self.violations.append(f"{len(pending)} callers never heard: {sorted(pending, key=str)[:3]}")
        for task in self._tasks:
            if task not in pending:
                task.result()

    # ---------------------------------------------------------------------------------------- the callers

    def _start(self, number: int) -> int:
        """Let one caller in, or some by `infer_many`. Returns how many requests that makes."""
        rng = self.rng
        kind = rng.random()
        if kind < 0.04:
            group = [self._caller() for _ in range(rng.randrange(1, 12))]
            self._spawn(self._call_many(group))
            return len(group)
        caller = self._caller()
        if kind < 0.14:
            self._spawn(self._call_stream(caller, rng.randrange(1, 30), rng.choice((0.0, 0.0, 6.0))))
            return 1
        if kind < 0.18:
            caller.x, caller.options = rng.choice(self._invalid(caller))
        elif kind < 0.3:
            caller.options["overflow"] = rng.choice(list(QueueOverflowPolicy))
            caller.options["block_timeout"] = rng.choice((0.0, 0.01, None))
        task = self._spawn(self._call(caller, waits=kind >= 0.22))
        if rng.random() < 0.15:
            self.loop.call_later(rng.expovariate(1 / 0.01), task.cancel)
        return 1

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = self.loop.create_task(work)
        self._tasks.append(task)
        return task

    def _caller(self) -> Caller:
        rng = self.rng
        number = len(self._callers)
        rows, width = rng.randrange(1, self.scenario.max_rows + 1), rng.choice((3, 3, 3, 4))
        x = np.zeros((rows, width), np.float32)
        x[:, 0], x[:, 1] = number, np.arange(rows)
        if rng.random() < 0.01:
            x[:, 2] = POISON
        options: dict[str, Any] = {"priority": rng.choice((*Priority, None))}
        if rng.random() < 0.4:
            options["timeout"] = rng.uniform(0.001, 0.1)
        if rng.random() < 0.1:
            options["session_id"] = rng.choice("abcd")
        if rng.random() < 0.1:
            options["force_cpu"] = True
        if rows == 1 and self.scenario.batchable and rng.random() < 0.5:
            x = x[0]
        caller = Caller(number, x, options, self.loop.time() + options.get("timeout", math.inf))
        self._callers.append(caller)
        return caller

    def _invalid(self, caller: Caller) -> list[tuple[Any, dict[str, Any]]]:
        return [
            (np.zeros((2, 2, 2), np.float32), caller.options),
            (np.zeros((0, 3), np.int32), caller.options),
            (caller.x, {**caller.options, "timeout": 0.0}),
            (caller.x, {**caller.options, "priority": 7}),
        ]

    def _request(self, caller: Caller) -> Any:
        if caller.number % 3:
            return caller.x
        tenant = "ab"[caller.number % 2]
        return InferenceRequest(caller.x, metadata=RequestMetadata(request_id=str(caller.number), tenant=tenant))

    async def _call(self, caller: Caller, *, waits: bool) -> None:
        later: list[None] = []
        self.loop.call_soon(later.append, None)
        options = caller.options
        try:
            if caller.number % 4 == 0 and options.keys() <= {"priority", "timeout"}:
                response = await self._submit(caller)
            elif waits or "overflow" in options:
                response = await self.scheduler.infer(self._request(caller), **options)
            else:
                response = await self.scheduler.try_infer(self._request(caller), **options)
        except asyncio.CancelledError:
            self._hear("cancelled")
        except EngineError as error:
            self._hear(self._verdict(caller, error, at_once=not later))
        else:
            self._check_answer(caller, response)
            self._hear("succeeded")
        caller.ended = True

    async def _submit(self, caller: Caller) -> InferenceResponse:
        """By way of a callback."""
        answer: asyncio.Future[InferenceResponse] = self.loop.create_future()
        told: list[None] = []

        def then(response: InferenceResponse | None, error: BaseException | None) -> None:
            told.append(None)
            if len(told) > 1 or answer.cancelled():
                self.violations.append(f"request {caller.number} was told {len(told)} times, or after it was withdrawn")
            elif error is not None:
                answer.set_exception(error)
            elif response is not None:
                answer.set_result(response)

        submitted = self.scheduler.infer_then(self._request(caller), then, **caller.options)
        try:
            return await answer
        except asyncio.CancelledError:
            self.scheduler.withdraw(submitted)
            raise

    async def _call_many(self, group: list[Caller]) -> None:
        timeout = group[0].options.get("timeout")
        for caller in group:
            caller.deadline = self.loop.time() + (timeout or math.inf)
        answers = await self.scheduler.infer_many(
            [caller.x for caller in group], timeout=timeout, return_exceptions=True
        )
        for caller, answer in zip(group, answers, strict=True):
            caller.ended = True
            if isinstance(answer, EngineError):
                self._hear(self._verdict(caller, answer, at_once=False))
            else:
                self._check_answer(caller, answer)
                self._hear("succeeded")

    async def _call_stream(self, caller: Caller, leave_after: int, pause: float) -> None:
        """Read a stream: some readers leave early, some are slow."""
        later: list[None] = []
        self.loop.call_soon(later.append, None)
        chunks = 0
        try:
            async with aclosing(self.scheduler.infer_stream(self._request(caller), **caller.options)) as stream:
                async for response in stream:
                    self._check_answer(caller, response)
                    chunks += 1
                    if pause and chunks == 1:
                        await asyncio.sleep(pause)
                    elif not pause and chunks == leave_after < self.scenario.chunks:
                        break
        except EngineError as error:
            self._hear(self._verdict(caller, error, at_once=not later))
        else:
            self._hear("succeeded" if chunks == self.scenario.chunks else "cancelled")
            if chunks not in (leave_after, self.scenario.chunks):
                self.violations.append(f"a stream of {self.scenario.chunks} chunks gave {chunks}")
        caller.ended = True

    def _hear(self, what: str) -> None:
        self.heard.count[what] += 1

    def _verdict(self, caller: Caller, error: EngineError, *, at_once: bool) -> str:
        """The line of the books that an error belongs to."""
        text = str(error)
        match error:
            case InvalidInput() | ResourceExhausted():
                return "invalid"
            case DeadlineExceeded():
                return "late"
            case Overloaded() if "evicted" in text:
                return "evicted"
            case Overloaded() if "unread" in text:
                return "failed"
            case Overloaded() | Unavailable() if at_once or "in time" in text:
                return "refused"
            case Overloaded():
                return "either"
            case Unavailable():
                if not self.scenario.may_be_unavailable:
                    self.violations.append(f"request {caller.number} heard {error!r} though nothing was lost")
                return "either"
            case InferenceError(__cause__=PoisonError() | RuntimeError()):
                if not caller.runs:
                    self.violations.append(f"request {caller.number} failed without having run")
                if isinstance(error.__cause__, PoisonError) and not caller.poisonous:
                    self._innocent.append(caller.number)
                return "failed"
        self.violations.append(f"request {caller.number} heard {error!r}")
        return "failed"

    # ---------------------------------------------------------------------------------------- the watchers

    def _check_answer(self, caller: Caller, response: InferenceResponse) -> None:
        if caller.poisonous:
            self.violations.append(f"request {caller.number} was answered in spite of its poison")
        if not np.array_equal(response.output, 2 * caller.x):
            self.violations.append(f"request {caller.number} got an answer that is not its own: {response.output}")
        if not caller.number % 3 and response._request_id not in (None, str(caller.number)):
            self.violations.append(f"request {caller.number} got the id {response.request_id}")

    def on_call(self, inputs: Tensors) -> None:
        """An engine's call is about to start."""
        x = inputs["x"]
        rows = x[None] if x.ndim == 1 else x
        numbers = [int(number) for number in rows[:, 0]]
        if self.scenario.batchable and len(rows) > self.scenario.batch.max_batch_size:
            self.violations.append(f"a call of {len(rows)} rows")
        for number in dict.fromkeys(numbers):
            caller = self._callers[number]
            caller.runs += 1
            if caller.ended:
                self.violations.append(f"request {number} was run after its caller had gone")
            if caller.deadline < self.loop.time():
                self.violations.append(f"request {number} was run after its deadline")
            if numbers.count(number) != (len(caller.x) if caller.x.ndim == 2 else 1):
                self.violations.append(f"request {number} was torn apart")
        if self.rng.random() < 0.05:
            self.loop.call_soon(self.check)

    def check(self) -> None:
        """The books balance, and every count is within its bounds, at any moment."""
        found = self.scheduler.statistics()
        admitted = found.succeeded + found.failed + found.expired + found.cancelled + found.evicted
        admitted += found.queued + found.running
        lanes = self.scheduler._dispatches()
        for lane in lanes:
            lane.queue.validate()
        rules = {
            "offered": found.offered
            == found.invalid + found.refused + found.withdrawn + found.waiting + found.admitted,
            "admitted": found.admitted == admitted,
            "open": self.scheduler._books.open == found.waiting + found.queued + found.running,
            "callers": self.scheduler._books.open <= sum(not caller.ended for caller in self._callers),
            "running": found.running >= 0,
            "slots": found.calls_in_flight <= found.slots,
        }
        self.violations += [f"{rule} does not hold: {found}" for rule, holds in rules.items() if not holds]

    def _compare(self) -> None:
        """The end: what the scheduler counted is what its callers heard."""
        self.check()
        found, heard = self.scheduler.statistics(), self.heard
        rules = {
            "offered": found.offered == len(self._callers) == heard.count.total(),
            "nothing is left": found.waiting == found.queued == found.running == 0,
            "succeeded": found.succeeded == heard.succeeded,
            "invalid": found.invalid == heard.invalid,
            "evicted": found.evicted == heard.evicted,
            "gone": found.withdrawn + found.expired + found.cancelled == heard.late + heard.cancelled,
            "expired": found.expired <= heard.late,
            "cancelled": found.cancelled <= heard.cancelled,
            "refused": found.refused >= heard.refused,
            "failed": found.failed >= heard.failed,
            "lost": found.refused + found.failed == heard.refused + heard.failed + heard.either,
            "calls in flight": all(engine.max_in_flight <= self.scenario.workers for engine in self.every_engine),
            "innocent": not self._innocent or not self.scenario.retry or found.retried >= RETRIES_SAVED_UP,
            "unloaded": not any(engine.loaded for engine in self.every_engine),
        }
        self.violations += [
            f"{rule} does not hold: {found} {dict(heard.count)}" for rule, holds in rules.items() if not holds
        ]


def _alone() -> Any:
    """A model whose calls are never shared."""
    inputs, outputs = (
        tuple(msgspec.structs.replace(spec, batch_axis=None) for spec in specs)
        for specs in (FAKE_INFO.inputs, FAKE_INFO.outputs)
    )
    return msgspec.structs.replace(FAKE_INFO, inputs=inputs, outputs=outputs, batchable=False)
