"""`kapsl-scheduler top` against the real server: once, and in a terminal of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import PATIENCE, run, serving
from tests.e2e.terminal import Terminal

pytestmark = pytest.mark.slow

ROW = {"pixels": np.zeros((1, 64), np.float32)}


async def test_a_server_is_watched_until_q(tmp_path: Path) -> None:
    async with serving(PACKAGE, "--store", "memory") as server, Client(server.url) as client:
        with Terminal() as terminal:
            command = (sys.executable, "-m", "kapsl_scheduler", "top", "--interval", "0.05", "--url", server.url)
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=terminal.theirs,
                stdout=terminal.theirs,
                stderr=asyncio.subprocess.PIPE,
                env=dict(os.environ) | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"},
            )
            try:
                await terminal.shows(lambda shown: "digits 1.0.0" in shown and "digits:heartbeat" in shown)
                await client.infer("digits", ROW)
                await terminal.shows(lambda shown: "latency_critical" in shown)
                terminal.press("p")
                await terminal.shows(lambda shown: "held: p goes on" in shown)
                terminal.press("p")
                await terminal.shows(lambda shown: "p holds" in shown)
                server.send(signal.SIGKILL)
                await terminal.shows(lambda shown: "no server answers" in shown and "digits 1.0.0" in shown)
                terminal.press("q")
                async with asyncio.timeout(PATIENCE):
                    _, said = await process.communicate()
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.communicate()
    assert (process.returncode, said) == (0, b"")


async def test_once_and_as_json() -> None:
    async with serving(PACKAGE, "--store", "memory") as server:
        url = ("--url", server.url, "--interval", "0.05")
        code, printed, said = await run("top", "--once", *url)
        assert (code, said) == (0, "")
        assert re.match(r"\d\d:\d\d:\d\d UTC, over 0\.\d+ s\n", printed)
        assert [line.split()[0] for line in printed.splitlines()[2:] if line] == [
            "model",
            "digits",
            "id",
            "digits:heartbeat",
        ]
        code, printed, _ = await run("top", "--json", *url)
        told = json.loads(printed)
        assert (code, told["models"][0]["name"], told["jobs"][0]["id"]) == (0, "digits", "digits:heartbeat")


async def test_a_server_without_jobs_has_models_only() -> None:
    async with serving(PACKAGE, "--no-cron") as server:
        code, printed, _ = await run("top", "--json", "--url", server.url, "--interval", "0.05")

    assert (code, json.loads(printed)["jobs"]) == (0, None)
