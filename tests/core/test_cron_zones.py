"""Zones: the tables against zoneinfo, the firing rules against a walk through every UTC second around changes of
all kinds, and the days that people remember."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from itertools import islice, pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kapsl_scheduler.core.cron import CronExpression
from kapsl_scheduler.core.cron_zones import zone_of
from kapsl_scheduler.errors import InvalidExpression
from tests.core import naive_cron

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)

CHANGES = [
    ("Europe/Berlin", "2026-03-29T01:00Z"),
    ("Europe/Berlin", "2026-10-25T01:00Z"),
    ("Europe/Berlin", "2090-03-26T01:00Z"),  # by the rule that stands behind the table of transitions
    ("America/New_York", "2026-03-08T07:00Z"),
    ("America/New_York", "2026-11-01T06:00Z"),
    ("Europe/Dublin", "2026-03-29T01:00Z"),  # winter time is the exception there
    ("Europe/Dublin", "2026-10-25T01:00Z"),
    ("Africa/Casablanca", "2026-02-15T02:00Z"),  # Ramadan
    ("Africa/Casablanca", "2026-03-22T02:00Z"),
    ("Australia/Lord_Howe", "2026-04-04T15:00Z"),  # half an hour
    ("Australia/Lord_Howe", "2026-10-03T15:30Z"),
    ("America/Sao_Paulo", "2018-11-04T03:00Z"),  # midnight does not exist
    ("America/Sao_Paulo", "2018-02-18T02:00Z"),  # the day before ends twice
    ("Asia/Beirut", "2024-03-30T22:00Z"),
    ("Asia/Beirut", "2024-10-26T21:00Z"),
    ("Asia/Pyongyang", "2015-08-14T15:00Z"),  # for good
    ("Asia/Pyongyang", "2018-05-04T15:00Z"),
    ("America/Caracas", "2016-05-01T07:00Z"),
    ("Asia/Kathmandu", "1985-12-31T18:30Z"),  # a quarter of an hour
    ("Africa/Monrovia", "1972-01-07T00:44:30Z"),  # from an offset with seconds
]
WHOLE_DAYS = [("Pacific/Apia", "2011-12-30T10:00Z"), ("Pacific/Kwajalein", "1993-08-21T12:00Z")]


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def us(moment: datetime) -> int:
    return (moment - EPOCH) // timedelta(microseconds=1)


def change(zone: str, at: str) -> tuple[ZoneInfo, datetime, timedelta]:
    """A zone, when its offset changes, and by how much."""
    tz, when = ZoneInfo(zone), moment(at)
    after, before = when.astimezone(tz).utcoffset(), (when - SECOND).astimezone(tz).utcoffset()
    assert after is not None
    assert before is not None
    assert after != before
    return tz, when, after - before


def upcoming(expression: CronExpression, start: datetime, stop: datetime) -> list[datetime]:
    found = []
    for one in expression.iter(start - SECOND):
        if one >= stop:
            break
        found.append(one.astimezone(UTC))
    return found


def past(expression: CronExpression, start: datetime, stop: datetime) -> list[datetime]:
    found: list[datetime] = []
    one = expression.previous(stop)
    while one is not None and one >= start:
        found.insert(0, one.astimezone(UTC))
        one = expression.previous(one)
    return found


def check(text: str, tz: ZoneInfo, literal: bool, start: datetime, stop: datetime) -> None:
    """Forwards, backwards and in number as the walk through the seconds."""
    naive = naive_cron.parse(text)
    rule = naive_cron.passes if naive.wild or literal else naive_cron.once
    expected = list(rule(naive, tz, start, stop))
    expression = CronExpression(text, tz, literal=literal)
    assert upcoming(expression, start, stop) == expected
    assert past(expression, start, stop) == expected
    for before, one in pairwise([start - SECOND, *expected]):
        assert expression.next(one - SECOND) == one
        assert expression.next(before) == one
        assert expression.count_us(us(one) - 1, us(one)) == 1
    rng = random.Random(text)
    for point in [start + SECOND * rng.randrange(int((stop - start) / SECOND)) for _ in range(20)]:
        assert upcoming(expression, point + SECOND, stop) == [one for one in expected if one > point]
        assert past(expression, start, point) == [one for one in expected if one < point]
    for first in (start, *(start + SECOND * rng.randrange(int((stop - start) / SECOND)) for _ in range(5))):
        for last in (stop, *(start + SECOND * rng.randrange(int((stop - start) / SECOND)) for _ in range(5))):
            between = [one for one in expected if first < one < last]
            assert expression.count_us(us(first), us(last) - 1) == len(between)


# --------------------------------------------------------------------------------------------------- the tables


@pytest.mark.slow
@given(
    st.sampled_from([zone for zone, _ in CHANGES + WHOLE_DAYS] + ["Asia/Gaza", "America/Noronha", "Asia/Kolkata"]),
    st.integers(-30 * 86_400, 4_133_980_800),
)
@example("America/Noronha", 971_000_000)  # a summer time of seven days
@example("Asia/Gaza", 2_234_304_000)
def test_the_table_has_the_offset_of_every_moment(zone: str, second: int) -> None:
    tz = ZoneInfo(zone)
    instant = EPOCH + timedelta(seconds=second)
    shown = zone_of(tz).at(second)
    assert shown == instant
    assert shown.replace(tzinfo=None) == instant.astimezone(tz).replace(tzinfo=None)


def test_each_zone_has_one_table() -> None:
    assert zone_of(ZoneInfo("Europe/Berlin")) is zone_of(ZoneInfo("Europe/Berlin"))
    table = zone_of(ZoneInfo("Europe/Berlin"))
    assert table.lows == sorted(table.lows)
    assert table.highs == sorted(table.highs)


def test_a_fixed_offset_is_a_zone_without_changes() -> None:
    expression = CronExpression("0 0 9 * * *", timezone(timedelta(hours=5, minutes=30)))
    found = expression.next(moment("2026-01-01T03:30:00Z"))
    assert found == moment("2026-01-02T03:30:00Z")
    assert found.isoformat() == "2026-01-02T09:00:00+05:30"


class Odd(tzinfo):
    """A zone of somebody's own making."""

    def __init__(self, offset: timedelta | None) -> None:
        self.offset = offset

    def __str__(self) -> str:
        return "Odd"

    def utcoffset(self, dt: datetime | None) -> timedelta | None:
        return self.offset

    def dst(self, dt: datetime | None) -> timedelta | None:
        return None if self.offset is None else timedelta(0)

    def fromutc(self, dt: datetime) -> datetime:
        return dt + (self.offset or timedelta(0))


class Hasty(Odd):
    """Its offset changes twice within a day, in 2020."""

    def fromutc(self, dt: datetime) -> datetime:
        fields = dt.replace(tzinfo=None)
        first, second = datetime(2020, 5, 5, 6), datetime(2020, 5, 5, 18)  # noqa: DTZ001
        hours = 0 if fields < first else 1 if fields < second else 3
        shown = dt + timedelta(hours=hours)
        return shown.replace(tzinfo=Odd(timedelta(hours=hours)))


class Restless(Odd):
    """Its offset is another one every three and a half days of the spring of 2020."""

    def fromutc(self, dt: datetime) -> datetime:
        passed = (dt.replace(tzinfo=None) - datetime(2020, 3, 1)) // timedelta(hours=84)  # noqa: DTZ001
        offset = timedelta(hours=passed % 2 if 0 <= passed < 20 else 0)
        return (dt + offset).replace(tzinfo=Odd(offset))


def test_no_change_hides_behind_the_next_one() -> None:
    assert zone_of(Restless(timedelta(0))).offsets == [0, 3600] * 10 + [0]


def test_any_tzinfo_will_do() -> None:
    expression = CronExpression("0 0 9 * * *", Odd(timedelta(hours=-2)))
    assert expression.tz_name == "Odd"
    assert expression.next(EPOCH) == moment("1970-01-01T11:00:00Z")


def test_changes_that_are_close_are_all_found() -> None:
    table = zone_of(Hasty(timedelta(0)))
    assert table.offsets == [0, 3600, 3 * 3600]
    assert table.starts[1:] == [us(moment(f"2020-05-05T{hour}:00:00Z")) // 10**6 for hour in ("06", "18")]


@pytest.mark.parametrize(
    ("tz", "message"),
    [
        (Odd(None), "the zone 'Odd' cannot be used: it says no offset"),
        (Odd(timedelta(microseconds=5)), "cannot be used: its offset has a fraction of a second"),
        (timezone(timedelta(microseconds=5)), "cannot be used: its offset has a fraction of a second"),
        (type("Loose", (Odd,), {"__hash__": None})(None), "cannot be used: unhashable type"),
    ],
)
def test_a_zone_that_cannot_be_used(tz: tzinfo, message: str) -> None:
    with pytest.raises(InvalidExpression, match=message) as caught:
        CronExpression("* * * * * *", tz)
    assert caught.value.field == "tz"


# ---------------------------------------------------------------------------------------- against every second

seconds = st.sampled_from(["0", "0", "30", "*/20", "59"])
minutes = st.sampled_from(["*", "*/15", "0", "30", "0,59", "15-45", "0/7", "*/40,3"])


@st.composite
def hours(draw: st.DrawFn, around: int) -> str:
    """An hour field that has something to do with the hours around a change."""
    near = st.integers(-2, 2).map(lambda ahead: (around + ahead) % 24)
    kind = draw(st.sampled_from(["*", "*/2", "one", "two", "range", "all"]))
    if kind in ("*", "*/2"):
        return kind
    if kind == "all":
        return "0-23"
    one, other = sorted([draw(near), draw(near)])
    return {"one": f"{one}", "two": f"{one},{other}", "range": f"{one}-{other}"}[kind]


@pytest.mark.slow
@settings(max_examples=120)
@given(st.data())
def test_the_rules_hold_around_every_kind_of_change(data: st.DataObject) -> None:
    tz, when, by = change(*data.draw(st.sampled_from(CHANGES)))
    local = when.astimezone(tz)
    days = data.draw(st.sampled_from(["* * *", "* * *", f"{local.day} {local.month} *", f"? * {local:%a}"]))
    text = f"{data.draw(seconds)} {data.draw(minutes)} {data.draw(hours(local.hour))} {days}"
    around = abs(by) + timedelta(minutes=35)
    check(text, tz, data.draw(st.booleans()), when - around, when + around)


@pytest.mark.slow
@pytest.mark.parametrize(("zone", "at"), WHOLE_DAYS)
@pytest.mark.parametrize("text", ["0 30 9 * * *", "0 */30 9 * * *", "0 0 0 30 12 *", "0 0 0,10 * * *", "0 0 */5 * * *"])
@pytest.mark.parametrize("literal", [False, True])
def test_the_rules_hold_where_a_day_was_skipped(zone: str, at: str, text: str, literal: bool) -> None:
    tz, when, by = change(zone, at)
    assert by == timedelta(days=1)
    check(text, tz, literal, when - timedelta(hours=26), when + timedelta(hours=26))


@pytest.mark.slow
@settings(max_examples=60)
@given(
    naive_cron.expressions(years=False),
    st.sampled_from(["Europe/Berlin", "America/Sao_Paulo", "Asia/Gaza", "Australia/Lord_Howe", "Africa/Casablanca"]),
    st.booleans(),
    st.integers(0, 4_000_000_000),
    st.integers(0, 300_000_000),
)
def test_forwards_backwards_and_in_number_over_years(
    text: str, zone: str, literal: bool, start: int, span: int
) -> None:
    expression = CronExpression(text, zone, literal=literal)
    first, last = start * 10**6, (start + span) * 10**6
    found = list(islice(_walk(expression, first, last), 60))
    for before, after in pairwise(found):
        assert before < after
        assert expression.previous_us(after) == before
        assert expression.count_us(before, after) == 1
    if found:
        assert expression.count_us(first, found[-1]) == len(found)
        assert expression.count_us(first, last) == len(found) + expression.count_us(found[-1], last)
        assert (expression.previous_us(found[0]) or 0) <= first
    else:
        assert expression.count_us(first, last) == 0


def _walk(expression: CronExpression, after: int, until: int) -> list[int]:
    found = []
    at = expression.next_us(after)
    while at is not None and at <= until and len(found) < 60:
        found.append(at)
        at = expression.next_us(at)
    return found


# -------------------------------------------------------------------------------------------- days to remember


def shown(text: str, zone: str, start: str, count: int, *, literal: bool = False) -> list[str]:
    found = islice(CronExpression(text, zone, literal=literal).iter(moment(start)), count)
    return [one.isoformat() for one in found]


def test_a_fixed_time_in_a_gap_comes_when_the_gap_is_over() -> None:
    assert shown("0 30 2 * * *", "Europe/Berlin", "2026-03-28T00:00Z", 3) == [
        "2026-03-28T02:30:00+01:00",
        "2026-03-29T03:00:00+02:00",
        "2026-03-30T02:30:00+02:00",
    ]


def test_several_fixed_times_in_one_gap_are_one_occurrence() -> None:
    assert shown("0 0,15,30 2,3 * * *", "Europe/Berlin", "2026-03-29T00:00Z", 3) == [
        "2026-03-29T03:00:00+02:00",
        "2026-03-29T03:15:00+02:00",
        "2026-03-29T03:30:00+02:00",
    ]
    expression = CronExpression("0 0,15,30 2,3 * * *", "Europe/Berlin")
    day = us(moment("2026-03-29T00:00Z"))
    assert expression.count_us(day, day + 80_000 * 10**6) == 3
    assert expression.previous(moment("2026-03-29T01:00:01Z")) == moment("2026-03-29T01:00:00Z")
    assert expression.previous(moment("2026-03-29T01:00:00Z")) == moment("2026-03-28T02:30:00Z")


def test_a_fixed_time_in_a_fold_comes_in_the_first_pass() -> None:
    assert shown("0 30 2 * * *", "Europe/Berlin", "2026-10-24T22:00Z", 2) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-26T02:30:00+01:00",
    ]
    between_the_passes = moment("2026-10-25T01:15:00Z")
    expression = CronExpression("0 30 2 * * *", "Europe/Berlin")
    assert expression.next(between_the_passes) == moment("2026-10-26T01:30:00Z")
    assert expression.previous(moment("2026-10-25T01:45:00Z")) == moment("2026-10-25T00:30:00Z")
    assert expression.previous(between_the_passes) == moment("2026-10-25T00:30:00Z")


def test_a_wildcard_hour_follows_the_clock_through_both_passes() -> None:
    assert shown("0 30 * * * *", "Europe/Berlin", "2026-10-24T23:45Z", 4) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:30:00+01:00",
        "2026-10-25T03:30:00+01:00",
        "2026-10-25T04:30:00+01:00",
    ]
    assert shown("0 30 * * * *", "Europe/Berlin", "2026-03-29T00:00Z", 3) == [
        "2026-03-29T01:30:00+01:00",
        "2026-03-29T03:30:00+02:00",
        "2026-03-29T04:30:00+02:00",
    ]


def test_a_wildcard_minute_of_a_skipped_hour_is_left_out() -> None:
    assert shown("0 */20 2 * * *", "Europe/Berlin", "2026-03-28T01:30Z", 2) == [
        "2026-03-28T02:40:00+01:00",
        "2026-03-30T02:00:00+02:00",
    ]


def test_literal_skips_and_repeats() -> None:
    assert shown("0 30 2 * * *", "Europe/Berlin", "2026-03-28T12:00Z", 1, literal=True) == ["2026-03-30T02:30:00+02:00"]
    assert shown("0 30 2 * * *", "Europe/Berlin", "2026-10-24T22:00Z", 2, literal=True) == [
        "2026-10-25T02:30:00+02:00",
        "2026-10-25T02:30:00+01:00",
    ]


def test_a_midnight_that_does_not_exist() -> None:
    assert shown("@daily", "America/Sao_Paulo", "2018-11-03T12:00Z", 2) == [
        "2018-11-04T01:00:00-02:00",
        "2018-11-05T00:00:00-02:00",
    ]


def test_a_day_that_does_not_exist() -> None:
    assert shown("0 0 9 * * *", "Pacific/Apia", "2011-12-29T12:00Z", 3) == [
        "2011-12-29T09:00:00-10:00",
        "2011-12-31T00:00:00+14:00",
        "2011-12-31T09:00:00+14:00",
    ]
    assert shown("0 0 9 30 12 *", "Pacific/Apia", "2011-12-01T12:00Z", 1, literal=True) == ["2012-12-30T09:00:00+14:00"]


def test_the_example_of_the_page() -> None:
    expression = CronExpression("0 30 9 * * MON-FRI", "Europe/Berlin")
    assert expression.explain() == "At 09:30:00 on Monday through Friday, Europe/Berlin time"
    assert str(expression.next(datetime(2026, 1, 2, 12, tzinfo=UTC))) == "2026-01-05 09:30:00+01:00"


def test_half_an_hour() -> None:
    assert shown("0 15 2 * * *", "Australia/Lord_Howe", "2026-10-02T18:00Z", 2) == [
        "2026-10-04T02:30:00+11:00",
        "2026-10-05T02:15:00+11:00",
    ]


def test_answers_are_instants_that_compare_and_subtract() -> None:
    """Of two datetimes of one ZoneInfo Python compares the clocks, and in a fold none equals one of another zone."""
    first, second = islice(CronExpression("0 30 * * * *", "Europe/Berlin").iter(moment("2026-10-24T23:45Z")), 2)
    assert first == moment("2026-10-25T00:30Z")
    assert first < second
    assert second - first == timedelta(hours=1)


def test_years_are_those_of_the_zones_clock() -> None:
    tokyo = CronExpression("* * * * * *", "Asia/Tokyo")
    assert tokyo.next(moment("1900-01-01T00:00Z")) == moment("1969-12-31T15:00:00Z")
    assert tokyo.previous(moment("2200-01-01T00:00Z")) == moment("2100-12-31T14:59:59Z")
    assert tokyo.next(moment("2100-12-31T14:59:59Z")) is None
    assert tokyo.previous(moment("1969-12-31T15:00:00Z")) is None
    assert tokyo.next_us(-(10**30)) == -9 * 3600 * 10**6
    assert tokyo.previous_us(-(10**30)) is None
    assert tokyo.count_us(-(10**30), 10**30) == 47_847 * 86_400
    assert tokyo.count_us(10, 0) == 0
    berlin = CronExpression("0 0 9 * * *", "Europe/Berlin")
    assert berlin.next_us(10**30) is None
    assert berlin.previous_us(-(10**30)) is None
    assert berlin.count_us(-(10**30), 10**30) == 47_847
    assert berlin.count_us(10, 0) == 0


@pytest.mark.parametrize(
    ("text", "literal", "last"),
    [
        ("* * 2 8-14 3 SUN", False, "2006-03-12T02:59:59-05:00"),  # from 2007 on the hour that is skipped
        ("0 30 2 8-14 3 SUN", True, "2006-03-12T02:30:00-05:00"),
        ("* 0-59 2 8-14 3 SUN", False, "2100-03-14T03:00:00-04:00"),
    ],
)
def test_what_falls_into_every_gap(text: str, literal: bool, last: str) -> None:
    expression = CronExpression(text, "America/New_York", literal=literal)
    found = expression.previous(moment("2101-01-01T00:00Z"))
    assert found is not None
    assert found.isoformat() == last
    assert expression.next(found) is None


def test_what_never_fires_in_a_zone() -> None:
    for literal in (False, True):
        never = CronExpression("0 0 0 30 2 *", "Europe/Berlin", literal=literal)
        assert never.next(EPOCH) is None
        assert never.previous(moment("2100-01-01T00:00Z")) is None
        assert never.previous(moment("2026-10-25T01:15Z")) is None  # in the second pass of a fold
        assert never.count_us(0, us(moment("2100-01-01T00:00Z"))) == 0


def test_zones_without_an_offset_are_utc() -> None:
    found = CronExpression("0 0 9 * * *", "Etc/GMT").next(EPOCH)
    assert found == moment("1970-01-01T09:00:00Z")
    assert CronExpression("0 0 9 * * *", "Etc/GMT").tz_name == "Etc/GMT"
