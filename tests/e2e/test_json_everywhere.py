"""Every command that prints data prints it as one JSON document too, and nothing else where that is read."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from kapsl_scheduler.cli import main
from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import DIGITS, run, serving

pytestmark = pytest.mark.slow

PAST = ("2026-01-01T00:00:00Z", "2026-01-03T00:00:00Z")

# Arguments of a command, with places to fill in, and what its answer must have: keys of an object, or of the first
# object of a list.
COMMANDS: dict[str, tuple[str, set[str]]] = {
    "bench": ("digits --seconds 0.1 --connections 1 --url {url}", {"requests_per_second", "p50", "p99", "errors"}),
    "config show": ("--port 9000", {"server.port", "cron.store", "model.max_batch_size"}),
    "explain": ("@daily", {"expression", "description", "next"}),
    "infer": ("digits {row} --url {url}", {"input", "outputs"}),
    "jobs add": ("night --schedule @daily --input {row} --model digits --url {url}", {"id", "next_firing"}),
    "jobs backfill": ("old {past} --url {url}", {"origin", "runs"}),
    "jobs history": ("old --url {url}", {"number", "state"}),
    "jobs list": ("--url {url}", {"id", "schedule", "next_firing"}),
    "jobs pause": ("old --reason rest --url {url}", {"id", "paused"}),
    "jobs preview": ("old --url {url}", set()),
    "jobs remove": ("spare --url {url}", {"removed"}),
    "jobs resume": ("old --url {url}", {"id", "paused"}),
    "jobs run": ("old --wait --url {url}", {"number", "state"}),
    "jobs show": ("old --url {url}", {"id", "definition", "next", "runs"}),
    "models": ("--url {url}", {"name", "version", "inputs", "outputs", "stats"}),
    "pack": (f"{DIGITS} -o {{package}}", {"package", "bytes"}),
    "serve": (f"{PACKAGE} --check", {"name", "version", "jobs"}),
    "token new": ("--name ann", {"token", "line"}),
    "top": ("--interval 0.05 --url {url}", {"seconds", "models", "jobs"}),
    "tune": (f"{DIGITS} --seconds 0.1 --max-batch-size 4", {"model", "curve", "recommendation", "toml"}),
}
WORDS_ONLY = {"completion", "demo"}


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield " ".join((*words, name)), command


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("row") / "row.npy"
    np.save(file, np.zeros(64, np.float32))
    return file


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """That of a server which all of these ask, with jobs."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KAPSL_")}
    command = ("-m", "kapsl_scheduler", "serve", str(PACKAGE), "--port", "0", "--store", "memory", "--no-socket")
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[2]
            asyncio.run(fill(url))
            yield url
        finally:
            process.kill()


async def fill(url: str) -> None:
    job = json.dumps({"schedule": "@daily", "model": "digits", "value": [[0] * 64]}).encode()
    async with Client(url) as client:
        for id in ("old", "spare"):
            await client.put_job(id, job)
        await client.trigger_job("old", "first")


def test_the_table_has_every_command_and_each_takes_json() -> None:
    there = dict(commands(main))
    assert set(there) - WORDS_ONLY == set(COMMANDS)
    without = [
        name
        for name, command in there.items()
        if name not in WORDS_ONLY and not any("--json" in parameter.opts for parameter in command.params)
    ]
    assert without == []


@pytest.mark.parametrize("name", COMMANDS)
async def test_stdout_is_one_document(name: str, url: str, row: Path, tmp_path: Path) -> None:
    arguments, keys = COMMANDS[name]
    filled = arguments.format(url=url, row=row, past=" ".join(PAST), package=tmp_path / "p.aimod")

    code, printed, said = await run(*name.split(), *filled.split(), "--json")

    assert (code, said) == (0, "")
    document: Any = json.loads(printed)
    first = document[0] if isinstance(document, list) else document
    assert keys == set() or keys <= set(first)


async def test_a_server_says_in_json_where_it_is() -> None:
    async with serving(DIGITS, "--no-cron", "--json") as server:
        told = json.loads(server.first_line)
        async with Client(told["url"]) as client:
            assert [model["name"] for model in await client.models()] == told["models"] == ["digits"]
