"""The retry budget: 20 % of recent calls + 10 a second."""

from __future__ import annotations

from kapsl_scheduler.core.health import RetryBudget


def spent(budget: RetryBudget, now: float) -> int:
    """How many retries are allowed at one moment."""
    count = 0
    while budget.take(now):
        count += 1
    return count


def test_what_is_saved_up_is_spent_once() -> None:
    budget = RetryBudget(5.0)
    assert spent(budget, 5.0) == 100
    assert spent(budget, 5.0) == 0


def test_ten_a_second() -> None:
    budget = RetryBudget(0.0)
    spent(budget, 0.0)
    assert spent(budget, 0.05) == 0
    assert spent(budget, 0.125) == 1
    assert spent(budget, 2.0) == 19


def test_one_for_five_calls() -> None:
    budget = RetryBudget(0.0)
    spent(budget, 0.0)
    budget.earn(4)
    assert spent(budget, 0.0) == 0
    budget.earn(2)
    assert spent(budget, 0.0) == 1
    budget.earn(50)
    assert spent(budget, 0.0) == 10


def test_no_more_is_saved_than_ten_seconds_earn() -> None:
    budget = RetryBudget(0.0)
    budget.earn(1_000_000)
    assert spent(budget, 1_000.0) == 100
    budget.earn(1_000_000)
    assert spent(budget, 1_000.0) == 100


def test_a_clock_that_steps_back_takes_nothing_away() -> None:
    budget = RetryBudget(10.0)
    spent(budget, 10.0)
    budget.earn(10)
    assert spent(budget, 9.0) == 2
    assert not budget.take(9.0)
    assert budget.take(9.25)
