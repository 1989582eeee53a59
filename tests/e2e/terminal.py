"""A terminal for the commands that look whether somebody watches."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.e2e.process import PATIENCE


class Terminal:
    """A terminal that a command believes in, and what it has shown."""

    def __init__(self) -> None:
        self._ours, self.theirs = os.openpty()
        self._shown = ""
        self._more = asyncio.Event()

    def __enter__(self) -> Terminal:
        asyncio.get_running_loop().add_reader(self._ours, self._read)
        return self

    def __exit__(self, *raised: object) -> None:
        asyncio.get_running_loop().remove_reader(self._ours)
        os.close(self._ours)
        os.close(self.theirs)

    def _read(self) -> None:
        self._shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", os.read(self._ours, 1 << 16).decode("utf-8", "replace"))
        self._more.set()

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    async def shows(self, fits: Callable[[str], bool]) -> None:
        """Waits until what was shown since the last call fits."""
        async with asyncio.timeout(PATIENCE):
            while not fits(self._shown):
                self._more.clear()
                await self._more.wait()
        self._shown = ""


async def in_terminal(arguments: Sequence[str | Path]) -> tuple[int, str]:
    """Runs a command whose stderr somebody watches: its exit code and what was printed, when the bar was seen."""
    with Terminal() as terminal:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "kapsl_scheduler", *map(str, arguments)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=terminal.theirs,
            env=dict(os.environ) | {"TERM": "xterm", "COLUMNS": "100"},
        )
        await terminal.shows(lambda shown: "━" in shown)
        async with asyncio.timeout(PATIENCE):
            printed, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode()
