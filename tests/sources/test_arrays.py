"""Arrays of numpy: orders, several arrays side by side, archives and headers that lie."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources import FolderSource, arrays
from tests.sources.files import firing


def items_of(folder: Path, **settings: Any) -> list[SourceItem]:
    return list(FolderSource(path=str(folder), **settings).items(firing(), {}))


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header(shape: Any, descr: str = "<f4", fortran: bool = False) -> bytes:
    text = repr({"descr": descr, "fortran_order": fortran, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_blocks_give_the_rows_in_either_order(
    order: Any, block: int, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "_BLOCK", block)
    rows = np.arange(20 * 3 * 4, dtype=np.int16).reshape(20, 3, 4)
    array = np.asarray(rows, order=order)
    save: Callable[..., None] = np.save if suffix == ".npy" else np.savez
    save(tmp_path / f"a{suffix}", array)
    items = items_of(tmp_path, rows=7)
    got = [item.request if suffix == ".npy" else item.request["arr_0"] for item in items]
    assert [len(piece) for piece in got] == [7, 7, 6]
    np.testing.assert_array_equal(np.concatenate(got), rows)


def test_each_array_of_an_archive_is_an_input(tmp_path: Path) -> None:
    state = np.arange(12, dtype=np.int64).reshape(3, 4)
    np.savez(tmp_path / "a.npz", x=np.eye(3, dtype=np.float32), state=state, words=np.array(["a", "b", "c"]))
    items = items_of(tmp_path, rows=2)
    assert [item.key for item in items] == ["a.npz:0-1", "a.npz:2"]
    assert items[1].request["state"].tolist() == [[8, 9, 10, 11]]
    assert items[1].request["words"].tolist() == ["c"]
    (item,) = items_of(tmp_path, rows=9, inputs={"only": "x"}, dtype="int8")
    assert list(item.request) == ["only"]
    assert item.request["only"].dtype == np.int8


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (npy(np.array([{}, 1], object)), "nothing is unpickled"),
        (npy(np.zeros(2, [("a", "i4")])), "expected numbers or text"),
        (npy(np.float32(1)), "got a single value"),
        (npy(np.zeros((5, 0))), "expected rows of 1 to"),
        (header((10**12, 0)), "expected rows of 1 to"),
        (header((1, 10**12)), "expected rows of 1 to"),
        (header((10**9, 4)), "the file is cut off"),
        (b"\x93NUMPY\x03\x00" + header((1,))[8:], "version 1 or 2"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "version 1 or 2"),
        (b"", "version 1 or 2"),
    ],
    ids=range(10),
)
def test_a_file_that_is_no_array_of_rows_is_refused(content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    (item,) = items_of(tmp_path)
    assert item.key == "a.npy"
    assert isinstance(item.error, InvalidInput)
    assert fault in str(item.error)


def test_a_long_header_is_read(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, np.eye(2), version=(2, 0))
    assert len(items_of(tmp_path)) == 2


def archive(members: dict[str, bytes], path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)


@pytest.mark.parametrize(
    ("members", "settings", "fault"),
    [
        ({"x.npy": npy(np.eye(3)), "y.npy": npy(np.eye(2))}, {}, "expected as many rows in every array"),
        ({"x.npy": npy(np.eye(3))}, {"inputs": "y"}, "no column 'y', there is ['x']"),
        ({"readme.txt": b"hello"}, {}, "expected 1 to 256 arrays, got 0"),
        ({"x.npy": b"hello"}, {}, "'x': expected a .npy array"),
        ({"x.npy": header((4, 4), fortran=True) + b"1234"}, {}, "'x': the file is shorter than its header says"),
        ({"x.npy": header((4, 4)) + b"1234"}, {}, "'x': the file is shorter than its header says"),
        ({"x.npy": header((2**40, 4), fortran=True)}, {}, "expected C order"),
    ],
    ids=range(7),
)
def test_an_archive_that_cannot_be_used_is_refused(
    members: dict[str, bytes], settings: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    archive(members, tmp_path / "a.npz")
    (item,) = items_of(tmp_path, **settings)
    assert item.key == "a.npz"
    assert str(item.error).startswith("a.npz: ")
    assert fault in str(item.error)


def test_damage_in_the_middle_of_an_archive_costs_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_BLOCK", 1024)
    rows = np.random.default_rng(1).integers(0, 255, (600, 100), np.uint8)
    path = tmp_path / "a.npz"
    np.savez_compressed(path, x=rows)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    *items, last = items_of(tmp_path)
    assert last.key == "a.npz"
    assert isinstance(last.error, InvalidInput)
    assert all(item.error is None for item in items)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    archive({"x.npy": npy(np.eye(2))}, path)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    path.write_bytes(content)
    (item,) = items_of(tmp_path)
    assert "expected an .npz archive" in str(item.error)
