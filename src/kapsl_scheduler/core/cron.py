"""When a job is due: `CronExpression`, and `schedule_of` for whatever a caller may give as a schedule.

Moments are aware datetimes for people, and integer microseconds since 1970 UTC (`…_us`) for the planner.
What is not here: the language (core.cron_parser), the search (core.cron_pattern, core.cron_zones), plain words
(core.cron_words), how intervals count (core.interval), what a firing is and whether it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import partial
from typing import Any, Final, NoReturn, TypeAlias
from zoneinfo import ZoneInfo, available_timezones

from kapsl_scheduler.core.cron_hints import clip
from kapsl_scheduler.core.cron_hints import zone as zone_hint
from kapsl_scheduler.core.cron_pattern import DAY, Pattern, pattern_of
from kapsl_scheduler.core.cron_words import describe
from kapsl_scheduler.core.cron_zones import EPOCH, Zone, elapsed, zone_of
from kapsl_scheduler.core.interval import Interval
from kapsl_scheduler.errors import InvalidExpression

__all__ = ["CronExpression", "Interval", "Schedule", "schedule_of"]

_SECOND: Final = 1_000_000  # microseconds
_EARLIEST: Final = -40 * DAY  # before all local times of 1970; the zones' tables know nothing earlier
_FIXED: Final = re.compile(
    r"UTC(?P<sign>[+-])(?P<hours>[01][0-9]|2[0-3]):(?P<minutes>[0-5][0-9])(:(?P<seconds>[0-5][0-9]))?"
)


class CronExpression:
    """An expression of six or seven fields (second first, 1 is Sunday) in a zone. Immutable; equal by its text, its
    zone and `literal`. The language and the rules for zones: docs/cron.md.

    `tz` is an IANA name, a fixed offset as `UTC+02:00`, or a `tzinfo`. Where the hour or the minute has a wildcard
    (`*` or `*/n`, also as a member of a list), every second whose local time matches is an occurrence: both passes
    of an hour that the clock repeats, none of one that it skips. All others are fixed times: each matching local
    time once, at the first valid moment after a gap that swallowed it, in the first pass of a repeated hour.
    `literal` has fixed times skipped and repeated too. The years 1970 to 2100 are those of the zone's clock.

    Raises `InvalidExpression` for text that is no expression, and for an unknown zone (`field` is then `"tz"`). An
    expression that can never fire is valid: whoever asks for its next occurrence gets None.
    """

    __slots__ = ("_every_pass", "_pattern", "_zone", "literal", "text", "tz", "tz_name")

    text: str
    tz: tzinfo
    tz_name: str
    literal: bool
    _pattern: Pattern
    _zone: Zone | None
    _every_pass: bool

    def __init__(self, text: str, tz: str | tzinfo = "UTC", *, literal: bool = False) -> None:
        if not isinstance(text, str):
            raise InvalidExpression(f"a cron expression is text, got {type(text).__name__}")
        pattern = pattern_of(text)
        zone, name = _named_zone(tz) if isinstance(tz, str) else _given_zone(tz)
        try:
            table = zone_of(zone)
        except (TypeError, ValueError, NotImplementedError) as error:
            _refuse_zone(clip(name), f"the zone {clip(name)!r} cannot be used: {error}")
        fix = object.__setattr__
        fix(self, "text", text)
        fix(self, "tz", zone)
        fix(self, "tz_name", name)
        fix(self, "literal", bool(literal))
        fix(self, "_pattern", pattern)
        fix(self, "_zone", None if table.offsets == [0] else table)
        fix(self, "_every_pass", bool(literal) or pattern.fields.wild)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a CronExpression does not change: {name}")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a CronExpression does not change: {name}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CronExpression):
            return NotImplemented
        return self.text == other.text and self.tz == other.tz and self.literal == other.literal

    def __hash__(self) -> int:
        return hash((self.text, self.tz, self.literal))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(CronExpression, literal=self.literal), (self.text, self.tz)

    def __repr__(self) -> str:
        literal = ", literal=True" if self.literal else ""
        return f"CronExpression({clip(self.text)!r}, {self.tz_name!r}{literal})"

    # ------------------------------------------------------------------------------------------- for people

    def next(self, after: datetime) -> datetime | None:
        """The first occurrence strictly after the moment, a whole second; None if there is none up to the end of
        2100.

        The answer shows the zone's clock and carries the offset of that moment as a fixed one, so that it compares
        and subtracts as an instant also where the clock is turned back; in UTC it is plain UTC.
        Raises `ValueError` for a datetime without a zone.
        """
        passed = elapsed(after)
        found = self._next(passed.days * DAY + passed.seconds + 1)
        return None if found is None else self._moment(found)

    def previous(self, before: datetime) -> datetime | None:
        """The last occurrence strictly before the moment; None if there is none since 1970. Otherwise as `next`."""
        passed = elapsed(before)
        found = self._previous(passed.days * DAY + passed.seconds - (not passed.microseconds))
        return None if found is None else self._moment(found)

    def iter(self, after: datetime) -> Iterator[datetime]:
        """The occurrences strictly after the moment, ascending, to the last."""
        passed = elapsed(after)
        return self._walk(passed.days * DAY + passed.seconds + 1)

    def explain(self) -> str:
        """The expression in plain English: "At 09:00:00 on Monday through Friday"."""
        words = describe(self._pattern)
        return words if self._zone is None else f"{words}, {self.tz_name} time"

    # --------------------------------------------------------------------------------------- for the planner

    def next_us(self, after_us: int) -> int | None:
        """The first occurrence strictly after, in microseconds since 1970 UTC. None: it never fires again."""
        found = self._next(after_us // _SECOND + 1)
        return None if found is None else found * _SECOND

    def previous_us(self, before_us: int) -> int | None:
        """The last occurrence strictly before, in microseconds since 1970 UTC; None if there is none."""
        found = self._previous((before_us - 1) // _SECOND)
        return None if found is None else found * _SECOND

    def count_us(self, after_us: int, until_us: int) -> int:
        """How many occurrences there are after `after_us` and up to `until_us` (inclusive), without walking through
        them: the cost grows with the months and changes of offset between."""
        first, last = after_us // _SECOND + 1, until_us // _SECOND
        zone, pattern = self._zone, self._pattern
        if zone is None:
            return pattern.count(first, last + 1)
        first = max(first, _EARLIEST)
        return zone.count_passes(pattern, first, last) if self._every_pass else zone.count_once(pattern, first, last)

    # ------------------------------------------------------------------------------------------------ seconds

    def _next(self, second: int) -> int | None:
        zone = self._zone
        if zone is None:
            return self._pattern.next(second)
        if second < _EARLIEST:
            second = _EARLIEST
        return zone.next_pass(self._pattern, second) if self._every_pass else zone.next_once(self._pattern, second)

    def _previous(self, second: int) -> int | None:
        zone, pattern = self._zone, self._pattern
        if zone is None:
            return pattern.previous(second)
        second = max(second, _EARLIEST)
        return zone.previous_pass(pattern, second) if self._every_pass else zone.previous_once(pattern, second)

    def _moment(self, second: int) -> datetime:
        return EPOCH + timedelta(0, second) if self._zone is None else self._zone.at(second)

    def _walk(self, second: int) -> Iterator[datetime]:
        found = self._next(second)
        while found is not None:
            yield self._moment(found)
            found = self._next(found + 1)


Schedule: TypeAlias = CronExpression | Interval
"""What a job may be scheduled by. `next_us(now) is None` says that it never fires again; an interval always does."""


def schedule_of(
    value: str | float | timedelta | CronExpression | Interval, tz: str | tzinfo = "UTC", literal: bool = False
) -> Schedule:
    """The schedule that is meant: cron text in the zone, an interval as seconds or as a timedelta, or a ready one,
    which keeps its own zone. Raises `InvalidExpression`, naming what came, for anything else."""
    if isinstance(value, CronExpression | Interval):
        return value
    if isinstance(value, str):
        return CronExpression(value, tz, literal=literal)
    if isinstance(value, int | float | timedelta) and not isinstance(value, bool):
        return Interval(value)
    raise InvalidExpression(
        f"a schedule is cron text, seconds, a timedelta, a CronExpression or an Interval, got "
        f"{value if isinstance(value, bool) else type(value).__name__}"
    )


# ------------------------------------------------------------------------------------------------------- zones


def _named_zone(name: str) -> tuple[tzinfo, str]:
    if name == "UTC":
        return UTC, name
    if (fixed := _FIXED.fullmatch(name)) is not None:
        offset = timedelta(hours=int(fixed["hours"]), minutes=int(fixed["minutes"]), seconds=int(fixed["seconds"] or 0))
        return _given_zone(timezone(offset if fixed["sign"] == "+" else -offset))
    try:
        return ZoneInfo(name), name
    except (KeyError, ValueError, OSError):  # unknown; no key at all; a folder of zones
        problem = f"unknown time zone {clip(name)!r}, expected an IANA name as Europe/Berlin"
        _refuse_zone(clip(name), problem, zone_hint(name, available_timezones()))


def _given_zone(tz: object) -> tuple[tzinfo, str]:
    if not isinstance(tz, tzinfo):
        _refuse_zone("", f"a zone is an IANA name or a tzinfo, got {type(tz).__name__}")
    if isinstance(tz, timezone):
        plain = timezone(tz.utcoffset(None))  # without a name of its own, which might be that of another zone
        return (UTC, "UTC") if plain == UTC else (plain, str(plain))
    if isinstance(tz, ZoneInfo) and tz.key:
        return _named_zone(tz.key)
    return tz, str(tz)


def _refuse_zone(token: str, problem: str, hint: str | None = None) -> NoReturn:
    raise InvalidExpression(problem, field="tz", token=token, hint=hint)
