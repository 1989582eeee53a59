"""A function as a sink."""

from __future__ import annotations

from typing import Any

import pytest

from kapsl_scheduler.ports import SinkItem
from kapsl_scheduler.sinks import CallableSink
from tests.sinks.answers import answers, firing


def test_it_is_given_lists_and_nothing_where_there_is_nothing() -> None:
    calls: list[list[SinkItem]] = []
    writer = CallableSink(calls.append).open(firing(), {})
    items = answers(2)
    writer.write(tuple(items))
    writer.write(())
    assert calls == [items]
    assert isinstance(calls[0], list)
    assert writer.flush() == {}


def test_what_it_raises_comes_out() -> None:
    def fail(items: list[SinkItem]) -> None:
        raise KeyError("no")

    with pytest.raises(KeyError):
        CallableSink(fail).open(firing(), {}).write(answers(1))


async def coroutine(items: list[SinkItem]) -> None: ...


class Coroutine:
    async def __call__(self, items: list[SinkItem]) -> None: ...


@pytest.mark.parametrize(
    ("function", "fault"), [(5, "got int"), (coroutine, "coroutine function"), (Coroutine(), "coroutine function")]
)
def test_what_cannot_be_called_here_is_refused(function: Any, fault: str) -> None:
    with pytest.raises(TypeError, match=fault):
        CallableSink(function)


def test_it_shows_its_function() -> None:
    assert repr(CallableSink(print)) == "CallableSink(<built-in function print>)"
