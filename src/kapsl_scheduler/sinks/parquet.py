"""Results as Parquet: a part for each flush, which appears whole or not at all. By pyarrow (extra `parquet`)."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import msgspec
import numpy as np

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.errors import Backend, Unavailable
from kapsl_scheduler.ports import SinkItem, SinkWriter
from kapsl_scheduler.sinks.documents import fault_of
from kapsl_scheduler.sinks.memory import Remembered
from kapsl_scheduler.sinks.paths import check_template, lock, make_folder, naming, path_of, sync_folder
from kapsl_scheduler.types import Array

__all__ = ["ParquetSink"]

_GROUP_ROWS: Final = 4096
_GROUP_BYTES: Final = 4 << 20
_FIXED: Final = ("key", "error_code", "error_message")


class ParquetSink(
    msgspec.Struct,
    frozen=True,
    tag="parquet",
    tag_field="type",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """One row for each result, in the order of the requests, in parts `NAME-00001.parquet`, `NAME-00002.parquet`, ...

    Columns: `key`, `error_code` and `error_message` (null for an answer); for each output its elements as a list, in C
    order, and `OUTPUT_shape`, both null for an error. float16 is stored as float32. An output whose column's name is
    taken gets `_` behind it. Outputs of other names or dtypes than before begin a new part.

    `path` is as in `JsonLinesSink`, `.parquet` at its end is not needed. Each flush with results makes at least one
    part, of row groups of a few megabytes. Parts are numbered on from those that are there. A resumed run goes on
    behind its last flush. Hidden files beside the parts are the writer's.

    `open` raises `Backend` without pyarrow, `Unavailable` while another run writes there; what the file system refuses
    is an `OSError` with the path. `ValueError` is raised for a path that cannot be.
    """

    path: str

    def __post_init__(self) -> None:
        check_template(self.path)

    def open(self, firing: Firing, memory: Mapping[str, str]) -> SinkWriter:
        try:
            import pyarrow as pa
            from pyarrow import parquet
        except ImportError as error:
            raise Backend("Parquet needs pyarrow: pip install 'kapsl-scheduler[parquet]'") from error
        remembered = Remembered(memory, firing)
        path = path_of(self.path, firing)
        parts = _Parts(path.with_name(path.name.removesuffix(".parquet")))
        parts.claim()
        try:
            number = 1
            if remembered.mark is not None:
                before = _Parts(Path(remembered.mark.path))
                before.drop_from(remembered.mark.at)
                number = remembered.mark.at if before.base == parts.base else 1
            return _Writer(pa, parquet, parts, max([number, *(last + 1 for last in parts.numbers())]), remembered)
        except BaseException:
            parts.release()
            raise


class _Parts:
    """The files of one path: the parts, the ones that are being written, and the lock."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self._lock: int | None = None
        self._lock_path = base.with_name(f".{base.name}.lock")

    def part(self, number: int) -> Path:
        return self.base.with_name(f"{self.base.name}-{number:05}.parquet")

    def draft(self, number: int) -> Path:
        return self.base.with_name(f".{self.base.name}-{number:05}.parquet.tmp")

    def numbers(self) -> list[int]:
        return self._matching(f"{re.escape(self.base.name)}-([0-9]{{5,}})\\.parquet")

    def drop_from(self, number: int) -> None:
        """Take away parts that no flush has vouched for."""
        for later in self.numbers():
            if later >= number:
                self.part(later).unlink(missing_ok=True)

    def claim(self) -> None:
        """Make the folder, keep others out, and clear away what a crash has left."""
        make_folder(self.base.parent)
        descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            lock(descriptor, self.base)
            if not os.fstat(descriptor).st_nlink:  # its owner has let go of it between the two calls
                raise Unavailable(f"sink: another run has just written to {self.base}")
            for number in self._matching(f"\\.{re.escape(self.base.name)}-([0-9]{{5,}})\\.parquet\\.tmp"):
                self.draft(number).unlink(missing_ok=True)
        except BaseException:
            os.close(descriptor)
            raise
        self._lock = descriptor

    def release(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None

    def _matching(self, pattern: str) -> list[int]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.base.parent) as entries:
            return [int(match[1]) for entry in entries if (match := re.fullmatch(pattern, entry.name))]
        return []


class _Row(NamedTuple):
    key: str
    fault: tuple[str, str] | None
    outputs: Mapping[str, Array]


class _Writer:
    """Rows gather in memory up to a row group. `_types` are the outputs of the part at hand, None before the first
    answer; `_drafts` the numbers of parts that are written and have not got their names."""

    def __init__(self, pa: Any, parquet: Any, parts: _Parts, number: int, remembered: Remembered) -> None:
        self._pa = pa
        self._parquet = parquet
        self._parts = parts
        self._number = number
        self._remembered = remembered
        self._rows: list[_Row] = []
        self._size = 0
        self._types: dict[str, Any] | None = None
        self._drafts: list[int] = []
        self._file: BinaryIO | None = None
        self._table: Any = None

    def write(self, items: Sequence[SinkItem]) -> None:
        for item in items:
            fault = fault_of(item)
            outputs: Mapping[str, Array] = {}
            if fault is None and item.response is not None:
                outputs = item.response.outputs
                types = {name: self._type(array) for name, array in outputs.items()}
                if self._types is not None and types != self._types:
                    self._end_part()
                self._types = types
            self._rows.append(_Row(item.key, fault, outputs))
            self._size += sum(array.nbytes for array in outputs.values())
            if len(self._rows) >= _GROUP_ROWS or self._size >= _GROUP_BYTES:
                self._end_group()

    def flush(self) -> Mapping[str, str | None]:
        self._end_part()
        for number in self._drafts:
            os.replace(self._parts.draft(number), self._parts.part(number))
        if self._drafts:
            sync_folder(self._parts.base.parent)
            self._drafts = []
        return self._remembered.reached(self._number, str(self._parts.base))

    def close(self) -> None:
        if self._file is not None:
            self._drafts.append(self._number)
            with contextlib.suppress(OSError):
                self._table.close()
            self._table.is_open = False  # else it is closed once more when it is collected
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        for number in self._drafts:
            self._parts.draft(number).unlink(missing_ok=True)
        self._drafts = []
        self._parts.release()

    def _end_group(self) -> None:
        """Write the rows that have gathered."""
        if not self._rows:
            return
        types = self._types = self._types or {}
        columns = self._columns(types)
        table = self._pa.table(columns)
        draft = self._parts.draft(self._number)
        with naming(draft):
            if self._file is None:
                self._file = open(draft, "wb")  # noqa: SIM115 - closed with the part
                self._table = self._parquet.ParquetWriter(self._file, table.schema)
            self._table.write_table(table)
        self._rows, self._size = [], 0

    def _end_part(self) -> None:
        self._end_group()
        self._types = None
        if self._file is None:
            return
        with naming(self._parts.draft(self._number)):
            self._table.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        self._drafts.append(self._number)
        self._number += 1

    def _columns(self, types: Mapping[str, Any]) -> dict[str, Any]:
        pa = self._pa
        faults = [row.fault or (None, None) for row in self._rows]
        columns = {
            "key": pa.array([row.key for row in self._rows], pa.string()),
            "error_code": pa.array([code for code, _ in faults], pa.string()),
            "error_message": pa.array([message for _, message in faults], pa.string()),
        }
        for name, kind in types.items():
            column = name
            while column in columns or f"{column}_shape" in columns:
                column += "_"
            arrays = [row.outputs.get(name) for row in self._rows]
            elements = [None if array is None else self._elements(array, kind) for array in arrays]
            shapes = [None if array is None else array.shape for array in arrays]
            columns[column] = pa.array(elements, pa.list_(kind))
            columns[f"{column}_shape"] = pa.array(shapes, pa.list_(pa.int64()))
        return columns

    def _type(self, array: Array) -> Any:
        """The type of an output's elements."""
        pa = self._pa
        if array.dtype == np.float16:  # which not every reader of Parquet knows
            return pa.float32()
        if array.dtype.kind in "OSU":
            return pa.binary() if any(isinstance(element, bytes) for element in array.flat) else pa.string()
        try:
            return pa.from_numpy_dtype(array.dtype)
        except NotImplementedError:
            return pa.string()

    def _elements(self, array: Array, kind: Any) -> Any:
        """All elements in C order, as `kind` wants them."""
        pa, flat = self._pa, array.ravel()
        if kind == pa.binary():
            return [element if isinstance(element, bytes) else str(element).encode() for element in flat]
        if kind == pa.string():
            return [str(element) for element in flat.tolist()]
        return flat.astype(np.float32) if flat.dtype == np.float16 else flat
