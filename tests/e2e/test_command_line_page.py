"""What docs/command-line.md shows is what the commands print: every session in it is run, in its order.

Figures that are measured are compared by their place: of the sessions that show some, numbers, units and bars count as
one mark each.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from kapsl_scheduler.cli import main
from kapsl_scheduler.config import load_config
from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import PATIENCE, serving

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
TOML = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
MEASURED = ("bench", "tune")
NUMBER = re.compile(r"\d[\d:.]*(e-\d+)?( (us|ms|s|min)\b)?%?|█+")


class Step(NamedTuple):
    command: str
    shown: list[str]


def steps() -> Iterator[Step]:
    for session in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE):
            yield Step(command, shown.splitlines())


def fill(folder: Path) -> dict[str, str]:
    """The files of the sessions, and an environment that has the command."""
    shutil.copy(PACKAGE, folder / "digits.aimod")
    (folder / "kapsl.toml").write_text(TOML[0])
    images = np.load(PACKAGE.with_name("digits_test.npz"))["images"]
    for name, number in (("7", 3), ("4", 1)):
        pixels = (images[number].reshape(8, 8) * 15.9).astype(np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.NEAREST).save(folder / f"{name}.png")
    rows = images[:3].astype(np.float32)
    np.save(folder / "rows.npy", rows)
    (folder / "rows.jsonl").write_text("".join(f"{row.tolist()}\n" for row in rows))
    np.save(folder / "wide.npy", np.zeros(65, np.float32))
    command = folder / "bin" / "kapsl-scheduler"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom kapsl_scheduler.cli import main\nmain()\n")
    command.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith("KAPSL_")}
    return kept | {"PATH": f"{command.parent}:{os.environ['PATH']}"}


def compared(lines: list[str], command: str) -> list[str]:
    """What of the lines must agree: all but the width of columns; where something is measured all but the figures; of
    `top`, which may see the job at work or not, what stands first in a line."""
    words = [line.split() for line in lines]
    if "kapsl-scheduler top" in command:
        return [
            NUMBER.sub("#", row[0]) for row, line in zip(words, lines, strict=True) if row and not line.startswith(" ")
        ]
    measured = any(f"kapsl-scheduler {name} " in command for name in MEASURED)
    joined = [" ".join(row) for row in words]
    return [" ".join(NUMBER.sub("#", line).replace("<", "").split()) for line in joined] if measured else joined


async def test_every_session_prints_what_is_shown(tmp_path: Path) -> None:
    environment = fill(tmp_path)
    ran = 0
    async with serving(PACKAGE, "--store", "memory") as server:
        for command, shown in steps():
            process = await asyncio.create_subprocess_shell(
                command,
                cwd=tmp_path,
                env=environment | {"KAPSL_URL": server.url},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            async with asyncio.timeout(PATIENCE):
                printed, _ = await process.communicate()
            found = printed.decode().splitlines()
            assert compared(found, command) == compared(shown, command), command
            ran += 1
    assert ran == len(re.findall(r"^\$ ", PAGE, re.MULTILINE)) > 10


def test_the_file_that_is_shown_is_one(tmp_path: Path) -> None:
    file = tmp_path / "kapsl.toml"
    file.write_text(TOML[0])

    config = load_config(flags={}, environment={}, file=file)

    assert config.server.models == ("digits=digits.aimod",)
    assert (config.for_model("digits").max_batch_size, config.for_model("other").max_batch_size) == (16, 32)


def test_every_command_is_in_the_table() -> None:
    listed = {name.split()[0] for name in re.findall(r"^\| `([a-z ]+)` \|", PAGE, re.MULTILINE)}

    assert listed == set(main.commands)
