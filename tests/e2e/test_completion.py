"""Completion as shells do it: their own, over what `completion` prints for them, and a running server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import DIGITS, Process, run, serving

pytestmark = pytest.mark.slow

BASH = """
eval "$(kapsl-scheduler completion bash)"
COMP_WORDS=({words}) COMP_CWORD={last}
compopt() {{ echo "compopt $2"; }}
_kapsl_scheduler_completion kapsl-scheduler
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
autoload -Uz compinit && compinit -D -u
eval "$(kapsl-scheduler completion zsh)"
compadd() {{ print -l -- $completions }}
_describe() {{ print -l -- ${{completions_with_descriptions%%:*}} }}
words=({words})
CURRENT=$(({last} + 1))
_kapsl_scheduler_completion
"""
FISH = """
kapsl-scheduler completion fish | source
complete --do-complete "{line}"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One in which the command is found, as it is where it is installed."""
    command = tmp_path / "bin" / "kapsl-scheduler"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom kapsl_scheduler.cli import main\nmain()\n")
    command.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KAPSL_")}
    return kept | {"PATH": f"{command.parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}


@pytest.fixture
async def server() -> AsyncIterator[Process]:
    async with serving(f"digits={PACKAGE}", f"other={DIGITS}", "--store", "memory") as server:
        async with Client(server.url) as client:
            job = {"schedule": "@daily", "model": "digits", "value": [[0] * 64]}
            await client.put_job("digits:night", json.dumps(job).encode())
        yield server


def script(shell: str, code: str, environment: dict[str, str]) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-c", code], capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.stderr == ""
    return sorted(line.partition("\t")[0] for line in done.stdout.splitlines() if line)  # fish explains behind a tab


def in_bash(words: Sequence[str], environment: dict[str, str]) -> list[str]:
    quoted = " ".join(f"'{word}'" for word in words)
    return script("bash", BASH.format(words=quoted, last=len(words) - 1), environment)


def test_bash_completes_commands_and_options(environment: dict[str, str]) -> None:
    assert in_bash(("kapsl-scheduler", "jo"), environment) == ["jobs"]
    assert in_bash(("kapsl-scheduler", "jobs", "pr"), environment) == ["preview"]
    assert in_bash(("kapsl-scheduler", "serve", "--max-b"), environment) == [
        "--max-batch-size",
        "--max-batch-time",
        "--max-body-bytes",
    ]
    assert in_bash(("kapsl-scheduler", "infer", "m", "--priority", "th"), environment) == ["throughput"]
    assert in_bash(("kapsl-scheduler", "infer", "m", "dig"), environment) == ["compopt default"]


async def test_bash_completes_the_models_and_jobs_of_a_server(server: Process, environment: dict[str, str]) -> None:
    # bash gives a URL and an id in pieces, broken at every colon.
    scheme, host, port = server.url.replace(":", " : ").split(" : ")
    url = ("--url", scheme, ":", host, ":", port)
    assert in_bash(("kapsl-scheduler", "infer", *url, ""), environment) == ["digits", "other"]
    assert in_bash(("kapsl-scheduler", "bench", *url, "o"), environment) == ["other"]
    assert in_bash(("kapsl-scheduler", "jobs", "show", *url, "digits"), environment) == [
        "digits:heartbeat",
        "digits:night",
    ]
    assert in_bash(("kapsl-scheduler", "jobs", "show", *url, "digits", ":", "n"), environment) == ["night"]
    assert in_bash(("kapsl-scheduler", "jobs", "history", *url, "digits", ":"), environment) == ["heartbeat", "night"]
    equals = ("--url", "=", *url[1:])
    assert in_bash(("kapsl-scheduler", "infer", *equals, "d"), environment) == ["digits"]


def test_without_a_server_there_are_no_names_and_no_words(environment: dict[str, str]) -> None:
    url = ("--url", "http", ":", "//127.0.0.1", ":", "1")
    assert in_bash(("kapsl-scheduler", "infer", *url, ""), environment) == []
    assert in_bash(("kapsl-scheduler", "jobs", "show", *url, "x"), environment) == []


async def test_fish_completes_the_same(server: Process, environment: dict[str, str]) -> None:
    line = f"kapsl-scheduler jobs show --url {server.url} dig"
    found = script("fish", FISH.format(line=line), environment)
    assert found == ["digits:heartbeat", "digits:night"]
    assert script("fish", FISH.format(line="kapsl-scheduler jo"), environment) == ["jobs"]


async def test_zsh_completes_the_same(server: Process, environment: dict[str, str]) -> None:
    words = f"kapsl-scheduler jobs show --url {server.url} dig"
    assert script("zsh", ZSH.format(words=words, last=5), environment) == ["digits:heartbeat", "digits:night"]
    assert script("zsh", ZSH.format(words="kapsl-scheduler jo", last=1), environment) == ["jobs"]


async def test_a_token_is_shown_to_the_server_that_wants_one(tmp_path: Path, environment: dict[str, str]) -> None:
    tokens = tmp_path / "tokens"
    code, made, _ = await run("token", "new", "--name", "ann", "--file", tokens)
    assert code == 0
    async with serving(DIGITS, "--tokens", tokens) as server:
        url = ("--url", *server.url.replace(":", " : ").split())
        assert in_bash(("kapsl-scheduler", "infer", *url, ""), environment) == []
        known = environment | {"KAPSL_TOKEN": made.strip()}
        assert in_bash(("kapsl-scheduler", "infer", *url, ""), known) == ["digits"]
