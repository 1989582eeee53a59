"""The command line starts fast: what it does at once, and what a shell asks it, takes neither numpy nor a framework."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click
import pytest

import kapsl_scheduler
from kapsl_scheduler.cli import main

pytestmark = pytest.mark.slow

HEAVY = ("asyncio", "httptools", "numpy", "onnxruntime", "rich", "starlette", "uvicorn")

PROGRAM = """
import contextlib, io, json, sys
from kapsl_scheduler.cli import main
from click.shell_completion import ShellComplete

offered = {}
for words in json.loads(sys.argv[1]):
    completing = ShellComplete(main, {}, "kapsl-scheduler", "_X")
    offered[" ".join(words)] = [item.value for item in completing.get_completions(words, "--")]
with contextlib.redirect_stdout(io.StringIO()) as shown:
    main(["--help"], standalone_mode=False)
print(json.dumps({"offered": offered, "help": shown.getvalue(), "there": sorted(sys.modules)}))
"""


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name)


@pytest.fixture(scope="module")
def started() -> Any:

    asked = json.dumps(list(commands(main)))
    done = subprocess.run([sys.executable, "-c", PROGRAM, asked], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def test_help_and_completion_import_nothing_heavy(started: Any) -> None:
    assert [name for name in HEAVY if name in started["there"]] == []
    assert "Answers live requests first" in started["help"]


def test_the_options_of_every_command_are_completed(started: Any) -> None:
    offered = started["offered"]
    assert len(offered) > 15
    assert [words for words, options in offered.items() if "--help" not in options] == []
    assert {"--port", "--check", "--max-batch-size", "--json"} <= set(offered["serve"])
    assert {"--schedule", "--priority", "--url"} <= set(offered["jobs add"])


def test_every_public_name_is_found_where_the_table_says() -> None:
    named = {name: getattr(kapsl_scheduler, name) for name in kapsl_scheduler.__all__}
    assert {value.__name__ for value in named.values()} == set(named)
    assert set(kapsl_scheduler._HOMES) == set(named) <= set(dir(kapsl_scheduler))
    with pytest.raises(AttributeError, match="no attribute 'Schedular'"):
        kapsl_scheduler.Schedular  # noqa: B018
