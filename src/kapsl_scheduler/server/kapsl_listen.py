"""Where the Kapsl socket is: a file for the Unix socket that only its owner can use. A live server's is left alone, and
what a dead one left behind is removed.

What is not here: what is answered there (`server.kapsl_socket`).
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["listening_at"]


@contextmanager
def listening_at(path: Path) -> Iterator[socket.socket]:
    """A listening Unix socket at the path, which is removed at the end. Raises `OSError` where another server listens,
    something that is no socket is in the place, or the file system refuses."""
    try:
        _remove_stale(path)
        listener = _bound(path)
    except OSError as error:
        raise OSError(f"cannot listen on {path}: {error.strerror or error}") from error
    with listener:
        ours = _identity(path)
        try:
            yield listener
        finally:
            with suppress(OSError):
                if _identity(path) == ours:
                    os.unlink(path)


def _identity(path: Path) -> tuple[int, int, int]:
    """Which file it is; its number alone is given to another one once it is gone."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _bound(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with suppress(OSError):  # so that on Linux it is closed to others from the first moment
            os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(2048)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("there is something else in that place")
    except FileNotFoundError:
        return
    if _is_live(path):
        raise OSError("another server listens there")
    # Another server may have taken the place in this moment: it is put aside first, and asked again before it goes.
    aside = path.with_name(f".{os.getpid()}")
    os.rename(path, aside)
    if _is_live(aside):
        os.rename(aside, path)
        raise OSError("another server listens there")
    os.unlink(aside)


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except BlockingIOError:  # so many wait already that it takes no more for now
            pass
        return True
