"""What somebody who wrote a faulty cron expression probably meant, and what to write for it.

Words only: the parser (core.cron_parser) decides what is faulty. A hint is given where it can be guessed, else None.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Final

__all__ = [
    "ALL_FIELDS",
    "EITHER_DAY",
    "MONTHS",
    "SHORT",
    "WEEKDAYS",
    "character",
    "clip",
    "forwards",
    "from_classic",
    "interval",
    "looks_classic",
    "name",
    "one_day_field",
    "outside",
    "shorthand",
    "step",
    "word",
    "zone",
]

_MONTH_NAMES: Final = (
    *("january", "february", "march", "april", "may", "june"),
    *("july", "august", "september", "october", "november", "december"),
)
_DAY_NAMES: Final = ("sunday", "monday", "tuesday", "wednesday", "thursday", "friday", "saturday")


def _with_short(names: Sequence[str], **more: int) -> Mapping[str, int]:
    full = {name: value for value, name in enumerate(names, 1)}
    return MappingProxyType({**full, **{name[:3]: value for name, value in full.items()}, **more})


MONTHS: Final = _with_short(_MONTH_NAMES)
WEEKDAYS: Final = _with_short(_DAY_NAMES, tues=3, thurs=5)
SHORT: Final[Mapping[int, Sequence[str]]] = {
    4: [name[:3].upper() for name in _MONTH_NAMES],
    5: [name[:3].upper() for name in _DAY_NAMES],
}
"""Names by the index of their field, in the order of their values from 1."""

ALL_FIELDS: Final = "six or seven: second minute hour day-of-month month day-of-week [year]"
EITHER_DAY: Final = (
    "where both day fields are given, classic cron fires when either matches and here both must: that takes two jobs"
)

_QUOTED: Final = 40
_SECONDS: Final = {"second": 1, "minute": 60, "hour": 3600}
_LIKE_SECONDS: Final = re.compile(r"\+?[0-9]{1,12}(\.[0-9]{1,12})?(?P<unit> ?[A-Za-z]+)?|every\b.*", re.I | re.S)
_CLASSIC_RANGE: Final = re.compile(r"(?P<low>[0-7])(-(?P<high>[0-7])(/(?P<step>[1-7]))?)?")
_OCCURRENCE: Final = re.compile(r"[A-Za-z0-9]+#([1-4])")


def clip(text: str) -> str:
    """The text, or its beginning: a message stays short whatever was sent."""
    return text if len(text) <= _QUOTED else text[: _QUOTED - 1] + "…"


def zone(given: str, known: Iterable[str]) -> str | None:
    """For the name of no zone: the city alone, another case, a slip of the pen."""
    lower = given[:_QUOTED].lower()
    folded = {one.lower(): one for one in known}
    cities = [one for one in sorted(folded) if one.endswith(f"/{lower}")]
    # Short names are abbreviations more often than slips, and the nearest one would be another zone.
    close = [lower] if lower in folded else cities or (get_close_matches(lower, folded, 1, 0.8) if lower[4:] else [])
    return f"write {folded[close[0]]}" if close else None


def shorthand(text: str, known: Sequence[str]) -> str | None:
    """For a text that begins with @."""
    first = text.split()[0].lower()
    if first in ("@reboot", "@every"):
        return {
            "@reboot": "there is no schedule for a start: run the job where the program starts",
            "@every": "an interval is no cron text: give its seconds as a number",
        }[first]
    alias = {"@annually": "@yearly", "@midnight": "@daily"}.get(first) or _near(first, known)
    return None if alias is None else f"write {alias}"


def interval(text: str) -> str | None:
    """For `60`, `5m` and the like: an interval, which is no cron text."""
    match = _LIKE_SECONDS.fullmatch(text)
    if match is None:
        return None
    if match["unit"] is None and text[0] not in "eE":
        return f"for an interval of {text.lstrip('+')} seconds give the number itself, not text"
    return "for an interval give its seconds as a number, not text"


def _near(given: str, known: Iterable[str]) -> str | None:
    close = get_close_matches(given[:_QUOTED], known, 1)
    return close[0] if close else None


# ---------------------------------------------------------------------------------------------- classic cron


def looks_classic(text: str) -> bool:
    """Whether it has five words."""
    return len(text.split()) == 5


def one_day_field(words: Sequence[str]) -> bool:
    """Whether at most one of the two day fields of a classic expression is restricted."""
    return words[2].startswith(("*", "?")) or words[4].startswith(("*", "?"))


def from_classic(words: Sequence[str]) -> str | None:
    """The classic five fields in this language: with a second, and days of the week (0 and 7 Sunday) as names."""
    days = [_classic_days(member) for member in words[4].split(",")]
    if None in days:
        return None
    return " ".join(["0", *words[:4], ",".join(day for day in days if day)])


def _classic_days(member: str) -> str | None:
    if not member[:1].isdigit():
        return member
    match = _CLASSIC_RANGE.fullmatch(member)
    if match is None:
        return None
    names = SHORT[5]
    low = int(match["low"])
    high = int(match["high"] or low)
    if low > high:
        return None
    if match["step"] or high - low < 2:
        days = dict.fromkeys(names[day % 7] for day in range(low, high + 1, int(match["step"] or 1)))
        return ",".join(days)
    if high < 7:
        return f"{names[low]}-{names[high]}"
    return f"{names[low]}-SAT,SUN" if low else "*"


# --------------------------------------------------------------------------------------------------- members


def forwards(low: int, high: int, step: int, first: int, last: int, names: Sequence[str] | None) -> str:
    """What to write for a range that runs past the end of its field: two ranges, or with a step its values."""

    def said(value: int) -> str:
        return str(value) if names is None else names[value - first]

    if last - first > 60:  # years do not come round again
        return f"write {high}-{low}"
    if step > 1:
        values = range(low, high + last - first + 2, step)
        return "write " + ",".join(said(value if value <= last else value - (last - first + 1)) for value in values)
    parts = [(low, last), (first, high)]
    return "write " + ",".join(said(a) if a == b else f"{said(a)}-{said(b)}" for a, b in parts)


def outside(field: str, value: int, *, ends_range: bool) -> str | None:
    """For a number that the field does not have."""
    past = {"second": 60, "minute": 60, "hour": 24}.get(field)
    if value == past and ends_range:
        return f"write {past - 1} for the last {field}"
    if field == "day_of_week" and value == 0:
        return "write 1 or SUN for Sunday"
    if field == "hour" and value == 24:
        return "write 0 for midnight"
    if field in ("second", "minute") and value == 60:
        return "write 0"
    return None


def step(field: str, size: int) -> str | None:
    """For a step that the field does not have."""
    if size == 0:
        return "write 1 for every one"
    if field not in _SECONDS:
        return None
    return f"for every {size} {field}s give an interval, {size * _SECONDS[field]} seconds as a number"


def name(given: str, field: str, names: Mapping[str, int], behind: str = "") -> str | None:
    """For a word that is no name of the field; `behind` is what follows it."""
    lower = given.lower()
    if behind[:1] == "#":
        return word(given + behind, field, names)
    if lower in MONTHS:
        return "names of months stand in the month field, the fifth"
    if lower in WEEKDAYS:
        return "names of days stand in the day of week field, the sixth"
    if lower[-1] in "lw" and lower[:-1] in names:
        return word(given, field, names)
    if lower[:3] in names:
        return f"write {lower[:3].upper()}"
    if (close := _near(lower, names) if names else None) is not None:
        return f"write {close.upper()}"
    return word(given, field, names)


def word(given: str, field: str, names: Mapping[str, int]) -> str | None:
    """For a member with signs or letters that this language does not have."""
    upper = given.upper()
    if "#" in given:
        match = _OCCURRENCE.fullmatch(given)
        if match is None or field != "day_of_week":
            return "there is no # here"
        last = int(match[1]) * 7
        return f"there is no # here: leave the day alone and write {last - 6}-{last} as the day of month"
    if field in ("day_of_month", "day_of_week"):
        if upper.rstrip("0123456789-").endswith("L"):
            return "there is no L here: let the job run on days 28-31 and look at the date itself"
        if upper.endswith("W"):
            return "there is no W here: write MON-FRI as the day of week"
    for sign in given:
        if (hint := character(sign, field.replace("_", " "))) is not None:
            return hint
    return None


def character(sign: str, field: str) -> str | None:
    """For a character that cannot stand where it does."""
    if sign == "?":
        return f"write *: ? stands in the two day fields only, not in the {field}"
    if sign in "‐‑‒–—−":  # noqa: RUF001 - the dashes that word processors make of a hyphen
        return "write a plain hyphen, -"
    if sign.isdigit() and not sign.isascii():
        return "write the digits 0 to 9"
    return {"+": "write the number without a sign", ".": "write whole numbers"}.get(sign)
