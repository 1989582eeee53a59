"""JSON lines: torn lines, disks that are full, what is on disk when."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from kapsl_scheduler.sinks import JsonLinesSink, jsonl
from tests.sinks.answers import answers, firing, keys, lines_of, remember


def write(path: Path, count: int = 2, **run: Any) -> None:
    writer = JsonLinesSink(str(path)).open(firing(**run), {})
    writer.write(answers(count))
    writer.flush()
    writer.close()


@pytest.mark.parametrize("look_back", [1, 64 << 10])
@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ('{"key":"a"}\n{"key":"b', ['{"key":"a"}']),
        ('{"key":"a"}\n{"key":"b"}', ['{"key":"a"}', '{"key":"b"}']),
        ('{"key":"a', []),
        ('{"key":"a"}\n\0\0\0', ['{"key":"a"}']),
        ("[" * 5000, []),
    ],
)
def test_a_torn_line_is_taken_away_and_a_whole_one_is_ended(
    content: str, kept: list[str], look_back: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_LOOK_BACK", look_back)
    path = tmp_path / "out.jsonl"
    path.write_text(content)
    write(path)
    lines = path.read_text().splitlines()
    assert lines[: len(kept)] == kept
    assert len(lines) == len(kept) + 2
    assert [line["key"] for line in lines_of(path)[len(kept) :]] == keys(answers(2))


def test_a_flush_reaches_the_disk_the_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    writer = JsonLinesSink(str(path)).open(firing(), {})
    writer.write(answers(2))
    synced: list[tuple[str, int]] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(("file", path.stat().st_size)))
    monkeypatch.setattr(jsonl, "sync_folder", lambda folder: synced.append((folder.name, 0)))
    writer.flush()
    size = path.stat().st_size
    assert size > 0
    writer.flush()
    writer.close()
    assert synced == [("file", size), (tmp_path.name, 0), ("file", size)]


def test_a_resumed_run_does_not_stretch_a_file_that_has_become_shorter(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    sink = JsonLinesSink(str(path))
    memory: dict[str, str] = {}
    writer = sink.open(firing(), memory)
    writer.write(answers(3))
    remember(memory, writer.flush())
    writer.close()
    os.truncate(path, 0)
    JsonLinesSink(str(tmp_path / "{attempt}.jsonl")).open(firing(attempt=2), memory).close()
    assert path.stat().st_size == 0
    for taken_away in (False, True):
        if taken_away:
            path.unlink()
        else:
            os.truncate(path, 0)
        writer = sink.open(firing(attempt=2), memory)
        writer.write(answers(1))
        writer.flush()
        writer.close()
        assert [line["key"] for line in lines_of(path)] == keys(answers(1))


def test_lines_go_to_disk_before_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_BUFFER", 100)
    path = tmp_path / "deep" / "er" / "out.jsonl"
    writer = JsonLinesSink(str(path)).open(firing(), {})
    writer.write(answers(10))
    written = path.stat().st_size
    assert written > 300
    writer.close()
    assert path.stat().st_size == 0


def test_a_disk_that_is_full_is_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    write(path)
    before = path.read_text()
    real, calls = os.pwrite, []

    def fill_up(descriptor: int, data: Any, offset: int) -> int:
        calls.append(len(data))
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(descriptor, data[:10], offset)

    monkeypatch.setattr(jsonl.os, "pwrite", fill_up)
    writer = JsonLinesSink(str(path)).open(firing(4), {})
    writer.write(answers(5))
    with pytest.raises(OSError, match=r"No space left on device: '.*out\.jsonl'"):
        writer.flush()
    assert path.read_text() == before + '{"key":"fi'
    writer.close()
    assert path.read_text() == before


def test_a_file_that_cannot_be_made_shorter_is_left_to_the_next_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jsonl, "_BUFFER", 1)
    path = tmp_path / "out.jsonl"
    writer = JsonLinesSink(str(path)).open(firing(), {})
    writer.write(answers(1))

    def refuse(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(jsonl.os, "ftruncate", refuse)
    writer.close()
    assert len(lines_of(path)) == 1


def test_a_folder_that_cannot_be_made_is_an_error_with_the_path(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        JsonLinesSink(str(tmp_path / "file" / "out.jsonl")).open(firing(), {})
