"""Where a run's results go in the file system: the path's template, one writer at a time, names that outlast a crash.

What is written there is the business of each format.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kapsl_scheduler.core.runs import Firing, compact
from kapsl_scheduler.errors import Unavailable

__all__ = ["check_template", "lock", "make_folder", "naming", "path_of", "sync_folder"]

_FIELDS: Final = ("job", "nominal", "origin", "attempt")
_SAFE: Final = frozenset(f"{string.ascii_letters}{string.digits}-_".encode())
_LONGEST: Final = 100
"""Characters of a field; a name may have 255, and temporary ones have more in it."""


def check_template(template: str) -> None:
    """Raises `ValueError` for a path that is empty or a folder, or has other fields than those of a run."""
    expected = ", ".join(f"{{{field}}}" for field in _FIELDS)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"path: {error} in {template!r}; braces are for {expected}") from None
    for _, field, form, conversion in parts:
        if field is not None and (field not in _FIELDS or form or conversion):
            raise ValueError(f"path: expected only {expected} in braces, got {template!r}")
    if not template or template.endswith(("/", "/.", "/..")) or template in (".", ".."):
        raise ValueError(f"path: expected the name of a file, got {template!r}")


def path_of(template: str, firing: Firing) -> Path:
    """The absolute path for a run. Fields never become more than one part of it, and differ where the runs do."""
    filled = template.format(
        job=_name(firing.job),
        nominal=compact(firing.nominal),
        origin=_name(firing.origin),
        attempt=firing.attempt,
    )
    return Path(os.path.abspath(filled))


def _name(text: str) -> str:
    """`text` with all but plain letters, digits, `-` and `_` as %XX; cut off, with a digest, where that is long."""
    raw = text.encode("utf-8", "surrogatepass")
    name = "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in raw)
    if len(name) <= _LONGEST:
        return name
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return f"{name[: _LONGEST - 17]}~{digest}"


def lock(descriptor: int, path: Path) -> None:
    """Keep others from writing there for as long as the file is open. Raises `Unavailable` if somebody does already."""
    import fcntl  # not on every system on which the rest of the package works

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        hint = "runs at the same time need {nominal} and {origin} in its path"
        raise Unavailable(f"sink: another run is writing to {path}; {hint}") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An `OSError` from inside says which file it is about."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def make_folder(folder: Path) -> None:
    """The folder and those above it, to stay."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """The names in the folder are as safe as the files are."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
