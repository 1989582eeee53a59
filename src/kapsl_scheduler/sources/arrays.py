"""Arrays of numpy, `.npy` and `.npz`: rows on axis 0, read in blocks of some hundred kilobytes.

Nothing is unpickled. Files are read, not mapped: a file that shrinks while it is mapped kills the process.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, Final

import numpy as np
from numpy.lib import format as npy

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.sources.columns import Columns
from kapsl_scheduler.sources.reading import OpenFile, Place, Row, row_of_array
from kapsl_scheduler.types import Array

__all__ = ["MAX_ARRAYS", "MAX_ROW", "read_npy", "read_npz"]

MAX_ROW: Final = 256 << 20
"""Bytes of the largest row that is read, and of the largest compressed array in Fortran order."""
MAX_ARRAYS: Final = 256
"""The most arrays of one `.npz` that are read side by side."""

_BLOCK: Final = 256 << 10
_READERS: Final = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_SUFFIX: Final = ".npy"


class _Stream:
    """The rows of one array from a file that stands at its beginning. Raises `InvalidInput` for what is no array of
    numbers or text with rows."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._name = name
        try:
            read = _READERS[npy.read_magic(file)]
            shape, fortran, dtype = read(file)
        except (ValueError, KeyError, EOFError) as error:
            raise InvalidInput(f"{name}: expected a .npy array of version 1 or 2: {error}") from None
        if dtype.kind not in "biufSU":
            raise InvalidInput(f"{name}: expected numbers or text, got dtype {dtype}; nothing is unpickled")
        if not shape:
            raise InvalidInput(f"{name}: expected rows on axis 0, got a single value")
        self.rows = int(shape[0])
        self.size = math.prod(shape) * dtype.itemsize
        self._inner = shape[1:]
        self._dtype = dtype
        self._width = math.prod(self._inner) * dtype.itemsize
        if not 0 < self._width <= MAX_ROW:
            raise InvalidInput(f"{name}: expected rows of 1 to {MAX_ROW} bytes, got {self._width} of shape {shape}")
        self._file = file
        self._fortran = fortran and len(shape) > 1
        if self._fortran and not isinstance(file, io.BufferedReader):  # going back in a compressed file is slow
            if self.size > MAX_ROW:
                raise InvalidInput(f"{name}: expected C order, or at most {MAX_ROW} bytes in Fortran order")
            self._file = io.BytesIO(file.read(self.size))
        self._begin = self._file.tell()
        self.block = max(1, _BLOCK // self._width)

    def skip(self, row: int) -> None:
        """Go to `row`, from the first one."""
        if not self._fortran:
            self._file.seek(row * self._width, io.SEEK_CUR)

    def take(self, row: int, count: int) -> Array:
        """`count` rows from `row` on, which is where the last ones ended."""
        if not self._fortran:
            return self._read(count * self._width).reshape(count, *self._inner)
        pieces = []
        item = self._dtype.itemsize
        for place in range(self._width // item):
            self._file.seek(self._begin + (place * self.rows + row) * item)
            pieces.append(self._read(count * item))
        return np.stack(pieces).reshape(*reversed(self._inner), count).T

    def _read(self, size: int) -> Array:
        data = self._file.read(size)
        if len(data) < size:
            raise InvalidInput(f"{self._name}: the file is shorter than its header says: it was cut off")
        return np.frombuffer(data, self._dtype)


def read_npy(opened: OpenFile, columns: Columns, start: Place) -> Iterator[Row]:
    """The one array is the only input."""
    stream = _Stream(opened.file, opened.name)
    if opened.file.tell() + stream.size > opened.size:
        raise InvalidInput(f"{opened.name}: expected {stream.size} bytes of numbers, got less: the file is cut off")
    stream.skip(start.row)
    for row in range(start.row, stream.rows, stream.block):
        block = stream.take(row, min(stream.block, stream.rows - row))
        for index, value in enumerate(block, row):
            yield row_of_array(opened.name, index, stream.rows, columns.bare, value)


def read_npz(opened: OpenFile, columns: Columns, start: Place) -> Iterator[Row]:
    """Each array is an input of its name, or the column of that name where columns are chosen; all have the same rows.
    They are decompressed side by side, block by block."""
    try:
        yield from _npz_rows(opened, columns, start)
    # What `zipfile` raises for damaged archives, for encrypted ones, and for compressions that it does not know.
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{opened.name}: expected an .npz archive: {error}") from None


def _npz_rows(opened: OpenFile, columns: Columns, start: Place) -> Iterator[Row]:
    with zipfile.ZipFile(opened.file) as archive:
        there = [name.removesuffix(_SUFFIX) for name in archive.namelist() if name.endswith(_SUFFIX)]
        try:
            columns.check(there)
        except InvalidInput as error:
            raise InvalidInput(f"{opened.name}: {error}") from None
        names = there if columns.names is None else list(columns.names)
        if not 0 < len(names) <= MAX_ARRAYS:
            raise InvalidInput(f"{opened.name}: expected 1 to {MAX_ARRAYS} arrays, got {len(names)}")
        streams = {name: _Stream(archive.open(name + _SUFFIX), f"{opened.name}: {name!r}") for name in names}
        lengths = {name: stream.rows for name, stream in streams.items()}
        rows = min(lengths.values())
        if rows < max(lengths.values()):
            raise InvalidInput(f"{opened.name}: expected as many rows in every array, got {lengths}")
        for stream in streams.values():
            stream.skip(start.row)
        size = min(stream.block for stream in streams.values())
        for row in range(start.row, rows, size):
            blocks = {name: stream.take(row, min(size, rows - row)) for name, stream in streams.items()}
            for index in range(row, min(row + size, rows)):
                value = {name: block[index - row] for name, block in blocks.items()}
                yield row_of_array(opened.name, index, rows, columns.named, value)
