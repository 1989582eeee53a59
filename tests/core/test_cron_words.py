"""Expressions in plain English."""

from __future__ import annotations

import re

import pytest
from hypothesis import given

from kapsl_scheduler.core.cron import CronExpression
from tests.core.naive_cron import expressions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        # evenly
        ("* * * * * *", "Every second"),
        ("*/15 * * * * *", "Every 15 seconds"),
        ("*/30 * * * * *", "Every 30 seconds"),
        ("0 * * * * *", "Every minute"),
        ("0 */5 * * * *", "Every 5 minutes"),
        ("0 0,30 * * * *", "Every 30 minutes"),
        ("@hourly", "Every hour, on the hour"),
        ("*/15 * * * * MON-FRI", "Every 15 seconds, on Monday through Friday"),
        ("* * * * 1 *", "Every second, in January"),
        # not evenly: nothing that would not be true
        ("*/17 * * * * *", "Every 17th second from 0 through 51 of every minute"),
        ("3/15 * * * * *", "Every 15th second from 3 through 48 of every minute"),
        ("3/19 * * * * *", "Every 19th second from 3 through 41 of every minute"),
        ("0 0 9 2/10 * *", "At 09:00:00 on every 10th day from 2 through 22 of every month"),
        ("0 */7 * * * *", "At second 0 of every 7th minute from 0 through 56 of every hour"),
        ("30 */5 * * * *", "At second 30 of every 5th minute of every hour"),
        ("59 * * * * *", "At second 59 of every minute"),
        ("0 5 * * * *", "At second 0 of minute 5 of every hour"),
        ("0 0 */2 * * *", "At second 0 of minute 0 past every 2nd hour"),
        ("0 0 1/2 * * *", "At second 0 of minute 0 past every 2nd hour from 1 through 23"),
        ("* 0-9 2 * * *", "Every second of minutes 0 through 9 past hour 2"),
        ("0 */5 2 1 1 MON", "At second 0 of every 5th minute past hour 2, on day 1 of January, when it is a Monday"),
        ("1,2,5-9,20 0 0,12 * * *", "At seconds 1, 2, 5 through 9 and 20 of minute 0 past hours 0 and 12"),
        # clock times
        ("0 0 9 * * MON-FRI", "At 09:00:00 on Monday through Friday"),
        ("0 0 9 * * *", "At 09:00:00 every day"),
        ("0 0 */6 * * *", "At 00:00:00, 06:00:00, 12:00:00 and 18:00:00 every day"),
        ("0,30 0 9,17 * * *", "At 09:00:00, 09:00:30, 17:00:00 and 17:00:30 every day"),
        ("0 0 9 * 6-8 *", "At 09:00:00 every day, in June through August"),
        ("0 0 9 * * * 2026", "At 09:00:00 every day, in 2026"),
        ("@yearly", "At 00:00:00 on day 1 of January"),
        ("@monthly", "At 00:00:00 on day 1 of every month"),
        ("@weekly", "At 00:00:00 on Sunday"),
        # days
        ("0 0 9 1,15 * *", "At 09:00:00 on days 1 and 15 of every month"),
        ("0 0 9 */10 1,2 *", "At 09:00:00 on every 10th day from 1 through 31 of January and February"),
        ("0 0 9 8-14 * 6", "At 09:00:00 on days 8 through 14 of every month, when it is a Friday"),
        ("0 0 9 1-7 */6 1,7", "At 09:00:00 on days 1 through 7 of January and July, when it is Sunday or Saturday"),
        ("0 0 9 1 1 2-6", "At 09:00:00 on day 1 of January, when it is Monday through Friday"),
        ("0 0 9 ? 1 TUE,THU", "At 09:00:00 on Tuesday and Thursday, in January"),
        ("0 0 9 1 1 * 2026-2030", "At 09:00:00 on day 1 of January, in years 2026 through 2030"),
        ("0 0 9 1 1 * */4", "At 09:00:00 on day 1 of January, in every 4th year from 1970 through 2098"),
        ("0 0 9 */21 1 * */11", "At 09:00:00 on days 1 and 22 of January, in every 11th year from 1970 through 2091"),
        ("0 0 0 30 2 *", "At 00:00:00 on day 30 of February: no such day ever comes, so never"),
    ],
)
def test_words(text: str, words: str) -> None:
    assert CronExpression(text).explain() == words


def test_the_zone_is_said_where_it_is_not_utc() -> None:
    assert CronExpression("0 0 9 * * *", "Asia/Tokyo").explain() == "At 09:00:00 every day, Asia/Tokyo time"
    assert CronExpression("0 0 9 * * *", "UTC+02:00").explain() == "At 09:00:00 every day, UTC+02:00 time"


def test_ordinals() -> None:
    said = {text: CronExpression(f"0 0 0 1 1 * 1970-2100/{text}").explain().split()[-6] for text in (2, 3, 21, 11, 12)}
    assert said == {2: "2nd", 3: "3rd", 21: "21st", 11: "11th", 12: "12th"}


@pytest.mark.slow
@given(expressions())
def test_words_for_every_expression(text: str) -> None:
    words = CronExpression(text).explain()
    assert re.match(r"(Every|At) \S", words)
    assert "  " not in words
    assert words == words.strip()
