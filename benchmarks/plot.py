"""Drawings of a report: one figure for each suite, in the format that the file's name asks for (SVG, PNG, PDF).

The only file that needs matplotlib (extra `bench`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.report import Label, Measurement, Report

__all__ = ["draw"]

_OURS: Final = "#0b6e4f"
_OTHERS: Final = "#9aa5b1"
_REFERENCE: Final = "#d1495b"
_LINES: Final = ("#0b6e4f", "#d1495b", "#30638e", "#edae49")


def draw(report: Report, path: Path) -> Path:
    """Draw the report into `path`. Raises `ImportError` without matplotlib, `ValueError` for an unknown suite."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = report.suite
    import matplotlib.pyplot as plt

    if report.suite not in _DRAWINGS:
        raise ValueError(f"no drawing for the suite {report.suite!r}")
    figure = _DRAWINGS[report.suite](report, plt)
    machine = report.machine
    figure.suptitle(
        f"{report.suite}: {machine.cpu}, {machine.cores} cores, {machine.python}, commit {machine.commit or 'unknown'}",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _of(report: Report, metric: str, **labels: Label) -> list[Measurement]:
    """All measurements of the metric with those labels, in the report's order."""
    return [m for m in report.measurements if m.metric == metric and labels.items() <= m.labels.items()]


def _distinct(measurements: Sequence[Measurement], label: str) -> list[Label]:
    return list(dict.fromkeys(measurement.labels[label] for measurement in measurements if label in measurement.labels))


def _bars(axes: Any, measurements: Sequence[Measurement], label: str, colour: Callable[[str], str]) -> None:
    """Horizontal bars with their rounds' range, the first at the top."""
    names = [str(measurement.labels[label]) for measurement in measurements]
    values = [measurement.value for measurement in measurements]
    below = [measurement.value - min(measurement.samples) for measurement in measurements]
    above = [max(measurement.samples) - measurement.value for measurement in measurements]
    bars = axes.barh(names, values, xerr=[below, above], color=[colour(name) for name in names], ecolor="#333333")
    axes.bar_label(bars, labels=[f" {value:,.0f}" if value >= 100 else f" {value:.3g}" for value in values], fontsize=7)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.tick_params(labelsize=8)


def _contender_colour(name: str) -> str:
    if name.startswith("kapsl"):
        return _OURS
    return _REFERENCE if name in ("engine directly", "thread hop") else _OTHERS


def _draw_digits(report: Report, plt: Any) -> Any:
    rates = _of(report, "rate")
    lone = _of(report, "p50")
    lone = [measurement for measurement in lone if "lone caller" in measurement.labels]
    loops = _distinct(rates or lone, "loop")
    crowds = _distinct(rates, "callers")
    columns = len(crowds) + bool(lone)
    figure, grid = plt.subplots(len(loops), columns, figsize=(6 * columns, 3.6 * len(loops)), squeeze=False)
    for row, loop in zip(grid, loops, strict=True):
        for axes, callers in zip(row, crowds, strict=False):
            _bars(axes, _of(report, "rate", loop=loop, callers=callers), "contender", _contender_colour)
            axes.set_title(f"{loop}, {callers} callers: requests/s", fontsize=9)
        if lone:
            _bars(row[-1], [m for m in lone if m.labels["loop"] == loop], "lone caller", _contender_colour)
            row[-1].set_xscale("log")
            row[-1].set_title(f"{loop}, a lone caller: p50 in us", fontsize=9)
    return figure


def _draw_serial(report: Report, plt: Any) -> Any:
    shares = _of(report, "of direct")
    crowds = _distinct(shares, "callers")
    figure, grid = plt.subplots(1, len(crowds), figsize=(5 * len(crowds), 3), squeeze=False)
    for axes, callers in zip(grid[0], crowds, strict=True):
        chosen = [m for m in shares if m.labels["callers"] == callers]
        _bars(axes, chosen, "class", lambda _: _OURS)
        axes.set_title(f"{callers} callers: share of the engine called directly", fontsize=9)
    return figure


_FLOOD_LINES: Final = {"live p99": (_OURS, "o-"), "live p50": (_OTHERS, "o-"), "bound": (_REFERENCE, "--")}


def _draw_flood(report: Report, plt: Any) -> Any:
    worst = _of(report, "live p99")
    cases = list(dict.fromkeys((m.labels["engine"], m.labels["flood"]) for m in worst))
    figure, grid = plt.subplots(1, len(cases), figsize=(4.5 * len(cases), 3.6), squeeze=False)
    for axes, (engine, flood) in zip(grid[0], cases, strict=True):
        for metric, colour, style in (
            ("live p99", _OURS, "o-"),
            ("live p50", _OTHERS, "o-"),
            ("bound", _REFERENCE, "--"),
        ):
            chosen = _of(report, metric, engine=engine, flood=flood)
            places = [str(measurement.labels["flooders"]) for measurement in chosen]
            axes.plot(places, [measurement.value for measurement in chosen], style, color=colour, label=metric)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("callers that flood")
        axes.set_ylabel("ms")
        axes.set_title(f"{engine}, {flood}", fontsize=9)
        axes.legend(fontsize=7)
    return figure


def _draw_overload(report: Report, plt: Any) -> Any:
    goodput = _of(report, "goodput")
    patterns = _distinct(goodput, "arrivals")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
    for pattern, colour in zip(patterns, _LINES, strict=False):
        for axes, metric in ((left, "goodput"), (right, "of ideal")):
            chosen = _of(report, metric, arrivals=pattern)
            offered = [str(measurement.labels["offered"]) for measurement in chosen]
            axes.plot(offered, [measurement.value for measurement in chosen], "o-", color=colour, label=str(pattern))
    for axes, title in ((left, "goodput / capacity"), (right, "goodput / that of an ideal server")):
        axes.set_ylim(0, 1.1)
        axes.set_xlabel("offered load / capacity")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=8)
    return figure


def _draw_queue(report: Report, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for measurement, colour in zip(_of(report, "resident"), _LINES, strict=False):
        axes.plot(measurement.samples, "o-", color=colour, label=str(measurement.labels["loop"]))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("cycle of 10,000 queued and answered")
    axes.set_ylabel("resident MB")
    axes.legend(fontsize=8)
    return figure


def _draw_micro(report: Report, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(9, 4.5))
    _bars(axes, _of(report, "time"), "piece", lambda name: _OTHERS if name.startswith("reference") else _OURS)
    axes.set_xlabel("ns for one request")
    return figure


def _draw_store(report: Report, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(9, 4))
    _bars(axes, _of(report, "rate"), "contender", lambda name: _REFERENCE if name.startswith("bare") else _OURS)
    axes.set_xscale("log")
    axes.set_xlabel("commits, or rows, per second")
    return figure


def _draw_cron(report: Report, plt: Any) -> Any:
    rates = _of(report, "rate")
    contenders = _distinct(rates, "contender")
    figure, grid = plt.subplots(1, len(contenders), figsize=(5 * len(contenders), 3.4), squeeze=False)
    for axes, contender in zip(grid[0], contenders, strict=True):
        colours = dict.fromkeys(_distinct(rates, "kind"), _OTHERS if contender == "APScheduler 3" else _OURS)
        _bars(axes, _of(report, "rate", contender=contender), "kind", colours.__getitem__)
        axes.set_title(f"{contender}: next/s", fontsize=9)
    return figure


def _draw_cron_scheduler(report: Report, plt: Any) -> Any:
    figure, (late, cpu) = plt.subplots(1, 2, figsize=(9, 3))
    colour = {"ours": _OURS, "bare call_at": _REFERENCE}
    for axes, metric, unit in ((late, "late p99", "ms"), (cpu, "CPU", "s")):
        measured = [m for m in _of(report, metric) if "200 jobs at 1 s" in m.labels]
        _bars(axes, measured, "200 jobs at 1 s", lambda name: colour.get(name, _OTHERS))
        axes.set_xlabel(f"{metric} of 200 jobs at 1 s [{unit}]")
    return figure


def _draw_cron_live(report: Report, plt: Any) -> Any:
    engines = _distinct(report.measurements, "engine")
    figure, grid = plt.subplots(1, len(engines), figsize=(5 * len(engines), 3), squeeze=False)
    for axes, engine in zip(grid[0], engines, strict=True):
        measured = _of(report, "live p99", engine=engine)
        _bars(axes, measured, "jobs", lambda name: _REFERENCE if name == "none" else _OURS)
        axes.set_title(f"{engine}: live p99 [ms]", fontsize=9)
    return figure


def _draw_door(report: Report, plt: Any) -> Any:
    crowds = _distinct(report.measurements, "connections")
    figure, grid = plt.subplots(1, len(crowds), figsize=(5 * len(crowds), 2.4), squeeze=False)
    for axes, connections in zip(grid[0], crowds, strict=True):
        measured = _of(report, "requests", connections=connections)
        _bars(axes, measured, "asked", lambda name: _OURS if name in ("binary", "JSON") else _OTHERS)
        axes.set_title(f"{connections} connections: requests/s", fontsize=9)
    return figure


def _draw_grpc(report: Report, plt: Any) -> Any:
    crowds = _distinct(report.measurements, "callers")
    figure, grid = plt.subplots(1, len(crowds), figsize=(5 * len(crowds), 2.0), squeeze=False)
    for axes, callers in zip(grid[0], crowds, strict=True):
        measured = _of(report, "calls", callers=callers)
        _bars(axes, measured, "asked", lambda name: _REFERENCE if name == "echo" else _OURS)
        axes.set_title(f"{callers} callers: calls/s", fontsize=9)
    return figure


def _draw_crowd(report: Report, plt: Any) -> Any:
    return _draw_latencies(report, plt, "beside", "a crowd")


def _draw_streams(report: Report, plt: Any) -> Any:
    return _draw_latencies(report, plt, "server", "kapsl-scheduler", piece="first")


def _draw_soak(report: Report, plt: Any) -> Any:
    figure, axes = plt.subplots(figsize=(6, 2.5))
    _bars(axes, _of(report, "resident"), "eighth", lambda name: _OURS)
    axes.set_xlabel("memory by eighths of the time [MB]")
    return figure


def _draw_latencies(report: Report, plt: Any, label: str, ours: str, **labels: Label) -> Any:
    figure, panels = plt.subplots(1, 2, figsize=(9, 2.5))
    for axes, metric in zip(panels, ("p50", "p99"), strict=True):
        measurements = _of(report, metric, **labels)
        _bars(axes, measurements, label, lambda name: _OURS if name == ours else _OTHERS)
        axes.set_xlabel(f"{metric} [{measurements[0].unit}]")
    return figure


_DRAWINGS: Final[dict[str, Callable[[Report, Any], Any]]] = {
    "cron": _draw_cron_scheduler,
    "cron-live": _draw_cron_live,
    "cron-next": _draw_cron,
    "digits": _draw_digits,
    "door": _draw_door,
    "crowd": _draw_crowd,
    "streams": _draw_streams,
    "flood": _draw_flood,
    "grpc": _draw_grpc,
    "micro": _draw_micro,
    "overload": _draw_overload,
    "queue10k": _draw_queue,
    "serial": _draw_serial,
    "soak": _draw_soak,
    "store": _draw_store,
}
