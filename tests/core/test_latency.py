"""The latency model: medians by rows, what it assumes where nothing was measured, whom it condemns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.core.batch import Shape
from kapsl_scheduler.core.latency import Deviation, LatencyModel, LatencyTable

seconds = st.floats(1e-6, 10.0)
measurements = st.dictionaries(st.integers(1, 64), seconds, min_size=1, max_size=6)


def model_of(times: dict[int, float], *, calls: int = 3, now: float = 0.0) -> LatencyModel:
    model = LatencyModel()
    for _ in range(calls):
        for rows, elapsed in times.items():
            model.observe(rows, elapsed, now)
    return model


# ------------------------------------------------------------------------------------------------ learning


def test_nothing_is_known_before_the_first_call() -> None:
    model = LatencyModel()
    assert model.upper(1) is None
    assert model.lower(1, 0.0) == 0.0


def test_an_estimate_is_the_median_of_the_last_five_calls() -> None:
    """The lower of the two in the middle, where there are two."""
    model = LatencyModel()
    estimates = []
    for elapsed in [1.0, 2.0, 3.0, 9.0, 9.0, 2.0, 4.0]:
        model.observe(4, elapsed, 0.0)
        estimates.append(model.upper(4))
    assert estimates == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0]


@pytest.mark.slow
@given(st.lists(seconds, min_size=5, max_size=5), st.lists(st.sampled_from([1e-9, 1e9]), max_size=2))
def test_two_outliers_in_five_calls_change_nothing_much(calm: list[float], wild: list[float]) -> None:
    model = LatencyModel()
    for elapsed in [*calm, *wild]:
        model.observe(8, elapsed, 0.0)
    assert min(calm) <= (model.upper(8) or 0.0) <= max(calm)


def test_row_counts_are_learned_in_any_order() -> None:
    model = model_of({8: 0.8, 1: 0.1, 4: 0.4})
    assert [model.upper(rows) for rows in (1, 4, 8)] == [0.1, 0.4, 0.8]


# -------------------------------------------------------------------------------------------- upper, lower


def test_between_two_measurements_time_is_linear() -> None:
    model = model_of({2: 0.2, 6: 1.0})
    assert model.upper(4) == pytest.approx(0.6)
    assert model.lower(4, 0.0) == pytest.approx(0.6)


def test_below_the_smallest_the_two_err_in_opposite_directions() -> None:
    model = model_of({8: 0.8, 16: 1.6})
    assert model.upper(2) == 0.8
    assert model.lower(2, 0.0) == pytest.approx(0.2)


def test_above_the_largest_too() -> None:
    model = model_of({2: 0.3, 4: 0.5})
    assert model.upper(8) == pytest.approx(0.9)
    assert model.lower(8, 0.0) == 0.5


def test_from_one_row_count_the_worst_is_that_time_grows_with_the_rows() -> None:
    model = model_of({4: 0.4})
    assert model.upper(16) == pytest.approx(1.6)
    assert model.lower(16, 0.0) == 0.4


def test_a_curve_that_falls_is_not_carried_on_downwards() -> None:
    assert model_of({2: 0.5, 4: 0.3}).upper(8) == 0.3


@pytest.mark.slow
@given(measurements, st.integers(1, 128))
def test_lower_never_exceeds_upper(times: dict[int, float], rows: int) -> None:
    model = model_of(times)
    upper = model.upper(rows)
    assert upper is not None
    assert model.lower(rows, 0.0) <= upper * (1 + 1e-9)


@pytest.mark.slow
@given(measurements)
def test_what_was_measured_is_what_is_predicted(times: dict[int, float]) -> None:
    model = model_of(times)
    for rows, elapsed in times.items():
        assert model.upper(rows) == model.lower(rows, 0.0) == elapsed


# ------------------------------------------------------------------------------------- who is condemned


@pytest.mark.parametrize(("calls", "condemns"), [(1, False), (2, False), (3, True)])
def test_two_calls_condemn_nobody(calls: int, condemns: bool) -> None:
    """The first may be the model's compilation."""
    model = model_of({1: 5.0}, calls=calls)
    assert (model.lower(1, 0.0) > 0) is condemns
    assert model.upper(1) == 5.0


def test_a_second_without_a_call_condemns_nobody() -> None:
    """One call must go through, or nothing would ever show that the engine is quick again."""
    model = model_of({1: 0.05}, now=10.0)
    assert model.lower(1, 11.0) == 0.05
    assert model.lower(1, 11.001) == 0.0
    assert model.upper(1) == 0.05
    model.observe(1, 0.05, 20.0)
    assert model.lower(1, 20.5) == 0.05


def test_slow_engines_are_given_ten_calls_time() -> None:
    model = model_of({1: 1.0, 4: 2.0})
    assert model.lower(1, 20.0) == 1.0
    assert model.lower(1, 20.1) == 0.0


# ------------------------------------------------------------------------------------------- rows_within


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(1, 8), st.floats(0.0, 1.0)), min_size=1, max_size=6),
    st.floats(0.0, 8.0),
    st.integers(1, 32),
    st.integers(0, 32),
)
def test_the_most_rows_that_fit_are_those_that_a_search_one_by_one_finds(
    steps: list[tuple[int, float]], bound: float, at_least: int, more: int
) -> None:
    times, rows, elapsed = {}, 0, 0.1
    for step, growth in steps:
        rows, elapsed = rows + step, elapsed + growth
        times[rows] = elapsed
    model = model_of(times)
    at_most = at_least + more
    fitting = [n for n in range(at_least, at_most + 1) if (model.upper(n) or 0.0) <= bound]
    assert model.rows_within(bound, at_least, at_most) == max(fitting, default=at_least)


@pytest.mark.slow
@given(measurements, st.floats(0.0, 20.0), st.integers(1, 32), st.integers(0, 32))
def test_whatever_was_measured_the_rows_fit_or_are_the_fewest(
    times: dict[int, float], bound: float, at_least: int, more: int
) -> None:
    model = model_of(times)
    rows = model.rows_within(bound, at_least, at_least + more)
    assert at_least <= rows <= at_least + more
    assert rows == at_least or (model.upper(rows) or 0.0) <= bound


def test_an_unmeasured_shape_fits_only_the_fewest_rows() -> None:
    assert LatencyModel().rows_within(1e9, 1, 32) == 1
    assert LatencyModel().rows_within(1e9, 4, 32) == 4


# -------------------------------------------------------------------------------------------------- table


def test_every_shape_has_a_model_of_its_own() -> None:
    table, one, other = LatencyTable(), Shape("one", batchable=True), Shape("other", batchable=True)
    table[one].observe(1, 0.5, 0.0)
    assert table[one].upper(1) == 0.5
    assert table[other].upper(1) is None
    assert table[one] is table[one]


def test_the_shape_that_was_used_longest_ago_is_forgotten() -> None:
    table = LatencyTable()
    shapes = [Shape(number, batchable=True) for number in range(257)]
    for shape in shapes[:256]:
        table[shape].observe(1, 0.5, 0.0)
    assert table[shapes[0]].upper(1) == 0.5  # used again: now the second is the oldest
    assert table[shapes[256]].upper(1) is None
    assert table[shapes[0]].upper(1) == 0.5
    assert table[shapes[2]].upper(1) == 0.5
    assert table[shapes[1]].upper(1) is None


# ---------------------------------------------------------------------------------------------- deviation


def test_the_expectation_is_the_mean_and_four_times_the_mean_deviation() -> None:
    deviation = Deviation()
    assert deviation.expected == 0.0
    deviation.observe(0.8)
    assert deviation.expected == pytest.approx(0.1 + 4 * 0.2)
    for _ in range(200):
        deviation.observe(0.8)
    assert deviation.expected == pytest.approx(0.8, rel=1e-3)


@pytest.mark.slow
@given(st.lists(st.floats(0.001, 0.002), min_size=30, max_size=50))
def test_calm_samples_are_seldom_above_the_expectation(samples: list[float]) -> None:
    deviation = Deviation()
    for sample in samples:
        deviation.observe(sample)
    assert 0.0009 <= deviation.expected <= 0.004
