"""What the demo is made of: the repository's model with its manifest, packaged by `kapsl-scheduler pack`, and a server
process that is gone when the demo is. That it runs and ends by itself is in `test_command_line`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from kapsl_scheduler.demo import run as demo
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.packages import build_package, load_package
from kapsl_scheduler.packages.manifest import IntervalDef
from kapsl_scheduler.testing import run_virtual
from tests.e2e.process import DIGITS


def test_the_demo_serves_the_model_of_the_repository(tmp_path: Path) -> None:
    package = load_package(PACKAGE, workdir=tmp_path)

    assert package.manifest.project_name == "digits"
    assert package.model_path.read_bytes() == DIGITS.read_bytes()


def test_the_package_is_what_pack_makes_of_the_repository(tmp_path: Path) -> None:
    keys = json.loads(DIGITS.with_name("manifest.json").read_bytes())
    again = build_package(DIGITS, tmp_path / "digits.aimod", **keys)

    with tarfile.open(PACKAGE) as ours, tarfile.open(again) as theirs:
        for name in ("metadata.json", "digits.onnx"):
            members = ours.extractfile(name), theirs.extractfile(name)
            assert members[0] is not None
            assert members[1] is not None
            assert members[0].read() == members[1].read()


def test_its_job_asks_for_the_first_held_out_images_every_two_seconds(tmp_path: Path) -> None:
    (job,) = load_package(PACKAGE, workdir=tmp_path).manifest.cron_jobs
    with np.load(demo._TEST_IMAGES) as file:
        images = file["images"][:8].astype(np.float32)

    assert f"digits:{job.id}" == demo._JOB
    assert job.schedule == IntervalDef(2)
    np.testing.assert_array_equal(job.input, images)


class Calls:
    """A client that notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def pause_job(self, id: str, reason: str) -> None:
        self.asked.append("pause")

    async def resume_job(self, id: str) -> None:
        self.asked.append("resume")


@pytest.mark.parametrize(
    ("seconds", "asked"), [(4.0, ["pause"]), (8.0, ["pause", "resume"]), (20.0, ["pause", "resume"])]
)
def test_the_job_fires_for_half_of_the_time(seconds: float, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    client, phases = Calls(), demo._Phases()
    spans: dict[bool | None, float] = {True: 0.0, False: 0.0, None: 0.0}

    async def alternate() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(demo.time, "perf_counter", loop.time)
        alternating = loop.create_task(phases.alternate(client, seconds))  # type: ignore[arg-type]
        while not alternating.done():
            begun, phase = loop.time(), phases.now
            await asyncio.sleep(0.125)
            phases.seen(phase, 1.0)
            spans[None if phase is None else phase[1]] += loop.time() - begun

    run_virtual(alternate())

    assert client.asked == asked
    assert spans[False] == pytest.approx(seconds / 2, abs=0.3)
    assert spans[True] == pytest.approx(seconds / 2 - demo._WARM_UP, abs=0.4)
    assert abs(len(phases.latencies[True]) - 8 * spans[True]) <= 3  # less those that outlasted their phase
    assert abs(len(phases.latencies[False]) - 8 * spans[False]) <= 3


@pytest.mark.slow
async def test_a_server_that_neither_starts_nor_ends_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf, number = tmp_path / "deaf", tmp_path / "number"
    deaf.write_text(f"#!/bin/sh\ntrap '' TERM\necho $$ > {number}\nexec sleep 1000\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(deaf))
    monkeypatch.setattr(demo, "_PATIENCE", 0.3)

    with pytest.raises(Unavailable, match=r"did not start within 0\.3 s"):
        async with demo._server():
            raise AssertionError("it started")

    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)
