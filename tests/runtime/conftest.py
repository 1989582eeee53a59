"""What every test of the runtime must leave behind: nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator

import pytest


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """No thread of a slot or of a `SyncScheduler`'s loop outlives the test."""
    before = set(threading.enumerate())
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("kapsl-") and thread not in before:
            thread.join(1.0)
            assert not thread.is_alive(), f"{thread.name} is left behind"


@pytest.fixture(autouse=True)
async def no_task_left() -> AsyncIterator[None]:
    """No task of the test's loop outlives the test; `virtual` watches its own loop."""
    yield
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks left behind: {left}"
