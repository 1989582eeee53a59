"""A command that ends while somebody else's function hangs in a thread.

Arguments: what it hangs in (`model`: C++ code, `lock`: Python, `print`: a pipe that nobody reads, with the lock of
stdout held), how the command ends (`exit`: with code 3, `raise`: by a fault of its own), and the file of the model.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

import numpy as np
import onnxruntime

from kapsl_scheduler import cli_frame
from kapsl_scheduler.cli import main
from kapsl_scheduler.runtime.offload import in_thread

TURNS = 60_000  # of the working model: some seconds
MUCH = 2**20  # characters, more than a pipe takes


def hang(where: str, model: str) -> None:
    if where == "model":
        session = onnxruntime.InferenceSession(model)
        session.run(None, {"x": np.ones((1, 1), np.float32), "turns": np.array(TURNS)})
    elif where == "lock":
        threading.Event().wait()
    else:
        sys.stdout.write("." * MUCH)


async def begin(*words: Any) -> None:
    in_thread(hang, *words)


@main.command()
@cli_frame.click.argument("where")
@cli_frame.click.argument("end")
@cli_frame.click.argument("model")
def leave(where: str, end: str, model: str) -> None:
    """Ends without what it has begun."""
    asyncio.run(begin(where, model))
    if end == "raise":
        raise ZeroDivisionError("a fault")
    sys.exit(3)


if __name__ == "__main__":
    cli_frame._LAST_WORDS = 0.5
    main(["leave", *sys.argv[1:]])
