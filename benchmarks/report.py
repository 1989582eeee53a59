"""What a suite hands back: measurements and targets; written as JSON, printed as tables, compared with another run.

Generic over the suites: a measurement says by its labels what was measured. Drawing lives in plot.py.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from benchmarks.machine import Machine, describe_machine
from benchmarks.stats import median

__all__ = [
    "Label",
    "Measurement",
    "Report",
    "Target",
    "compare",
    "format_table",
    "load_report",
    "print_report",
    "save_report",
]

Label = str | int | float
Better = Literal["higher", "lower", "neither"]


class Measurement(msgspec.Struct):
    """One figure of one case. `samples` holds one value for each round that has one, in the unit named; labels say
    what the case is."""

    labels: dict[str, Label]
    metric: str
    unit: str
    samples: list[float]
    better: Better = "neither"

    @property
    def value(self) -> float:
        """The median round; NaN if no round has a value."""
        return median(self.samples)

    def key(self) -> tuple[object, ...]:
        """What makes it the same measurement in another run."""
        return (self.metric, *sorted(self.labels.items(), key=lambda item: item[0]))


class Target(msgspec.Struct):
    """A figure that must be reached, and whether it was. No value: it could not be measured, so it was not."""

    name: str
    value: float | None
    comparison: Literal["at least", "at most", "exactly"]
    limit: float
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether the value reaches the limit."""
        if self.value is None:
            return False
        if self.comparison == "exactly":
            return self.value == self.limit
        return self.value >= self.limit if self.comparison == "at least" else self.value <= self.limit

    def __str__(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        verdict = "met" if self.met else "MISSED"
        value = "not measured" if self.value is None else f"{_number(self.value)}{unit}"
        return f"{verdict:6}  {self.name}: {value}, {self.comparison} {_number(self.limit)}{unit}"


class Report(msgspec.Struct):
    """One run of one suite. `settings` are its parameters, `notes` what the reader must know of this run."""

    suite: str
    started: str
    machine: Machine
    settings: dict[str, Label | list[Label]]
    measurements: list[Measurement] = msgspec.field(default_factory=list)
    targets: list[Target] = msgspec.field(default_factory=list)
    notes: list[str] = msgspec.field(default_factory=list)

    @classmethod
    def begin(cls, suite: str, settings: dict[str, Label | list[Label]]) -> Report:
        """An empty report that is dated and placed now."""
        started = datetime.datetime.now(datetime.UTC).replace(microsecond=0).isoformat()
        return cls(suite, started, describe_machine(), settings)

    def add(
        self,
        labels: Mapping[str, Label],
        metric: str,
        unit: str,
        samples: Iterable[float],
        better: Better = "neither",
    ) -> Measurement:
        """Record one figure, a sample per round (NaN for a round that has none), and hand it back."""
        values = [float(sample) for sample in samples if not math.isnan(sample)]
        measurement = Measurement(dict(labels), metric, unit, values, better)
        self.measurements.append(measurement)
        return measurement

    def at_least(self, name: str, value: float, limit: float, unit: str = "") -> None:
        self._expect(Target(name, value, "at least", limit, unit))

    def at_most(self, name: str, value: float, limit: float, unit: str = "") -> None:
        self._expect(Target(name, value, "at most", limit, unit))

    def exactly(self, name: str, value: float, limit: float, unit: str = "") -> None:
        self._expect(Target(name, value, "exactly", limit, unit))

    def _expect(self, target: Target) -> None:
        if target.value is not None and math.isnan(target.value):
            target.value = None  # JSON has no NaN
        self.targets.append(target)

    def find(self, metric: str, labels: Mapping[str, Label]) -> Measurement:
        """The only measurement of that metric with those labels (it may have more). Raises `LookupError`."""
        found = [
            measurement
            for measurement in self.measurements
            if measurement.metric == metric and labels.items() <= measurement.labels.items()
        ]
        if len(found) != 1:
            raise LookupError(f"{len(found)} measurements of {metric!r} with {labels}")
        return found[0]

    def missed(self) -> list[Target]:
        return [target for target in self.targets if not target.met]


# ------------------------------------------------------------------------------------------------- files


def save_report(report: Report, path: Path) -> Path:
    """Write it as indented JSON. A directory gets a file named after the suite and the time."""
    if path.is_dir() or not path.suffix:
        stamp = report.started.replace("-", "").replace(":", "").removesuffix("+0000")
        path = path / f"{report.suite}-{stamp}Z.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return path


def load_report(path: Path) -> Report:
    """Read what `save_report` wrote. Raises `msgspec.ValidationError` for anything else."""
    return msgspec.json.decode(path.read_bytes(), type=Report, strict=False)


# ------------------------------------------------------------------------------------------------ tables


def print_report(report: Report) -> None:
    """Tables of the measurements, then the targets."""
    machine = report.machine
    print(f"\n== {report.suite}: {report.started}, {machine.cpu}, {machine.cores} cores, {machine.python}")
    settings = ", ".join(f"{name} {_label(value)}" for name, value in report.settings.items())
    print(f"   {settings}; load average {machine.load_average}")
    for table in _tables(report.measurements):
        print()
        print(table)
    for note in report.notes:
        print(f"\n   {note}")
    if report.targets:
        print()
    for target in report.targets:
        print(f"   {target}")


def _tables(measurements: Sequence[Measurement]) -> list[str]:
    """One table for each set of labels: a row for each case, a column for each metric."""
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for measurement in measurements:
        groups.setdefault(tuple(measurement.labels), []).append(measurement)
    tables: list[str] = []
    for names, members in groups.items():
        metrics = list(dict.fromkeys((member.metric, member.unit) for member in members))
        cells = {(tuple(member.labels.values()), member.metric): member for member in members}
        cases = list(dict.fromkeys(tuple(member.labels.values()) for member in members))
        header = [*names, *(f"{metric} [{unit}]" if unit else metric for metric, unit in metrics)]
        rows = [
            [*(_label(part) for part in case), *(_cell(cells.get((case, metric))) for metric, _ in metrics)]
            for case in cases
        ]
        tables.append(format_table(header, rows, text_columns=len(names)))
    return tables


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int) -> str:
    """Columns aligned: the first `text_columns` to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines: list[str] = []
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("   " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _cell(measurement: Measurement | None) -> str:
    """The median, and the range of the rounds where they differ."""
    if measurement is None or not measurement.samples:
        return ""
    numbers = [_number(sample) for sample in (measurement.value, min(measurement.samples), max(measurement.samples))]
    return numbers[0] if numbers[1] == numbers[2] else f"{numbers[0]} ({numbers[1]}-{numbers[2]})"


def _label(value: Label | list[Label]) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float) -> str:
    """Three significant digits, whole thousands separated."""
    magnitude = abs(value)
    if magnitude >= 100:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    if magnitude >= 1:
        return f"{value:.2f}"
    return f"{value:.3f}".rstrip("0").rstrip(".") or "0"


# --------------------------------------------------------------------------------------------- comparison


def compare(before: Report, after: Report) -> str:
    """A table of after over before for every figure that both have, worst change first."""
    earlier = {measurement.key(): measurement for measurement in before.measurements}
    rows: list[tuple[float, list[str]]] = []
    for measurement in after.measurements:
        other = earlier.get(measurement.key())
        if other is None or not measurement.samples or not other.samples or not other.value:
            continue
        ratio = measurement.value / other.value
        labels = " ".join(_label(value) for value in measurement.labels.values())
        verdict = _verdict(other, measurement)
        gain = {"higher": ratio, "lower": 1 / ratio if ratio else math.inf, "neither": math.inf}[measurement.better]
        figures = [_number(other.value), _number(measurement.value), f"{ratio:.3f}", verdict]
        rows.append((gain, [labels, measurement.metric, *figures]))
    rows.sort(key=lambda row: row[0])
    header = ["case", "metric", "before", "after", "after/before", ""]
    return format_table(header, [row for _, row in rows], text_columns=2)


def _verdict(before: Measurement, after: Measurement) -> str:
    """Better or worse only where the rounds of one run all lie beyond those of the other."""
    if after.better == "neither":
        return ""
    if min(after.samples) > max(before.samples):
        return "better" if after.better == "higher" else "worse"
    if max(after.samples) < min(before.samples):
        return "worse" if after.better == "higher" else "better"
    return "within the spread"
