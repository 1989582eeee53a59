"""Reports: targets, tables, files, comparison."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks.report import Report, Target, compare, load_report, print_report, save_report


@pytest.fixture
def report() -> Report:
    report = Report.begin("sample", {"rounds": 3})
    report.add({"loop": "asyncio", "callers": 32}, "rate", "requests/s", [900.0, 1000.0, 5000.0], "higher")
    report.add({"loop": "asyncio", "callers": 32}, "p99", "ms", [2.0, 2.0, 2.0], "lower")
    report.at_least("rate of 32", 1000.0, 900.0)
    report.at_most("p99 of 32", 2.0, 1.0, "ms")
    return report


@pytest.mark.parametrize(
    ("comparison", "value", "met"),
    [
        ("at least", 0.35, True),
        ("at least", 0.349, False),
        ("at most", 5.0, True),
        ("at most", 5.01, False),
        ("exactly", 500.0, True),
        ("exactly", 501.0, False),
    ],
)
def test_a_target_is_met_at_its_limit_and_not_beyond(comparison: str, value: float, met: bool) -> None:
    limit = {"at least": 0.35, "at most": 5.0, "exactly": 500.0}[comparison]
    assert Target("name", value, comparison, limit).met is met


@pytest.mark.parametrize("comparison", ["at least", "at most", "exactly"])
def test_what_was_not_measured_meets_no_target(comparison: str) -> None:
    report = Report.begin("sample", {})
    {"at least": report.at_least, "at most": report.at_most, "exactly": report.exactly}[comparison]("it", math.nan, 1.0)
    assert [str(target) for target in report.missed()] == [f"MISSED  it: not measured, {comparison} 1.00"]


def test_the_value_is_the_median_round(report: Report) -> None:
    assert report.find("rate", {"callers": 32}).value == 1000.0


def test_find_wants_exactly_one(report: Report) -> None:
    with pytest.raises(LookupError, match="0 measurements"):
        report.find("rate", {"callers": 1})
    report.add({"loop": "uvloop", "callers": 32}, "rate", "requests/s", [1.0])
    with pytest.raises(LookupError, match="2 measurements"):
        report.find("rate", {"callers": 32})


def test_a_report_survives_its_file(report: Report, tmp_path: Path) -> None:
    path = save_report(report, tmp_path)
    assert path.name.startswith("sample-")
    assert load_report(path) == report
    assert report.machine.python
    assert report.machine.packages["numpy"]


def test_rounds_without_a_figure_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report.begin("sample", {})
    report.add({"case": "a"}, "p99", "ms", [math.nan, 1.0])
    report.add({"case": "b"}, "p99", "ms", [math.nan])
    report.at_most("b", report.find("p99", {"case": "b"}).value, 1.0)
    loaded = load_report(save_report(report, tmp_path / "report.json"))
    assert loaded == report
    assert loaded.find("p99", {"case": "a"}).value == 1.0
    print_report(loaded)
    assert "MISSED  b: not measured, at most 1.00" in capsys.readouterr().out


def test_the_table_shows_medians_ranges_and_missed_targets(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.lstrip().startswith("asyncio"))
    assert row.split() == ["asyncio", "32", "1,000", "(900-5,000)", "2.00"]
    assert "   met     rate of 32: 1,000, at least 900" in lines
    assert "   MISSED  p99 of 32: 2.00 ms, at most 1.00 ms" in lines
    assert [target.name for target in report.missed()] == ["p99 of 32"]


def test_compare_puts_the_worst_change_first_and_knows_the_spread(report: Report) -> None:
    after = Report.begin("sample", {})
    after.add({"loop": "asyncio", "callers": 32}, "rate", "requests/s", [1500.0, 2000.0], "higher")
    after.add({"loop": "asyncio", "callers": 32}, "p99", "ms", [4.0, 5.0], "lower")
    after.add({"loop": "uvloop", "callers": 32}, "rate", "requests/s", [1.0], "higher")

    rows = [line.split() for line in compare(report, after).splitlines()[2:]]

    assert [row[2] for row in rows] == ["p99", "rate"]
    assert rows[0][3:] == ["2.00", "4.50", "2.250", "worse"]
    assert rows[1][3:] == ["1,000", "1,750", "1.750", "within", "the", "spread"]
