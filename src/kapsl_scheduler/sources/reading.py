"""What the readers of all formats share: the open file that they are given, the rows that they yield.

No format and no choice of columns lives here (`sources.columns`), nor which files are read (`sources.folder`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple, Protocol

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.sources.columns import Columns, Values

__all__ = ["OpenFile", "Place", "Reader", "Row", "row_of", "row_of_array"]


class OpenFile(NamedTuple):
    """A file as it was when it was opened: `name` is its path inside the folder, `size` its bytes then."""

    name: str
    file: BinaryIO
    size: int


class Place(NamedTuple):
    """Where to go on in a file: behind so many rows (lines, in text), at this byte (0 where a row says it all)."""

    row: int = 0
    offset: int = 0


class Row(NamedTuple):
    """One row of a file: its values, or what is wrong with it.

    `number` is the row's: lines of text count from 1, rows of arrays and tables from 0, an image has none.
    `then` is the place behind it, `part` how much of the file lies behind it, from 0 to 1.
    """

    number: int | None
    values: Values | None
    error: InvalidInput | None
    then: Place
    part: float


class Reader(Protocol):
    """Reads one format, from any place that its rows named.

    A row that cannot be read is yielded with its error, and the next one follows. `InvalidInput` is raised where the
    rest of the file is lost, `OSError` where reading failed.
    """

    def __call__(self, opened: OpenFile, columns: Columns, start: Place) -> Iterator[Row]: ...


def row_of(name: str, number: int, values: Values | InvalidInput, then: Place, part: float) -> Row:
    """A row of the file `name`, or what is wrong with it."""
    if isinstance(values, InvalidInput):
        return Row(number, None, InvalidInput(f"{name}:{number}: {values}"), then, part)
    return Row(number, values, None, then, part)


def row_of_array(name: str, index: int, rows: int, choose: Callable[[Any], Values], value: Any) -> Row:
    """Row `index` of so many: what `choose` makes of `value`, or why it cannot."""
    try:
        values: Values | InvalidInput = choose(value)
    except InvalidInput as error:
        values = error
    return row_of(name, index, values, Place(index + 1), (index + 1) / rows)
