"""`kapsl-scheduler infer`: files to answers.

What is not here: how files are read (`cli_inputs`).
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from kapsl_scheduler.cli_frame import (
    Number,
    ask_server,
    click,
    json_option,
    metadata_of,
    model_argument,
    print_json,
    priority_option,
    url_option,
)
from kapsl_scheduler.cli_progress import progress
from kapsl_scheduler.errors import EngineError, InvalidInput
from kapsl_scheduler.priority import Priority

if TYPE_CHECKING:
    from kapsl_scheduler.cli_inputs import NamedCall
    from kapsl_scheduler.client import Client
    from kapsl_scheduler.types import Array

__all__ = ["infer"]

_TOLERANCE: Final = 1e-3  # how far scores may be from adding up to one


class _Answer(NamedTuple):
    """What came of one call, or of a file that could not be read to its end."""

    name: str
    outputs: Mapping[str, Array]
    error: Exception | None = None


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> tuple[float, ...]:
    return tuple(Number().convert(part, parameter, context) for part in text.split(","))


@click.command()
@model_argument
@click.argument("files", nargs=-1, required=True, type=click.Path(allow_dash=True), metavar="FILE...")
@priority_option
@click.option("--timeout", type=Number(min=0, min_open=True), help="Seconds that each answer may take.")
@click.option("--concurrency", type=click.IntRange(1, 1024), default=16, show_default=True, help="Requests at a time.")
@click.option("--top", type=click.IntRange(min=1), default=3, show_default=True, help="Classes shown of scores.")
@click.option("--labels", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Their names, one a line.")
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="Write the answers to this .npz.")
@click.option("--pixel-scale", type=Number(), default=1.0, show_default=True, help="Factor of pixels, 0 to 255.")
@click.option("--pixel-mean", callback=_numbers, default="0", show_default=True, help="Taken from the scaled pixels.")
@click.option("--pixel-std", callback=_numbers, default="1", show_default=True, help="Divides what that leaves.")
@url_option
@json_option
def infer(
    model: str,
    files: tuple[str, ...],
    priority: Priority | None,
    timeout: float | None,
    concurrency: int,
    top: int,
    labels: Path | None,
    output: Path | None,
    pixel_scale: float,
    pixel_mean: tuple[float, ...],
    pixel_std: tuple[float, ...],
    url: str,
    as_json: bool,
) -> None:
    """Ask MODEL about each FILE and print the answers.

    A FILE is an image (scaled to the model's input), an array (.npy), arrays by the names of inputs (.npz), or JSON:
    nested lists, {"name": lists} for several inputs, a whole request of the protocol, or one of these a line; - reads
    stdin. Each is a request of its own. Exits with 1 if one failed.
    """
    from kapsl_scheduler.cli_inputs import Pixels, read_calls, stdin_of

    if files.count("-") > 1:
        raise click.UsageError("- can be read once only")
    if output is not None and output.suffix != ".npz":
        raise click.UsageError(f"--output: expected a name that ends in .npz, got {str(output)!r}")
    try:
        names = None if labels is None else labels.read_text("utf-8").splitlines()
    except UnicodeDecodeError as unread:
        raise click.UsageError(f"--labels: {labels}: {unread}") from None
    pixels = Pixels(pixel_scale, pixel_mean, pixel_std)
    reading = partial(read_calls, pixels=pixels, stdin=stdin_of(*files))

    def sent(call: NamedCall) -> dict[str, Any]:
        return {
            "priority": call.call.priority if priority is None else priority,
            "timeout": call.call.timeout if timeout is None else timeout,
            "outputs": call.call.outputs,
            "id": call.call.id,
        }

    answers: list[_Answer] = ask_server(url, lambda client: _ask(client, model, files, reading, sent, concurrency))
    failed = [answer for answer in answers if answer.error is not None]
    if len(answers) == 1 and failed and failed[0].error is not None and not as_json:
        raise failed[0].error
    if output is not None and not failed:
        _write(output, answers)
    if as_json:
        print_json([_plain(answer) for answer in answers])
    else:
        _show([answer for answer in answers if answer.error is None], top, names)
    for answer in failed:
        error = str(answer.error)
        click.echo(error if error.startswith(answer.name) else f"{answer.name}: {error}", err=True)
    if failed:
        if output is not None:
            click.echo(f"{output}: not written, as {len(failed)} of {len(answers)} requests failed", err=True)
        sys.exit(1)


async def _ask(
    client: Client,
    model: str,
    files: Sequence[str],
    reading: Callable[[str, Mapping[str, Any]], Iterator[NamedCall]],
    sent: Callable[[NamedCall], dict[str, Any]],
    concurrency: int,
) -> list[_Answer]:
    """The answers in the order of the files, at most `concurrency` requests at a time. Files are read beside the loop,
    one after the other, and no further ahead than requests are sent."""
    import asyncio

    from kapsl_scheduler.cli_inputs import is_one_call

    metadata = await metadata_of(client, model)
    answers: list[_Answer] = []
    free = asyncio.Semaphore(concurrency)
    done = 0

    async def ask(place: int, call: NamedCall) -> None:
        nonlocal done
        try:
            reply = await client.infer(model, call.call.request.inputs, **sent(call))
            answers[place] = _Answer(call.name, reply.outputs)
        except EngineError as error:
            answers[place] = _Answer(call.name, {}, error)
        finally:
            free.release()
            done += 1
            tell(done)

    with progress(f"asking {model}", len(files) if all(map(is_one_call, files)) else None) as tell:
        async with asyncio.TaskGroup() as group:
            for file in files:
                calls = reading(file, metadata)
                try:
                    while (call := await asyncio.to_thread(next, calls, None)) is not None:
                        await free.acquire()
                        answers.append(_Answer(call.name, {}))
                        group.create_task(ask(len(answers) - 1, call))
                except EngineError as error:
                    answers.append(_Answer(file, {}, error))
                except OSError as error:
                    answers.append(_Answer(file, {}, InvalidInput(f"{file}: {error.strerror or error}")))
    return answers


# ------------------------------------------------------------------------------------------------ answers


def _plain(answer: _Answer) -> dict[str, Any]:
    if answer.error is not None:
        error = answer.error
        return {"input": answer.name, "error": {"code": getattr(error, "code", ""), "message": str(error)}}
    return {"input": answer.name, "outputs": {name: array.tolist() for name, array in answer.outputs.items()}}


def _write(path: Path, answers: Sequence[_Answer]) -> None:
    """Each output under its name, with the rows of all answers one behind the other; `input` says whose each row is."""
    import numpy as np

    rows: dict[str, list[Array]] = {}
    for answer in answers:
        for name, array in answer.outputs.items():
            rows.setdefault(name, []).append(np.atleast_1d(array))
    try:
        arrays = {name: np.concatenate(several) for name, several in rows.items()}
    except ValueError as error:
        raise click.ClickException(f"{path}: answers of these shapes do not go into one array: {error}") from error
    counts = [len(np.atleast_1d(next(iter(answer.outputs.values())))) for answer in answers]
    arrays.setdefault("input", np.repeat([answer.name for answer in answers], counts))
    with zipfile.ZipFile(path, "w") as archive:  # not by `savez`, which has parameters that outputs may be called
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                text = array.dtype.kind == "O"
                np.lib.format.write_array(file, array.astype(str) if text else array, allow_pickle=False)


def _show(answers: Sequence[_Answer], top: int, labels: Sequence[str] | None) -> None:
    if not answers:
        return
    arrays = [array for answer in answers for array in answer.outputs.values()]
    if len(arrays) == len(answers) and all(map(_are_scores, arrays)) and len({len(array[0]) for array in arrays}) == 1:
        if len(answers) == 1:
            click.echo(_heading(*next(iter(answers[0].outputs.items()))))
        _show_classes(answers, top, labels)
        return
    import numpy as np

    for answer in answers:
        if len(answers) > 1:
            click.secho(answer.name, bold=True)
        for name, array in answer.outputs.items():
            click.echo(f"{_heading(name, array)}\n{np.array2string(array, precision=6, suppress_small=True)}")


def _heading(name: str, array: Array) -> str:
    from kapsl_scheduler.types import dtype_name

    return f"{name} {dtype_name(array.dtype)} {'x'.join(map(str, array.shape))}"


def _are_scores(array: Array) -> bool:
    """Whether each row is numbers from 0 to 1 that add up to 1, as a classifier gives them."""
    if array.ndim != 2 or array.dtype.kind != "f" or array.shape[1] < 2 or not len(array):
        return False
    return bool((array >= 0).all() and (abs(array.sum(axis=1, dtype=float) - 1) <= _TOLERANCE).all())


def _show_classes(answers: Sequence[_Answer], top: int, labels: Sequence[str] | None) -> None:
    from rich.text import Text

    from kapsl_scheduler import cli_tables

    several_rows = any(len(array) > 1 for answer in answers for array in answer.outputs.values())
    (width,) = {array.shape[1] for answer in answers for array in answer.outputs.values()}
    shown = min(top, width)
    if labels is not None and len(labels) != width:
        raise click.UsageError(f"--labels: expected {width} lines, as there are classes, got {len(labels)}")
    headings = ["input", *([">row"] if several_rows else []), "class", ">score"]
    table = cli_tables.new_table(*headings, *(["class", ">score"] * (shown - 1)))
    for answer in answers:
        (scores,) = answer.outputs.values()
        for number, row in enumerate(scores):
            cells = [str(number)] if several_rows else []
            for index in (-row).argsort(kind="stable")[:shown]:
                cells += [str(index) if labels is None else labels[index], f"{row[index]:.1%}"]
            table.add_row(Text(answer.name), *map(Text, cells))
    cli_tables.new_console().print(table)
