"""`kapsl-scheduler top`: what a server does, again every second.

What is not here: the figures (`cli_figures`).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from kapsl_scheduler.cli_frame import Number, ask_server, click, json_option, print_json, url_option
from kapsl_scheduler.errors import NotFound, Unavailable

if TYPE_CHECKING:
    import asyncio

    from rich.console import Group, RenderableType

    from kapsl_scheduler.cli_figures import Look, ModelFigures, ServerFigures
    from kapsl_scheduler.client import Client

__all__ = ["screen", "top"]

_BAR: Final = 10  # columns of a slot's whole time
_COLUMNS: Final = ("model", ">queued", ">running", ">req/s", ">fail/s", ">p50", ">p99", ">batch", "busy")


@click.command()
@click.option("--once", is_flag=True, help="Look twice, --interval apart, print once, and end.")
@click.option(
    "--interval",
    type=Number(min=0.05, max=3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@url_option
@json_option
def top(once: bool, interval: float, url: str, as_json: bool) -> None:
    """Watch a server: its models by how busy they are, its jobs by when they run.

    Rates and latencies are those of the time between two looks. q ends it, p holds it and lets it go on. With --json,
    and where nobody looks, it prints once.
    """
    if once or as_json or not sys.stdout.isatty():
        found: ServerFigures = ask_server(url, lambda client: _once(client, interval))
        if as_json:
            print_json(found)
            return
        from kapsl_scheduler.cli_tables import new_console

        new_console().print(screen(found, f"{dt.datetime.now(dt.UTC):%H:%M:%S} UTC, over {found.seconds:.2g} s"))
        return
    ask_server(url, lambda client: _live(client, interval))


async def _look(client: Client) -> Look:
    from kapsl_scheduler.cli_figures import Look

    models = await client.all_stats()
    at = time.monotonic()
    try:
        jobs = await client.jobs()
    except NotFound:  # it was started without
        jobs = None
    return Look(at, models, jobs)


async def _once(client: Client, interval: float) -> ServerFigures:
    import asyncio

    from kapsl_scheduler.cli_figures import figures

    before = await _look(client)
    await asyncio.sleep(interval)
    return figures(before, await _look(client))


async def _live(client: Client, interval: float) -> None:
    """Until q. A server that goes away may come back: meanwhile what was seen last stays."""
    import asyncio

    from rich.live import Live

    from kapsl_scheduler.cli_figures import figures

    before = await _look(client)
    keys: asyncio.Queue[str] = asyncio.Queue()
    held = False
    trouble = ""
    seen = figures(before, before)
    with _keys(keys), Live(screen=True, auto_refresh=False) as live:
        while True:
            words = trouble or ("held: p goes on, q quits" if held else "q quits, p holds")
            live.update(screen(seen, f"{dt.datetime.now(dt.UTC):%H:%M:%S} UTC  {words}"), refresh=True)
            key = await _key(keys, None if held else interval)
            if key == "q":
                return
            if key == "p":
                held = not held
            if held or key is not None:
                continue
            try:
                now = await _look(client)
            except Unavailable as error:
                trouble = str(error)
                continue
            trouble, seen, before = "", figures(before, now), now


async def _key(keys: asyncio.Queue[str], within: float | None) -> str | None:
    """The next key, None where none is pressed in time."""
    import asyncio

    try:
        async with asyncio.timeout(within):
            return await keys.get()
    except TimeoutError:
        return None


@contextlib.contextmanager
def _keys(keys: asyncio.Queue[str]) -> Iterator[None]:
    """Puts keys there as they are pressed, without waiting for the end of a line; none where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield
        return
    import asyncio
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    loop = asyncio.get_running_loop()
    tty.setcbreak(descriptor)

    def pressed() -> None:
        for key in os.read(descriptor, 64).decode("latin-1"):
            keys.put_nowait(key)

    loop.add_reader(descriptor, pressed)
    try:
        yield
    finally:
        loop.remove_reader(descriptor)
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


# ------------------------------------------------------------------------------------------------ screen


def screen(found: ServerFigures, heading: str) -> Group:
    """All of it, as it is shown."""
    from rich.console import Group
    from rich.text import Text

    from kapsl_scheduler.cli_tables import jobs_table, new_table

    models = new_table(*_COLUMNS)
    for model in found.models:
        models.add_row(*_model(model))
        for name, entry in model.classes.items():
            if entry.queued or entry.rate:
                shown = Text(f"  {name}", "dim")
                models.add_row(shown, str(entry.queued), "", _number(entry.rate), "", *_span(entry.p50, entry.p99))
    parts: list[RenderableType] = [models]
    if found.jobs:
        parts += [Text(), jobs_table(found.jobs)]
    return Group(Text(heading, "dim"), Text(), *parts)


def _model(model: ModelFigures) -> list[Any]:
    from rich.text import Text

    busy = "-" if model.busy is None else f"{'█' * round(_BAR * model.busy):<{_BAR}} {model.busy:.0%}"
    failing = Text(_number(model.failures), "red" if model.failures else "")
    return [
        Text(f"{model.name} {model.version}", "bold"),
        str(model.queued),
        str(model.running),
        _number(model.rate),
        failing,
        *_span(model.p50, model.p99),
        "-" if model.batch is None else f"{model.batch:.1f}",
        busy,
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 10 or not value else f"{value:.1f}"


def _span(*seconds: float | None) -> list[str]:
    from kapsl_scheduler.cli_tables import span

    return ["-" if length is None else span(length) for length in seconds]
