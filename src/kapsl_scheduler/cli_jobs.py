"""The commands about jobs: `jobs ...` against a running server, and `explain` for cron expressions.

What is not here: what they look like in print (`cli_tables`), what they do (the server's routes, `core.cron`).
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from kapsl_scheduler.cli_frame import (
    Number,
    ask_server,
    click,
    job_argument,
    json_option,
    metadata_of,
    print_json,
    probably,
    read_json,
    url_option,
)
from kapsl_scheduler.cli_names import complete_job, complete_model
from kapsl_scheduler.cli_progress import progress
from kapsl_scheduler.core.cron import CronExpression
from kapsl_scheduler.core.jobs import CronJob, CronOverflowPolicy, Named, RunPolicy
from kapsl_scheduler.core.runs import RunState
from kapsl_scheduler.errors import NotFound
from kapsl_scheduler.priority import Priority

if TYPE_CHECKING:
    from kapsl_scheduler.client import Client

__all__ = ["explain", "jobs"]

_POLL: Final = 0.2  # seconds between two looks at a run that is waited for


def _moment(text: str) -> dt.datetime:
    """A moment in ISO 8601, with its zone: the type of an argument."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(f"{text!r} is no moment, expected one as 2026-03-29T01:00:00Z") from None
    if moment.tzinfo is None:
        raise click.BadParameter(f"{text!r} has no zone: add Z for UTC, or an offset such as +01:00")
    return moment


def _ask_of_job(url: str, id: str | None, ask: Callable[[Client], Awaitable[Any]]) -> Any:
    """What a call about a job returns. Where there is no such job, the error names the one that was probably meant."""

    async def call(client: Client) -> Any:
        try:
            return await ask(client)
        except NotFound as error:
            hint = probably(id or "", [job["id"] for job in await client.jobs()])  # raises where there are none at all
            raise NotFound(f"{error}{hint}\n`kapsl-scheduler jobs list` lists what is there.") from None

    return ask_server(url, call)


@click.group()
def jobs() -> None:
    """List, make and look after the jobs of a server."""


@jobs.command("list")
@url_option
@json_option
def list_jobs(url: str, as_json: bool) -> None:
    """All jobs: when they fire next, and how they ended last."""
    found = ask_server(url, lambda client: client.jobs())
    if as_json:
        print_json(found)
        return
    from kapsl_scheduler import cli_tables

    cli_tables.show_jobs(found)


@jobs.command()
@job_argument
@url_option
@json_option
def show(id: str, url: str, as_json: bool) -> None:
    """One job: what it is, its next five times, its last five runs."""

    async def ask(client: Client) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
        return await client.job(id), await client.preview_job(id), await client.runs(id, limit=5)

    job, times, runs = _ask_of_job(url, id, ask)
    if as_json:
        print_json(job | {"next": times, "runs": runs})
        return
    from kapsl_scheduler import cli_tables

    cli_tables.show_job(job, times, runs)


@jobs.command()
@click.argument("what", metavar="ID|FILE")
@click.option("--schedule", help='When it fires: "second minute hour day month weekday [year]".')
@click.option("--every", type=Number(min=0, min_open=True), help="Seconds between two firings, instead.")
@click.option("--tz", default="UTC", show_default=True, help="Zone of the schedule.")
@click.option(
    "--model", shell_complete=complete_model, help="Model that it asks; may be left out where there is but one."
)
@click.option("--input", "given", metavar="JSON|FILE", help="Inputs: JSON, or a file as `infer` reads it.")
@click.option("--callable", "name", help="Name under which the server has what makes its requests, instead.")
@click.option("--priority", type=click.Choice([priority.name.lower() for priority in Priority]), default="background")
@click.option(
    "--overflow-policy",
    type=click.Choice([policy.value for policy in CronOverflowPolicy]),
    default=CronOverflowPolicy.SKIP_IF_BUSY.value,
    help="What a firing does when the model is full.",
)
@click.option("--force-cpu", is_flag=True, help="Run on the CPU whatever there is.")
@click.option(
    "--timeout", type=Number(min=0, min_open=True), help="Seconds that a run may take, with all its attempts."
)
@click.option("--attempts", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--paused", is_flag=True, help="Do not fire before it is resumed.")
@url_option
@json_option
def add(
    what: str, schedule: str | None, every: float | None, given: str | None, url: str, as_json: bool, **options: Any
) -> None:
    """Make a job, or put it in the place of the one that has its id.

    Either FILE, which holds the JSON form of a job or a list of them (- reads stdin), or ID with --schedule or --every
    and --input.
    """
    if schedule is not None and every is not None:
        raise click.UsageError("--schedule and --every: one of them says when, both came")
    when = schedule if every is None else every
    from kapsl_scheduler.cli_inputs import stdin_of

    stdin = stdin_of(what if when is None else given)

    async def ask(client: Client) -> list[tuple[bool, dict[str, Any]]]:
        if when is None:
            definitions = _definitions(what, stdin)
        else:
            definitions = [(what, await _definition(client, what, when, given, stdin, **options))]
        known = {job["id"] for job in await client.jobs()}
        return [(id in known, await client.put_job(id, definition)) for id, definition in definitions]

    made = ask_server(url, ask)
    if as_json:
        print_json([job for _, job in made])
        return
    from kapsl_scheduler import cli_tables

    for was_there, job in made:
        click.echo(f"{'updated' if was_there else 'added'} {job['id']}: {cli_tables.outlook(job)}")


def _definitions(file: str, stdin: bytes) -> list[tuple[str, bytes]]:
    """The jobs that a file describes."""
    if file != "-" and not Path(file).exists():
        raise click.UsageError(f"{file}: is no file; a job that is given by flags needs --schedule or --every")
    content = read_json(stdin, "stdin") if file == "-" else read_json(Path(file).read_bytes(), file)
    definitions = content if isinstance(content, list) else [content]
    for number, definition in enumerate(definitions):
        if not isinstance(definition, dict) or not isinstance(definition.get("id"), str):
            raise click.ClickException(f"{file}: job {number}: expected an object with an id")
    return [(definition["id"], msgspec.json.encode(definition)) for definition in definitions]


async def _definition(
    client: Client,
    id: str,
    when: str | float,
    given: str | None,
    stdin: bytes,
    *,
    tz: str,
    model: str | None,
    name: str | None,
    priority: str,
    overflow_policy: str,
    force_cpu: bool,
    timeout: float | None,
    attempts: int,
    paused: bool,
) -> bytes:
    """The JSON form of the job that flags describe, with inputs as the model wants them."""
    from kapsl_scheduler.core.definition import encode_job

    if (given is None) == (name is None):
        raise click.UsageError("--input and --callable: one of them says what is asked")
    if model is None:
        loaded = [entry["name"] for entry in await client.models()]
        if len(loaded) != 1:
            raise click.UsageError(f"--model is missing; the server has {', '.join(loaded) or 'none'}")
        (model,) = loaded
    request: Any = Named(name or "")
    if given is not None:
        request = _inputs(given, stdin, await metadata_of(client, model))
    job = CronJob(
        id,
        when,
        request,
        tz=tz,
        model=model,
        priority=Priority[priority.upper()],
        overflow_policy=CronOverflowPolicy(overflow_policy),
        force_cpu=force_cpu,
        run=RunPolicy(timeout=timeout, attempts=attempts),
        enabled=not paused,
    )
    return encode_job(job.check(allow_latency_critical=True))  # whether it may be is the server's to say


def _inputs(given: str, stdin: bytes, metadata: dict[str, Any]) -> Any:
    """What the JSON, or the file, says."""
    from kapsl_scheduler.cli_inputs import read_first
    from kapsl_scheduler.client import read_call

    if given.lstrip()[:1] in ("[", "{"):
        return read_call(read_json(given.encode(), "--input"), metadata).request.inputs
    return read_first(given, metadata, stdin=stdin).request.inputs


@jobs.command()
@job_argument
@click.option("-n", "number", type=click.IntRange(1, 1000), default=5, show_default=True)
@url_option
@json_option
def preview(id: str, number: int, url: str, as_json: bool) -> None:
    """When a job is due next."""

    async def ask(client: Client) -> tuple[dict[str, Any], list[str]]:
        return await client.job(id), await client.preview_job(id, number)

    job, times = _ask_of_job(url, id, ask)
    if as_json:
        print_json(times)
        return
    from kapsl_scheduler import cli_tables

    cli_tables.show_times([dt.datetime.fromisoformat(time) for time in times], job["tz"])


@jobs.command()
@job_argument
@click.option("--reason", default="", help="Why, for those who will wonder.")
@url_option
@json_option
def pause(id: str, reason: str, url: str, as_json: bool) -> None:
    """Let a job fire no more until it is resumed; what runs goes on."""
    job = _ask_of_job(url, id, lambda client: client.pause_job(id, reason))
    if as_json:
        print_json(job)
        return
    click.echo(f"paused {id}: {job['paused']}")


@jobs.command()
@job_argument
@click.option("--catch-up", is_flag=True, help="Also for what was due meanwhile, by its misfire rule.")
@url_option
@json_option
def resume(id: str, catch_up: bool, url: str, as_json: bool) -> None:
    """Let a job fire again."""
    job = _ask_of_job(url, id, lambda client: client.resume_job(id, catch_up=catch_up))
    if as_json:
        print_json(job)
        return
    from kapsl_scheduler import cli_tables

    click.echo(f"resumed {id}: {cli_tables.outlook(job)}")


@jobs.command("run")
@job_argument
@click.option("--origin", help="A name for this run: asked for twice under one, it is one run.")
@click.option("--wait", is_flag=True, help="Wait for its end; exit with 1 unless it succeeds.")
@url_option
@json_option
def run_job(id: str, origin: str | None, wait: bool, url: str, as_json: bool) -> None:
    """Let a job fire once, now."""

    import asyncio

    async def ask(client: Client) -> dict[str, Any]:
        run = await client.trigger_job(id, origin)
        if not wait:
            return run
        with progress(f"running {id}", 100) as tell:
            while RunState(run["state"]).open:
                tell(round(100 * (run["progress"] or 0)))
                await asyncio.sleep(_POLL)
                run = await client.get(f"/v2/cron/runs/{run['number']}")
        return run

    run = _ask_of_job(url, id, ask)
    if as_json:
        print_json(run)
    else:
        from kapsl_scheduler import cli_tables

        cli_tables.show_runs([run])
    if wait and run["state"] != RunState.SUCCEEDED.value:
        sys.exit(1)


@jobs.command()
@job_argument
@click.argument("start", type=_moment)
@click.argument("end", type=_moment)
@click.option("--concurrency", type=click.IntRange(1, 10_000), default=1, show_default=True, help="Runs at a time.")
@click.option("--origin", help="A name for the runs: asked for twice under one, nothing runs twice.")
@url_option
@json_option
def backfill(
    id: str, start: dt.datetime, end: dt.datetime, concurrency: int, origin: str | None, url: str, as_json: bool
) -> None:
    """Let a job fire for every time from START to before END, such as 2026-03-29T01:00:00Z."""
    answer = _ask_of_job(
        url, id, lambda client: client.backfill_job(id, start, end, concurrency=concurrency, origin=origin)
    )
    if as_json:
        print_json(answer)
        return
    click.echo(f"{answer['runs']} runs of {id} with the origin {answer['origin']}")


@jobs.command()
@click.argument("id", required=False, shell_complete=complete_job)
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--state", "states", multiple=True, type=click.Choice([state.value for state in RunState]))
@click.option("--origin", help="Only the runs of one trigger or backfill, or of the `schedule`.")
@url_option
@json_option
def history(id: str | None, limit: int, states: tuple[str, ...], origin: str | None, url: str, as_json: bool) -> None:
    """The runs of a job, or of all, the newest first."""
    runs = _ask_of_job(url, id, lambda client: client.runs(id, limit=limit, states=states, origin=origin))
    if as_json:
        print_json(runs)
        return
    from kapsl_scheduler import cli_tables

    cli_tables.show_runs(runs)


@jobs.command()
@job_argument
@click.option("--cancel", is_flag=True, help="Cancel what runs; without it, it goes on to its end.")
@url_option
@json_option
def remove(id: str, cancel: bool, url: str, as_json: bool) -> None:
    """Forget a job. Its history stays."""
    _ask_of_job(url, id, lambda client: client.remove_job(id, cancel=cancel))
    if as_json:
        print_json({"removed": id})
        return
    click.echo(f"removed {id}")


@click.command()
@click.argument("expression")
@click.option("--tz", default="UTC", show_default=True, help="Zone of the expression.")
@click.option("-n", "number", type=click.IntRange(1, 1000), default=5, show_default=True, help="How many times.")
@click.option("--after", type=_moment, help="The times after this moment; after now without it.")
@json_option
def explain(expression: str, tz: str, number: int, after: dt.datetime | None, as_json: bool) -> None:
    """Say in words when a cron EXPRESSION fires, and the next times: second minute hour day month weekday [year]."""
    parsed = CronExpression(expression, tz)
    times = [time for time, _ in zip(parsed.iter(after or dt.datetime.now(dt.UTC)), range(number), strict=False)]
    if as_json:
        listed = [{"utc": time.astimezone(dt.UTC), "local": time} for time in times]
        print_json({"expression": parsed.text, "tz": tz, "description": parsed.explain(), "next": listed})
        return
    from kapsl_scheduler import cli_tables

    click.echo(parsed.explain())
    cli_tables.show_times(times, parsed.tz_name, after)
