"""A pattern in plain English, said from the sets and not from the text: what it says is what fires.

What is not here: the words of the error messages (core.cron_hints).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kapsl_scheduler.core.cron_parser import FIELDS, FIRST_YEAR
from kapsl_scheduler.core.cron_pattern import Pattern

__all__ = ["describe"]

_SECOND, _MINUTE, _HOUR, _DAY, _MONTH, _WEEKDAY, _YEAR = FIELDS
_MONTHS: Final = (
    "",
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
)
_WEEKDAYS: Final = ("", "Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
_FEW: Final = 6  # so many times of day are said one by one


def describe(pattern: Pattern) -> str:
    """One sentence without a full stop."""
    times, by_the_clock = _times(pattern)
    days = _days(pattern)
    if by_the_clock:
        if not days or days[0].startswith("in "):
            days.insert(0, "every day")
        times = f"{times} {days.pop(0)}"
    words = ", ".join([times, *days])
    return words if pattern.next(0) is not None else f"{words}: no such day ever comes, so never"


def _times(pattern: Pattern) -> tuple[str, bool]:
    """The times of a day, and whether they are said as clock times."""
    fields = pattern.fields
    seconds, minutes, hours = _values(fields.seconds), _values(fields.minutes), _values(fields.hours)
    if len(hours) == 24:
        if len(minutes) == 60 and (every := _every(seconds)):
            return "Every second" if every == 1 else f"Every {every} seconds", False
        if seconds == [0] and (every := _every(minutes)):
            return "Every minute" if every == 1 else f"Every {every} minutes", False
        if seconds == minutes == [0]:
            return "Every hour, on the hour", False
    elif len(hours) * len(minutes) * len(seconds) <= _FEW:
        clock = [f"{hour:02}:{minute:02}:{second:02}" for hour in hours for minute in minutes for second in seconds]
        return f"At {_join(clock)}", True
    said = f"{_set('second', seconds, 0, 59)} of {_set('minute', minutes, 0, 59)}"
    said = f"E{said[1:]}" if said.startswith("every") else f"At {said}"
    if len(hours) < 24:
        return f"{said} past {_set('hour', hours, 0, 23)}", False
    return said if len(minutes) == 60 else f"{said} of every hour", False


def _days(pattern: Pattern) -> list[str]:
    """What restricts the days, if anything does."""
    fields = pattern.fields
    days, weekdays = _values(fields.days), _values(fields.weekdays)
    months = [_MONTHS[month] for month in _values(fields.months)]
    years = [year + FIRST_YEAR for year in _values(fields.years)]
    said = []
    if len(days) < 31:
        of = "every month" if len(months) == 12 else _runs(_values(fields.months), _MONTHS)
        said.append(f"on {_set('day', days, 1, 31)} of {of}")
        if len(weekdays) == 1:
            said.append(f"when it is a {_WEEKDAYS[weekdays[0]]}")
        elif len(weekdays) < 7:
            said.append(f"when it is {_runs(weekdays, _WEEKDAYS, 'or')}")
    else:
        if len(weekdays) < 7:
            said.append(f"on {_runs(weekdays, _WEEKDAYS)}")
        if len(months) < 12:
            said.append(f"in {_runs(_values(fields.months), _MONTHS)}")
    if len(years) == 1:
        said.append(f"in {years[0]}")
    elif len(years) < _YEAR.high - _YEAR.low + 1:
        said.append(f"in {_set('year', years, _YEAR.low, _YEAR.high)}")
    return said


def _values(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]


def _every(values: Sequence[int]) -> int | None:
    """n, if the sixty are divided evenly into every n-th from 0 on and there is more than one."""
    size = 60 // len(values)
    return size if len(values) > 1 and list(values) == list(range(0, 60, size)) else None


def _set(unit: str, values: Sequence[int], low: int, high: int) -> str:
    """The values of one field: all, evenly spaced, or one by one and in runs."""
    if len(values) == high - low + 1:
        return f"every {unit}"
    if len(values) == 1:
        return f"{unit} {values[0]}"
    apart = values[1] - values[0]
    if len(values) > 2 and apart > 1 and list(values) == list(range(values[0], values[-1] + 1, apart)):
        said = f"every {_ordinal(apart)} {unit}"
        if values[0] == 0 and values[-1] + apart == high + 1:
            return said
        return f"{said} from {values[0]} through {values[-1]}"
    return f"{unit}s {_runs(values)}"


def _runs(values: Sequence[int], names: Sequence[str] | None = None, last: str = "and") -> str:
    """The values one by one, three and more in a row as a run."""
    said: list[str] = []
    start = 0
    for index, value in enumerate(values):
        if index + 1 < len(values) and values[index + 1] == value + 1:
            continue
        run = [str(one) if names is None else names[one] for one in values[start : index + 1]]
        said += [f"{run[0]} through {run[-1]}"] if len(run) > 2 else run
        start = index + 1
    return _join(said, last)


def _join(words: Sequence[str], last: str = "and") -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def _ordinal(number: int) -> str:
    tens, ones = divmod(number, 10)
    suffix = "th" if tens % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(ones, "th")
    return f"{number}{suffix}"
