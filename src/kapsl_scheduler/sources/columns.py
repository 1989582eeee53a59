"""How the columns of a row become the inputs of a model: which of them, as which dtype, checked.

Rows come from any format: a mapping of column names to numbers, lists, arrays or text, or one bare value. What is not
here: how rows are read, and how several become one request.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any, Final

import msgspec
import numpy as np

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.types import Array, canonical_dtype, numpy_dtype

__all__ = ["Chosen", "Columns", "Inputs", "Values"]

Chosen = str | tuple[str, ...]
"""One column as it is, or several numbers stacked to one vector."""

Inputs = Chosen | dict[str, Chosen] | None
"""What makes the only input of a model, or each input by its name; None: all that the row has."""

Values = Array | dict[str, Array]
"""One row without the batch axis: the array of the only input, or each input's array by its name."""

_NUMBERS: Final = "biuf"


class Columns:
    """The choice of columns, applied to row after row. Raises `ValueError` if it contradicts itself.

    `dtype` is that of all inputs, or of each by name. Where there is none, an array keeps its own; numbers of text
    become float32, truth values bool, strings string.
    """

    def __init__(self, inputs: Inputs, dtype: str | Mapping[str, str] | None) -> None:
        self._inputs = inputs
        self._dtype = dtype
        named = inputs if isinstance(inputs, dict) else {} if inputs is None else {"": inputs}
        chosen = [column for choice in named.values() for column in ([choice] if isinstance(choice, str) else choice)]
        if inputs is not None and not (named and all(named.values())):
            raise ValueError("inputs: expected at least one column for each input, got none")
        self.names: tuple[str, ...] | None = None if inputs is None else tuple(dict.fromkeys(chosen))
        """The columns that are read; None: all."""
        for name in dtype.values() if isinstance(dtype, Mapping) else () if dtype is None else (dtype,):
            if canonical_dtype(name) is None:
                raise ValueError(f"dtype: there is no dtype {name!r}")
        if isinstance(dtype, Mapping) and inputs is not None:
            strange = [name for name in dtype if name not in named or not isinstance(inputs, dict)]
            if strange:
                raise ValueError(f"dtype: {', '.join(map(repr, strange))}: not among the names of inputs")

    def row(self, values: Mapping[str, Any], *, text: bool = False) -> Values:
        """The inputs of one row of a table. Without a choice, all columns make the only input: one as it is, several
        stacked. `text` says that the values are text, to be read as numbers or as JSON lists."""
        inputs = self._inputs
        if inputs is None:
            inputs = next(iter(values)) if len(values) == 1 else tuple(values)
        if isinstance(inputs, dict):
            return {name: self._choose(choice, values, self._of(name), text) for name, choice in inputs.items()}
        return self._choose(inputs, values, self._of(None), text)

    def named(self, values: Mapping[str, Any]) -> Values:
        """The inputs of one row whose columns have names of the author's: without a choice, each is an input."""
        if self._inputs is not None:
            return self.row(values)
        if not values:
            raise InvalidInput("expected at least one value, got {}")
        return {name: _array(value, self._of(name), f"column {name!r}") for name, value in values.items()}

    def bare(self, value: Any) -> Values:
        """The only input, from a row that has no columns. Raises `InvalidInput` if columns were chosen."""
        if self.names is not None:
            expected = ", ".join(map(repr, self.names))
            raise InvalidInput(f"expected columns {expected}, got {reprlib.repr(value)}, which has none")
        return _array(value, self._of(None), "row")

    def check(self, there: tuple[str, ...] | list[str]) -> None:
        """Raises `InvalidInput` for columns that were chosen and are not `there`."""
        missing = [name for name in self.names or () if name not in there]
        if missing:
            raise InvalidInput(f"no column {', '.join(map(repr, missing))}, there is {reprlib.repr(list(there))}")

    def _of(self, name: str | None) -> str | None:
        dtype = self._dtype
        if isinstance(dtype, Mapping):
            dtype = dtype.get(name) if name is not None else None
        return None if dtype is None else canonical_dtype(dtype)

    def _choose(self, choice: Chosen, values: Mapping[str, Any], dtype: str | None, text: bool) -> Array:
        try:
            if isinstance(choice, str):
                value = values[choice]
                where = f"column {choice!r}"
                return _array(_parsed(value, dtype, where) if text else value, dtype, where)
            if text:
                return _array([_parsed(values[name], dtype, f"column {name!r}") for name in choice], dtype, "row", 1)
            try:
                return _array([values[name] for name in choice], dtype, "row", 1)
            except InvalidInput:
                for name in choice:  # a second look, to say which one it was
                    _array(values[name], dtype, f"column {name!r}", 0)
                raise
        except KeyError as error:
            raise InvalidInput(f"no column {error.args[0]!r}, there is {reprlib.repr(list(values))}") from None


# ------------------------------------------------------------------------------------------------ values


def _parsed(value: str, dtype: str | None, where: str) -> Any:
    """What a cell of text says: text for a string input, else a number, or a JSON list of them."""
    if dtype == "string":
        return value
    shown = value.strip()
    try:
        if shown.startswith("["):
            return msgspec.json.decode(shown)
        if "_" in shown:  # which Python would take for a separator
            raise ValueError
        if dtype is not None and numpy_dtype(dtype).kind in "iub":
            try:
                return int(shown)  # exact beyond 2^53, where a float is not
            except ValueError:
                pass
        return float(shown)
    except (ValueError, RecursionError):
        raise InvalidInput(f"{where}: expected a number or a list of numbers, got {reprlib.repr(value)}") from None


def _array(value: Any, dtype: str | None, where: str, rank: int | None = None) -> Array:
    """`value` as an array of `dtype`. Raises `InvalidInput` for what is no array of numbers (or of strings), for
    numbers that the dtype cannot hold and for another rank."""
    first = value[0] if isinstance(value, list) and value else value
    typed = isinstance(first, np.ndarray | np.generic)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        array = np.empty((), object)  # lists of several lengths
    if rank is not None and array.ndim != rank:
        raise InvalidInput(f"{where}: expected {'numbers' if rank else 'a number'}, got {reprlib.repr(value)}")
    if dtype == "string" or (dtype is None and array.dtype.kind in "OSU"):
        return _strings(value, where)
    if array.dtype.kind not in _NUMBERS:
        raise InvalidInput(f"{where}: expected numbers, got {reprlib.repr(value)}")
    if dtype is not None:
        return _cast(array, numpy_dtype(dtype), where)
    if typed:
        return array.astype(array.dtype.newbyteorder("="), copy=False)
    return array if array.dtype.kind == "b" else _cast(array, np.dtype(np.float32), where)


def _strings(value: Any, where: str) -> Array:
    array = np.asarray(value, object)
    if not all(isinstance(element, str | bytes) for element in array.flat):
        raise InvalidInput(f"{where}: expected numbers or text, got {reprlib.repr(value)}")
    return array


def _cast(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    if array.dtype == dtype:
        return array
    with np.errstate(all="ignore"):  # what overflows is refused, with a message of ours
        cast = array.astype(dtype)
    if not _holds(array, cast):
        raise InvalidInput(f"{where}: expected numbers that {dtype.name} can hold, got {reprlib.repr(array.tolist())}")
    return cast


def _holds(array: Array, cast: Array) -> bool:
    """Whether only floats were rounded, and nothing else has become another number."""
    if cast.dtype.kind == "f":
        return not np.any(np.isinf(cast) & np.isfinite(array))
    if not array.size:
        return True
    low, high = (0, 1) if cast.dtype.kind == "b" else (np.iinfo(cast.dtype).min, np.iinfo(cast.dtype).max)
    # As Python's numbers, which compare exactly whatever their types; NaN is in no range.
    within = low <= array.min().item() and array.max().item() <= high
    return bool(within and np.all(np.trunc(array) == array))
