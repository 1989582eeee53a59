"""The OpenAPI document against the real server, by schemathesis: requests that fit it and requests that do not; no
answer is a failure of the server's, and every answer is one that the document tells of.

The everyday run is short; `KAPSL_STRESS=1` makes it thousands of requests.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import serving

pytestmark = pytest.mark.slow

PHASES = "examples,coverage,fuzzing" if os.environ.get("KAPSL_STRESS") else "examples,fuzzing"
EXAMPLES = "40" if os.environ.get("KAPSL_STRESS") else "2"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
ENDLESS = "/v2/cron/events"  # nothing happens there, and the stream does not end
ENDING = "(unload|remove|stop)$"  # after these there would be no model


async def test_the_server_is_as_the_document_says(tmp_path: Path) -> None:
    async with serving(str(PACKAGE), "--store", "memory") as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--phases", PHASES, "--max-examples", EXAMPLES, "--checks", ",".join(CHECKS), "--seed", "1"),
            *("--exclude-path", ENDLESS, "--exclude-path-regex", ENDING, "--continue-on-failure"),
            *("--request-timeout", "20", "--generation-database", "none", "--no-color"),
            cwd=tmp_path,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        told, _ = await process.communicate()
        assert process.returncode == 0, told.decode()[-6000:]
        async with Client(server.url) as client:
            assert [model["name"] for model in await client.models()] == ["digits"]
