"""Which files a pattern names, and that none is outside the folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources import FolderSource, listing
from kapsl_scheduler.sources.listing import check_pattern, found_files, open_file
from tests.sources.files import firing


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = (tmp_path / "root").resolve()
    for name in ("a.csv", "b.txt", ".hidden.csv", "sub/c.csv", "sub/deep/d.csv", ".git/e.csv", "sub.csv/f.csv"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x\n1\n")
    return folder


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*", ["a.csv", "b.txt"]),
        ("*.csv", ["a.csv"]),
        ("[ab].*", ["a.csv", "b.txt"]),
        (".*", [".hidden.csv"]),
        ("*/*", ["sub.csv/f.csv", "sub/c.csv"]),
        ("sub/*.csv", ["sub/c.csv"]),
        ("**", ["a.csv", "b.txt", "sub.csv/f.csv", "sub/c.csv", "sub/deep/d.csv"]),
        ("**/*.csv", ["a.csv", "sub.csv/f.csv", "sub/c.csv", "sub/deep/d.csv"]),
        ("**/deep/**/*.csv", ["sub/deep/d.csv"]),
        ("sub/**", ["sub/c.csv", "sub/deep/d.csv"]),
        (".git/*", [".git/e.csv"]),
        ("no/*", []),
        ("A.csv", []),
    ],
)
def test_a_pattern_names_files(pattern: str, expected: list[str], root: Path) -> None:
    check_pattern(pattern)
    found = found_files(str(root), pattern)
    assert [file.name for file in found] == expected
    assert all(file.size == 4 and file.mtime == os.stat(root / file.name).st_mtime_ns for file in found)


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*", "a/../../*", "a//b", "./*", "a/"])
def test_a_pattern_cannot_leave_the_folder(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern: expected a relative path"):
        FolderSource(path="x", pattern=pattern)


def test_links_are_followed_only_to_files_inside(root: Path) -> None:
    outside = root.parent / "outside.csv"
    outside.write_text("x\n1\n")
    (root / "out.csv").symlink_to(outside)
    (root / "in.csv").symlink_to(root / "sub" / "c.csv")
    (root / "gone.csv").symlink_to(root / "no.csv")
    (root / "linked").symlink_to(root / "sub")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.csv")
    names = [file.name for file in found_files(str(root), "*.csv")]
    assert names == ["a.csv", "in.csv"]
    assert not any(file.name.startswith(("linked", "loop")) for file in found_files(str(root), "**"))
    assert found_files(str(root), "linked/*") == []
    assert open_file(str(root), "out.csv") is None
    assert open_file(str(root), "pipe.csv") is None
    assert open_file(str(root), "gone.csv") is None


def test_a_link_that_is_put_there_meanwhile_is_not_followed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = root.parent / "outside.csv"
    outside.write_text("x\n1\n")
    (root / "late.csv").symlink_to(outside)
    monkeypatch.setattr(listing, "_inside", os.path.join)
    with pytest.raises(OSError, match=r"late\.csv"):
        open_file(str(root), "late.csv")


def test_a_folder_that_goes_meanwhile_is_passed_over(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scan(path: str) -> object:
        if path.endswith("deep/"):
            raise FileNotFoundError(path)
        return real(path)

    monkeypatch.setattr(listing.os, "scandir", scan)
    assert [file.name for file in found_files(str(root), "sub/**")] == ["sub/c.csv"]


def test_a_folder_that_cannot_be_read_is_an_error_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> object:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(listing.os, "scandir", refuse)
    with pytest.raises(InvalidInput, match="cannot be read: Permission denied"):
        FolderSource(path=str(root)).items(firing(), {})


def keys(items: list[SourceItem]) -> list[str]:
    return [item.key for item in items]


def test_a_file_that_cannot_be_opened_is_an_error_and_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int) -> int:
        if path.endswith("c.csv"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, flags)

    monkeypatch.setattr(listing.os, "open", refuse)
    items = list(FolderSource(path=str(root), pattern="sub/**").items(firing(), {}))
    assert keys(items) == ["sub/c.csv", "sub/deep/d.csv:2"]
    assert str(items[0].error) == "sub/c.csv: cannot be read: Permission denied"
    assert items[0].marks == {}


def test_names_that_are_no_text_are_shown_as_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.jsonl")
    try:
        (tmp_path / name).write_text("1\n")
    except OSError:
        pytest.skip("the file system takes only text")
    (item,) = FolderSource(path=str(tmp_path)).items(firing(), {})
    assert item.key == "\\xff.jsonl:1"
    assert list(item.marks) == ["source:\\xff.jsonl"]
