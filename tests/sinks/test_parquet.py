"""Parquet: columns, parts, what is left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from kapsl_scheduler.errors import Backend, InvalidInput, Unavailable
from kapsl_scheduler.ports import SinkItem
from kapsl_scheduler.sinks import ParquetSink, parquet
from tests.sinks.answers import answer, answers, firing, keys, remember, rows_of


def write(folder: Path, *flushed: list[SinkItem]) -> list[Path]:
    writer = ParquetSink(str(folder / "out.parquet")).open(firing(), {})
    for items in flushed:
        writer.write(items)
        writer.flush()
    writer.close()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    return sorted(folder.iterdir())


def test_columns_have_the_types_of_the_outputs(tmp_path: Path) -> None:
    items = [
        SinkItem("first", None, InvalidInput("bad")),
        answer(
            "second",
            probabilities=np.array([[0.1, 0.9]], np.float32),
            label=np.array([7], np.int64),
            half=np.array([0.5], np.float16),
            ok=np.array([[True]]),
            word=np.array(["ä"], object),
            raw=np.array([b"\xff", "x"], object),
            odd=np.array([1 + 2j]),
            scalar=np.float64(3),
        ),
        SinkItem("third", None),
    ]
    (part,) = write(tmp_path, items)
    assert part.name == "out-00001.parquet"
    table = pq.read_table(part)
    types = {field.name: field.type for field in table.schema if not field.name.endswith("_shape")}
    assert types == {
        "key": pa.string(),
        "error_code": pa.string(),
        "error_message": pa.string(),
        "probabilities": pa.list_(pa.float32()),
        "label": pa.list_(pa.int64()),
        "half": pa.list_(pa.float32()),
        "ok": pa.list_(pa.bool_()),
        "word": pa.list_(pa.string()),
        "raw": pa.list_(pa.binary()),
        "odd": pa.list_(pa.string()),
        "scalar": pa.list_(pa.float64()),
    }
    first, second, third = table.to_pylist()
    assert (first["error_code"], first["error_message"], first["label"]) == ("invalid_input", "bad", None)
    assert second["error_code"] is None
    assert second["probabilities"] == pytest.approx([0.1, 0.9])
    assert second["probabilities_shape"] == [1, 2]
    assert second["raw"] == [b"\xff", b"x"]
    assert second["odd"] == ["(1+2j)"]
    assert second["scalar_shape"] == []
    assert third["label"] is None


def test_shapes_may_differ_and_are_kept(tmp_path: Path) -> None:
    arrays = [np.arange(6.0).reshape(2, 3), np.arange(4.0).reshape(1, 2, 2)]
    write(tmp_path, [answer(str(index), y=array) for index, array in enumerate(arrays)])
    for row, array in zip(rows_of(tmp_path), arrays, strict=True):
        np.testing.assert_array_equal(np.reshape(row["y"], row["y_shape"]), array)


def test_names_that_are_taken_get_an_underscore(tmp_path: Path) -> None:
    write(tmp_path, [answer("k", key=[1], y=[2], y_shape=[3], error_code=[4])])
    (row,) = rows_of(tmp_path)
    assert row["key"] == "k"
    assert (row["key_"], row["y"], row["y_shape"], row["y_shape_"]) == ([1], [2], [1], [3])
    assert (row["error_code"], row["error_code_"]) == (None, [4])


def test_each_flush_with_results_makes_a_part(tmp_path: Path) -> None:
    parts = write(tmp_path, answers(3), [], answers(2, start=3))
    assert [part.name for part in parts] == ["out-00001.parquet", "out-00002.parquet"]
    assert [row["key"] for row in rows_of(tmp_path)] == keys(answers(5))


def test_a_part_is_on_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ParquetSink(str(tmp_path / "out")).open(firing(), {})
    writer.write(answers(2))
    steps: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append("file"))
    monkeypatch.setattr(os, "replace", lambda old, new: (steps.append("name"), replace(old, new)))
    monkeypatch.setattr(parquet, "sync_folder", lambda folder: steps.append("folder"))
    writer.flush()
    writer.close()
    assert steps == ["file", "name", "folder"]


def test_other_outputs_begin_another_part(tmp_path: Path) -> None:
    error = SinkItem("error", None, InvalidInput("bad"))
    parts = write(tmp_path, [error, answer("a", y=[1]), error, answer("b", y=[1.5]), answer("c", z=[1.5])])
    assert [pq.read_metadata(part).num_rows for part in parts] == [3, 1, 1]


def test_rows_go_to_disk_before_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 3)
    (part,) = write(tmp_path, [answer(str(number), y=[number]) for number in range(7)])
    assert [pq.read_metadata(part).row_group(group).num_rows for group in range(3)] == [3, 3, 1]
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 1)
    parts = write(tmp_path, [answer(str(number), y=[number]) for number in range(2)])
    assert [pq.read_metadata(part).num_row_groups for part in parts] == [3, 2]


def test_errors_alone_fill_row_groups_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 2)
    errors = [SinkItem(str(number), None, InvalidInput("bad")) for number in range(3)]
    write(tmp_path, [*errors, answer("a", y=[1])])
    assert [row["key"] for row in rows_of(tmp_path)] == ["0", "1", "2", "a"]


def test_parts_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out-00041.parquet").touch()
    (tmp_path / "out-x.parquet").touch()
    (tmp_path / "outer-00099.parquet").touch()
    assert (tmp_path / "out-00042.parquet") in write(tmp_path, answers(1))


def test_numbers_are_not_used_again_where_parts_were_taken_away(tmp_path: Path) -> None:
    sink = ParquetSink(str(tmp_path / "out"))
    memory: dict[str, str] = {}
    writer = sink.open(firing(), memory)
    writer.write(answers(1))
    remember(memory, writer.flush())
    writer.close()
    (tmp_path / "out-00001.parquet").unlink()
    writer = sink.open(firing(attempt=2), memory)
    writer.write(answers(1))
    writer.flush()
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["out-00002.parquet"]


def test_what_a_crash_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".out-00001.parquet.tmp").touch()
    (tmp_path / ".out.lock").touch()
    assert [path.name for path in write(tmp_path, answers(1))] == ["out-00001.parquet"]


def test_a_lock_that_was_let_go_of_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "lock", lambda descriptor, path: (tmp_path / ".out.lock").unlink())
    with pytest.raises(Unavailable, match="has just written"):
        write(tmp_path)


@pytest.mark.parametrize("fails", ["write", "close"])
def test_a_disk_that_is_full_is_an_error_with_the_path(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        """A file on a disk that is full, from a number of bytes on."""

        def __init__(self, file: Any, room: int) -> None:
            self._file = file
            self._room = room

        def write(self, data: Any) -> int:
            self._room -= len(data)
            if self._room < 0:
                raise OSError(28, "No space left on device")
            return int(self._file.write(data))

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    room = 4 if fails == "write" else 400
    monkeypatch.setattr(parquet, "open", lambda path, mode: Full(open(path, mode), room), raising=False)  # noqa: SIM115
    writer = ParquetSink(str(tmp_path / "out")).open(firing(), {})
    writer.write(answers(2))
    with pytest.raises(OSError, match=r"No space left on device: '.*out-00001\.parquet\.tmp'"):
        writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        ParquetSink(str(tmp_path / "file" / "out")).open(firing(), {})
    os.mkdir(tmp_path / "out-00001.parquet")
    memory = {"sink:20261125T030000Z:schedule": '{"at":1,"path":"' + str(tmp_path / "out") + '"}'}
    with pytest.raises(OSError, match="out-00001"):
        ParquetSink(str(tmp_path / "out")).open(firing(attempt=2), memory)
    ParquetSink(str(tmp_path / "out")).open(firing(), {}).close()


def test_a_mark_in_a_folder_that_is_gone_is_no_trouble(tmp_path: Path) -> None:
    memory = {"sink:20261125T030000Z:schedule": '{"at":1,"path":"/no/such/folder/out"}'}
    ParquetSink(str(tmp_path / "out")).open(firing(attempt=2), memory).close()


def test_without_pyarrow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(Backend, match=r"pip install 'kapsl-scheduler\[parquet\]'"):
        write(tmp_path)
