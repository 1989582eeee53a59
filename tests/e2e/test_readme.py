"""The Python in README.md runs as it stands."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


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
    assert len(BLOCKS) == 2
    done = subprocess.run([sys.executable, "-c", BLOCKS[1]], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[[2. 2. 2. 2.]] 100 ")
