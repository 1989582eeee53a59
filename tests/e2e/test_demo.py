"""What the demo is made of: the repository's model, packaged by `kapsl-scheduler pack models/digits/digits.onnx`, and a
server process that is gone when the demo is. That it runs and ends by itself is in `test_command_line`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from kapsl_scheduler.demo import run as demo
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.packages import load_package
from tests.e2e.process import DIGITS


def test_the_demo_serves_the_model_of_the_repository(tmp_path: Path) -> None:
    package = load_package(PACKAGE, workdir=tmp_path)

    assert package.manifest.project_name == "digits"
    assert package.model_path.read_bytes() == DIGITS.read_bytes()


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
