"""The occurrences of a cron expression on the local timeline: seconds since 1970-01-01 00:00 of a clock that knows
no zone and no change of offset.

Days are found month by month with bit masks, times of day with tables of the next value, so that the worst case is
one pass over the 1,572 months of the years 1970 to 2100. What is not here: what a second of this timeline is in UTC
(core.cron_zones).
"""

from __future__ import annotations

from bisect import bisect_right
from datetime import date
from functools import lru_cache
from itertools import pairwise
from typing import Final

from kapsl_scheduler.core.cron_parser import FIRST_YEAR, LAST_YEAR, Fields, parse

__all__ = ["DAY", "DAYS", "Pattern", "pattern_of"]

DAY: Final = 86_400  # seconds
_EPOCH: Final = date(FIRST_YEAR, 1, 1).toordinal()
_YEARS: Final = LAST_YEAR - FIRST_YEAR + 1
_MONTHS: Final = 12 * _YEARS
_STARTS: Final = tuple(
    date(FIRST_YEAR + month // 12, month % 12 + 1, 1).toordinal() - _EPOCH for month in range(_MONTHS + 12)
)
"""The first day of each month, counted in days since 1970-01-01; a year more than is searched."""
DAYS: Final = _STARTS[_MONTHS]
"""Days from 1970-01-01 to the end of 2100."""
_FIRST_WEEKDAYS: Final = bytes((day + 4) % 7 for day in _STARTS)  # 1970-01-01 was a Thursday; 0 is Sunday
_LENGTHS: Final = tuple((2 << (after - start)) - 2 for start, after in pairwise(_STARTS))
"""The days of each month as bits 1 to 28, 29, 30 or 31."""
_NEVER: Final = 1 << 40  # a day beyond all days


@lru_cache(maxsize=1024)
def pattern_of(text: str) -> Pattern:
    """The pattern of an expression's text; equal expressions share one. Raises `InvalidExpression`."""
    return _shared(parse(text))


@lru_cache(maxsize=1024)
def _shared(fields: Fields) -> Pattern:
    return Pattern(fields)


@lru_cache(maxsize=1024)
def _following(mask: int, size: int) -> bytes:
    """For each number from 0 to `size` the least value of the mask that is not less; `size` where there is none."""
    table = bytearray([size] * (size + 1))
    for number in range(size - 1, -1, -1):
        table[number] = number if mask >> number & 1 else table[number + 1]
    return bytes(table)


@lru_cache(maxsize=512)
def _days_by_first_weekday(days: int, weekdays: int) -> tuple[int, ...]:
    """The days of a month that match, as bits, for each weekday that the month may begin with (0 is Sunday)."""
    return tuple(
        sum(1 << day for day in range(1, 32) if days >> day & 1 and weekdays >> ((first + day - 1) % 7 + 1) & 1)
        for first in range(7)
    )


class Pattern:
    """The sets of one expression, ready for search. Seconds are of the local timeline, days count from 1970-01-01.

    Immutable but for a memo of the last day that was found; one pattern is shared by all who ask for the same.
    """

    __slots__ = (
        "_day_masks",
        "_every_day",
        "_first_of_day",
        "_first_of_hour",
        "_first_of_minute",
        "_hours",
        "_last_of_day",
        "_minutes",
        "_per_day",
        "_seconds",
        "_span",
        "fields",
    )

    def __init__(self, fields: Fields) -> None:
        self.fields = fields
        self._seconds = _following(fields.seconds, 60)
        self._minutes = _following(fields.minutes, 60)
        self._hours = _following(fields.hours, 24)
        self._first_of_minute = self._seconds[0]
        self._first_of_hour = self._minutes[0] * 60 + self._first_of_minute
        self._first_of_day = self._hours[0] * 3600 + self._first_of_hour
        self._last_of_day = _greatest(fields.hours) * 3600 + _greatest(fields.minutes) * 60 + _greatest(fields.seconds)
        self._per_day = fields.seconds.bit_count() * fields.minutes.bit_count() * fields.hours.bit_count()
        self._day_masks = _days_by_first_weekday(fields.days, fields.weekdays)
        self._every_day = (
            fields.years == (1 << _YEARS) - 1 and fields.months == (1 << 13) - 2 and self._day_masks[0] == (2 << 31) - 2
        )
        self._span = (_NEVER, _NEVER)  # the first matching day from any day of the span on is its last

    def __reduce__(self) -> tuple[object, ...]:
        return _shared, (self.fields,)

    def next(self, second: int) -> int | None:
        """The first occurrence at `second` or later."""
        if second < 0:
            second = 0
        day, time = divmod(second, DAY)
        low, found = self._span
        if not low <= day <= found:
            found = self._find_day(day)
        if found == day:
            hour, rest = divmod(time, 3600)
            minute, rest = divmod(rest, 60)
            then = self._hours[hour]
            if then == hour:
                later = self._minutes[minute]
                if later == minute:
                    latest = self._seconds[rest]
                    if latest < 60:
                        return second + latest - rest
                    later = self._minutes[minute + 1]
                if later < 60:
                    return day * DAY + hour * 3600 + later * 60 + self._first_of_minute
                then = self._hours[hour + 1]
            if then < 24:
                return day * DAY + then * 3600 + self._first_of_hour
            found = self._find_day(day + 1)
        return None if found == _NEVER else found * DAY + self._first_of_day

    def previous(self, second: int) -> int | None:
        """The last occurrence at `second` or earlier."""
        if second < 0:
            return None
        day, time = divmod(second, DAY)
        if day >= DAYS:
            day, time = DAYS - 1, DAY - 1
        found = self._find_day_back(day)
        if found == day:
            if (at := self._time_back(time)) >= 0:
                return day * DAY + at
            found = self._find_day_back(day - 1)
        return None if found < 0 else found * DAY + self._last_of_day

    def count(self, start: int, stop: int) -> int:
        """How many occurrences there are from second `start` on and before second `stop`."""
        start, stop = max(start, 0), min(stop, DAYS * DAY)
        if start >= stop:
            return 0
        first, from_time = divmod(start, DAY)
        last, to_time = divmod(stop, DAY)
        count = self._count_days(first, last) * self._per_day
        if from_time and self._find_day(first) == first:
            count -= self._rank(from_time)
        if to_time and self._find_day(last) == last:
            count += self._rank(to_time)
        return count

    # --------------------------------------------------------------------------------------------------- days

    def _find_day(self, day: int) -> int:
        """The first matching day from `day` (not negative) on."""
        low, found = self._span
        if low <= day <= found:
            return found
        found = self._search(day)
        self._span = (day, found)  # one store: what another thread reads fits together
        return found

    def _search(self, day: int) -> int:
        if day >= DAYS:
            return _NEVER
        if self._every_day:
            return day
        years, months, masks = self.fields.years, self.fields.months, self._day_masks
        month = bisect_right(_STARTS, day) - 1
        start = _STARTS[month]
        of_month = day - start + 1
        matching = self._days_of(month) >> of_month << of_month
        if matching:
            return start + (matching & -matching).bit_length() - 2
        for later in range(month + 1, _MONTHS):
            year, of_year = divmod(later, 12)
            if (
                months >> of_year & 2
                and years >> year & 1
                and (matching := masks[_FIRST_WEEKDAYS[later]] & _LENGTHS[later])
            ):
                return _STARTS[later] + (matching & -matching).bit_length() - 2
        return _NEVER

    def _find_day_back(self, day: int) -> int:
        """The last matching day up to `day` (which is before the end of the years); -1 if there is none."""
        if day < 0:
            return -1
        if self._every_day:
            return day
        month = bisect_right(_STARTS, day) - 1
        matching = self._days_of(month) & ((2 << (day - _STARTS[month] + 1)) - 1)
        while not matching and month:
            month -= 1
            matching = self._days_of(month)
        return _STARTS[month] + matching.bit_length() - 2 if matching else -1

    def _days_of(self, month: int) -> int:
        """The matching days of a month (counted from January 1970), as bits."""
        year, of_year = divmod(month, 12)
        if not (self.fields.months >> of_year & 2 and self.fields.years >> year & 1):
            return 0
        return self._day_masks[_FIRST_WEEKDAYS[month]] & _LENGTHS[month]

    def _count_days(self, first: int, last: int) -> int:
        """How many days match from `first` on and before `last`."""
        if first >= last or self._every_day:
            return last - first
        from_month = bisect_right(_STARTS, first) - 1
        to_month = bisect_right(_STARTS, last) - 1
        count = sum(self._days_of(month).bit_count() for month in range(from_month, to_month))
        if to_month < _MONTHS:
            count += (self._days_of(to_month) & ((1 << (last - _STARTS[to_month] + 1)) - 1)).bit_count()
        return count - (self._days_of(from_month) & ((1 << (first - _STARTS[from_month] + 1)) - 1)).bit_count()

    # --------------------------------------------------------------------------------------------------- times

    def _time_back(self, time: int) -> int:
        """The last matching second of a day up to `time`; -1 if there is none."""
        fields = self.fields
        hour, rest = divmod(time, 3600)
        minute, second = divmod(rest, 60)
        if fields.hours >> hour & 1:
            if fields.minutes >> minute & 1 and (below := fields.seconds & ((2 << second) - 1)):
                return time - second + _greatest(below)
            if below := fields.minutes & ((1 << minute) - 1):
                return hour * 3600 + _greatest(below) * 60 + _greatest(fields.seconds)
        if below := fields.hours & ((1 << hour) - 1):
            return _greatest(below) * 3600 + self._last_of_day % 3600
        return -1

    def _rank(self, time: int) -> int:
        """How many matching seconds of a day are before `time`."""
        fields = self.fields
        hour, rest = divmod(time, 3600)
        minute, second = divmod(rest, 60)
        per_minute = fields.seconds.bit_count()
        count = (fields.hours & ((1 << hour) - 1)).bit_count() * fields.minutes.bit_count() * per_minute
        if fields.hours >> hour & 1:
            count += (fields.minutes & ((1 << minute) - 1)).bit_count() * per_minute
            if fields.minutes >> minute & 1:
                count += (fields.seconds & ((1 << second) - 1)).bit_count()
        return count


def _greatest(mask: int) -> int:
    return mask.bit_length() - 1
