"""What is recommended for a latency curve and a goal."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.core.tuning import Measured, recommend

SECONDS = st.floats(1e-6, 10)


@st.composite
def curves(draw: st.DrawFn) -> list[Measured]:
    """Some sizes, each with any median and a p99 that is not below it."""
    points = []
    for rows in sorted(draw(st.sets(st.integers(1, 256), min_size=1, max_size=5))):
        median = draw(SECONDS)
        points.append(Measured(rows, median, median * draw(st.floats(1, 5))))
    return points


@given(curves(), SECONDS)
def test_what_is_recommended_was_measured_and_keeps_the_goal(curve: list[Measured], goal: float) -> None:
    advice = recommend(curve, goal)

    (point,) = [point for point in curve if point.rows == advice.max_batch_size]
    assert advice.rows_per_second == point.rows_per_second
    assert advice.keeps_goal == any(2 * other.p99 <= goal for other in curve)
    assert advice.worst == 2 * point.p99 + advice.max_queue_delay
    assert 0 <= advice.max_queue_delay <= point.median
    if advice.keeps_goal:
        assert advice.worst <= goal * (1 + 1e-12)
    else:
        assert advice.max_queue_delay == 0
        assert point.p99 == min(other.p99 for other in curve)


@given(curves(), SECONDS)
def test_no_size_that_fits_is_much_faster_and_no_smaller_one_as_fast(curve: list[Measured], goal: float) -> None:
    advice = recommend(curve, goal)
    if not advice.keeps_goal:
        return

    fitting = [point for point in curve if 2 * point.p99 <= goal]
    most = max(point.rows_per_second for point in fitting)
    assert advice.rows_per_second >= 0.95 * most
    for point in fitting:
        assert point.rows >= advice.max_batch_size or point.rows_per_second < 0.95 * most


@given(curves(), SECONDS, st.floats(1, 100))
def test_a_looser_goal_is_never_answered_with_much_less(curve: list[Measured], goal: float, more: float) -> None:
    tight, loose = recommend(curve, goal), recommend(curve, goal * more)

    if tight.keeps_goal:
        assert loose.keeps_goal
        assert loose.rows_per_second >= 0.95 * tight.rows_per_second


def gaining() -> list[Measured]:
    return [Measured(1, 0.004, 0.005), Measured(8, 0.008, 0.010), Measured(32, 0.020, 0.025)]


@pytest.mark.parametrize(
    ("goal", "rows", "delay", "keeps"),
    [
        (math.inf, 32, 0.0, True),
        (1.0, 32, 0.020, True),  # no longer than a call takes
        (0.055, 32, 0.005, True),  # what the goal leaves
        (0.050, 32, 0.0, True),
        (0.049, 8, 0.008, True),
        (0.012, 1, 0.0, True),  # one row fills a batch of one
        (0.009, 1, 0.0, False),
    ],
)
def test_the_goal_decides(goal: float, rows: int, delay: float, keeps: bool) -> None:
    advice = recommend(gaining(), goal)

    assert (advice.max_batch_size, advice.keeps_goal) == (rows, keeps)
    assert advice.max_queue_delay == pytest.approx(delay)


def test_a_model_that_gains_nothing_is_not_batched() -> None:
    curve = [Measured(rows, 0.010 * rows, 0.011 * rows) for rows in (1, 2, 4, 8)]

    assert recommend(curve, 10.0).max_batch_size == 1


def test_what_is_no_curve_or_no_goal_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        recommend([])
    for goal in (0.0, math.nan):
        with pytest.raises(ValueError, match="more than 0"):
            recommend(gaining(), goal)
