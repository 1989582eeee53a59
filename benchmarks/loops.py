"""Event loops to run a trial on, and the watch over how long they were blocked."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Coroutine, Iterable
from types import TracebackType
from typing import Any, Final, TypeVar

__all__ = ["LOOPS", "LoopWatch", "in_turns", "run_on"]

T = TypeVar("T")
Case = TypeVar("Case")

LOOPS: Final = ("uvloop", "asyncio")


def run_on(loop: str, main: Coroutine[Any, Any, T]) -> T:
    """Run one trial to its end on a fresh loop of that kind; what it left running is cancelled with the loop.

    Garbage of earlier trials is collected first and what remains is frozen, as a server does when it has started:
    no trial pays for another's objects, nor for the modules that the peers import.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=_factory(loop)) as runner:
        return runner.run(main)


def in_turns(
    loop: str, cases: Iterable[Case], rounds: int, trial: Callable[[Case, int], Coroutine[Any, Any, T]]
) -> dict[Case, list[T]]:
    """The trials of each case: all of them in the first round, all in the second, and so on, so that what changes on
    the machine meanwhile meets every case. `trial` is given the case and the number of the round."""
    trials: dict[Case, list[T]] = {case: [] for case in cases}
    for number in range(rounds):
        for case, done in trials.items():
            done.append(run_on(loop, trial(case, number)))
    return trials


def _factory(loop: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if loop == "asyncio":
        return asyncio.new_event_loop
    if loop == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    raise ValueError(f"loop: expected one of {', '.join(LOOPS)}, got {loop!r}")


class LoopWatch:
    """How late a timer of 1 ms comes, again and again: what the loop would have kept anybody else waiting.

    `longest` (seconds) is the latest of them. uvloop counts timers in whole milliseconds, so a single reading may
    be up to 1 ms short there; the longest of thousands is not. `clock` gives monotonic seconds.
    """

    _PERIOD: Final = 0.001

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.longest = 0.0
        self._clock = clock
        self._due = 0.0
        self._handle: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> LoopWatch:
        self._arm()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()

    def reset(self) -> None:
        """Forget what was seen so far: the warm-up is over."""
        self.longest = 0.0

    def _arm(self) -> None:
        self._due = self._clock() + self._PERIOD
        self._handle = self._loop.call_later(self._PERIOD, self._tick)

    def _tick(self) -> None:
        self.longest = max(self.longest, self._clock() - self._due)
        self._arm()
