"""Servers in processes of their own, for suites that ask over HTTP. What is asked lives in the suites."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from typing import Final

__all__ = ["process_of"]

PATIENCE: Final = 60.0
"""Seconds that a server has to start."""


@contextlib.contextmanager
def process_of(command: list[str], *arguments: str) -> Iterator[int]:
    """The port of a server that runs meanwhile; the command is told `--port N`, and the arguments behind it."""
    port = _free_port()
    process = subprocess.Popen(
        [*command, "--port", str(port), *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(port)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _wait_for(port: int) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        else:
            return
