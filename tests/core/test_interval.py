"""Intervals: exact, never drifting, bound to an anchor."""

from __future__ import annotations

import pickle
from datetime import UTC, datetime, timedelta
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.core.interval import Interval
from kapsl_scheduler.errors import InvalidExpression

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
periods = st.integers(1_000, 10**13)
times = st.integers(-(10**16), 10**16)


def microseconds(count: int) -> timedelta:
    return timedelta(microseconds=count)


@given(periods, times, times)
def test_occurrences_are_the_anchor_and_whole_periods_from_it(period: int, anchor: int, now: int) -> None:
    interval = Interval(microseconds(period)).anchored(anchor)
    after, before = interval.next_us(now), interval.previous_us(now)
    assert (after - anchor) % period == (before - anchor) % period == 0
    assert now < after <= now + period
    assert now - period <= before < now
    assert after - before == (period if (now - anchor) % period else 2 * period)


@given(periods, times, times, times)
def test_the_count_is_of_those_after_and_up_to(period: int, anchor: int, one: int, other: int) -> None:
    interval = Interval(microseconds(period)).anchored(anchor)
    after, until = sorted([one, other])
    count = interval.count_us(after, until)
    first = interval.next_us(after)
    assert count == (0 if first > until else 1 + (until - first) // period)
    assert interval.count_us(until, after) == 0


def test_after_a_year_of_a_tenth_of_a_second_nothing_has_drifted() -> None:
    interval = Interval(0.1, EPOCH)
    year = 365 * 86_400 * 1_000_000
    assert interval.next_us(year - 1) == year
    assert interval.count_us(0, year) == year // 100_000


def test_for_people() -> None:
    interval = Interval(300, datetime(2026, 1, 1, 0, 2, tzinfo=UTC))
    now = datetime(2026, 1, 1, 12, 2, tzinfo=UTC)
    assert interval.next(now) == now + timedelta(minutes=5)
    assert interval.previous(now) == now - timedelta(minutes=5)
    assert interval.next(now + timedelta(seconds=1)) == now + timedelta(minutes=5)
    assert [one.minute for one in islice(interval.iter(now), 3)] == [7, 12, 17]
    assert interval.anchor == datetime(2026, 1, 1, 0, 2, tzinfo=UTC)
    assert interval.period == timedelta(minutes=5)
    with pytest.raises(ValueError, match="expected a datetime with a zone"):
        interval.next(datetime(2026, 1, 1))  # noqa: DTZ001


def test_it_ends_where_datetimes_end() -> None:
    interval = Interval(86_400, EPOCH)
    last = datetime(9999, 12, 31, tzinfo=UTC)
    assert interval.next(last) is None
    assert list(interval.iter(last - timedelta(days=1))) == [last]
    assert interval.previous(datetime(1, 1, 1, tzinfo=UTC)) is None


def test_without_an_anchor_there_are_no_occurrences() -> None:
    loose = Interval(5)
    for ask in (lambda: loose.next_us(0), lambda: loose.previous_us(0), lambda: loose.count_us(0, 1)):
        with pytest.raises(ValueError, match="no anchor yet"):
            ask()
    with pytest.raises(ValueError, match="no anchor yet"):
        loose.iter(EPOCH)
    assert loose.anchor is None
    assert loose.explain() == "Every 5 seconds"


def test_an_anchor_is_kept_once_it_is_there() -> None:
    bound = Interval(5).anchored(1_000)
    assert bound.anchor_us == 1_000
    assert bound.anchored(2_000) is bound


@pytest.mark.parametrize(
    ("period", "us"),
    [
        (1, 1_000_000),
        (0.001, 1_000),
        (1 / 3, 333_333),
        (timedelta(milliseconds=250), 250_000),
        (timedelta(days=36_525), 36_525 * 86_400 * 1_000_000),
    ],
)
def test_seconds_or_a_timedelta(period: float | timedelta, us: int) -> None:
    assert Interval(period).period_us == us


@pytest.mark.parametrize(
    ("period", "message"),
    [
        (0, "at least 0.001 seconds and at most 100 years, got 0 seconds"),
        (-5, "got -5 seconds"),
        (0.0009, "got 0.0009 seconds"),
        (timedelta(0), "got 0:00:00"),
        (timedelta(days=36_526), "got 36526 days, 0:00:00"),
        (1e300, "got 1e\\+300 seconds"),
        (10**4000, "got far more"),
        (float("nan"), "a finite number of seconds, got nan"),
        (float("inf"), "a finite number of seconds, got inf"),
        (True, "seconds or a timedelta, got bool"),
        ("60", "seconds or a timedelta, got str"),
        (None, "seconds or a timedelta, got NoneType"),
    ],
)
def test_a_period_that_is_none(period: float, message: str) -> None:
    with pytest.raises(InvalidExpression, match=message):
        Interval(period)


def test_an_anchor_has_a_zone() -> None:
    with pytest.raises(InvalidExpression, match="the anchor of an interval: expected a datetime with a zone"):
        Interval(5, datetime(2026, 1, 1))  # noqa: DTZ001


def test_equal_by_period_and_anchor() -> None:
    one = Interval(60, EPOCH)
    assert one == Interval(timedelta(minutes=1)).anchored(0)
    assert hash(one) == hash(Interval(60.0, EPOCH))
    others = [Interval(60), Interval(61, EPOCH), Interval(60, EPOCH + timedelta(seconds=1)), 60]
    assert all(one != other for other in others)
    assert pickle.loads(pickle.dumps(one)) == one
    assert pickle.loads(pickle.dumps(Interval(60))) == Interval(60)


def test_does_not_change() -> None:
    one = Interval(60)
    with pytest.raises(AttributeError, match="does not change: anchor_us"):
        one.anchor_us = 5
    with pytest.raises(AttributeError, match="does not change: period_us"):
        del one.period_us


def test_says_what_it_is() -> None:
    assert repr(Interval(300)) == "Interval(300)"
    assert repr(Interval(0.25, EPOCH)) == "Interval(0.25, 1970-01-01T00:00:00+00:00)"


@pytest.mark.parametrize(
    ("period", "words"),
    [
        (1, "Every second"),
        (60, "Every minute"),
        (3600, "Every hour"),
        (86_400, "Every day"),
        (300, "Every 5 minutes"),
        (90, "Every 90 seconds"),
        (7_200, "Every 2 hours"),
        (timedelta(days=14), "Every 14 days"),
        (36_000_001, "Every 36,000,001 seconds"),
        (0.5, "Every 0.5 seconds"),
        (1.25, "Every 1.25 seconds"),
        (0.001001, "Every 0.001001 seconds"),
    ],
)
def test_words(period: float | timedelta, words: str) -> None:
    assert Interval(period).explain() == words
