"""JSON lines and CSV: what counts as a row, what a bad line costs, lines without end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources import CsvSettings, FolderSource, lines
from tests.sources.files import firing, remember


def items_of(folder: Path, content: bytes | str, suffix: str, **settings: Any) -> list[SourceItem]:
    (folder / f"a{suffix}").write_bytes(content.encode() if isinstance(content, str) else content)
    return list(FolderSource(path=str(folder), **settings).items(firing(), {}))


def keys(items: list[SourceItem]) -> list[tuple[str, bool]]:
    return [(item.key, item.error is None) for item in items]


def test_objects_have_columns_and_lists_are_the_only_input(tmp_path: Path) -> None:
    (one, other, bare) = items_of(tmp_path, '{"x": [1, 2], "y": 3}\n{"x": [4, 5], "y": 6}\n[7, 8]', ".jsonl")
    assert {name: array.tolist() for name, array in one.request.items()} == {"x": [[1, 2]], "y": [3]}
    assert other.request["x"].tolist() == [[4, 5]]
    assert bare.request.tolist() == [[7, 8]]


def test_rows_of_one_form_share_a_request(tmp_path: Path) -> None:
    content = "[1, 2]\n[3, 4]\n[5]\n[6]\n" + '{"x": 1}\n{"x": 2}\n{"y": 2}\n'
    items = items_of(tmp_path, content, ".jsonl", rows=10)
    assert [item.key for item in items] == ["a.jsonl:1-2", "a.jsonl:3-4", "a.jsonl:5-6", "a.jsonl:7"]
    assert items[2].request["x"].tolist() == [1, 2]


def test_bad_lines_cost_only_themselves(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf[1]\n\n  \n{"x\n[1, "a"]\n"\xff"\n' + b"[" * 5000 + b"\n[1" + b"]\n[2]"
    items = items_of(tmp_path, content, ".jsonl", dtype="float32")
    assert keys(items) == [
        ("a.jsonl:1", True),
        ("a.jsonl:4", False),
        ("a.jsonl:5", False),
        ("a.jsonl:6", False),
        ("a.jsonl:7", False),
        ("a.jsonl:8", True),
        ("a.jsonl:9", True),
    ]
    assert str(items[1].error).startswith("a.jsonl:4: expected JSON, got")


def test_an_object_without_a_chosen_column_is_a_bad_line(tmp_path: Path) -> None:
    items = items_of(tmp_path, '{"x": 1}\n{"y": 1}\n[1]\n', ".jsonl", inputs="x")
    assert keys(items) == [("a.jsonl:1", True), ("a.jsonl:2", False), ("a.jsonl:3", False)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_line_without_end_is_passed_over(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 20)
    monkeypatch.setattr(lines, "_SKIP", 7)
    content = f"1\n2\n{'9' * 90}\n3\n0.{'8' * 18}"
    items = items_of(tmp_path, content, suffix, csv=CsvSettings(header=False))
    assert keys(items) == [(f"a{suffix}:{number}", number != 3) for number in range(1, 6)]
    assert "at most 20 bytes" in str(items[2].error)


def test_what_is_appended_meanwhile_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    long = " " * 100_000 + "\n"  # more than what is read ahead
    path.write_text(f"1\n2{long}3{long}4")
    source = FolderSource(path=str(tmp_path))
    items = source.items(firing(), {})
    got = [next(items)]
    with path.open("a") as file:
        file.write("5\n6\n")
    got += items
    assert [item.request.tolist() for item in got] == [[1], [2], [3], [4]]
    again = list(source.items(firing(), remember({}, got)))
    assert [item.request.tolist() for item in again] == [[1], [2], [3], [45], [6]]


# --------------------------------------------------------------------------------------------------- CSV


def test_csv_without_a_choice_is_stacked_and_with_one_is_not(tmp_path: Path) -> None:
    content = 'id,x,y,list\r\n7,1.5,2,"[1, 2]"\r\n'
    (item,) = items_of(
        tmp_path, content, ".csv", inputs={"xy": ["y", "x"], "l": "list", "id": "id"}, dtype={"id": "str"}
    )
    assert item.request["xy"].tolist() == [[2, 1.5]]
    assert item.request["l"].tolist() == [[1, 2]]
    assert item.request["id"].tolist() == ["7"]
    assert item.key == "a.csv:2"
    (item,) = items_of(tmp_path, "x;y\n1;2\n", ".csv", csv=CsvSettings(delimiter=";"))
    assert item.request.tolist() == [[1, 2]]


def test_columns_without_a_header_are_called_by_their_place(tmp_path: Path) -> None:
    items = items_of(tmp_path, "1,2\n3,4\n", ".csv", inputs="1", csv=CsvSettings(header=False))
    assert [item.key for item in items] == ["a.csv:1", "a.csv:2"]
    assert [item.request.tolist() for item in items] == [[2], [4]]


def test_bad_records_cost_only_themselves(tmp_path: Path) -> None:
    content = b'x,y\n1,2\n1\n1,"2\n3,4\n\n1,\xff\n"5\n",6\n7,"8"8\n9,"10"\n1,z\n'
    items = items_of(tmp_path, content, ".csv")
    assert keys(items) == [
        ("a.csv:2", True),
        ("a.csv:3", False),  # one column too few
        ("a.csv:4", False),  # a quote that is closed four lines further on
        ("a.csv:5", True),
        ("a.csv:7", False),  # not UTF-8
        ("a.csv:8", True),  # a record of two lines
        ("a.csv:10", False),
        ("a.csv:11", True),
        ("a.csv:12", False),
    ]
    assert items[1].error is not None
    assert str(items[1].error) == "a.csv:3: expected 2 columns, got 1"
    assert items[5].request.tolist() == [[5, 6]]
    for done in range(len(items)):
        rest = list(FolderSource(path=str(tmp_path)).items(firing(), remember({}, items[:done])))
        assert keys(rest) == keys(items)[done:]


def test_a_record_without_end_costs_only_its_first_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 20)
    items = items_of(tmp_path, 'x\n"\n' + "1\n" * 30 + '"\n', ".csv")
    assert keys(items) == [
        ("a.csv:2", False),
        *((f"a.csv:{number}", True) for number in range(3, 33)),
        ("a.csv:33", False),
    ]
    assert "a record of at most 20 bytes" in str(items[0].error)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("x,x\n1,2\n", "expected every column once"),
        ('"x\n1\n', "first record: expected CSV"),
        ("x\n1\n", "no column 'y', there is"),
    ],
)
def test_a_header_that_cannot_be_used_costs_the_file(content: str, fault: str, tmp_path: Path) -> None:
    inputs = "y" if "'y'" in fault else None
    (item,) = items_of(tmp_path, content, ".csv", inputs=inputs)
    assert item.key == "a.csv"
    assert str(item.error).startswith("a.csv: first record: ")
    assert fault in str(item.error)


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n"])
def test_a_delimiter_is_one_character(delimiter: str) -> None:
    with pytest.raises(ValueError, match="delimiter: expected one character"):
        CsvSettings(delimiter=delimiter)


def test_text_goes_through_unchanged(tmp_path: Path) -> None:
    words = ["zwölf", "a,b", 'say "x"', "two\nlines", "[1]", "nan"]
    content = "w\n" + "".join('"' + word.replace('"', '""') + '"\n' for word in words)
    items = items_of(tmp_path, content, ".csv", dtype="string")
    assert [item.request.tolist() for item in items] == [[word] for word in words]
    (tmp_path / "a.csv").unlink()
    items = items_of(tmp_path, "".join(json.dumps(word) + "\n" for word in words), ".ndjson")
    assert [item.request.tolist() for item in items] == [[word] for word in words]
    assert items[0].request.dtype == np.dtype(object)
