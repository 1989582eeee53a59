"""`kapsl-scheduler explain`, and how lengths of time are put."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from kapsl_scheduler.cli import main
from kapsl_scheduler.cli_tables import span


def explain(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["explain", *arguments])
    return result.exit_code, result.output


def test_words_and_the_next_times_in_the_zone_and_utc() -> None:
    code, printed = explain("0 30 2 * * *", "--tz", "Europe/Zurich", "-n", "2", "--after", "2026-03-28T12:00:00Z")

    lines = printed.splitlines()
    assert (code, lines[0]) == (0, "At 02:30:00 every day, Europe/Zurich time")
    assert lines[1].split() == ["Europe/Zurich", "UTC", "away"]
    assert [line.split("  ") for line in lines[2:]] == [
        ["Sun 2026-03-29 03:00:00+02:00", "Sun 2026-03-29 01:00:00+00:00", "in 13 h"],
        ["Mon 2026-03-30 02:30:00+02:00", "Mon 2026-03-30 00:30:00+00:00", "in 2 d "],
    ]


def test_five_times_from_now_on_without_more_words() -> None:
    code, printed = explain("@hourly")

    lines = printed.splitlines()
    assert (code, len(lines)) == (0, 7)
    assert lines[1].split() == ["UTC", "away"]
    assert " in " in lines[2]
    assert explain("0 0 0 1 1 * 1999")[1].splitlines()[1] == "It never fires."


def test_json_for_programs() -> None:
    code, printed = explain("@daily", "--tz", "UTC+02:00", "-n", "1", "--after", "2026-01-01T00:00:00Z", "--json")

    assert code == 0
    assert json.loads(printed) == {
        "expression": "@daily",
        "tz": "UTC+02:00",
        "description": "At 00:00:00 every day, UTC+02:00 time",
        "next": [{"utc": "2026-01-01T22:00:00Z", "local": "2026-01-02T00:00:00+02:00"}],
    }


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("0 61 * * * *",), 1, "minute: expected 0 to 59, got '61' at position 2\n  0 61 * * * *\n    ^^\n"),
        (("0\t61 * * * *",), 1, "\n  0 61 * * * *\n    ^^\n"),
        (("0 9 * * 1-5",), 1, "write 0 0 9 * * MON-FRI\n  0 9 * * 1-5\n  ^^^^^^^^^^^\n"),
        (("",), 1, "the expression is empty"),
        (("@daily", "--tz", "Europe/Zurch"), 1, "write Europe/Zurich"),
        (("@daily", "--after", "noon"), 2, "'noon' is no moment"),
        ((), 2, "EXPRESSION"),
    ],
)
def test_what_cannot_be_explained_is_shown_to_the_token(arguments: tuple[str, ...], code: int, said: str) -> None:
    exit_code, printed = explain(*arguments)

    assert exit_code == code
    assert said in printed


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 us"),
        (0.00025, "250 us"),
        (0.00123, "1.23 ms"),
        (0.25, "250 ms"),
        (1.5, "1.5 s"),
        (12.4, "12 s"),
        (89, "89 s"),
        (180, "3 min"),
        (4 * 3600, "4 h"),
        (50 * 3600, "2 d"),
    ],
)
def test_a_length_of_time_is_put_in_one_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text
