"""Replies: told once, at once, or never."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler import InferenceResponse
from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.runtime.reply import Reply

ANSWER = InferenceResponse.of({"y": np.zeros(1)}, 0.0, 0.0, 1)
ERROR = Unavailable("gone")


@pytest.mark.parametrize(
    ("verb", "value", "told"), [("set_result", ANSWER, (ANSWER, None)), ("set_exception", ERROR, (None, ERROR))]
)
def test_it_is_told_at_once_and_once(verb: str, value: Any, told: Any) -> None:
    heard: list[Any] = []
    reply = Reply(lambda *said: heard.append((*said, reply.done())))
    assert not reply.done()
    getattr(reply, verb)(value)
    assert heard == [(*told, True)]
    reply.cancel()
    assert not reply.cancelled()
    for again in (reply.set_result, reply.set_exception):
        with pytest.raises(asyncio.InvalidStateError):
            again(value)
    assert len(heard) == 1


def test_who_cancels_it_is_never_told() -> None:
    heard: list[Any] = []
    reply = Reply(lambda *said: heard.append(said))
    reply.cancel()
    assert (reply.done(), reply.cancelled()) == (True, True)
    with pytest.raises(asyncio.InvalidStateError):
        reply.set_result(ANSWER)
    assert heard == []
