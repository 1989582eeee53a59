"""`kapsl-scheduler tune`: measures how long a model's calls take by their rows, and says what to set for a goal.

What is not here: the policy (`core.tuning`).
"""

from __future__ import annotations

import json
import math
import re
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kapsl_scheduler.cli_frame import Number, click, json_option, print_json
from kapsl_scheduler.cli_progress import progress

if TYPE_CHECKING:
    from kapsl_scheduler.core.tuning import Measured, Recommendation
    from kapsl_scheduler.ports import Engine
    from kapsl_scheduler.types import Array, ModelInfo

__all__ = ["measure", "tune"]

_WARM: Final = 3  # calls of each size that are not counted
_LEAST: Final = 5  # rounds, whatever time they take
_MOST: Final = 1000  # rounds: a p99 needs no more
_LONG: Final = 0.05  # of the time that is given: a size with longer calls is the last, or rounds would take too long
_BAR: Final = 24  # columns of the longest bar


class _Tuning(NamedTuple):
    """What was measured of which model; `not_batched` says why it has one row only, where its own shapes do."""

    model: str
    not_batched: str
    curve: list[Measured]


@click.command()
@click.argument("path", type=click.Path(), metavar="[NAME=]MODEL_PATH")
@click.option(
    "--latency-goal-ms",
    "goal_ms",
    type=Number(min=0, min_open=True),
    help="Milliseconds that 99 of 100 requests may take. Without it: the most rows a second, and no delay.",
)
@click.option("--max-batch-size", "most", type=click.IntRange(min=1), default=64, show_default=True, help="Most rows.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of one call.")
@click.option("--seconds", type=Number(min=0.1), default=10.0, show_default=True, help="How long to measure.")
@click.option(
    "--input",
    "given",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Rows to measure with, as `infer` reads them; random numbers of the model's shapes without it.",
)
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Add the settings to this TOML file.")
@json_option
def tune(
    path: str,
    goal_ms: float | None,
    most: int,
    threads: int,
    seconds: float,
    given: str | None,
    write: Path | None,
    as_json: bool,
) -> None:
    """Measure the model at MODEL_PATH, and recommend its max_batch_size and max_queue_delay.

    Calls of 1, 2, 4, ... rows are made in turn, so that what else the machine does harms all alike. A size fits where
    twice its p99 keeps the goal: one call that runs already, and one's own. Of those that fit the most rows a second
    win, the smallest among equals; the delay is what the goal leaves, at most the time of a call. Exits with 1 if no
    size keeps the goal.
    """
    from kapsl_scheduler.core.tuning import recommend

    goal = math.inf if goal_ms is None else goal_ms / 1e3
    tuning = _tuning(path, most, threads, seconds, given, goal)
    advice = recommend(tuning.curve, goal)
    settings = {"max_batch_size": advice.max_batch_size, "max_queue_delay": round(advice.max_queue_delay, 6)}
    if threads != 1:
        settings["threads"] = threads
    lines = _toml(tuning.model, settings)
    if as_json:
        print_json(
            {
                "model": tuning.model,
                "latency_goal": None if goal_ms is None else goal,
                "not_batched": tuning.not_batched or None,
                "curve": [_plain(point) for point in tuning.curve],
                "recommendation": advice,
                "toml": lines,
            }
        )
    else:
        _show(tuning.curve, advice)
        if tuning.not_batched:
            click.echo(f"\nIt is never batched: {tuning.not_batched}")
        click.echo(f"\n{_in_words(advice, goal)}\n\n{lines}", nl=False)
    if not advice.keeps_goal:
        if write is not None:
            click.echo(f"{write}: nothing added, as no size keeps the goal", err=True)
        sys.exit(1)
    if write is not None:
        _add(write, tuning.model, lines)
        click.echo(f"added to {write}", err=True)


def _tuning(path: str, most: int, threads: int, seconds: float, given: str | None, goal: float) -> _Tuning:
    from kapsl_scheduler.app_sources import Source, engine_of, open_source
    from kapsl_scheduler.cli_inputs import read_first, stdin_of
    from kapsl_scheduler.config import ModelSettings
    from kapsl_scheduler.server.loop import run_coroutine
    from kapsl_scheduler.server.oip_models import model_metadata

    with tempfile.TemporaryDirectory(prefix="kapsl-") as workdir:
        name, package = run_coroutine(open_source(path, Path(workdir)))
        engine = engine_of(Source(name, path, ModelSettings(threads=threads), package))
        engine.load()
        try:
            info = engine.model_info()
            metadata = model_metadata(name, info, [info.version])
            example = None if given is None else read_first(given, metadata, stdin=stdin_of(given)).request.inputs
            with progress("measuring", round(seconds)) as tell:
                curve = measure(
                    engine,
                    lambda rows: _inputs(info, rows, example),
                    most if info.batchable else 1,
                    seconds=seconds,
                    enough=goal,
                    clock=time.perf_counter,
                    tell=tell,
                )
        finally:
            engine.unload()
    return _Tuning(name, "" if info.batchable else info.metadata.get("not_batched", ""), curve)


def measure(
    engine: Engine,
    inputs: Callable[[int], Mapping[str, Array]],
    most: int,
    *,
    seconds: float,
    enough: float = math.inf,
    clock: Callable[[], float],
    tell: Callable[[float], None] = lambda done: None,
) -> list[Measured]:
    """The latency curve of a loaded engine over 1, 2, 4, ... `most` rows, in rounds of one call of each size, up and
    down, for about `seconds`. `inputs` makes those of so many rows; a size whose calls take longer than `enough`
    seconds, or too long for the time there is, is the last. Raises what the engine raises."""
    import numpy as np

    from kapsl_scheduler.core.tuning import Measured

    begun = clock()

    def seconds_of(batch: Mapping[str, Array]) -> float:
        started = clock()
        engine.infer(batch)
        return clock() - started

    batches: dict[int, Mapping[str, Array]] = {}
    rows = 1
    while True:
        batches[rows] = inputs(rows)
        took = min(seconds_of(batches[rows]) for _ in range(_WARM))
        if rows == most or took > min(enough, _LONG * seconds):
            break
        rows = min(2 * rows, most)
    times: dict[int, list[float]] = {rows: [] for rows in batches}
    order = list(batches)
    for number in range(_MOST):
        elapsed = clock() - begun
        tell(min(elapsed, seconds))
        if number >= _LEAST and elapsed >= seconds:
            break
        for rows in order:
            times[rows].append(seconds_of(batches[rows]))
        order.reverse()
    return [
        Measured(rows, float(np.median(taken)), float(np.percentile(taken, 99)), len(taken))
        for rows, taken in times.items()
    ]


# ------------------------------------------------------------------------------------------------ inputs


def _inputs(info: ModelInfo, rows: int, example: Mapping[str, Array] | None) -> dict[str, Array]:
    """Inputs of so many rows: those of the example over and over, or random ones. Raises `InvalidInput` where the model
    does not say how large they are."""
    import numpy as np

    from kapsl_scheduler.errors import InvalidInput
    from kapsl_scheduler.types import numpy_dtype

    rng = np.random.default_rng(0)
    made: dict[str, Array] = {}
    for spec in info.inputs:
        if example is not None and spec.name in example:
            array = example[spec.name]
            axis = spec.batch_axis
            made[spec.name] = array if axis is None else np.take(array, np.arange(rows) % array.shape[axis], axis=axis)
            continue
        shape = [rows if axis == spec.batch_axis else size for axis, size in enumerate(spec.shape)]
        sizes = [size for size in shape if isinstance(size, int)]
        if len(sizes) < len(shape):
            open_axes = ", ".join(str(axis) for axis, size in enumerate(shape) if not isinstance(size, int))
            raise InvalidInput(
                f"input {spec.name!r}: how large axis {open_axes} is depends on the request: name one with --input"
            )
        dtype = numpy_dtype(spec.dtype)
        if dtype.kind == "O":
            made[spec.name] = np.full(sizes, "text", object)
        elif dtype.kind == "f":
            made[spec.name] = rng.random(sizes).astype(dtype)
        else:
            made[spec.name] = rng.integers(0, 2, sizes).astype(dtype)
    return made


# ------------------------------------------------------------------------------------------------ results


def _plain(point: Measured) -> dict[str, float]:
    return {
        "rows": point.rows,
        "median": point.median,
        "p99": point.p99,
        "rows_per_second": point.rows_per_second,
        "calls": point.calls,
    }


def _show(curve: Sequence[Measured], advice: Recommendation) -> None:
    from rich.text import Text

    from kapsl_scheduler.cli_tables import new_console, new_table, span

    table = new_table(">rows", ">median", ">p99", ">calls", ">rows/s", "")
    most = max(point.rows_per_second for point in curve)
    for point in curve:
        chosen = point.rows == advice.max_batch_size
        bar = "█" * max(1, round(_BAR * point.rows_per_second / most))
        table.add_row(
            str(point.rows),
            span(point.median),
            span(point.p99),
            str(point.calls),
            f"{point.rows_per_second:.0f}",
            Text(f"{bar}{' <' if chosen else ''}", "green" if chosen else ""),
        )
    new_console().print(table)


def _in_words(advice: Recommendation, goal: float) -> str:
    from kapsl_scheduler.cli_tables import span

    if not advice.keeps_goal:
        return (
            f"No size keeps {span(goal)}: with {advice.max_batch_size}, the fastest, a request may take "
            f"{span(advice.worst)} (twice the p99). Try more --threads, or a goal above that."
        )
    kept = "" if math.isinf(goal) else f", within {span(goal)}"
    waits = f" and {span(advice.max_queue_delay)} of delay" if advice.max_queue_delay else ""
    return (
        f"Batches of {advice.max_batch_size}{waits}: {advice.rows_per_second:.0f} rows/s, and a request takes at most "
        f"{span(advice.worst)}{kept}, while no more than a batch waits."
    )


def _toml(model: str, settings: Mapping[str, Any]) -> str:
    bare = re.fullmatch(r"[\w-]+", model, re.ASCII)
    name = model if bare else json.dumps(model, ensure_ascii=False)  # whose escapes are among TOML's
    return "\n".join([f"[models.{name}]", *(f"{key} = {value}" for key, value in settings.items()), ""])


def _add(file: Path, model: str, lines: str) -> None:
    """Adds the table to the file, which has none of that name and stays TOML."""
    before = file.read_text("utf-8") if file.exists() else ""
    try:
        if model in tomllib.loads(before).get("models", {}):
            raise click.ClickException(f"{file}: has [models.{model}] already: change it there, to the lines above")
        after = f"{before.rstrip()}\n\n{lines}" if before.strip() else lines
        tomllib.loads(after)
    except tomllib.TOMLDecodeError as error:
        raise click.ClickException(f"{file}: is not TOML: {error}") from error
    file.write_text(after, "utf-8")
