"""The source's own: its settings, what it passes over, memory of other hands."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources import CsvSettings, FolderSource, ImageSettings
from tests.sources.files import firing


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"path": ""}, "path: expected a folder"),
        ({"format": "xml"}, "format: expected one of csv, image"),
        ({"format": "npy", "inputs": "x"}, "inputs: npy has no columns"),
        ({"rows": 0}, "rows: expected at least 1"),
        ({"again": "never"}, "again: expected 'changed' or 'always'"),
        ({"dtype": "float31"}, "dtype: there is no dtype"),
        ({"inputs": ()}, "inputs: expected at least one column"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        FolderSource(**{"path": "x", **settings})


def test_it_is_stored_with_all_its_settings() -> None:
    source = FolderSource(
        path="in",
        pattern="**/*.csv",
        format="csv",
        inputs={"x": ("a", "b"), "y": "c"},
        rows=8,
        dtype={"y": "string"},
        image=ImageSettings(size=(8, 8), mean=(1.0, 2.0, 3.0)),
        csv=CsvSettings(delimiter=";", header=False),
        again="always",
    )
    assert msgspec.json.decode(msgspec.json.encode(source), type=FolderSource) == source
    for fault in (b'{"type": "folder", "path": "x", "rows": 0}', b'{"type": "folder", "path": "x", "row": 1}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(fault, type=FolderSource)


def test_files_of_no_known_suffix_are_passed_over_unless_a_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("1\n")
    (tmp_path / "b.JSONL").write_text("2\n")
    items = list(FolderSource(path=str(tmp_path)).items(firing(), {}))
    assert [item.key for item in items] == ["b.JSONL:1"]
    items = list(FolderSource(path=str(tmp_path), format="jsonl").items(firing(), {}))
    assert [item.key for item in items] == ["a.log:1", "b.JSONL:1"]


@pytest.mark.parametrize("text", ["", "{}", "null", '{"size": 2, "mtime": 1}'])
def test_what_it_cannot_read_of_its_memory_is_as_if_it_was_not_there(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    (item,) = FolderSource(path=str(tmp_path)).items(firing(), {"source:a.jsonl": text})
    assert item.key == "a.jsonl:1"


def test_marks_of_files_that_are_gone_go_out_with_the_first_item(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n2\n")
    memory = {"source:b": '{"size":1,"mtime":1}', "sink:c": "x"}
    first, second = FolderSource(path=str(tmp_path)).items(firing(), memory)
    assert first.marks["source:b"] is None
    assert list(second.marks) == ["source:a.jsonl"]


def remember(memory: dict[str, str], items: Iterable[SourceItem]) -> dict[str, str]:
    for item in items:
        memory = {key: mark for key, mark in {**memory, **item.marks}.items() if mark is not None}
    return memory


def test_files_that_pass_through_a_folder_leave_no_more_marks_than_the_last_of_them(tmp_path: Path) -> None:
    source = FolderSource(path=str(tmp_path))
    memory: dict[str, str] = {}
    for number in range(50):
        (tmp_path / f"{number}.jsonl").write_text("1\n")
        (tmp_path / f"{number}b.jsonl").write_text("1\n")
        memory = remember(memory, source.items(firing(), memory))
        assert sorted(memory) == [f"source:{number}.jsonl", f"source:{number}b.jsonl"]
        for file in tmp_path.iterdir():
            file.unlink()
        assert remember(memory, source.items(firing(), memory)) == memory  # nothing new: as they were


def test_a_folder_that_is_empty_for_a_while_is_not_read_anew(tmp_path: Path) -> None:
    """As the place of a file system that is not mounted."""
    folder, elsewhere = tmp_path / "in", tmp_path / "away"
    folder.mkdir()
    (folder / "a.jsonl").write_text("1\n")
    source = FolderSource(path=str(folder))
    memory = remember({}, source.items(firing(), {}))
    folder.rename(elsewhere)
    folder.mkdir()
    memory = remember(memory, source.items(firing(), memory))
    folder.rmdir()
    elsewhere.rename(folder)
    assert list(source.items(firing(), memory)) == []


def test_files_that_other_settings_pass_over_are_not_forgotten(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    (tmp_path / "b.csv").write_text("x\n1\n")
    memory = remember({}, FolderSource(path=str(tmp_path), pattern="*.jsonl").items(firing(), {}))
    memory = remember(memory, FolderSource(path=str(tmp_path), pattern="*.csv").items(firing(), memory))
    assert list(FolderSource(path=str(tmp_path)).items(firing(), memory)) == []


def test_reading_that_fails_halfway_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text("1\n2\n3\n")
    source = FolderSource(path=str(tmp_path), rows=2)
    from kapsl_scheduler.sources import folder

    def failing(*arguments: Any, **options: Any) -> Any:
        rows = real(*arguments, **options)
        yield next(rows)
        raise OSError(5, "Input/output error")

    real = folder.read_json_lines
    monkeypatch.setattr(folder, "read_json_lines", failing)
    one, failed = source.items(firing(), {})
    assert [one.key, failed.key] == ["a.jsonl:1", "a.jsonl"]
    assert str(failed.error) == "a.jsonl: cannot be read: Input/output error"
    assert failed.marks == {}

    monkeypatch.setattr(folder, "read_json_lines", real)
    memory = {key: mark for key, mark in one.marks.items() if mark is not None}
    (rest,) = source.items(firing(), memory)
    assert rest.key == "a.jsonl:2-3"
