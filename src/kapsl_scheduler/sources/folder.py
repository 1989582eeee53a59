"""The files of a folder as a job's requests: which are new, in which order, what is remembered of them.

How a format is read lives in a module of its own (`lines`, `arrays`, `images`, `parquet`); the table of them is here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Final, Literal, NamedTuple

import msgspec
import numpy as np

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources.arrays import read_npy, read_npz
from kapsl_scheduler.sources.columns import Columns, Inputs
from kapsl_scheduler.sources.images import ImageSettings, read_image
from kapsl_scheduler.sources.lines import CsvSettings, read_csv, read_json_lines
from kapsl_scheduler.sources.listing import Found, check_pattern, found_files, open_file
from kapsl_scheduler.sources.parquet import read_parquet
from kapsl_scheduler.sources.reading import Place, Reader, Row
from kapsl_scheduler.types import Array

__all__ = ["FolderSource"]

Format = Literal["image", "npy", "npz", "jsonl", "csv", "parquet"]

_BY_SUFFIX: Final[Mapping[str, str]] = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".jsonl", ".ndjson"), "jsonl"),
    **{f".{name}": name for name in ("npy", "npz", "csv", "parquet")},
}
_FORMATS: Final = frozenset(_BY_SUFFIX.values())
_NO_COLUMNS: Final = frozenset(("image", "npy"))
_PREFIX: Final = "source:"


class FolderSource(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    tag="folder",
    tag_field="type",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """Requests from the files below the folder `path` that `pattern` names, in the order of their paths.

    `pattern` is a glob relative to `path`; `**` stands for any folders. It never leads out of `path`. Hidden files
    count only where the pattern starts a name with a dot. `format` None goes by the suffix and passes over files of
    others: .png .jpg .jpeg .bmp .gif .webp .tif .tiff (extra `images`), .npy, .npz, .jsonl .ndjson, .csv, .parquet
    (extra `parquet`).

    A row is a line, a record of CSV or Parquet, an index of axis 0 of an array, or an image. A request has up to `rows`
    rows of one file (fewer at its end, before a row that cannot be read, and where the shape changes), with the batch
    axis in front.

    `inputs` says what the model is given: one column as it is (`"pixels"`: a number, a list, text), several numbers
    stacked to one vector (`("a", "b")`), or one of these for each input by name (`{"x": "pixels"}`). In `.npz` the
    arrays are the columns. None takes all: the columns of CSV and Parquet stacked, each array of `.npz` and each key of
    a JSON object as the input of that name, a JSON list, an array of `.npy` and an image as the only input.

    `dtype` is that of all inputs, or of each by name. Where it says nothing, `.npy`, `.npz` and Parquet keep their own,
    and numbers of text and of images are float32. A number that the dtype cannot hold makes its row a bad one.

    `again` is when a file is read again: once its size or its time of change is another (`changed`), or by every firing
    (`always`). What is remembered of a file is forgotten with the file, not when these settings change.

    A row that cannot be read, and a file, becomes an item with an `InvalidInput` that names it, and reading goes on.
    Keys are `FILE:NUMBER` or `FILE:FIRST-LAST`, with lines from 1, rows of arrays and tables from 0; `FILE` for an
    image.

    `ValueError` is raised for settings that contradict one another.
    """

    path: str
    pattern: str = "*"
    format: Format | None = None
    inputs: Inputs = None
    rows: int = 1
    dtype: str | dict[str, str] | None = None
    image: ImageSettings = ImageSettings()
    csv: CsvSettings = CsvSettings()
    again: Literal["changed", "always"] = "changed"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: expected a folder, got an empty text")
        check_pattern(self.pattern)
        if self.format is not None and self.format not in _FORMATS:
            raise ValueError(f"format: expected one of {', '.join(sorted(_FORMATS))}, got {self.format!r}")
        if self.format in _NO_COLUMNS and self.inputs is not None:
            raise ValueError(f"inputs: {self.format} has no columns to choose from")
        if self.rows < 1:
            raise ValueError(f"rows: expected at least 1, got {self.rows}")
        if self.again not in ("changed", "always"):
            raise ValueError(f"again: expected 'changed' or 'always', got {self.again!r}")
        Columns(self.inputs, self.dtype)

    def items(self, firing: Firing, memory: Mapping[str, str]) -> Iterator[SourceItem]:
        """The requests of all files that are new or were changed, behind what `memory` says was delivered.

        Files that come while it runs are the next firing's. Raises `InvalidInput` at once if the folder is not there or
        cannot be read, and `Backend`, where a file of that format comes, if a package is missing.
        """
        root = os.path.realpath(self.path)
        if not os.path.isdir(root):
            raise InvalidInput(f"source: expected a folder, there is none at {self.path}")
        known = {key: _read_mark(text) for key, text in memory.items() if key.startswith(_PREFIX)}
        listed = [file for file in found_files(root, self.pattern) if self._format_of(file.name)]
        others = known.keys() - {_key(file.name) for file in listed}  # gone, or passed over by the settings of today
        gone = [key for key in sorted(others) if not os.path.lexists(os.path.join(root, key.removeprefix(_PREFIX)))]
        run = f"{firing.nominal.isoformat()} {firing.origin}" if self.again == "always" else ""
        todo = []
        for file in listed:
            mark = known.get(_key(file.name))
            if mark is None or mark.row is not None or not mark.fits(file, run):
                todo.append((file, mark))
        return self._items(root, todo, run, dict.fromkeys(gone))

    def _items(
        self, root: str, todo: list[tuple[Found, _Mark | None]], run: str, marks: dict[str, str | None]
    ) -> Iterator[SourceItem]:
        """`marks` go out with the first item. While there is none nothing is forgotten: a folder that is empty because
        its file system is not mounted will be full of known files again, and what is remembered does not grow
        meanwhile."""
        total = sum(max(1, file.size) for file, _ in todo)
        behind = 0
        for file, mark in todo:
            weight = max(1, file.size)
            for item, part in self._of_file(root, file, mark, run):
                progress = (behind + weight * part) / total
                yield msgspec.structs.replace(item, marks={**marks, **item.marks}, progress=progress)
                marks = {}
            behind += weight

    def _of_file(self, root: str, file: Found, mark: _Mark | None, run: str) -> Iterator[tuple[SourceItem, float]]:
        """The items of one file, behind its mark if that still fits, each with the part of the file behind it."""
        name = _shown(file.name)
        try:
            opened = open_file(root, file.name)
        except OSError as error:  # not remembered: leave to read it changes neither its size nor its time
            yield SourceItem(None, name, {}, _unreadable(name, error)), 1.0
            return
        if opened is None:
            return
        content, now = opened
        start = Place()
        if mark is not None and mark.row is not None and mark.fits(now, run):
            start = Place(mark.row, mark.offset)
        with content.file:
            reader = self._readers()[self._format_of(file.name)]
            rows = reader(content._replace(name=name), Columns(self.inputs, self.dtype), start)
            for piece, last in _with_last(_pieces(rows, name, self.rows)):
                marks: dict[str, str | None] = {}
                if piece.then is not None:
                    row, offset = (None, 0) if last else piece.then
                    left = _Mark(now.size, now.mtime, row, offset, run)
                    marks[_key(file.name)] = msgspec.json.encode(left).decode()
                yield SourceItem(piece.request, piece.key, marks, piece.error), 1.0 if last else piece.part

    def _format_of(self, name: str) -> str:
        """The format of a file, empty if it has none that can be read."""
        return self.format or _BY_SUFFIX.get(os.path.splitext(name)[1].lower(), "")

    def _readers(self) -> dict[str, Reader]:
        return {
            "image": partial(read_image, settings=self.image),
            "npy": read_npy,
            "npz": read_npz,
            "jsonl": read_json_lines,
            "csv": partial(read_csv, settings=self.csv),
            "parquet": read_parquet,
        }


# ----------------------------------------------------------------------------------------------- memory


class _Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is remembered of a file: what it was, and where to go on in it; `row` None: it was read whole. `run` is by
    which run, where every firing reads it again."""

    size: int
    mtime: int
    row: int | None = None
    offset: int = 0
    run: str = ""

    def fits(self, file: Found, run: str) -> bool:
        # Not the inode: a folder that was copied or restored holds the same files.
        return (self.size, self.mtime) == (file.size, file.mtime) and run in ("", self.run)


def _read_mark(text: str) -> _Mark | None:
    try:
        return msgspec.json.decode(text, type=_Mark)
    except msgspec.MsgspecError:
        return None


def _shown(name: str) -> str:
    """The file's name as text that can be stored: names on disk are bytes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _key(name: str) -> str:
    return _PREFIX + _shown(name)


# --------------------------------------------------------------------------------------------- requests


class _Piece(NamedTuple):
    """One request of a file, or an error; the place and the part of the file behind it. `then` None: not remembered."""

    key: str
    request: Any
    error: Exception | None
    then: Place | None
    part: float


def _pieces(rows: Iterator[Row], name: str, limit: int) -> Iterator[_Piece]:
    """Rows put together to requests of at most `limit`, and what went wrong, in the order of the file."""
    group: list[Row] = []
    fault: _Piece | None = None
    try:
        for row in rows:
            if group and (len(group) == limit or _form(row) != _form(group[0])):
                yield _request(name, group)
                group = []
            if row.error is None:
                group.append(row)
            else:
                yield _Piece(_span(name, row, row), None, row.error, row.then, row.part)
    except InvalidInput as error:
        fault = _Piece(name, None, error, Place(), 1.0)
    except OSError as error:
        fault = _Piece(name, None, _unreadable(name, error), None, 1.0)
    if group:
        yield _request(name, group)
    if fault is not None:
        yield fault


def _form(row: Row) -> Any:
    """What rows of one request have in common; None for a row that cannot be read."""
    if isinstance(row.values, dict):
        return {name: (array.shape, array.dtype) for name, array in row.values.items()}
    return None if row.values is None else (row.values.shape, row.values.dtype)


def _request(name: str, group: list[Row]) -> _Piece:
    first, last = group[0], group[-1]
    rows: list[Any] = [row.values for row in group]
    if isinstance(first.values, dict):
        request: Any = {key: _stack([row[key] for row in rows]) for key in first.values}
    else:
        request = _stack(rows)
    return _Piece(_span(name, first, last), request, None, last.then, last.part)


def _stack(arrays: list[Array]) -> Array:
    return np.stack(arrays) if len(arrays) > 1 else arrays[0][np.newaxis]


def _span(name: str, first: Row, last: Row) -> str:
    if first.number is None:
        return name
    return f"{name}:{first.number}" if first is last else f"{name}:{first.number}-{last.number}"


def _unreadable(name: str, error: OSError) -> InvalidInput:
    fault = InvalidInput(f"{name}: cannot be read: {error.strerror}")
    fault.__cause__ = error
    return fault


def _with_last(pieces: Iterator[_Piece]) -> Iterator[tuple[_Piece, bool]]:
    """Each with whether it is the last one."""
    held: _Piece | None = None
    for piece in pieces:
        if held is not None:
            yield held, False
        held = piece
    if held is not None:
        yield held, True
