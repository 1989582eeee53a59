"""Text -> sets: against the grammar once more in its slowest form, and every error with what it points at."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.core.cron_parser import MAX_LENGTH, Fields, parse
from kapsl_scheduler.errors import InvalidExpression
from tests.core import naive_cron
from tests.core.naive_cron import ALPHABET, expressions, scribbles


def sets(fields: Fields) -> tuple[frozenset[int], ...]:
    offsets = (0, 0, 0, 0, 0, 0, 1970)
    return tuple(
        frozenset(bit + offset for bit in range(mask.bit_length()) if mask >> bit & 1)
        for mask, offset in zip(fields[:7], offsets, strict=True)
    )


def fault(text: str) -> InvalidExpression:
    with pytest.raises(InvalidExpression) as caught:
        parse(text)
    return caught.value


def check(text: str) -> None:
    """The parser and the naive grammar agree, and an error is one that helps."""
    try:
        expected = naive_cron.parse(text)
    except naive_cron.WrongError:
        error = fault(text)
        assert error.text == text
        assert len(str(error)) < 400
        assert len(error.token) <= 40
        assert text[error.position :].startswith(error.token.removesuffix("…"))
    else:
        fields = parse(text)
        assert sets(fields) == expected.sets
        assert fields.wild == expected.wild


# ------------------------------------------------------------------------------------------------ the language


@pytest.mark.slow
@given(expressions())
def test_valid_expressions_have_the_sets_of_the_grammar(text: str) -> None:
    naive_cron.parse(text)
    check(text)


@pytest.mark.slow
@given(scribbles())
def test_scribbled_expressions_are_taken_or_refused_as_the_grammar_does(text: str) -> None:
    check(text)


@given(st.text(ALPHABET, max_size=30))
def test_characters_of_the_language_in_any_order(text: str) -> None:
    check(text)


@given(st.text(max_size=40))
def test_garbage_is_refused_with_the_one_error(text: str) -> None:
    check(text)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("******", "* * * * * *"),
        ("*******", "* * * * * * *"),
        ("***?*?", "* * * * * *"),
        ("0 0 0 1 - 5 * *", "0 0 0 1-5 * *"),
        ("0 0 0 5Jan * *", "0 0 0 5 JAN *"),
        ("0 0 0*JAN*", "0 0 0 * 1 *"),
        ("0 0 0 * 1MON", "0 0 0 * 1 2"),
        ("0 0 0 * * MON2030", "0 0 0 * * 2 2030"),
        ("0 0 0 ?/2 * ?/3", "0 0 0 */2 * */3"),
        ("*,5 * * * * *", "* * * * * *"),
        ("5 ,\t7 / 2 , 3 * * * * *", "5,7/2,3 * * * * *"),
        ("*/ 2 * * * * *", "*/2 * * * * *"),
        ("*/59 * * * * *", "0,59 * * * * *"),
        ("0 0 0 * * * */2100", "0 0 0 * * * 1970"),
        ("0 0 0 * jan-january/12 *", "0 0 0 * 1 *"),
        ("0 0 0 * aUGUST-OCT TUES,tHURS", "0 0 0 * 8-10 3,5"),
        ("0 0 0 * * mon-fri/2", "0 0 0 * * 2,4,6"),
        ("0000000000000 0 0 * * 007", "0 0 0 * * 7"),
        ("\r\n0\t0\r0\n* * *\r\n", "0 0 0 * * *"),
        (" @weekly\n", "0 0 0 * * SUN"),
        ("@yearly", "0 0 0 1 1 *"),
        ("@monthly", "0 0 0 1 * *"),
        ("@daily", "0 0 0 * * *"),
        ("@hourly", "0 0 * * * *"),
    ],
)
def test_ways_to_write_the_same(text: str, same: str) -> None:
    assert sets(parse(text)) == sets(parse(same))


@pytest.mark.parametrize(
    ("text", "wild"),
    [
        ("0 0 * * * *", True),
        ("0 */5 9 * * *", True),
        ("0 7,*/20 9 * * *", True),
        ("0 0 5,* * * *", True),
        ("* 0 9 * * *", False),
        ("0 0/5 0-23 * * *", False),
        ("0 0-59 9 ? * ?", False),
        ("@hourly", True),
        ("@daily", False),
    ],
)
def test_the_hour_and_the_minute_may_be_wildcards(text: str, wild: bool) -> None:
    assert parse(text).wild is wild


# -------------------------------------------------------------------------------------------------- the errors

DAYS = "day of week: expected 1 (Sunday) to 7 (Saturday) or a name, SUN to SAT"
MONTHS = "month: expected 1 to 12 or a name, JAN to DEC"


@pytest.mark.parametrize(
    ("text", "field", "token", "position", "message"),
    [
        # outside
        ("60 * * * * *", "second", "60", 0, "second: expected 0 to 59, got '60' at position 0; write 0"),
        ("* 0-60 * * * *", "minute", "60", 4, "write 59 for the last minute"),
        ("0 0 24 * * *", "hour", "24", 4, "hour: expected 0 to 23, got '24' at position 4; write 0 for midnight"),
        ("0 0 0-24 * * *", "hour", "24", 6, "write 23 for the last hour"),
        ("0 0 0 0 * *", "day_of_month", "0", 6, "day of month: expected 1 to 31, got '0'"),
        ("0 0 0 * 0/3 *", "month", "0", 8, f"{MONTHS}, got '0'"),
        ("0 0 0 * * 0 ", "day_of_week", "0", 10, f"{DAYS}, got '0' at position 10; write 1 or SUN for Sunday"),
        ("0 0 0 * * 8", "day_of_week", "8", 10, f"{DAYS}, got '8'"),
        ("0 0 0 1 1 * 1969", "year", "1969", 12, "year: expected 1970 to 2100, got '1969'"),
        ("0 0 0 1 1 * 18446744073709551616", "year", "18446744073709551616", 12, "expected 1970 to 2100"),
        # names
        ("0 0 0 * sept *", "month", "sept", 8, f"{MONTHS}, got 'sept' at position 8; write SEP"),
        ("0 0 0 * * thur", "day_of_week", "thur", 10, "write THU"),
        ("0 0 0 * * wendesday", "day_of_week", "wendesday", 10, "write WEDNESDAY"),
        ("0 0 0 * * MON-TURTLE", "day_of_week", "TURTLE", 14, DAYS),
        ("0 0 0 * MON *", "month", "MON", 8, "names of days stand in the day of week field, the sixth"),
        ("0 0 0 * * JAN", "day_of_week", "JAN", 10, "names of months stand in the month field, the fifth"),
        ("SUN 0 0 * * *", "second", "SUN", 0, "second: expected 0 to 59, got 'SUN'"),
        ("0 0 0 * * MON/2", "day_of_week", "MON/2", 10, "write 2/2, or a range of names"),
        ("0 0 0 * * MON/9", "day_of_week", "MON/9", 10, "a step only after a number, a range or a wildcard"),
        ("0 0 0 * * MON-5", "day_of_week", "MON-5", 10, "a range of numbers or of names, not of both"),
        ("0 0 0 * * 2-FRI", "day_of_week", "2-FRI", 10, "a range of numbers or of names, not of both"),
        ("0 0 0 * * MON-", "day_of_week", "MON-", 10, "a name after '-'"),
        # ranges and steps
        ("0 0 0 * * FRI-MON", "day_of_week", "FRI-MON", 10, "the lesser to the greater, got 'FRI-MON' at position 10"),
        ("0 0 0 * * FRI-MON", "day_of_week", "FRI-MON", 10, "; write FRI-SAT,SUN-MON"),
        ("0 0 0 * * saturday-SUN", "day_of_week", "saturday-SUN", 10, "; write SAT,SUN"),
        ("0 0 22-2 * * *", "hour", "22-2", 4, "; write 22-23,0-2"),
        ("0 0 22 - 3/2 * * *", "hour", "22 - 3/2", 4, "; write 22,0,2"),
        ("0 0 0 * NOV-FEB/2 *", "month", "NOV-FEB/2", 8, "; write NOV,JAN"),
        ("0 0 0 * * * 2030-2026", "year", "2030-2026", 12, "; write 2026-2030"),
        ("1- * * * * *", "second", "1- *", 0, "a number after '-'"),
        ("1-2-3 * * * * *", "second", "1-2-3", 0, "second: expected 0 to 59"),
        ("*/0 * * * * *", "second", "*/0", 0, "a step of 1 to 59, got '*/0' at position 0; write 1 for every one"),
        ("0 */90 * * * *", "minute", "*/90", 2, "for every 90 minutes give an interval, 5400 seconds as a number"),
        ("0 0 */24 * * *", "hour", "*/24", 4, "for every 24 hours give an interval, 86400 seconds as a number"),
        ("0 0 0 1/40 * *", "day_of_month", "1/40", 6, "day of month: expected a step of 1 to 31"),
        ("*/99999999999 * * * * *", "second", "*/99999999999", 0, "a step of 1 to 59, got"),
        ("*/a * * * * *", "second", "*/a", 0, "a number after '/'"),
        ("10-12/* * * * * *", "second", "10-12/*", 0, "a number after '/'"),
        ("1/2/3 * * * * *", "second", "1/2/3", 0, "second: expected 0 to 59"),
        # lists and white space
        (",1 * * * * *", "second", ",", 0, "0 to 59 before the comma"),
        ("* * * * * 1,,2", "day_of_week", ",", 12, "SUN to SAT before the comma"),
        ("* * * * * 1,", "day_of_week", ",", 11, "SUN to SAT after the comma"),
        ("1, * * * * * *", "second", ", *", 1, "no blank between the comma and '*', got ', *' at position 1; write *"),
        ("0 0 0 1, ? * *", "day_of_month", ", ?", 7, "write ? right behind the comma"),
        ("* ,5 * * * * *", "minute", ",", 2, "write *, without a blank between"),
        ("* /2 * * * * *", "minute", "/2", 2, "write */ without a blank between"),
        # signs that other languages have
        ("? * * * * *", "second", "?", 0, "write *: ? stands in the two day fields only, not in the second"),
        ("1? * * * * *", "second", "1?", 0, "write *: ? stands in the two day fields only"),
        ("0 0 0 L * *", "day_of_month", "L", 6, "there is no L here: let the job run on days 28-31"),
        ("0 0 0 1W * ?", "day_of_month", "1W", 6, "there is no W here: write MON-FRI as the day of week"),
        ("0 0 0 LW * ?", "day_of_month", "LW", 6, "there is no W here"),
        ("0 0 0 * * 5L", "day_of_week", "5L", 10, "there is no L here"),
        ("0 0 0 * * FRIL", "day_of_week", "FRIL", 10, "there is no L here"),
        ("0 0 0 * * FRI#2", "day_of_week", "FRI#2", 10, "leave the day alone and write 8-14 as the day of month"),
        ("0 0 0 * * 6#5", "day_of_week", "6#5", 10, "there is no # here"),
        ("0 0 1#2 * * *", "hour", "1#2", 4, "there is no # here"),
        ("H H * * * *", "second", "H", 0, "second: expected 0 to 59, got 'H'"),
        ("0 0 0 * * 6 X", "year", "X", 12, "year: expected 1970 to 2100"),
        ("+5 * * * * *", "second", "+5", 0, "write the number without a sign"),
        ("-5 * * * * *", "second", "-5", 0, "second: expected 0 to 59, got '-5'"),
        ("1.5 * * * * *", "second", "1.5", 0, "write whole numbers"),
        ("1e1 * * * * *", "second", "1e1", 0, "second: expected 0 to 59"),
        ("٣ * * * * *", "second", "٣", 0, "write the digits 0 to 9"),
        ("* * * * * MON–FRI", "day_of_week", "MON–FRI", 10, "write a plain hyphen, -"),  # noqa: RUF001
        ("(0 0 0 * * *)", "second", "(0", 0, "second: expected 0 to 59"),
        # too few, too many
        (
            "0 0",
            "hour",
            "",
            3,
            "2 fields, expected six or seven: second minute hour day-of-month month day-of-week [year]",
        ),
        ("0,7 ", "minute", "", 4, "1 field, expected six or seven"),
        ("0 0 0 * * * * 1", "year", "1", 14, "nothing more after the year"),
        ("0 0 0 * * * UTC", "year", "UTC", 12, "year: expected 1970 to 2100, got 'UTC'"),
        # words for the whole
        ("", None, "", 0, "the expression is empty, expected six or seven"),
        (" \t\r\n", None, "", 0, "the expression is empty"),
        ("@reboot", None, "@reboot", 0, "run the job where the program starts"),
        (" @midnight", None, "@midnight", 1, "write @daily"),
        ("@HOURLY", None, "@HOURLY", 0, "expected one of @yearly, @monthly, @weekly, @daily, @hourly; write @hourly"),
        ("@dailyx", None, "@dailyx", 0, "write @daily"),
        ("@every 5m", None, "@every 5m", 0, "give its seconds as a number"),
        ("@xyz", None, "@xyz", 0, "no such shorthand: '@xyz' at position 0"),
        ("60", None, "60", 0, "for an interval of 60 seconds give the number itself, not text"),
        (" 5 minutes", None, "5 minutes", 1, "for an interval give its seconds as a number, not text"),
        ("every minute", None, "every minute", 0, "for an interval give its seconds as a number"),
    ],
)
def test_an_error_names_the_field_the_token_its_place_and_the_fix(
    text: str, field: str | None, token: str, position: int, message: str
) -> None:
    error = fault(text)
    assert (error.field, error.token, error.position) == (field, token, position)
    assert message in str(error)
    assert error.hint is None or str(error).endswith(f"; {error.hint}")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0 9 * * 1-5", "write 0 0 9 * * MON-FRI"),
        ("0 9 * * MON-FRI", "write 0 0 9 * * MON-FRI"),
        ("*/5 * * * *", "write 0 */5 * * * *"),
        ("0 9 * * 0", "write 0 0 9 * * SUN"),
        ("0 9 * * 7", "write 0 0 9 * * SUN"),
        ("0 9 * * 5-7", "write 0 0 9 * * FRI-SAT,SUN"),
        ("0 9 * * 6-7", "write 0 0 9 * * SAT,SUN"),
        ("0 9 * * 0-7", "write 0 0 9 * * *"),
        ("0 9 * * 1-5/2,6", "write 0 0 9 * * MON,WED,FRI,SAT"),
        ("0 9 * * */2", "write 0 0 9 * * */2"),
        ("0 9 1 * ?", "write 0 0 9 1 * ?"),
        ("0 9 1 * 1", "where both day fields are given, classic cron fires when either matches and here both must"),
        ("0 9 * * 5-1", None),
        ("0 9 * * 8", None),
        ("0 25 * * 1", None),
        ("0 9 * * sept", None),
    ],
)
def test_five_fields_are_told_that_seconds_come_first(text: str, hint: str | None) -> None:
    error = fault(text)
    assert (error.field, error.token, error.position) == (None, text, 0)
    assert f"five fields ({text!r}), expected six or seven" in str(error)
    assert "seconds come first, and day 1 is Sunday" in str(error)
    assert error.hint is None if hint is None else (error.hint or "").startswith(hint)


def test_five_words_that_are_six_fields_are_no_error() -> None:
    assert sets(parse("0 0 0 5Jan *")) == sets(parse("0 0 0 5 1 *"))


@pytest.mark.parametrize(
    "text",
    [
        "a" * 10**6,
        "0," * 10**6,
        "9" * 5000 + " * * * * *",
        "*/" + "9" * 5000 + " * * * * *",
        "1-" * 4000,
        "x" * 8000,
        "0 0 0 1" + "L" * 8000 + " * *",
        "0 0 0 * " + "Q" * 8000 + " *",
        "@" + "daily" * 1600,
        "1" + "#" * 8000,
        " " * 8000 + "1",
        ("0 9 * * " + "1," * 4000)[:8000],
        "\x00" * 100,
    ],
)
def test_hostile_text_is_refused_in_few_words(text: str) -> None:
    error = fault(text)
    assert len(str(error)) < 400
    assert len(error.token) <= 40


def test_what_is_longer_than_anybody_writes_is_not_read() -> None:
    text = "0," * ((MAX_LENGTH - 11) // 2) + "0 * * * * *"
    assert sets(parse(text))[0] == {0}
    assert "at most 8,192" in str(fault(text + " " * MAX_LENGTH))


def test_text_is_text() -> None:
    with pytest.raises(InvalidExpression, match="a cron expression is text, got bytes"):
        parse(b"* * * * * *")  # type: ignore[arg-type]
