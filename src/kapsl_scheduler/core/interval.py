"""Intervals: occurrences at anchor + k times the period for every integer k, exact in integer microseconds.

They know no zones and never end. What is not here: cron expressions (core.cron), where the anchor comes from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final, NoReturn

from kapsl_scheduler.core.cron_zones import EPOCH, elapsed
from kapsl_scheduler.errors import InvalidExpression

__all__ = ["Interval"]

_SECOND: Final = 1_000_000  # microseconds
_DAY: Final = 86_400 * _SECOND
_LEAST: Final = 1_000  # microseconds
_MOST: Final = 36_525 * _DAY  # 100 years
_UNITS: Final = (("day", _DAY), ("hour", 3_600 * _SECOND), ("minute", 60 * _SECOND), ("second", _SECOND))


class Interval:
    """Every `period` (seconds or a timedelta; 1 ms to 100 years, rounded to microseconds), counted from `anchor`.
    Immutable; equal by period and anchor.

    Without an anchor it says how often, not when: `anchored` binds it, and whoever asks one without for an
    occurrence gets a `ValueError`. Raises `InvalidExpression` for a period out of range and for a naive anchor.
    """

    __slots__ = ("anchor_us", "period_us")

    period_us: int
    anchor_us: int | None

    def __init__(self, period: float | timedelta, anchor: datetime | None = None) -> None:
        try:
            anchor_us = None if anchor is None else _microseconds(elapsed(anchor))
        except ValueError as error:
            raise InvalidExpression(f"the anchor of an interval: {error}") from None
        object.__setattr__(self, "period_us", _period(period))
        object.__setattr__(self, "anchor_us", anchor_us)

    def anchored(self, us: int) -> Interval:
        """The same with an anchor, in microseconds since 1970 UTC; itself if it has one."""
        if self.anchor_us is not None:
            return self
        bound = Interval(self.period)
        object.__setattr__(bound, "anchor_us", us)
        return bound

    @property
    def period(self) -> timedelta:
        """The time from one occurrence to the next."""
        return timedelta(microseconds=self.period_us)

    @property
    def anchor(self) -> datetime | None:
        """One of the occurrences, in UTC; None if it is not bound yet."""
        return None if self.anchor_us is None else _moment(self.anchor_us)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"an Interval does not change: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"an Interval does not change: {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Interval):
            return NotImplemented
        return self.period_us == other.period_us and self.anchor_us == other.anchor_us

    def __hash__(self) -> int:
        return hash((self.period_us, self.anchor_us))

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (self.period_us, self.anchor_us)

    def __repr__(self) -> str:
        anchor = "" if self.anchor is None else f", {self.anchor.isoformat()}"
        return f"Interval({self.period_us / _SECOND:.16g}{anchor})"

    # ------------------------------------------------------------------------------------------- for people

    def next(self, after: datetime) -> datetime | None:
        """The first occurrence strictly after the moment, in UTC; None if no datetime can hold it. Raises
        `ValueError` for a datetime without a zone."""
        return _moment(self.next_us(_microseconds(elapsed(after))))

    def previous(self, before: datetime) -> datetime | None:
        """The last occurrence strictly before the moment. Otherwise as `next`."""
        return _moment(self.previous_us(_microseconds(elapsed(before))))

    def iter(self, after: datetime) -> Iterator[datetime]:
        """The occurrences strictly after the moment, ascending, without end but that of the datetimes."""
        return self._walk(self.next_us(_microseconds(elapsed(after))))

    def explain(self) -> str:
        """The interval in plain English: "Every 5 minutes"."""
        for unit, size in _UNITS:
            if self.period_us % size == 0:
                return f"Every {unit}" if self.period_us == size else f"Every {self.period_us // size:,} {unit}s"
        whole, fraction = divmod(self.period_us, _SECOND)
        return f"Every {whole:,}.{f'{fraction:06}'.rstrip('0')} seconds"

    # --------------------------------------------------------------------------------------- for the planner

    def next_us(self, after_us: int) -> int:
        """The first occurrence strictly after, in microseconds since 1970 UTC."""
        anchor = self._bound()
        return anchor + ((after_us - anchor) // self.period_us + 1) * self.period_us

    def previous_us(self, before_us: int) -> int:
        """The last occurrence strictly before, in microseconds since 1970 UTC."""
        anchor = self._bound()
        return anchor + (before_us - anchor - 1) // self.period_us * self.period_us

    def count_us(self, after_us: int, until_us: int) -> int:
        """How many occurrences there are after `after_us` and up to `until_us` (inclusive)."""
        anchor = self._bound()
        return max(0, (until_us - anchor) // self.period_us - (after_us - anchor) // self.period_us)

    def _bound(self) -> int:
        if self.anchor_us is None:
            raise ValueError(
                "the interval has no anchor yet, so it has no occurrences: anchored(us) gives one that has"
            )
        return self.anchor_us

    def _walk(self, us: int) -> Iterator[datetime]:
        while (moment := _moment(us)) is not None:
            yield moment
            us += self.period_us


def _restored(period_us: int, anchor_us: int | None) -> Interval:
    interval = Interval(timedelta(microseconds=period_us))
    return interval if anchor_us is None else interval.anchored(anchor_us)


def _period(period: object) -> int:
    if isinstance(period, timedelta):
        us = _microseconds(period)
    elif isinstance(period, bool) or not isinstance(period, int | float):
        raise InvalidExpression(f"an interval is seconds or a timedelta, got {type(period).__name__}")
    elif isinstance(period, int):
        us = period * _SECOND
    elif math.isfinite(period):
        us = round(period * _SECOND)
    else:
        raise InvalidExpression(f"an interval is a finite number of seconds, got {period}")
    if not _LEAST <= us <= _MOST:
        raise InvalidExpression("an interval is at least 0.001 seconds and at most 100 years, got " + _shown(period))
    return us


def _shown(period: object) -> str:
    if isinstance(period, int) and abs(period) > 10**15:
        return "far more"  # an int of any length: its digits would fill the message
    return f"{period}" if isinstance(period, timedelta) else f"{period} seconds"


def _microseconds(span: timedelta) -> int:
    return (span.days * 86_400 + span.seconds) * _SECOND + span.microseconds


def _moment(us: int) -> datetime | None:
    try:
        return EPOCH + timedelta(microseconds=us)
    except OverflowError:
        return None
