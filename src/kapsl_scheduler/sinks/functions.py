"""A Python function as a sink."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.ports import SinkItem, SinkWriter

__all__ = ["CallableSink"]


class CallableSink:
    """Gives the results to `function`, some at a time, as a list of `SinkItem` in the order of the requests.

    It is called in a thread, never twice at a time for one run. What it raises fails the run. Nothing is remembered:
    what was given since the run's last commit is given again when an interrupted run is resumed. A job with such a sink
    cannot be stored as JSON.

    Raises `TypeError` for what cannot be called, and for a coroutine function: there is no event loop in that thread.
    """

    def __init__(self, function: Callable[[list[SinkItem]], object]) -> None:
        if not callable(function):
            raise TypeError(f"sink: expected a callable, got {type(function).__name__}")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise TypeError("sink: expected a plain function, got a coroutine function")
        self.function = function

    def __repr__(self) -> str:
        return f"CallableSink({self.function!r})"

    def open(self, firing: Firing, memory: Mapping[str, str]) -> SinkWriter:
        return _Writer(self.function)


class _Writer:
    def __init__(self, function: Callable[[list[SinkItem]], object]) -> None:
        self._function = function

    def write(self, items: Sequence[SinkItem]) -> None:
        if items:
            self._function(list(items))

    def flush(self) -> Mapping[str, str | None]:
        return {}

    def close(self) -> None:
        pass
