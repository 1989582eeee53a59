"""Every example runs to its end, without a warning."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.process import PATIENCE

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
async def test_an_example_ends_by_itself(example: Path) -> None:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-W", "error", example, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(PATIENCE):
        printed, said = await process.communicate()

    assert (process.returncode, said.decode()) == (0, "")
    lines = printed.decode().splitlines()
    assert lines
    assert [line for line in lines if line != line.rstrip()] == []
    if example.name == "cron_jobs.py":
        counted = dict(re.findall(r"(\w+): \d+ fired, (\d+) succeeded", printed.decode()))
        assert counted.keys() == {"heartbeat", "newest", "nightly"}
        assert min(int(counted["heartbeat"]), int(counted["newest"])) >= 1


def test_there_are_examples() -> None:
    assert EXAMPLES
