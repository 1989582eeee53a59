"""Parquet: rows of a table, read by record batches of a few megabytes. By pyarrow (extra `parquet`).

Numbers keep the dtype that the file has; lists of numbers become arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from kapsl_scheduler.errors import Backend, InvalidInput
from kapsl_scheduler.sources.columns import Columns
from kapsl_scheduler.sources.reading import OpenFile, Place, Row, row_of_array

__all__ = ["read_parquet"]

_BATCH_BYTES: Final = 4 << 20
_BATCH_ROWS: Final = 4096
_BUFFER_BYTES: Final = 1 << 20


def read_parquet(opened: OpenFile, columns: Columns, start: Place) -> Iterator[Row]:
    """A row of the table is a row. Without chosen columns all make the only input."""
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise Backend("Parquet needs pyarrow: pip install 'kapsl-scheduler[parquet]'") from error
    try:
        # With a buffer a column of a row group is streamed; without it is read whole.
        table = parquet.ParquetFile(opened.file, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        names = table.schema_arrow.names
        columns.check(names)
        wanted = names if columns.names is None else list(columns.names)
        total = table.metadata.num_rows
        row, groups = _from(table.metadata, start.row)
        size = max(1, min(_BATCH_ROWS, _BATCH_BYTES // _row_bytes(table.metadata)))
        for batch in table.iter_batches(size, row_groups=groups, columns=wanted, use_threads=False):
            for index, values in _rows(pa, batch, row, start.row):
                yield row_of_array(opened.name, index, total, columns.row, values)
            row += batch.num_rows
    except InvalidInput as error:
        raise InvalidInput(f"{opened.name}: {error}") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # reading failed, not decoding
        raise InvalidInput(f"{opened.name}: expected a Parquet file: {error}") from error


def _from(metadata: Any, row: int) -> tuple[int, list[int]]:
    """The row groups that hold `row` and all behind it, and the first row that they hold."""
    first = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if first + rows > row:
            return first, list(range(group, metadata.num_row_groups))
        first += rows
    return first, []


def _row_bytes(metadata: Any) -> int:
    """What a row takes, by the largest row group's average."""
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    return max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0) or 1


def _rows(pa: Any, batch: Any, first: int, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a batch from `start` on, each with its number; the batch begins with row `first`."""
    batch = batch.slice(max(0, start - first))
    names = batch.schema.names
    values = [_values(pa, column) for column in batch.columns]
    for index, row in enumerate(zip(*values, strict=True), max(first, start)):
        yield index, dict(zip(names, row, strict=True))


def _values(pa: Any, array: Any) -> Sequence[Any]:
    """The elements of a column: numbers of numpy, arrays for lists of them, None where there is none, else Python's."""
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [_values(pa, element.values) if element.is_valid else None for element in array]
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        if not array.null_count:
            numbers: Sequence[Any] = array.to_numpy(zero_copy_only=False)
            return numbers
        filled = array.fill_null(False if pa.types.is_boolean(kind) else 0).to_numpy(zero_copy_only=False)
        return [number if valid else None for number, valid in zip(filled, array.is_valid(), strict=True)]
    elements: list[Any] = array.to_pylist()
    return elements
