"""Parquet: dtypes, lists, nulls, row groups, and how much of a file is in memory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from kapsl_scheduler.errors import Backend
from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources import FolderSource
from tests.sources.files import firing


def items_of(folder: Path, columns: Any = None, **settings: Any) -> list[SourceItem]:
    if columns is not None:
        parquet.write_table(pa.table(columns), folder / "a.parquet")
    return list(FolderSource(path=str(folder), **settings).items(firing(), {}))


def test_columns_keep_their_dtypes(tmp_path: Path) -> None:
    columns = {
        "i": pa.array([1, 2], pa.int16()),
        "f": pa.array([1.5, 2.5], pa.float64()),
        "b": pa.array([True, False]),
        "s": pa.array(["x", "y"]),
        "l": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64())),
        "fixed": pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8(), 2)),
        "large": pa.array([[1, 2], [3, 4]], pa.large_list(pa.int64())),
        "nested": pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.int32()))),
    }
    items = items_of(tmp_path, columns, inputs={name: name for name in columns})
    request = items[1].request
    assert {name: array.dtype.name for name, array in request.items()} == {
        "i": "int16",
        "f": "float64",
        "b": "bool",
        "s": "object",
        "l": "float64",
        "fixed": "uint8",
        "large": "int64",
        "nested": "int32",
    }
    assert request["nested"].tolist() == [[[3, 4]]]
    assert request["s"].tolist() == ["y"]


def test_a_null_is_a_bad_row_and_the_others_keep_their_dtype(tmp_path: Path) -> None:
    columns = {"i": pa.array([1, None, 3]), "b": pa.array([True, True, None]), "l": pa.array([[1], [2], [3]])}
    items = items_of(tmp_path, columns, inputs={"i": "i", "b": "b", "l": "l"})
    assert [item.error is None for item in items] == [True, False, False]
    assert str(items[1].error) == "a.parquet:1: column 'i': expected numbers or text, got None"
    assert items[0].request["i"].dtype == np.int64
    columns = {"l": pa.array([[1.0], None, [2.0, None]], pa.list_(pa.float32()))}
    items = items_of(tmp_path, columns)
    assert [item.error is None for item in items] == [True, False, False]


def test_what_is_no_number_is_a_bad_row(tmp_path: Path) -> None:
    items = items_of(tmp_path, {"when": pa.array([0], pa.timestamp("us"))})
    assert "expected numbers" in str(items[0].error)


def test_a_column_that_is_not_there_costs_the_file(tmp_path: Path) -> None:
    (item,) = items_of(tmp_path, {"a": [1, 2]}, inputs="b")
    assert str(item.error) == "a.parquet: no column 'b', there is ['a']"
    assert item.key == "a.parquet"


def test_a_table_without_rows_has_none(tmp_path: Path) -> None:
    assert items_of(tmp_path, {"a": pa.array([], pa.int64())}) == []


@pytest.mark.slow
def test_a_row_group_is_not_held_in_memory_whole(tmp_path: Path) -> None:
    rows, width = 60_000, 50
    numbers = pa.array(np.random.default_rng(1).random(rows * width))
    table = pa.table({"x": pa.FixedSizeListArray.from_arrays(numbers, width)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=rows, compression="none", use_dictionary=False)
    del table, numbers
    before = pa.total_allocated_bytes()
    most = 0
    source = FolderSource(path=str(tmp_path), rows=500)
    for item in source.items(firing(), {}):
        assert item.request.shape == (500, width)
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < rows * width * 8 / 2


def test_reading_that_fails_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items_of(tmp_path, {"a": [1]})

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(parquet, "ParquetFile", fail)
    (item,) = items_of(tmp_path)
    assert str(item.error) == "a.parquet: cannot be read: Input/output error"
    assert item.marks == {}


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items_of(tmp_path, {"a": [1]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Backend, match=r"pip install 'kapsl-scheduler\[parquet\]'"):
        items_of(tmp_path)
