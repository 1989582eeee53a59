"""The text of a cron expression -> the sets of its seven fields, or an error that says what to write instead.

The language is that of the Rust crate `cron` (0.12, 0.13): its grammar takes the first alternative that fits and
never needs more than the next character to choose, so one pass from left to right reads the same language.
What is not here: what the sets mean for dates (core.cron_pattern), zones (core.cron_zones), the wording of the
hints (core.cron_hints).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final, NamedTuple, NoReturn

from kapsl_scheduler.core import cron_hints as hints
from kapsl_scheduler.errors import InvalidExpression

__all__ = ["FIELDS", "FIRST_YEAR", "LAST_YEAR", "MAX_LENGTH", "Field", "Fields", "parse"]

FIRST_YEAR: Final = 1970
LAST_YEAR: Final = 2100
MAX_LENGTH: Final = 8192
"""The most characters of an expression. The crate has no bound; nobody's expression comes near this one."""


class Field(NamedTuple):
    """One field of the language. `any` says whether `?` may stand in it; `offset` is the value of a mask's bit 0."""

    name: str
    words: str
    low: int
    high: int
    names: Mapping[str, int] = {}
    any: bool = False
    offset: int = 0

    def mask(self, low: int, high: int, step: int) -> int:
        """The values low, low + step, … up to high, as bits."""
        if step == 1:
            return (1 << (high - self.offset + 1)) - (1 << (low - self.offset))
        mask = 0
        for value in range(low, high + 1, step):
            mask |= 1 << (value - self.offset)
        return mask

    @property
    def expected(self) -> str:
        """What may stand in it, in words."""
        span = f"{self.low} to {self.high}"
        if self.names is hints.MONTHS:
            return f"{span} or a name, JAN to DEC"
        return f"{self.low} (Sunday) to {self.high} (Saturday) or a name, SUN to SAT" if self.names else span


FIELDS: Final = (
    Field("second", "second", 0, 59),
    Field("minute", "minute", 0, 59),
    Field("hour", "hour", 0, 23),
    Field("day_of_month", "day of month", 1, 31, any=True),
    Field("month", "month", 1, 12, hints.MONTHS),
    Field("day_of_week", "day of week", 1, 7, hints.WEEKDAYS, any=True),
    Field("year", "year", FIRST_YEAR, LAST_YEAR, offset=FIRST_YEAR),
)


class Fields(NamedTuple):
    """The values of each field as the bits of an integer: bit v is the value v, and bit 0 of `years` is 1970.

    `wild` says whether the hour or the minute has a wildcard, `*` or `*/n`, alone or as a member of its list:
    the firing rule for zones depends on how the hour is written, not only on the set.
    """

    seconds: int
    minutes: int
    hours: int
    days: int
    months: int
    weekdays: int
    years: int
    wild: bool


_SPACE: Final = " \t\r\n"
_SPACES: Final = re.compile(r"[ \t\r\n]*")
_NUMBER: Final = re.compile(r"[0-9]+")
_NAME: Final = re.compile(r"[A-Za-z]+")
_MEMBER_END: Final = re.compile(r"[^ \t\r\n,]*")
_SHORT: Final = 100  # characters of an expression that is quoted whole, as a hint
_HUGE: Final = 1 << 32  # more than any field has; the crate's own bound
_SHORTHANDS: Final = {
    "@yearly": "0 0 0 1 1 *",
    "@monthly": "0 0 0 1 * *",
    "@weekly": "0 0 0 * * 1",
    "@daily": "0 0 0 * * *",
    "@hourly": "0 0 * * * *",
}


def parse(text: str) -> Fields:
    """The sets of the expression's fields. Raises `InvalidExpression` for whatever is none, in time bounded by
    `MAX_LENGTH`; the message quotes little of the text."""
    if not isinstance(text, str):
        raise InvalidExpression(f"a cron expression is text, got {type(text).__name__}")
    if len(text) > MAX_LENGTH:
        raise InvalidExpression(
            f"the expression has {len(text):,} characters, expected at most {MAX_LENGTH:,}", text=text
        )
    stripped = text.strip(_SPACE)
    if not stripped:
        raise InvalidExpression(
            f"the expression is empty, expected {hints.ALL_FIELDS}, or one of {', '.join(_SHORTHANDS)}", text=text
        )
    if stripped in _SHORTHANDS:
        return _Parser(_SHORTHANDS[stripped]).read()
    start = text.index(stripped[0])
    if stripped.startswith("@"):
        token = hints.clip(stripped)
        raise InvalidExpression(
            f"no such shorthand: {token!r} at position {start}, expected one of {', '.join(_SHORTHANDS)}",
            text=text,
            token=token,
            position=start,
            hint=hints.shorthand(stripped, tuple(_SHORTHANDS)),
        )
    try:
        return _Parser(text).read()
    except InvalidExpression:
        token = hints.clip(stripped)
        if hints.looks_classic(stripped):
            problem = f"five fields ({token!r}), expected {hints.ALL_FIELDS}: seconds come first, and day 1 is Sunday"
            hint = _classic(stripped)
        elif (hint := hints.interval(stripped)) is not None:
            problem = f"{token!r} is no cron expression, expected {hints.ALL_FIELDS}"
        else:
            raise
        raise InvalidExpression(problem, text=text, token=token, position=start, hint=hint) from None


def _classic(text: str) -> str | None:
    """What to write for the classic five-field expression, where that is an expression of this language."""
    candidate = hints.from_classic(text.split())
    if candidate is None or len(candidate) > _SHORT:
        return None
    try:
        _Parser(candidate).read()
    except InvalidExpression:
        return None
    return f"write {candidate}" if hints.one_day_field(text.split()) else hints.EITHER_DAY


class _Parser:
    """Reads one expression. `at` is the next character; the methods leave it behind what they read."""

    __slots__ = ("at", "fresh", "text", "wild")

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.fresh = False  # whether what is being read is the first of its field
        self.wild = False

    def read(self) -> Fields:
        second, minute, hour, day, month, weekday = (self._field(index) for index in range(6))
        year = FIELDS[6].mask(FIRST_YEAR, LAST_YEAR, 1) if self.at == len(self.text) else self._field(6)
        if self.at < len(self.text):
            self._fail(6, self._member(), "nothing more after the year")
        return Fields(second, minute, hour, day, month, weekday, year, self.wild)

    def _field(self, index: int) -> int:
        """One comma list with the white space around it."""
        self._skip()
        self.fresh = True
        mask = self._item(index)
        self.fresh = False
        while self._take(","):
            comma = self.at
            self._skip()
            if self.at > comma and self._next() in ("*", "?"):
                hint = f"write {self._next()} right behind the comma"
                self._fail(index, (comma - 1, self.at + 1), f"no blank between the comma and {self._next()!r}", hint)
            mask |= self._item(index)
        self._skip()
        return mask

    def _item(self, index: int) -> int:
        """One member: a wildcard, a number, a name or a range, each but a lone name with an optional step."""
        field, start = FIELDS[index], self.at
        first = self._next()
        named = False
        if first == "*" or (first == "?" and field.any):
            self.at += 1
            low, high, lone = field.low, field.high, False
            self.wild = self.wild or index in (1, 2)
        elif _is_digit(first):
            low, high, lone = self._numbers(index, start)
        elif _is_letter(first):
            named = True
            low, high, lone = self._names(index, start)
        else:
            self._unexpected(index)
        step = 1
        if self._take("/"):
            self._skip()
            if not _is_digit(self._next()):
                self._fail(index, self._member(start), "a number after '/'")
            step = self._number()
            if named and lone:
                hint = f"write {low}/{step}, or a range of names" if 1 <= step <= field.high else None
                self._fail(index, (start, self.at), "a step only after a number, a range or a wildcard", hint)
            self._check_step(index, step, start)
            if lone:
                high = field.high
        if low > high:
            hint = hints.forwards(low, high, step, field.low, field.high, hints.SHORT[index] if named else None)
            self._fail(index, (start, self.at), "a range from the lesser to the greater", hint)
        return field.mask(low, high, step)

    def _numbers(self, index: int, start: int) -> tuple[int, int, bool]:
        """A number or a range of numbers: its ends, and whether it is a lone number."""
        low = self._value(index)
        if not self._take("-"):
            return low, low, True
        self._skip()
        if not _is_digit(self._next()):
            mixed = _is_letter(self._next())
            what = "a range of numbers or of names, not of both" if mixed else "a number after '-'"
            self._fail(index, self._member(start), what)
        return low, self._value(index, ends_range=True), False

    def _names(self, index: int, start: int) -> tuple[int, int, bool]:
        """A name or a range of names: its ends, and whether it is a lone name."""
        low = self._named(index, start)
        if not self._take("-"):
            return low, low, True
        self._skip()
        if not _is_letter(self._next()):
            mixed = _is_digit(self._next())
            what = "a range of numbers or of names, not of both" if mixed else "a name after '-'"
            self._fail(index, self._member(start), what)
        self.fresh = False
        return low, self._named(index, self.at), False

    def _value(self, index: int, *, ends_range: bool = False) -> int:
        """A number that the field has."""
        field, start = FIELDS[index], self.at
        value = self._number()
        if not field.low <= value <= field.high:
            token = self.text[start : self.at].rstrip(_SPACE)
            self._fail(
                index,
                (start, start + len(token)),
                field.expected,
                hints.outside(field.name, value, ends_range=ends_range),
            )
        return value

    def _number(self) -> int:
        """Digits and the white space behind them. What no field could hold is not computed: digits may be many."""
        match = _NUMBER.match(self.text, self.at)
        assert match is not None
        self.at = match.end()
        self._skip()
        digits = match.group().lstrip("0")
        return int(digits or "0") if len(digits) <= len(str(LAST_YEAR)) else _HUGE

    def _named(self, index: int, start: int) -> int:
        """A name of the field, and the white space behind it."""
        field = FIELDS[index]
        match = _NAME.match(self.text, self.at)
        assert match is not None
        value = field.names.get(match.group().lower())
        if value is None:
            if self._abuts():
                self._unexpected(index)
            hint = hints.name(match.group(), field.name, field.names, self.text[match.end() : match.end() + 2])
            self._fail(index, self._member(start), field.expected, hint)
        self.at = match.end()
        self._skip()
        return value

    def _check_step(self, index: int, step: int, start: int) -> None:
        field = FIELDS[index]
        if not 1 <= step <= field.high:
            what = f"a step of 1 to {field.high}"
            self._fail(index, (start, self.at), what, hints.step(field.name, step) if step < _HUGE else None)

    # -------------------------------------------------------------------------------------------- characters

    def _next(self) -> str:
        """The next character; empty at the end."""
        return self.text[self.at : self.at + 1]

    def _take(self, character: str) -> bool:
        if self._next() != character:
            return False
        self.at += 1
        return True

    def _skip(self) -> None:
        match = _SPACES.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def _abuts(self) -> bool:
        """Whether a field begins here right behind the one before it: `5L` is at fault as one."""
        return self.fresh and self.at > 0 and self.text[self.at - 1] not in _SPACE

    def _member(self, start: int | None = None) -> tuple[int, int]:
        """Where the member of a list that is being read begins and ends."""
        end = _MEMBER_END.match(self.text, self.at)
        assert end is not None
        if start is None:
            start = max(self.text.rfind(separator, 0, self.at) for separator in _SPACE + ",") + 1
        return start, max(end.end(), start + 1)

    # ------------------------------------------------------------------------------------------------- errors

    def _unexpected(self, index: int) -> NoReturn:
        """No member can begin with what comes next."""
        field, character = FIELDS[index], self._next()
        if not character:
            if not self.fresh:
                self._fail(index, (self.at - 1, self.at), f"{field.expected} after the comma")
            found = f"{index} field{'s' if index > 1 else ''}"
            raise InvalidExpression(
                f"{found}, expected {hints.ALL_FIELDS}: the {field.words} is missing",
                text=self.text,
                field=field.name,
                position=len(self.text),
            )
        if self._abuts():  # the field before ended within a word: the word is at fault, and belongs to that field
            field, index = FIELDS[index - 1], index - 1
            start, end = self._member()
            hint = hints.word(self.text[start:end], field.name, field.names)
            self._fail(index, (start, end), field.expected, hint)
        if character == ",":
            self._fail(index, (self.at, self.at + 1), f"{field.expected} before the comma", self._blank_before())
        hint = self._blank_before() or hints.character(character, field.words)
        self._fail(index, self._member(self.at), field.expected, hint)

    def _blank_before(self) -> str | None:
        """The hint for `* /2` and `* ,5`: behind a wildcard a blank ends the field."""
        character, before = self._next(), self.text[: self.at].rstrip(_SPACE)
        if character not in ("/", ",") or not before.endswith(("*", "?")):
            return None
        return f"write {before[-1]}{character} without a blank between"

    def _fail(self, index: int, span: tuple[int, int], expected: str, hint: str | None = None) -> NoReturn:
        field, (start, end) = FIELDS[index], span
        token = hints.clip(self.text[start:end].rstrip(_SPACE))
        raise InvalidExpression(
            f"{field.words}: expected {expected}, got {token!r} at position {start}",
            text=self.text,
            field=field.name,
            token=token,
            position=start,
            hint=hint,
        )


def _is_digit(character: str) -> bool:
    return "0" <= character <= "9"


def _is_letter(character: str) -> bool:
    return "a" <= character <= "z" or "A" <= character <= "Z"
