"""The demo's package is the model of the repository: `kapsl-scheduler pack models/digits/digits.onnx`."""

from __future__ import annotations

from pathlib import Path

from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.packages import load_package
from tests.e2e.process import DIGITS


def test_the_demo_serves_the_model_of_the_repository(tmp_path: Path) -> None:
    package = load_package(PACKAGE, workdir=tmp_path)

    assert package.manifest.project_name == "digits"
    assert package.model_path.read_bytes() == DIGITS.read_bytes()
