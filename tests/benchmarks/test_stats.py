"""Percentiles, ratios and rates."""

from __future__ import annotations

import math

import pytest
from benchmarks.stats import median, paired_ratios, percentile, rate_between


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1), (1, 1), (50, 50), (50.1, 51), (99, 99), (99.5, 100), (100, 100)]
)
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], percent) == expected


def test_percentile_of_few_values_is_one_of_them() -> None:
    assert percentile([1.0, 100.0], 50) == 1.0
    assert percentile([1.0, 100.0], 99) == 100.0
    assert percentile([7.0], 1) == 7.0


def test_percentile_and_median_of_nothing_are_nan() -> None:
    assert math.isnan(percentile([], 99))
    assert math.isnan(median([]))


def test_percentile_refuses_what_is_no_percentage() -> None:
    with pytest.raises(ValueError, match="percent"):
        percentile([1.0], 101)


def test_paired_ratios_compare_round_by_round() -> None:
    assert paired_ratios([1.0, 30.0], [2.0, 60.0]) == [0.5, 0.5]
    assert math.isnan(paired_ratios([1.0], [0.0])[0])
    with pytest.raises(ValueError, match="zip"):
        paired_ratios([1.0], [1.0, 2.0])


def test_rate_between_counts_the_window_alone() -> None:
    stamps = [0.5, 1.0, 1.5, 2.0, 2.99, 3.0]
    assert rate_between(stamps, 1.0, 3.0) == 2.0
    with pytest.raises(ValueError, match="stop after start"):
        rate_between(stamps, 1.0, 1.0)
