"""The Python in README.md runs as it stands."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


async def test_the_first_snippet_answers_a_digit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = np.load(ROOT / "src/kapsl_scheduler/demo/digits_test.npz")
    names = {"pixels": held_out["images"][0].astype(np.float32)}
    monkeypatch.chdir(ROOT / "models/digits")
    code = compile(BLOCKS[0], "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    running = eval(code, names)
    assert inspect.iscoroutine(running)
    await running
    assert capsys.readouterr().out.split()[0] == str(held_out["labels"][0])


@pytest.mark.slow
def test_the_program_runs_by_itself() -> None:
    assert len(BLOCKS) == 3
    assert run(BLOCKS[1]).startswith("[[2. 2. 2. 2.]] 100 ")


@pytest.mark.slow
def test_the_jobs_fire() -> None:
    assert run(BLOCKS[2]).splitlines() == [
        "often [[2. 2. 2. 2.]]",
        "3 nights to come",
        "At 03:00:00 every day, Europe/Zurich time",
    ]


@pytest.mark.slow
def test_what_explain_prints_is_what_stands_there() -> None:
    shown = re.findall(r"^\$ kapsl-scheduler (explain .*)\n((?:(?!```|\$ ).*\n)+)", README, re.MULTILINE)
    assert len(shown) == 2
    for arguments, printed in shown:
        command = [sys.executable, "-m", "kapsl_scheduler", *shlex.split(arguments)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        said = (done.stdout + done.stderr).splitlines()
        assert [line.rstrip() for line in said] == printed.splitlines()


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
