"""Jobs of the real process: over its end, with its packages, and through the commands."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from kapsl_scheduler.cli import main
from kapsl_scheduler.client import Client
from kapsl_scheduler.core.definition import encode_job
from kapsl_scheduler.core.jobs import CronJob
from kapsl_scheduler.core.wire import encode_tensor
from kapsl_scheduler.errors import InvalidJob, ModelLoadError, NotFound, Unavailable
from kapsl_scheduler.packages import build_package
from tests.e2e.process import DIGITS, FOREVER, Process, build_working_model, run, serving, until, work

pytestmark = pytest.mark.slow

LONG = 400  # turns of the working model: some tenths of a second at most


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_working_model(tmp_path_factory.mktemp("model") / "work.onnx")


def nightly(turns: int = 1) -> bytes:
    return encode_job(CronJob("night", "0 0 3 * * *", work(2, turns), model="work").check())


def in_state(client: Client, number: int, *states: str) -> Callable[[], Awaitable[bool]]:
    async def reached() -> bool:
        return (await client.get(f"/v2/cron/runs/{number}"))["state"] in states

    return reached


async def test_jobs_and_history_outlive_the_server_and_a_signal_records_what_it_cut_short(
    model: Path, state: Path
) -> None:
    async with serving(model, "--drain", "0.05") as server, Client(server.url) as client:
        await client.put_job("night", nightly())
        short = await client.trigger_job("night", "short")
        await until(in_state(client, short["number"], "succeeded"))
        await client.put_job("night", nightly(FOREVER))
        await client.pause_job("night", "for now")
        long = await client.trigger_job("night", "long")
        await until(in_state(client, long["number"], "running"))
        server.send(signal.SIGTERM)
        code, _ = await server.end()

    assert code == 0
    assert [path.name for path in (state / "kapsl-scheduler").iterdir()] == ["cron.db"]
    async with serving(model) as server, Client(server.url) as client:
        job, runs = await client.job("night"), await client.runs("night")
        await client.put_job("night", nightly())
        again = await client.trigger_job("night", "short")

    assert (job["paused"], job["fired_count"], job["succeeded"], job["cancelled"]) == ("for now", 2, 1, 1)
    assert [(run["origin"], run["state"], run["reason"]) for run in runs] == [
        ("long", "cancelled", "shutdown"),
        ("short", "succeeded", ""),
    ]
    assert again["number"] == short["number"]


async def refused(client: Client) -> bool:
    """Whether jobs are not changed any more."""
    try:
        await client.pause_job("night")
    except Unavailable:
        return True
    return False


async def test_runs_end_within_the_drain_and_changes_are_refused_meanwhile(model: Path, tmp_path: Path) -> None:
    store = tmp_path / "jobs.db"
    async with serving(model, "--store", store) as server, Client(server.url) as client:
        await client.put_job("night", nightly(LONG))
        number = (await client.trigger_job("night"))["number"]
        await until(in_state(client, number, "running", "succeeded"))
        server.send(signal.SIGTERM)

        await until(lambda: refused(client))
        assert await server.end() == (0, "")

    async with serving(model, "--store", store) as server, Client(server.url) as client:
        assert (await client.get(f"/v2/cron/runs/{number}"))["state"] == "succeeded"


async def test_the_jobs_of_a_package_come_change_and_go_with_its_model(tmp_path: Path) -> None:
    def job(id: str, schedule: Any) -> dict[str, Any]:
        return {"id": id, "schedule": schedule, "input": encode_tensor(np.zeros((3, 64), np.float32))}

    package = tmp_path / "package.aimod"

    def build(*jobs: dict[str, Any]) -> None:
        build_package(DIGITS, package, project_name="whatever", cron_jobs=jobs)

    build(job("beat", {"interval_secs": 1}), job("night", "0 0 3 * * *"))
    async with serving(f"m={package}", "--store", "memory") as server, Client(server.url) as client:

        async def ids() -> list[str]:
            return [listed["id"] for listed in await client.jobs()]

        async def has_fired() -> bool:
            return bool((await client.job("m:beat"))["succeeded"])

        assert await ids() == ["m:beat", "m:night"]
        await until(has_fired)
        assert (await client.runs("m:beat"))[-1]["rows"] == 3

        build(job("night", "0 0 4 * * *"), job("wrong", "0 61 * * * *"), job("never", "0 0 0 30 2 *"))
        with pytest.raises(ModelLoadError, match=r"m:wrong.*m:never"):
            await client.load("m")
        assert await ids() == ["m:beat", "m:night"]

        build(job("night", "0 0 4 * * *"))
        await client.load("m")
        assert await ids() == ["m:night"]
        assert (await client.job("m:night"))["schedule"] == "0 0 4 * * *"

        await client.put_job("mine", json.dumps({"schedule": "@daily", "value": [[0] * 64]}).encode())
        await client.unload("m")
        assert await ids() == ["mine"]
        assert "not loaded" in (await client.job("mine"))["waiting_for"]
        await client.load("m")
        assert await ids() == ["m:night", "mine"]
        assert (await client.job("mine"))["waiting_for"] is None


async def test_a_package_with_faulty_jobs_ends_the_start_with_all_its_faults(tmp_path: Path) -> None:
    tensor = encode_tensor(np.zeros((1, 64), np.float32))
    jobs = [{"id": "a", "schedule": "0 61 * * * *", "input": tensor}, {"id": "b", "schedule": "*", "input": tensor}]
    package = build_package(DIGITS, tmp_path / "p.aimod", project_name="p", cron_jobs=jobs)

    code, printed, said = await run("serve", package, "--port", "0")

    assert (code, printed) == (1, "")
    first, *faults = said.splitlines()
    assert first == f"Error: {package}: 2 faults"
    assert ["'p:a'" in faults[0], "'p:b'" in faults[1]] == [True, True]


async def test_a_damaged_store_ends_the_start_and_no_cron_serves_without(tmp_path: Path) -> None:
    store = tmp_path / "jobs.db"
    store.write_bytes(b"whatever this is, it is no database" * 100)

    code, printed, said = await run("serve", DIGITS, "--port", "0", "--store", store)

    assert (code, printed) == (2, "")
    assert f"store: {store}: it is no SQLite database" in said
    assert "--no-cron" in said
    assert "Traceback" not in said
    async with serving(DIGITS, "--store", store, "--no-cron") as server, Client(server.url) as client:
        assert (await client.models())[0]["state"] == "READY"
        with pytest.raises(NotFound, match="runs no jobs"):
            await client.jobs()


# ---------------------------------------------------------------------------------------------- commands


FEEDS = """
import json

def latest(firing):
    return [[[float(number)] * 64] for number in range(3)]

def always(firing):
    return True

def tell(job, result):
    with open("OUTPUT", "a") as file:
        print(job, json.dumps([answer.output.argmax(axis=1).tolist() for answer in result]), file=file)

def keep(items):
    with open("OUTPUT", "a") as file:
        print(*[item.key for item in items], file=file)
"""


async def test_jobs_name_functions_of_the_servers_own_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, file, modules = tmp_path / "output", tmp_path / "server.toml", tmp_path / "modules"
    modules.mkdir()
    (modules / "feeds_of_a_server.py").write_text(FEEDS.replace("OUTPUT", str(output)))
    table = "".join(f"{name} = 'feeds_of_a_server:{name}'\n" for name in ("latest", "always", "tell", "keep"))
    file.write_text(f"[cron.callables]\n{table}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(modules), os.environ.get("PYTHONPATH")))))
    definition = {"id": "a", "schedule": "0 0 3 * * *", "callable": "latest", "condition": "always"}

    async def scored(client: Client, id: str) -> str:
        number = (await client.trigger_job(id))["number"]
        await until(in_state(client, number, "succeeded"))
        text = output.read_text()
        output.unlink()
        return text

    async with serving(DIGITS, "--config", file) as server, Client(server.url) as client:
        await client.put_job("a", json.dumps(definition | {"on_result": "tell"}).encode())
        assert (await scored(client, "a")).startswith("a [[")
        with pytest.raises(InvalidJob, match="condition: nothing is bound as 'sometimes'"):
            await client.put_job("a", json.dumps(definition | {"condition": "sometimes"}).encode())
    async with serving(DIGITS, "--config", file) as server, Client(server.url) as client:
        assert (await scored(client, "a")).startswith("a [[")  # it is bound again
        await client.put_job("a", json.dumps(definition | {"sink": {"callable": "keep"}}).encode())
        assert await scored(client, "a") == "0 1 2\n"

    file.write_text("[cron.callables]\nlatest = 'feeds_of_a_server:last'\n")
    code, _, said = await run("serve", DIGITS, "--port", "0", "--config", file)
    assert code == 2
    assert "cron.callables.latest: expected a name in module 'feeds_of_a_server', got 'last'" in said


class Commands:
    """The `jobs` commands against one server."""

    def __init__(self, server: Process) -> None:
        self._url = ("--url", server.url)

    async def __call__(self, *arguments: str | Path, stdin: str | None = None) -> Result:
        words = ["jobs", *map(str, arguments), *self._url]
        result: Result = await asyncio.to_thread(CliRunner().invoke, main, words, input=stdin)
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    async def json(self, *arguments: str | Path) -> Any:
        result = await self(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.output)


async def test_a_job_is_looked_after_by_commands(tmp_path: Path) -> None:
    pixels, file = tmp_path / "pixels.npy", tmp_path / "jobs.json"
    np.save(pixels, np.zeros((2, 64)))
    when = {"schedule": "0 30 4 * * MON", "value": [[0] * 64]}
    file.write_text(json.dumps([{"id": "from:file", **when}, {"id": "second", **when}]))
    async with serving(DIGITS, "--store", "memory") as server:
        jobs = Commands(server)
        assert (await jobs("list")).output == "There are no jobs.\n"
        flags = ("--schedule", "0 0 3 * * *", "--tz", "Europe/Zurich", "--input", pixels)
        assert (await jobs("add", "night", *flags)).output.startswith("added night: in ")
        again = await jobs("add", "night", *flags, "--timeout", "5", "--priority", "throughput")
        assert again.output.startswith("updated night: in ")
        (every,) = await jobs.json("add", "[x]", "--every", "86400", "--input", json.dumps([0] * 64), "--paused")
        assert (every["id"], every["paused"], every["description"]) == ("[x]", "not enabled", "Every day")
        assert "added from:file" in (await jobs("add", file)).output
        assert "updated second" in (await jobs("add", "-", stdin=json.dumps({"id": "second", **when}))).output

        rows = {line.split()[0]: line for line in (await jobs("list")).output.splitlines()}
        assert list(rows) == ["id", "[x]", "from:file", "night", "second"]
        assert "paused: not enabled" in rows["[x]"]
        assert "0 0 3 * * * (Europe/Zurich)" in rows["night"]
        assert [job["id"] for job in await jobs.json("list")] == ["[x]", "from:file", "night", "second"]

        assert len(await jobs.json("preview", "night", "-n", "3")) == 3
        assert "Europe/Zurich" in (await jobs("preview", "night")).output
        assert (await jobs("pause", "night", "--reason", "holiday")).output == "paused night: holiday\n"
        done = await jobs("run", "night", "--wait", "--origin", "mine")
        assert (done.exit_code, "succeeded" in done.output, "mine" in done.output) == (0, True, True)
        assert (await jobs("resume", "night")).output.startswith("resumed night: in ")
        span = ("2026-01-01T00:00:00Z", "2026-01-03T00:00:00+00:00")
        assert (
            await jobs("backfill", "night", *span, "--origin", "new")
        ).output == "2 runs of night with the origin new\n"
        assert (await jobs.json("backfill", "night", *span, "--origin", "new"))["runs"] == 0

        shown = (await jobs("show", "night")).output
        for words in ("At 03:00:00 every day", "digits", "throughput", '"timeout": 5.0', "3 in all", "mine"):
            assert words in shown
        assert (await jobs.json("show", "night"))["definition"]["tz"] == "Europe/Zurich"
        assert len((await jobs("history")).output.splitlines()) == 4
        assert len(await jobs.json("history", "night", "--origin", "new", "--state", "succeeded")) <= 2
        assert (await jobs("history", "second")).output == "There are no runs.\n"
        assert (await jobs("remove", "night")).output == "removed night\n"
        assert len(await jobs.json("history", "night")) == 3


async def test_commands_say_what_is_wrong(tmp_path: Path) -> None:
    row, file = json.dumps([0] * 64), tmp_path / "jobs.json"
    file.write_text('[{"schedule": "@daily"}]')
    wrong = {"id": "a", "schedule": "0 0 9 * * FRI-MON", "value": [[0] * 64]}
    async with serving(DIGITS, "--store", "memory") as server:
        jobs = Commands(server)
        for arguments, stdin, code, said in (
            (("show", "none"), None, 1, "no job 'none'\n`kapsl-scheduler jobs list` lists what is there."),
            (("add", "a", "--schedule", "0 9 * * 1-5", "--input", row), None, 1, "  0 9 * * 1-5\n  ^^^^^^^^^^^"),
            (("add", "-"), json.dumps(wrong), 1, "  0 0 9 * * FRI-MON\n            ^^^^^^^"),
            (("add", "-"), json.dumps(wrong | {"priority": "x"}), 1, "the job: 2 faults\n  schedule: day of week"),
            (("add", "a", "--schedule", "0 0 0 30 2 *", "--input", row), None, 1, "it never fires"),
            (("add", "a", "--every", "5", "--input", "[[1, 2]]"), None, 1, "axis 1 is 2"),
            (("add", "a", "--every", "5", "--input", "[1"), None, 1, "--input: is not JSON"),
            (("add", "a", "--every", "5"), None, 2, "--input and --callable"),
            (("add", "a", "--every", "5", "--callable", "f"), None, 1, "nothing is bound as 'f'"),
            (("add", "a", "--every", "5", "--schedule", "@daily"), None, 2, "both came"),
            (("add", "a"), None, 2, "needs --schedule or --every"),
            (("add", file), None, 1, "job 0: expected an object with an id"),
            (("preview", "a", "-n", "0"), None, 2, "'-n': 0 is not in the range 1<=x<=1000"),
            (("backfill", "a", "yesterday", "today"), None, 2, "'yesterday' is no moment"),
            (("backfill", "a", "2026-01-01", "2026-01-02"), None, 2, "has no zone"),
        ):
            result = await jobs(*arguments, stdin=stdin)
            assert result.exit_code == code, (arguments, result.output)
            assert said in result.output, (arguments, result.output)
        await jobs("add", "nightly", "--every", "3600", "--input", row)
        assert "did you mean 'nightly'?\n`kapsl-scheduler jobs list`" in (await jobs("pause", "nigthly")).output
        await jobs("add", "a", "--every", "3600", "--input", row)
        with pytest.raises(InvalidJob):
            async with Client(server.url) as client:
                await client.trigger_job("a", "schedule")
