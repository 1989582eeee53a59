"""Results as JSON lines in a file: appended, safe after each flush, nothing twice when a run is resumed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.ports import SinkItem, SinkWriter
from kapsl_scheduler.sinks.documents import encode_item
from kapsl_scheduler.sinks.memory import Remembered
from kapsl_scheduler.sinks.paths import check_template, lock, make_folder, naming, path_of, sync_folder

__all__ = ["JsonLinesSink"]

_BUFFER: Final = 1 << 20
_LOOK_BACK: Final = 64 << 10


class JsonLinesSink(
    msgspec.Struct,
    frozen=True,
    tag="jsonl",
    tag_field="type",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """One line of JSON for each result, in the order of the requests (`sinks.documents` has the form).

    `path` may have {job}, {nominal} (UTC, 20261125T030000Z), {origin} and {attempt} in it; folders are made as needed.
    A run appends to what is there, and a line that a crash cut short is taken away. A resumed run goes on behind its
    last flush, and a run that fails takes back what it wrote since. A file is for one job: what somebody else appends
    to it in the middle of a run may be taken for the run's own.

    `open` raises `Unavailable` while another run writes to the file; what the file system refuses is an `OSError` with
    the path. `ValueError` is raised for a path that cannot be.
    """

    path: str

    def __post_init__(self) -> None:
        check_template(self.path)

    def open(self, firing: Firing, memory: Mapping[str, str]) -> SinkWriter:
        remembered = Remembered(memory, firing)
        if remembered.mark is not None:
            _cut(Path(remembered.mark.path), remembered.mark.at)
        path = path_of(self.path, firing)
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(descriptor, path)
            with naming(path):
                return _Writer(descriptor, path, _whole_lines(descriptor), remembered)
        except BaseException:
            os.close(descriptor)
            raise


class _Writer:
    """Lines gather in memory up to a megabyte; `_end` is how long the file is, `_flushed` how long for good."""

    def __init__(self, descriptor: int, path: Path, end: int, remembered: Remembered) -> None:
        self._descriptor: int | None = descriptor
        self._path = path
        self._end = self._flushed = end
        self._remembered = remembered
        self._lines: list[bytes] = []
        self._size = 0
        self._named = False

    def write(self, items: Sequence[SinkItem]) -> None:
        for item in items:
            line = encode_item(item)
            self._lines += (line, b"\n")
            self._size += len(line) + 1
            if self._size >= _BUFFER:
                self._spill()

    def flush(self) -> Mapping[str, str | None]:
        self._spill()
        with naming(self._path):
            os.fsync(self._open)
            if not self._named:
                sync_folder(self._path.parent)
                self._named = True
        self._flushed = self._end
        return self._remembered.reached(self._end, str(self._path))

    def close(self) -> None:
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):  # the next attempt does it, where this one cannot
            if self._end > self._flushed:
                os.ftruncate(self._descriptor, self._flushed)
        os.close(self._descriptor)
        self._descriptor = None

    @property
    def _open(self) -> int:
        assert self._descriptor is not None
        return self._descriptor

    def _spill(self) -> None:
        left = memoryview(b"".join(self._lines))
        self._lines, self._size = [], 0
        with naming(self._path):
            while left:
                written = os.pwrite(self._open, left, self._end)
                self._end += written
                left = left[written:]


def _cut(path: Path, length: int) -> None:
    """Take away what was written after `length`, which no flush has vouched for."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # somebody has taken the results away already
        return
    try:
        lock(descriptor, path)
        if os.fstat(descriptor).st_size > length:
            with naming(path):
                os.ftruncate(descriptor, length)
    finally:
        os.close(descriptor)


def _whole_lines(descriptor: int) -> int:
    """Where the file's last whole line ends, having seen to it that it ends there."""
    end = begin = os.fstat(descriptor).st_size
    if not end or os.pread(descriptor, 1, end - 1) == b"\n":
        return end
    tail = b""
    while begin and b"\n" not in tail:
        size = min(begin, _LOOK_BACK)
        begin -= size
        tail = os.pread(descriptor, size, begin) + tail
    line = tail[tail.rfind(b"\n") + 1 :]
    try:
        msgspec.json.decode(line)
    except (ValueError, RecursionError):  # cut short by a crash
        os.ftruncate(descriptor, end - len(line))
        return end - len(line)
    return end + os.pwrite(descriptor, b"\n", end)
