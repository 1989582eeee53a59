"""Cron expressions in UTC: the original's cases, a walk through every second, APScheduler 3, and what a value is."""

from __future__ import annotations

import pickle
import random
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from itertools import islice
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from apscheduler.triggers.cron import CronTrigger
from hypothesis import assume, given
from hypothesis import strategies as st

from kapsl_scheduler.core.cron import CronExpression, Interval, schedule_of
from kapsl_scheduler.core.cron_pattern import pattern_of
from kapsl_scheduler.errors import InvalidExpression
from tests.core import naive_cron
from tests.core.naive_cron import Naive, expressions

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CASES = [
    line.rsplit("\t", 3)
    for line in Path(__file__).with_name("cron_cases.tsv").read_bytes().decode().split("\n")[1:]
    if line
]

moments = st.datetimes(datetime(1969, 1, 1), datetime(2102, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
modern = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


def us(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


# --------------------------------------------------------------------------------------------- the original's


def test_there_are_160_cases_of_the_original() -> None:
    assert len(CASES) == 160


@pytest.mark.parametrize(("text", "start", "count", "answer"), CASES)
def test_the_originals_answer(text: str, start: str, count: str, answer: str) -> None:
    if answer == "ERR":
        with pytest.raises(InvalidExpression):
            CronExpression(text)
        return
    found = list(islice(CronExpression(text).iter(moment(start)), int(count)))
    assert ",".join(f"{one:%Y-%m-%dT%H:%M:%SZ}" for one in found) == answer


@pytest.mark.parametrize(("text", "start", "count", "answer"), [case for case in CASES if case[3] not in ("", "ERR")])
def test_the_originals_answer_backwards(text: str, start: str, count: str, answer: str) -> None:
    expression = CronExpression(text)
    expected = [moment(one) for one in answer.split(",")]
    found = [expected[-1]]
    while len(found) < len(expected):
        before = expression.previous(found[0])
        assert before is not None
        found.insert(0, before)
    assert found == expected
    first = expression.previous(expected[0])
    assert first is None or first <= moment(start)
    assert expression.count_us(us(moment(start)), us(expected[-1])) == len(expected)


# ---------------------------------------------------------------------------------------- against other searches


@pytest.mark.slow
@given(expressions(), modern, st.integers(1, 1200), st.data())
def test_every_second_of_a_while(text: str, start: datetime, length: int, data: st.DataObject) -> None:
    stop = start + timedelta(seconds=length)
    naive = naive_cron.parse(text)
    expected = naive.walk(start, stop)
    expression = CronExpression(text)
    after, until = start - timedelta(microseconds=1), stop - timedelta(microseconds=1)
    assert list(_until(expression, after, stop)) == expected
    assert expression.count_us(us(after), us(until)) == len(expected)
    assert list(_back(expression, stop, start)) == expected[::-1]
    between = data.draw(st.datetimes(_bare(start), _bare(stop), timezones=st.just(UTC)))
    assert expression.next(between) == expression.next(between - timedelta(microseconds=between.microsecond))
    assert expression.count_us(us(after), us(between)) == len([one for one in expected if one <= between])


def _bare(moment: datetime) -> datetime:
    return moment.replace(tzinfo=None)


def _until(expression: CronExpression, after: datetime, stop: datetime) -> list[datetime]:
    found = []
    for one in expression.iter(after):
        if one >= stop:
            break
        found.append(one)
    return found


def _back(expression: CronExpression, before: datetime, start: datetime) -> list[datetime]:
    found = []
    one = expression.previous(before)
    while one is not None and one >= start:
        found.append(one)
        one = expression.previous(one)
    return found


@pytest.mark.slow
@given(expressions(), moments)
def test_day_by_day_for_years(text: str, start: datetime) -> None:
    expected = naive_cron.parse(text).first_after(start, days=1500)
    found = CronExpression(text).next(start)
    if expected is None:
        assert found is None or found > start + timedelta(days=1498)
    else:
        assert found == expected


@pytest.mark.slow
@given(expressions(), moments, moments)
def test_next_previous_and_count_fit_together(text: str, one: datetime, other: datetime) -> None:
    expression = CronExpression(text)
    first, last = sorted([us(one), us(other)])
    found = expression.next_us(first)
    count = expression.count_us(first, last)
    if found is None or found > last:
        assert count == 0
    else:
        assert expression.previous_us(found + 1) == found
        assert (expression.previous_us(found) or -1) <= first
        assert count == 1 + expression.count_us(found, last)
        latest = expression.previous_us(last + 1)
        assert latest is not None
        assert count == 1 + expression.count_us(first, latest - 1)
        assert naive_cron.parse(text)(EPOCH + timedelta(microseconds=latest))
    assert expression.count_us(last, first) == 0


@pytest.mark.slow
@given(expressions(years=False), modern)
def test_apscheduler_fires_at_the_same_times(text: str, start: datetime) -> None:
    seconds, minutes, hours, days, months, weekdays, _ = naive_cron.parse(text).sets
    assume(not days <= {30, 31} or months != {2})  # APScheduler would look for it until the year 9999
    trigger = CronTrigger(
        second=_listed(seconds),
        minute=_listed(minutes),
        hour=_listed(hours),
        day=_listed(days),
        month=_listed(months),
        day_of_week=_listed({(day - 2) % 7 for day in weekdays}),
        year="1970-2060",
        timezone=UTC,
    )
    found: datetime | None = start
    expression = CronExpression(text)
    for _ in range(3):
        assert found is not None
        expected = trigger.get_next_fire_time(None, found + timedelta(microseconds=1))
        found = expression.next(found)
        if expected is None:
            assert found is None or found.year > 2060
            return
        assert found == expected


def _listed(values: set[int] | frozenset[int]) -> str:
    return ",".join(str(value) for value in sorted(values))


@pytest.mark.parametrize("seed", range(3))
def test_days_are_counted_month_by_month_as_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    text = f"0 0 0 {rng.randint(1, 20)}-31/{rng.randint(1, 9)} */{rng.randint(1, 5)} {rng.randint(1, 3)}-7 */3"
    naive: Naive = naive_cron.parse(text)
    expression = CronExpression(text)
    days = [date(1999, 1, 1) + timedelta(days=ahead) for ahead in range(1200)]
    matching = [us(datetime(day.year, day.month, day.day, tzinfo=UTC)) for day in days if naive.day(day)]
    until = us(datetime(days[-1].year, days[-1].month, days[-1].day, tzinfo=UTC))
    assert expression.count_us(us(datetime(1998, 12, 31, tzinfo=UTC)), until) == len(matching)
    for index, one in enumerate(matching):
        assert expression.count_us(one, until) == len(matching) - index - 1


# -------------------------------------------------------------------------------------------------------- edges


def test_the_answer_is_strictly_after_and_strictly_before() -> None:
    every = CronExpression("* * * * * *")
    assert every.next(moment("2026-01-01T00:00:00Z")) == moment("2026-01-01T00:00:01Z")
    assert every.next(moment("2026-01-01T00:00:00.999999Z")) == moment("2026-01-01T00:00:01Z")
    assert every.previous(moment("2026-01-01T00:00:00Z")) == moment("2025-12-31T23:59:59Z")
    assert every.previous(moment("2026-01-01T00:00:00.000001Z")) == moment("2026-01-01T00:00:00Z")
    assert every.next_us(999_999) == 1_000_000
    assert every.next_us(1_000_000) == 2_000_000
    assert every.previous_us(1_000_000) == 0
    assert every.previous_us(1_000_001) == 1_000_000
    assert every.count_us(0, 10_000_000) == 10
    assert every.count_us(0, 999_999) == 0


def test_the_years_are_1970_to_2100() -> None:
    every = CronExpression("* * * * * *")
    first, last = EPOCH, moment("2100-12-31T23:59:59Z")
    assert every.next(moment("0001-01-01T00:00:00Z")) == first
    assert every.next(moment("1969-12-31T23:59:59.5Z")) == first
    assert every.previous(moment("9999-12-31T23:59:59Z")) == last
    assert every.next(last) is None
    assert every.previous(first) is None
    assert every.next_us(10**30) is None
    assert every.previous_us(-(10**30)) is None
    assert every.next_us(-(10**30)) == 0
    assert every.previous_us(10**30) == us(last)
    assert every.count_us(-(10**30), 10**30) == 47_847 * 86_400
    assert every.count_us(us(last) - 2_000_000, 10**30) == 2
    assert CronExpression("0 0 0 31 * *").count_us(us(moment("2100-08-01T00:00:00Z")), 10**30) == 3


@pytest.mark.parametrize("text", ["0 0 0 30 2 *", "0 0 0 31 4,6,9,11 *", "* * * 29 2 SUN 2001-2003"])
def test_what_can_never_fire_is_valid_and_says_none(text: str) -> None:
    never = CronExpression(text)
    assert never.next(EPOCH) is None
    assert never.next(EPOCH) is None  # from the memo
    assert never.previous(moment("2100-01-01T00:00:00Z")) is None
    assert never.count_us(0, us(moment("2100-01-01T00:00:00Z"))) == 0
    assert list(never.iter(EPOCH)) == []


def test_what_fires_once_in_decades() -> None:
    leap = CronExpression("0 0 0 29 2 SUN")
    assert [one.year for one in leap.iter(moment("2020-01-01T00:00:00Z"))] == [2032, 2060, 2088]
    assert leap.previous(moment("2032-02-29T00:00:00Z")) == moment("2004-02-29T00:00:00Z")


def test_a_years_field_bounds_both_ends() -> None:
    bounded = CronExpression("0 0 12 * * * 2024-2026/2")
    assert bounded.next(EPOCH) == moment("2024-01-01T12:00:00Z")
    assert bounded.next(moment("2024-12-31T12:00:00Z")) == moment("2026-01-01T12:00:00Z")
    assert bounded.next(moment("2026-12-31T12:00:00Z")) is None
    assert bounded.previous(moment("2026-01-01T12:00:00Z")) == moment("2024-12-31T12:00:00Z")
    assert bounded.previous(moment("2024-01-01T12:00:00Z")) is None
    assert bounded.count_us(0, us(moment("2090-01-01T00:00:00Z"))) == 366 + 365


def test_asking_here_and_there_is_as_asking_in_order() -> None:
    """The memo of the last day that was found changes no answer."""
    expression = CronExpression("0 30 9 1,15 */2 MON-FRI")
    starts = [EPOCH + timedelta(days=days, hours=days % 24) for days in range(18_000, 20_000, 7)]
    fresh = []
    for start in starts:
        pattern_of.cache_clear()
        fresh.append(CronExpression("0 30 9 1,15 */2 MON-FRI").next(start))
    shuffled = list(enumerate(starts))
    random.Random(0).shuffle(shuffled)
    assert all(expression.next(start) == fresh[index] for index, start in shuffled)


def test_moments_of_other_zones_are_instants_too() -> None:
    noon = CronExpression("0 0 12 * * *")
    assert noon.next(datetime(2026, 6, 1, 13, 30, tzinfo=ZoneInfo("Europe/Berlin"))) == moment("2026-06-01T12:00:00Z")
    second_pass = datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin"))  # 01:30 UTC
    assert CronExpression("0 0 1 * * *").next(second_pass) == moment("2026-10-26T01:00:00Z")


@pytest.mark.parametrize("given", [datetime(2026, 1, 1), date(2026, 1, 1), "2026-01-01", 0, None])  # noqa: DTZ001
def test_a_moment_has_a_zone(given: datetime) -> None:
    expression = CronExpression("* * * * * *")
    for method in (expression.next, expression.previous, expression.iter):
        with pytest.raises(ValueError, match=r"expected a datetime with a zone \(tzinfo\), got"):
            method(given)


# ------------------------------------------------------------------------------------------------------- a value


def test_equal_by_text_zone_and_literal() -> None:
    one = CronExpression("0 0 9 * * *", "Europe/Berlin")
    assert one == CronExpression("0 0 9 * * *", ZoneInfo("Europe/Berlin"))
    assert hash(one) == hash(CronExpression("0 0 9 * * *", "Europe/Berlin"))
    others = [
        CronExpression("0 0 9 * * ?", "Europe/Berlin"),
        CronExpression("0 0 9 * * *"),
        CronExpression("0 0 9 * * *", "Europe/Berlin", literal=True),
        "0 0 9 * * *",
    ]
    assert all(one != other for other in others)
    assert len({one, *others}) == 5


@pytest.mark.parametrize("tz", ["UTC", "Asia/Kolkata", timezone(timedelta(hours=2)), "UTC-03:30"])
@pytest.mark.parametrize("literal", [False, True])
def test_crosses_processes_whole(tz: str | tzinfo, literal: bool) -> None:
    one = CronExpression("0 0 9 * * MON-FRI", tz, literal=literal)
    copy = pickle.loads(pickle.dumps(one))
    assert copy == one
    assert (copy.text, copy.tz_name, copy.literal) == ("0 0 9 * * MON-FRI", one.tz_name, literal)
    assert copy.next(EPOCH) == one.next(EPOCH)
    assert CronExpression(one.text, one.tz_name, literal=literal) == one  # as a store keeps it


def test_patterns_are_shared_also_across_pickles() -> None:
    assert pattern_of("0 0 9 * * 1") is pattern_of("0 0 9 ? * SUN")
    assert pickle.loads(pickle.dumps(pattern_of("0 0 9 * * 1"))) is pattern_of("0 0 9 * * 1")


def test_does_not_change() -> None:
    one = CronExpression("0 0 9 * * *")
    with pytest.raises(AttributeError, match="does not change: text"):
        one.text = "other"
    with pytest.raises(AttributeError, match="does not change: tz"):
        del one.tz


def test_text_is_text() -> None:
    with pytest.raises(InvalidExpression, match="a cron expression is text, got int"):
        CronExpression(60)  # type: ignore[arg-type]


def test_says_what_it_is() -> None:
    assert repr(CronExpression("0 0 9 * * *")) == "CronExpression('0 0 9 * * *', 'UTC')"
    literal = CronExpression("0 0 9 * * *", "Asia/Tokyo", literal=True)
    assert repr(literal) == "CronExpression('0 0 9 * * *', 'Asia/Tokyo', literal=True)"
    assert len(repr(CronExpression("0," * 1000 + "0 * * * * *"))) < 80


@pytest.mark.parametrize(
    ("tz", "name"),
    [
        ("UTC", "UTC"),
        (UTC, "UTC"),
        (timezone(timedelta(0), "nowhere"), "UTC"),
        (ZoneInfo("UTC"), "UTC"),
        (timezone(timedelta(hours=1), "CET"), "UTC+01:00"),
        ("UTC+01:00", "UTC+01:00"),
        ("UTC-00:44:30", "UTC-00:44:30"),
        ("Europe/Berlin", "Europe/Berlin"),
        (ZoneInfo("Europe/Berlin"), "Europe/Berlin"),
    ],
)
def test_a_zone_has_a_name_that_brings_it_back(tz: str | tzinfo, name: str) -> None:
    expression = CronExpression("0 0 9 * * *", tz)
    assert expression.tz_name == name
    assert CronExpression("0 0 9 * * *", name) == expression


@pytest.mark.parametrize(
    ("tz", "message"),
    [
        (
            "Europe/Berln",
            "unknown time zone 'Europe/Berln', expected an IANA name as Europe/Berlin; write Europe/Berlin",
        ),
        ("berlin", "; write Europe/Berlin"),
        ("utc", "; write UTC"),
        ("CEST", "unknown time zone 'CEST', expected an IANA name as Europe/Berlin"),
        ("America", "unknown time zone 'America'"),
        ("", "unknown time zone ''"),
        ("../../etc/passwd", "unknown time zone '../../etc/passwd'"),
        ("/etc/passwd", "unknown time zone"),
        ("a\0b", "unknown time zone"),
        ("UTC+25:00", "unknown time zone"),
        ("x" * 10**6, "unknown time zone 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx…'"),
        (None, "a zone is an IANA name or a tzinfo, got NoneType"),
        (7, "a zone is an IANA name or a tzinfo, got int"),
    ],
)
def test_an_unknown_zone_says_so(tz: str, message: str) -> None:
    with pytest.raises(InvalidExpression) as caught:
        CronExpression("* * * * * *", tz)
    assert caught.value.field == "tz"
    assert message in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("tz", ["CEST", "Z", "PDT", "America", "Gotham"])
def test_no_zone_is_proposed_that_is_not_meant(tz: str) -> None:
    with pytest.raises(InvalidExpression) as caught:
        CronExpression("* * * * * *", tz)
    assert caught.value.hint is None


# ------------------------------------------------------------------------------------------------- schedule_of


def test_plain_things_are_schedules() -> None:
    ready = CronExpression("@daily", "Asia/Tokyo")
    assert schedule_of(ready, "Europe/Berlin") is ready
    assert schedule_of(Interval(5)) == Interval(5)
    assert schedule_of("@daily", "Asia/Tokyo") == ready
    assert schedule_of("@daily", "Asia/Tokyo", literal=True) == CronExpression("@daily", "Asia/Tokyo", literal=True)
    assert schedule_of(300) == schedule_of(300.0) == schedule_of(timedelta(minutes=5)) == Interval(300)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (True, "a schedule is cron text, seconds, a timedelta, a CronExpression or an Interval, got True"),
        (None, "got NoneType"),
        (b"@daily", "got bytes"),
        ([60], "got list"),
        ("60", "for an interval of 60 seconds give the number itself, not text"),
        (0, "an interval is at least 0.001 seconds"),
    ],
)
def test_anything_else_is_none(value: str, message: str) -> None:
    with pytest.raises(InvalidExpression, match=message):
        schedule_of(value)
