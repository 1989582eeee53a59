"""Which files of a folder a pattern names, and opening one of them, without ever leaving the folder.

Hidden files count only where the pattern says so, as in a shell. Folders behind symbolic links are not entered; a link
to a file counts where the file is inside the folder.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.sources.reading import OpenFile

__all__ = ["Found", "check_pattern", "found_files", "open_file"]


class Found(NamedTuple):
    """A file of the folder: its path inside it, with `/`, its size in bytes and when it was last written (ns)."""

    name: str
    size: int
    mtime: int


def check_pattern(pattern: str) -> None:
    """Raises `ValueError` for a pattern that is empty or could leave the folder."""
    parts = pattern.split("/")
    if not all(parts) or ".." in parts or "." in parts:
        raise ValueError(f"pattern: expected a relative path of names and wildcards, without '..', got {pattern!r}")


def found_files(root: str, pattern: str) -> list[Found]:
    """The files that `pattern` names, by their paths. Raises `InvalidInput` where a folder cannot be read."""
    names = set(_matches(root, "", pattern.split("/")))
    found = []
    for name in sorted(names):
        path = _inside(root, name)
        if path is None:
            continue
        try:
            seen = os.stat(path)
        except OSError:  # gone meanwhile
            continue
        if stat.S_ISREG(seen.st_mode):
            found.append(Found(name, seen.st_size, seen.st_mtime_ns))
    return found


def _matches(root: str, folder: str, pattern: list[str]) -> Iterator[str]:
    first, *rest = pattern
    if first == "**":
        # Alone at the end it means every file below.
        yield from _matches(root, folder, rest or ["*"])
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            here = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    except FileNotFoundError:  # gone meanwhile
        return
    except OSError as error:
        raise InvalidInput(f"folder {os.path.join(root, folder)!r} cannot be read: {error.strerror}") from error
    for name, is_folder in here:
        path = f"{folder}{name}"
        if first == "**":
            if is_folder and not name.startswith("."):
                yield from _matches(root, f"{path}/", pattern)
        elif fnmatch.fnmatchcase(name, first) and (not name.startswith(".") or first.startswith(".")):
            if is_folder and rest:
                yield from _matches(root, f"{path}/", rest)
            elif not is_folder and not rest:
                yield path


def _inside(root: str, name: str) -> str | None:
    """Where the file really is; None if that is not below `root`, which is a real path."""
    path = os.path.realpath(os.path.join(root, name))
    return path if path.startswith(os.path.join(root, "")) else None


def open_file(root: str, name: str) -> tuple[OpenFile, Found] | None:
    """The file and what it is now; None if it is there no more, or no file of the folder any more. May raise
    `OSError`."""
    path = _inside(root, name)
    if path is None:
        return None
    try:
        # Not to be led on by a link that has just been put there, nor to wait for a pipe's other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    file = os.fdopen(descriptor, "rb")
    seen = os.fstat(descriptor)
    if not stat.S_ISREG(seen.st_mode):
        file.close()
        return None
    return OpenFile(name, file, seen.st_size), Found(name, seen.st_size, seen.st_mtime_ns)
