"""The virtual-time loop: exact, deterministic, never hanging."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from kapsl_scheduler.testing import DeadlockError, VirtualClock, VirtualTimeLoop, run_virtual

YEAR = 365 * 86_400.0


def now() -> float:
    return asyncio.get_running_loop().time()


def test_sleeping_takes_exactly_as_long_as_it_says_and_no_real_time() -> None:
    async def main() -> list[float]:
        seen = []
        for seconds in (0.1, 0.2, 0.3, 3 * 86_400.0, YEAR):
            started = now()
            await asyncio.sleep(seconds)
            seen.append(now() - started)
        return seen

    real = time.perf_counter()
    slept = run_virtual(main())
    assert slept[:2] == [0.1, 0.30000000000000004 - 0.1]
    assert slept[2:] == pytest.approx([0.3, 3 * 86_400.0, YEAR], abs=1e-6)
    assert time.perf_counter() - real < 1.0


def test_timers_run_at_their_own_moment_in_order() -> None:
    async def main() -> None:
        seen: list[float] = []
        loop = asyncio.get_running_loop()
        # 0.4 + (1.7 - 0.4) is not 1.7: jumping by the difference would miss it.
        moments = [1.7, 0.1, 0.4, 0.1]
        for moment in moments:
            loop.call_at(moment, lambda: seen.append(now()))
        await asyncio.sleep(2)
        assert seen == sorted(moments)

    run_virtual(main())


def test_time_far_from_zero_still_moves() -> None:
    async def main() -> int:
        ticks = 0
        await asyncio.sleep(40 * YEAR)
        for _ in range(5):
            await asyncio.sleep(0.5)
            ticks += 1
        return ticks

    assert run_virtual(main()) == 5


def test_a_cancelled_timer_takes_no_time() -> None:
    async def main() -> float:
        asyncio.get_running_loop().call_later(1000, lambda: None).cancel()
        await asyncio.sleep(1)
        return now()

    assert run_virtual(main()) == 1.0


def test_timeouts_are_virtual() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return now()

    assert run_virtual(main()) == 30.0


def test_a_synchronous_function_may_take_virtual_time() -> None:
    loop = VirtualTimeLoop()
    seen: list[float] = []
    loop.call_at(1.0, lambda: loop.clock.advance(5.0))
    loop.call_at(2.0, lambda: seen.append(loop.time()))
    loop.call_at(7.0, loop.stop)
    loop.run_forever()
    loop.close()
    assert seen == [6.0]


def test_what_can_never_end_raises_and_says_who_waits() -> None:
    async def waits_for_ever() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await asyncio.sleep(2.5)
        await asyncio.create_task(waits_for_ever(), name="the culprit")

    with pytest.raises(DeadlockError, match=r"at 2\.5 virtual seconds .* the culprit at .*waits_for_ever"):
        run_virtual(main())


class Foreign(Coroutine[Any, Any, None]):
    """A coroutine without a Python frame, as compiled modules have them."""

    def __init__(self) -> None:
        self.inner = asyncio.Event().wait()

    def send(self, value: Any) -> Any:
        return self.inner.send(value)

    def throw(self, *error: Any) -> Any:
        return self.inner.throw(*error)

    def close(self) -> None:
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()

    def __repr__(self) -> str:
        return "a foreign coroutine"


def test_a_deadlock_names_coroutines_without_a_frame() -> None:
    async def main() -> None:
        await asyncio.create_task(Foreign(), name="other")

    with pytest.raises(DeadlockError, match="other at a foreign coroutine"):
        run_virtual(main())


def test_a_deadlock_of_many_names_some() -> None:
    async def main() -> None:
        await asyncio.gather(*(asyncio.Event().wait() for _ in range(20)))

    with pytest.raises(DeadlockError, match=r"and 13 more$"):
        run_virtual(main())


@pytest.mark.parametrize("ending", ["returns", "raises", "deadlocks"])
def test_no_task_is_left(ending: str) -> None:
    ended = []

    async def background() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(1)
            ended.append(now())

    async def main() -> str:
        task = asyncio.create_task(background())
        await asyncio.sleep(0)
        if ending == "raises":
            raise LookupError(ending)
        if ending == "deadlocks":
            await task
        return ending

    def run() -> str:
        return run_virtual(main())

    if ending == "returns":
        assert run() == ending
    else:
        with pytest.raises(LookupError if ending == "raises" else DeadlockError):
            run()
    assert ended == [1.0]


def test_call_soon_threadsafe_from_the_loop_itself() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        for _ in range(10_000):
            loop.call_soon_threadsafe(lambda: None)
        loop.call_soon_threadsafe(done.set_result, "done")
        assert not done.done()
        return str(await done)

    assert run_virtual(main()) == "done"


def run_from_a_thread(call: Callable[[], Any]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_call_soon_threadsafe_from_another_thread_while_the_loop_is_busy() -> None:
    async def main() -> str:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        run_from_a_thread(lambda: loop.call_soon_threadsafe(done.set_result, "done"))
        return str(await done)

    assert run_virtual(main()) == "done"


def test_with_patience_other_threads_are_waited_for_and_time_stands_still() -> None:
    async def main() -> float:
        loop = asyncio.get_running_loop()
        gate = threading.Event()
        work = loop.run_in_executor(None, gate.wait)
        loop.call_soon(gate.set)
        assert await work
        return now()

    assert run_virtual(main(), patience=10.0) == 0.0


def test_with_patience_time_jumps_when_nobody_comes() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return now()

    assert run_virtual(main(), patience=0.001) == 3600.0


def test_with_patience_sockets_are_served() -> None:
    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        seen: list[str] = []
        done = loop.create_future()

        def read() -> None:
            seen.append(ours.recv(9).decode())
            done.set_result(None)

        def write() -> None:
            seen.append("writable")
            loop.remove_writer(ours)
            theirs.send(b"hello")

        with ours, theirs:
            loop.add_reader(ours, read)
            loop.add_writer(ours, write)
            await done
            loop.remove_reader(ours)
        return seen

    assert run_virtual(main(), patience=10.0) == ["writable", "hello"]


def test_the_clock_moves_only_forward() -> None:
    clock = VirtualClock(5.0)
    clock.advance(0.5)
    assert clock() == clock.now == 5.5
    with pytest.raises(ValueError, match="seconds: expected at least 0, got -1"):
        clock.advance(-1)
    assert repr(clock) == "VirtualClock(5.5)"


@pytest.mark.slow
def test_many_sleepers_wake_at_their_moments() -> None:
    async def sleeper(moment: float) -> bool:
        await asyncio.sleep(moment)
        return now() == moment

    async def main() -> bool:
        return all(await asyncio.gather(*(sleeper(number * 1e-4) for number in range(20_000))))

    assert run_virtual(main())


def test_late_in_time_a_timer_at_exactly_now_still_runs() -> None:
    """Beyond some months a float cannot tell now from now and the nanosecond that asyncio allows itself."""

    async def main() -> list[str]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualTimeLoop)
        loop.clock.now = 30_032_400.0
        ran: list[str] = []
        loop.call_at(loop.time(), ran.append, "now")
        for _ in range(5):
            await asyncio.sleep(0)
        await asyncio.sleep(1)
        return ran

    assert run_virtual(main()) == ["now"]
