"""The load generators in virtual time: what they count, and from when."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from benchmarks.load import Closed, Flag, Open, bursty_arrivals, closed_loop, open_loop, poisson_arrivals

from kapsl_scheduler.testing import run_virtual


def now() -> float:
    return asyncio.get_running_loop().time()


def advance(seconds: float) -> None:
    """Block the loop for so many virtual seconds."""
    asyncio.get_running_loop().clock.advance(seconds)


def test_open_loop_counts_from_the_intended_arrival_when_the_loop_was_blocked() -> None:
    async def request(index: int, _intended: float) -> str:
        if index == 0:
            advance(1.0)  # everybody who arrives meanwhile is started a second late
        await asyncio.sleep(0.01)
        return "answered"

    async def trial() -> Open:
        return await open_loop(request, [0.0, 0.1, 0.4], clock=now)

    result = run_virtual(trial())

    assert result.outcomes == ["answered"] * 3
    assert result.latencies == pytest.approx([1.01, 0.91, 0.61], abs=0.002)
    assert result.lag == pytest.approx([0.0, 0.9, 0.6], abs=0.002)


def test_open_loop_never_waits_for_an_answer_before_the_next_arrival() -> None:
    running = most = 0

    async def request(_index: int, _intended: float) -> str:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(10.0)
        running -= 1
        return "answered"

    async def trial() -> Open:
        return await open_loop(request, np.arange(50) * 0.01, clock=now)

    result = run_virtual(trial())

    assert most == 50
    assert max(result.lag) <= 0.0011
    assert result.latencies == pytest.approx([10.0] * 50, abs=0.0011)


def test_open_loop_keeps_outcomes_apart() -> None:
    async def request(index: int, _intended: float) -> str:
        await asyncio.sleep(index / 10)
        return "refused" if index % 2 else "answered"

    async def trial() -> Open:
        return await open_loop(request, [0.0, 0.0, 0.0], clock=now)

    result = run_virtual(trial())

    assert result.of("answered") == pytest.approx([0.0, 0.2])
    assert result.of("refused") == pytest.approx([0.1])


def test_open_loop_raises_what_a_request_raises() -> None:
    async def request(_index: int, _intended: float) -> str:
        raise KeyError("unexpected")

    async def trial() -> Open:
        return await open_loop(request, [0.0], clock=now)

    with pytest.raises(ExceptionGroup) as failure:
        run_virtual(trial())
    assert failure.group_contains(KeyError)


def test_closed_loop_counts_only_the_window_after_the_warm_up() -> None:
    async def caller(_index: int, stamps: list[float], flag: Flag) -> None:
        while flag.running:
            await asyncio.sleep(0.1 if now() < 0.95 else 0.2)  # the warm-up is twice as fast
            stamps.append(now())

    async def trial() -> Closed:
        return await closed_loop(caller, 3, warmup=1.01, seconds=2.0, clock=now)

    result = run_virtual(trial())

    assert result.rate == pytest.approx(15.0)
    assert len(result.latencies) == 30
    assert result.latencies == pytest.approx([0.2] * 30)


def test_closed_loop_reports_the_longest_block_of_the_loop() -> None:
    async def caller(_index: int, stamps: list[float], flag: Flag) -> None:
        while flag.running:
            await asyncio.sleep(0.1)
            advance(0.03)
            stamps.append(now())

    async def trial() -> Closed:
        return await closed_loop(caller, 1, warmup=0.2, seconds=1.0, clock=now)

    assert run_virtual(trial()).longest_block == pytest.approx(0.03, abs=0.0011)


def test_poisson_arrivals_have_the_rate_and_the_spread_of_chance() -> None:
    times = poisson_arrivals(1000.0, 20.0, np.random.default_rng(1))
    gaps = np.diff(times)

    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert (gaps >= 0).all()
    assert times[0] >= 0
    assert times[-1] < 20.0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)


def test_bursty_arrivals_keep_the_rate_and_leave_the_rest_of_each_period_empty() -> None:
    times = bursty_arrivals(1000.0, 20.0, np.random.default_rng(1), period=0.5, duty=0.25)

    assert len(times) == pytest.approx(20_000, rel=0.03)
    assert (np.diff(times) >= 0).all()
    assert ((times % 0.5) <= 0.125 + 1e-9).all()
