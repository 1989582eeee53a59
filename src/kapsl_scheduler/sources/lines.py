"""JSON lines and CSV: read line by line, up to the size that the file had when it was opened.

No more than one line (in CSV one record) is held at a time, and none longer than `MAX_LINE`. A line that cannot be
read costs that line only: reading goes on with the next one.
"""

from __future__ import annotations

import csv
import reprlib
from collections.abc import Iterator
from typing import Final

import msgspec

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.sources.columns import Columns, Values
from kapsl_scheduler.sources.reading import OpenFile, Place, Row, row_of

__all__ = ["MAX_LINE", "CsvSettings", "read_csv", "read_json_lines"]

MAX_LINE: Final = 16 << 20
"""Bytes of the longest line of JSON, or record of CSV, that is read."""

_SKIP: Final = 1 << 20
_BOM: Final = b"\xef\xbb\xbf"


class CsvSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How CSV is written: what stands between columns, and whether the first record names them. Without a header the
    columns are called 0, 1, 2, ..."""

    delimiter: str = ","
    header: bool = True

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ValueError(f"delimiter: expected one character, no quote and no line end, got {self.delimiter!r}")


class _Lines:
    """The lines of a file, each with its number and its byte."""

    __slots__ = ("_end", "_file", "number", "offset")

    def __init__(self, opened: OpenFile) -> None:
        self._file = opened.file
        self._end = opened.size
        self.number = self.offset = 0
        if self._file.read(len(_BOM)) == _BOM:
            self.offset = len(_BOM)
        self.go(self.place)

    @property
    def place(self) -> Place:
        return Place(self.number, self.offset)

    @property
    def part(self) -> float:
        return self.offset / self._end

    def go(self, place: Place) -> None:
        self.number, self.offset = place
        self._file.seek(self.offset)

    def read(self) -> bytes | None:
        """The next line, None at the end. Raises `InvalidInput` for a line that is too long, having passed it."""
        line = self._file.readline(min(self._end - self.offset, MAX_LINE + 1))
        if not line:
            return None
        self.number += 1
        self.offset += len(line)
        if len(line) <= MAX_LINE:
            return line
        while not line.endswith(b"\n") and (line := self._file.readline(min(self._end - self.offset, _SKIP))):
            self.offset += len(line)
        raise InvalidInput(f"expected a line of at most {MAX_LINE} bytes, got a longer one")


# -------------------------------------------------------------------------------------------- JSON lines


def read_json_lines(opened: OpenFile, columns: Columns, start: Place) -> Iterator[Row]:
    """A line is an object with columns, or a number or list that is the only input. Blank lines are passed over."""
    lines = _Lines(opened)
    if start.offset:
        lines.go(start)
    while True:
        try:
            line = lines.read()
            if line is None:
                return
            if not line.strip():
                continue
            values: Values | InvalidInput = _of_json(line, columns)
        except InvalidInput as error:
            values = error
        yield row_of(opened.name, lines.number, values, lines.place, lines.part)


def _of_json(line: bytes, columns: Columns) -> Values:
    try:
        document = msgspec.json.decode(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"expected JSON, got {reprlib.repr(line)}: {error}") from None
    return columns.named(document) if isinstance(document, dict) else columns.bare(document)


# --------------------------------------------------------------------------------------------------- CSV


def read_csv(opened: OpenFile, columns: Columns, start: Place, settings: CsvSettings) -> Iterator[Row]:
    """A record is a row; its number is that of its first line. Without chosen columns all are stacked."""
    lines = _Lines(opened)
    begin = lines.place
    try:
        header = _record(lines, settings)
        if header is None:
            return
        names = header if settings.header else [str(index) for index in range(len(header))]
        columns.check(names)
        if len(set(names)) < len(names):
            raise InvalidInput(f"expected every column once, got {reprlib.repr(names)}")
    except InvalidInput as error:
        raise InvalidInput(f"{opened.name}: first record: {error}") from None
    if start.offset:
        lines.go(start)
    elif not settings.header:
        lines.go(begin)
    while True:
        number = lines.number + 1
        try:
            cells = _record(lines, settings)
            if cells is None:
                return
            if not cells:
                continue
            if len(cells) != len(names):
                raise InvalidInput(f"expected {len(names)} columns, got {len(cells)}")
            values: Values | InvalidInput = columns.row(dict(zip(names, cells, strict=True)), text=True)
        except InvalidInput as error:
            values = error
        yield row_of(opened.name, number, values, lines.place, lines.part)


def _record(lines: _Lines, settings: CsvSettings) -> list[str] | None:
    """The next record, empty for a blank line; None at the end. Raises `InvalidInput` for one that cannot be read."""
    line = lines.read()
    if line is None:
        return None
    behind = lines.place
    try:
        return next(csv.reader(_texts(line, lines), delimiter=settings.delimiter, strict=True))
    except (csv.Error, UnicodeDecodeError, InvalidInput) as error:
        # A quote that is never closed has swallowed lines that are good.
        lines.go(behind)
        raise InvalidInput(f"expected CSV, got {reprlib.repr(line)}: {error}") from None


def _texts(line: bytes | None, lines: _Lines) -> Iterator[str]:
    """The lines of one record, as its quotes ask for them."""
    size = 0
    while line is not None:
        size += len(line)
        if size > MAX_LINE:
            raise InvalidInput(f"expected a record of at most {MAX_LINE} bytes")
        yield line.decode()
        line = lines.read()
