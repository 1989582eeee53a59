"""The cron language and its meaning once more, by the slowest way: the grammar as alternatives that are tried in
order, and time walked through second by second. And the strategy that writes expressions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo

from hypothesis import strategies as st

SPACE = " \t\r\n"
DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
BOUNDS = [(0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (1, 7), (1970, 2100)]
MONTHS = {
    "jan january": 1,
    "feb february": 2,
    "mar march": 3,
    "apr april": 4,
    "may": 5,
    "jun june": 6,
    "jul july": 7,
    "aug august": 8,
    "sep september": 9,
    "oct october": 10,
    "nov november": 11,
    "dec december": 12,
}
WEEKDAYS = {
    "sun sunday": 1,
    "mon monday": 2,
    "tue tues tuesday": 3,
    "wed wednesday": 4,
    "thu thurs thursday": 5,
    "fri friday": 6,
    "sat saturday": 7,
}
NAMES = {
    4: {name: value for names, value in MONTHS.items() for name in names.split()},
    5: {name: value for names, value in WEEKDAYS.items() for name in names.split()},
}
SHORTHANDS = {
    "@yearly": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * SUN",
    "@daily": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}


class WrongError(Exception):
    """The text is no expression."""


@dataclass(frozen=True)
class Naive:
    """The sets of the seven fields, and whether the hour or the minute has a wildcard."""

    sets: tuple[frozenset[int], ...]
    wild: bool

    def day(self, day: date) -> bool:
        _, _, _, days, months, weekdays, years = self.sets
        weekday = day.isoweekday() % 7 + 1
        return day.year in years and day.month in months and day.day in days and weekday in weekdays

    def time(self, moment: datetime) -> bool:
        seconds, minutes, hours = self.sets[:3]
        return moment.second in seconds and moment.minute in minutes and moment.hour in hours

    def __call__(self, moment: datetime) -> bool:
        return self.time(moment) and self.day(moment)

    def walk(self, start: datetime, stop: datetime) -> list[datetime]:
        """The matching seconds from `start` on and before `stop`."""
        moment = start.replace(microsecond=0)
        if moment < start:
            moment += timedelta(seconds=1)
        found = []
        while moment < stop:
            if self(moment):
                found.append(moment)
            moment += timedelta(seconds=1)
        return found

    def first_after(self, start: datetime, days: int) -> datetime | None:
        """The first match strictly after `start` within so many days, which are looked at one by one."""
        times = [(h, m, s) for h in sorted(self.sets[2]) for m in sorted(self.sets[1]) for s in sorted(self.sets[0])]
        for ahead in range(days):
            day = start.date() + timedelta(days=ahead)
            if not self.day(day):
                continue
            for hour, minute, second in times:
                moment = datetime(day.year, day.month, day.day, hour, minute, second, tzinfo=start.tzinfo)
                if moment > start:
                    return moment
        return None


# ---------------------------------------------------------------------------------------------------- grammar
# Every rule takes the text from a position on and gives the position behind it, or raises.


def parse(text: str) -> Naive:
    """The expression's sets. Raises `WrongError`."""
    shorthand = SHORTHANDS.get(text.strip(SPACE))
    if shorthand is not None:
        return parse(shorthand)
    at, sets, wild = 0, [], False
    for index in range(7):
        if index == 6 and at == len(text):
            sets.append(frozenset(range(1970, 2101)))
            break
        at = _space(text, at)
        values, wildcard, at = _root(text, at, index)
        wild = wild or (wildcard and index in (1, 2))
        field = set(values)
        while text[at : at + 1] == ",":
            values, wildcard, at = _root(text, at + 1, index)
            wild = wild or (wildcard and index in (1, 2))
            field |= set(values)
        at = _space(text, at)
        sets.append(frozenset(field))
    if at != len(text):
        raise WrongError
    return Naive(tuple(sets), wild)


def _root(text: str, at: int, index: int) -> tuple[list[int], bool, int]:
    for alternative in (_period, _specifier, _named_point):
        try:
            return alternative(text, at, index)
        except WrongError:
            continue
    raise WrongError


def _period(text: str, at: int, index: int) -> tuple[list[int], bool, int]:
    point = text[at : at + 1] not in "*?" and _is_point(text, at, index)
    values, wild, at = _specifier(text, at, index)
    if text[at : at + 1] != "/":
        raise WrongError
    step, at = _ordinal(text, at + 1)
    high = BOUNDS[index][1]
    if not 1 <= step <= high:
        raise WrongError
    if point:
        values = list(range(values[0], high + 1))
    return values[::step], wild, at


def _is_point(text: str, at: int, index: int) -> bool:
    try:
        _range(text, at, index)
    except WrongError:
        pass
    else:
        return False
    try:
        _ordinal(text, at)
    except WrongError:
        return False
    return True


def _specifier(text: str, at: int, index: int) -> tuple[list[int], bool, int]:
    low, high = BOUNDS[index]
    if text[at : at + 1] == "*" or (text[at : at + 1] == "?" and index in (3, 5)):
        return list(range(low, high + 1)), True, at + 1
    for alternative in (_range, _point, _named_range):
        try:
            values, at = alternative(text, at, index)
        except WrongError:
            continue
        return values, False, at
    raise WrongError


def _range(text: str, at: int, index: int) -> tuple[list[int], int]:
    first, at = _ordinal(text, at)
    if text[at : at + 1] != "-":
        raise WrongError
    last, at = _ordinal(text, at + 1)
    return _between(first, last, index), at


def _point(text: str, at: int, index: int) -> tuple[list[int], int]:
    value, at = _ordinal(text, at)
    return _between(value, value, index), at


def _named_range(text: str, at: int, index: int) -> tuple[list[int], int]:
    first, at = _name(text, at, index)
    if text[at : at + 1] != "-":
        raise WrongError
    last, at = _name(text, at + 1, index)
    return _between(first, last, index), at


def _named_point(text: str, at: int, index: int) -> tuple[list[int], bool, int]:
    value, at = _name(text, at, index)
    return [value], False, at


def _between(first: int, last: int, index: int) -> list[int]:
    low, high = BOUNDS[index]
    if not low <= first <= last <= high:
        raise WrongError
    return list(range(first, last + 1))


def _ordinal(text: str, at: int) -> tuple[int, int]:
    at = start = _space(text, at)
    while at < len(text) and text[at] in DIGITS:
        at += 1
    if at == start:
        raise WrongError
    return int(text[start:at]), _space(text, at)


def _name(text: str, at: int, index: int) -> tuple[int, int]:
    at = start = _space(text, at)
    while at < len(text) and text[at] in LETTERS:
        at += 1
    value = NAMES.get(index, {}).get(text[start:at].lower())
    if value is None:
        raise WrongError
    return value, _space(text, at)


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


# ------------------------------------------------------------------------------------------------------ zones


def passes(naive: Naive, tz: tzinfo, start: datetime, stop: datetime) -> Iterator[datetime]:
    """The UTC seconds whose local time matches."""
    for moment in _seconds(start, stop):
        if naive(moment.astimezone(tz)):
            yield moment


def once(naive: Naive, tz: tzinfo, start: datetime, stop: datetime) -> list[datetime]:
    """Each matching local time once: in the first pass of a fold, and for those of a gap when the gap is over.

    Right for whole seconds from `start` on and before `stop`, where no change is close to either."""
    found = set()
    before = start.astimezone(tz)
    for moment in _seconds(start, stop):
        local = moment.astimezone(tz)
        offset, offset_before = local.utcoffset(), before.utcoffset()
        assert offset is not None
        assert offset_before is not None
        if naive(local) and local.fold == 0:
            found.add(moment)
        if offset > offset_before:  # the clock has skipped what is between
            wall = before.replace(tzinfo=None) + timedelta(seconds=1)
            while wall < local.replace(tzinfo=None):
                if naive(wall):
                    found.add(moment)
                wall += timedelta(seconds=1)
        before = local
    return sorted(found)


def _seconds(start: datetime, stop: datetime) -> Iterator[datetime]:
    moment = start.astimezone(UTC)
    while moment < stop:
        yield moment
        moment += timedelta(seconds=1)


# --------------------------------------------------------------------------------------------------- strategy


@st.composite
def members(draw: st.DrawFn, index: int, first: bool) -> str:
    """One member of a field's list."""
    low, high = BOUNDS[index]
    blank = st.sampled_from(["", "", "", "", " ", "\t"])
    number = st.integers(low, high).map(str) | st.integers(low, high).map("{:03}".format)
    names = sorted(NAMES.get(index, {}))
    kinds = ["any", "number", "number", "range", "range", *(["name", "names"] if names else [])]
    kind = draw(st.sampled_from(kinds))
    if kind == "any" and not first and draw(st.booleans()):
        kind = "number"
    if kind == "any":
        base = draw(st.sampled_from("*?")) if index in (3, 5) else "*"
    elif kind == "number":
        base = draw(number)
    elif kind == "range":
        one, other = sorted([draw(st.integers(low, high)), draw(st.integers(low, high))])
        base = f"{one}{draw(blank)}-{draw(blank)}{other}"
    else:
        case = st.sampled_from([str.lower, str.upper, str.title, str.swapcase])
        one, other = sorted(
            [draw(st.sampled_from(names)), draw(st.sampled_from(names))], key=lambda name: NAMES[index][name]
        )
        base = draw(case)(one) if kind == "name" else f"{draw(case)(one)}{draw(blank)}-{draw(blank)}{draw(case)(other)}"
    if kind != "name" and draw(st.sampled_from([False, False, True])):
        step = draw(st.integers(1, 12) | st.integers(1, high))
        gap = "" if kind == "any" else draw(blank)
        base = f"{base}{gap}/{draw(blank)}{min(step, high)}"
    return base


@st.composite
def fields(draw: st.DrawFn, index: int) -> str:
    """One field: mostly a single member, and often a wildcard, as people write them."""
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from("*?")) if index in (3, 5) else "*"
    first = draw(members(index, True))
    rest = [draw(members(index, False)) for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2])))]
    return ",".join([first, *rest])


@st.composite
def expressions(draw: st.DrawFn, years: bool = True) -> str:
    """The text of a valid expression."""
    count = 7 if years and draw(st.integers(0, 4)) == 0 else 6
    parts = [draw(fields(index)) for index in range(count)]
    gap = draw(st.sampled_from([" ", " ", " ", "  ", "\t", "\r\n"]))
    around = draw(st.sampled_from(["", "", "", " "]))
    return around + gap.join(parts) + around


ALPHABET = "0123456789 */-,?*  \tLW#@.+xJanmonFRI"


@st.composite
def scribbles(draw: st.DrawFn) -> str:
    """A valid expression in which a few characters were lost, put in or changed."""
    text = draw(expressions())
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", *ALPHABET])) + text[at + draw(st.integers(0, 1)) :]
    return text
