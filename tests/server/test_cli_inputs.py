"""What a person hands in, made into calls as the model's metadata asks."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kapsl_scheduler.cli_inputs import NamedCall, Pixels, image_settings, read_calls, read_first, stdin_of
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.priority import Priority


def metadata(*shape: int, datatype: str = "FP32", **others: list[int]) -> dict[str, Any]:
    """Those of a model with an input `x`, and others."""
    inputs = [{"name": "x", "datatype": datatype, "shape": list(shape)}]
    inputs += [{"name": name, "datatype": "FP32", "shape": other} for name, other in others.items()]
    return {"inputs": inputs}


def read(file: Path | str, described: dict[str, Any], pixels: Pixels | None = None) -> list[NamedCall]:
    return list(read_calls(str(file), described, pixels or Pixels()))


def x_of(named: NamedCall) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = named.call.request.inputs["x"]
    return array


# ------------------------------------------------------------------------------------------------ images


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((-1, 3, 224, 112), ("RGB", (112, 224), "CHW")),
        ((1, 3, 224, 112), ("RGB", (112, 224), "CHW")),
        ((-1, 224, 112, 3), ("RGB", (112, 224), "HWC")),
        ((-1, 1, 28, 28), ("L", (28, 28), "CHW")),
        ((-1, 4, -1, -1), ("RGBA", None, "CHW")),
        ((-1, -1, -1, 1), ("L", None, "HWC")),
        ((3, 8, 6), ("RGB", (6, 8), "CHW")),
        ((-1, 8, 6), ("L", (6, 8), "HW")),
        ((-1, -1, -1), ("L", None, "HW")),
        ((-1, 64), ("L", (8, 8), "flat")),
        ((64,), ("L", (8, 8), "flat")),
        ((-1, 192), ("RGB", (8, 8), "flat")),
    ],
)
def test_the_shape_of_the_input_says_how_an_image_is_laid_out(
    shape: tuple[int, ...], expected: tuple[str, tuple[int, int] | None, str]
) -> None:
    settings = image_settings(metadata(*shape), Pixels())

    assert (settings.mode, settings.size, settings.layout) == expected


@pytest.mark.parametrize("shape", [(-1, 63), (-1, -1), (-1, 2, 8, 8), (-1, 3, -1, 8), (-1, 5, 3, 8, 8), ()])
def test_a_shape_that_does_not_say_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match=r"shape \[.*\] of input 'x' does not say.*\.npy"):
        image_settings(metadata(*shape), Pixels())


def test_an_image_is_no_text_and_not_several_inputs() -> None:
    with pytest.raises(InvalidInput, match="takes text"):
        image_settings(metadata(-1, 8, 8, datatype="BYTES"), Pixels())
    with pytest.raises(InvalidInput, match=r"inputs x, y: .*\.npz"):
        image_settings(metadata(-1, 8, 8, y=[-1, 2]), Pixels())
    with pytest.raises(InvalidInput, match="mean: expected 1 or 3"):
        image_settings(metadata(-1, 3, 8, 8), Pixels(mean=(1.0, 2.0)))


def test_an_image_is_scaled_and_its_pixels_counted_as_asked(tmp_path: Path) -> None:
    file = tmp_path / "no-suffix"
    Image.new("RGB", (40, 20), (255, 0, 51)).save(file, "PNG")

    (named,) = read(file, metadata(-1, 3, 2, 4), Pixels(1 / 255, (0.5,), (0.5, 1.0, 0.1)))

    assert (named.name, x_of(named).shape, x_of(named).dtype) == (str(file), (1, 3, 2, 4), np.float32)
    np.testing.assert_allclose(x_of(named)[0, :, 0, 0], [1.0, -0.5, -3.0], atol=1e-6)
    (named,) = read(file, metadata(-1, 2, 4, 3, datatype="UINT8"))
    assert x_of(named).dtype == np.uint8
    assert x_of(named)[0, 1, 3].tolist() == [255, 0, 51]


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    file = tmp_path / "cut.png"
    Image.new("L", (40, 20)).save(file)
    file.write_bytes(file.read_bytes()[:40])

    with pytest.raises(InvalidInput, match=r"cut\.png: expected an image"):
        read(file, metadata(-1, 64))


# ------------------------------------------------------------------------------------------------ arrays, JSON


def test_arrays_are_whole_and_go_by_the_names_of_inputs(tmp_path: Path) -> None:
    described = metadata(-1, 2, y=[2, -1, 3])
    np.savez(tmp_path / "two.npz", x=np.ones((4, 2)), y=np.zeros((2, 4, 3)))
    np.save(tmp_path / "one.npy", np.ones(2, np.int64))

    (named,) = read(tmp_path / "two.npz", described)
    assert {name: array.shape for name, array in named.call.request.inputs.items()} == {"x": (4, 2), "y": (2, 4, 3)}
    (named,) = read(tmp_path / "one.npy", metadata(-1, 2))
    assert (x_of(named).shape, x_of(named).dtype) == ((1, 2), np.float32)


def test_json_is_lists_names_or_a_request(tmp_path: Path) -> None:
    file = tmp_path / "in.json"
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}
    request = {"id": "7", "inputs": [tensor], "parameters": {"priority": 3, "timeout": 2_000_000}}
    for document in ([1, 2], [[1, 2]], {"x": [1, 2]}, request):
        file.write_text(json.dumps(document, indent=1))
        (named,) = read(file, metadata(-1, 2))
        assert x_of(named).tolist() == [[1, 2]]
    assert (named.call.id, named.call.priority, named.call.timeout) == ("7", Priority.BACKGROUND, 2.0)


@pytest.mark.parametrize("name", ["in.jsonl", "in.ndjson", "in.txt"])
def test_each_line_of_json_is_a_call_of_its_own(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text('[1, 2]\n\n{"x": [3, 4]}\n[[5, 6], [7, 8]]\n')

    calls = read(file, metadata(-1, 2))

    assert [call.name for call in calls] == [f"{file}:1", f"{file}:3", f"{file}:4"]
    assert [x_of(call).tolist() for call in calls] == [[[1, 2]], [[3, 4]], [[5, 6], [7, 8]]]


def test_a_line_that_cannot_be_read_comes_behind_those_that_can(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text('[1, 2]\n["a", 2]\n[3, 4]\n')
    calls = read_calls(str(file), metadata(-1, 2), Pixels())

    assert x_of(next(calls)).tolist() == [[1, 2]]
    with pytest.raises(InvalidInput, match=r"in\.jsonl:2: input 'x': not convertible"):
        next(calls)


def saved(array: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def damaged_archive() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=np.random.default_rng(0).random((4, 2)))
    data = bytearray(file.getvalue())
    data[100:140] = b"\xff" * 40
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "expected an image, an array"),
        (b"{", "expected an image, an array"),
        (b"one\ntwo\n", "expected an image, an array"),
        (b"PK\x03\x04 and no more", "is not an array"),
        (b"\x93NUMPY and no more", "is not an array"),
        (b'{"z": 1}', "expected one of x"),
        (b'["\xff"]', "expected an image, an array"),
        (b"[" * 100_000, "expected an image, an array"),
        (b'[1, 2]\n["\xff"]', r"given:2: 'utf-8' codec"),
        (b"\x93NUMPY\x01\x00\x10\x00{not a header   \n", "is not an array"),
        (damaged_archive(), "is not an array"),
        (saved(np.full((1, 2), 1 + 5j)), "not convertible to FP32: complex128 came"),
        (saved(np.zeros((1, 2), "M8[D]")), r"not convertible to FP32: datetime64\[D\] came"),
    ],
)
def test_what_cannot_be_read_is_named_once(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "given"
    file.write_bytes(content)

    with pytest.raises(InvalidInput, match=said) as caught:
        read(file, metadata(-1, 2))
    assert str(caught.value).count(str(file)) == 1


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    file = tmp_path / "in.npy"
    np.save(file, np.array([{}], object), allow_pickle=True)

    with pytest.raises(InvalidInput, match="is not an array"):
        read(file, metadata(-1, 2))


def test_stdin_may_be_any_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    image, array = io.BytesIO(), io.BytesIO()
    Image.new("L", (2, 1), 9).save(image, "PNG")
    np.save(array, np.full((1, 2), 9, np.float32))
    for content in (image.getvalue(), array.getvalue(), b"[9, 9]"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        described = metadata(-1, 1, 2) if content.startswith(b"\x89") else metadata(-1, 2)
        (named,) = read_calls("-", described, stdin=stdin_of("other", "-"))
        assert (named.name, x_of(named).ravel().tolist()) == ("stdin", [9, 9])


def test_the_first_call_is_all_that_some_ask_for(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("[1, 2]\n[3, 4]\n")
    assert read_first(str(file), metadata(-1, 2)).request.inputs["x"].tolist() == [[1, 2]]
    assert stdin_of(str(file), None) == b""  # which nobody named
    file.write_text("\n")
    with pytest.raises(InvalidInput, match="expected inputs, got none"):
        read_first(str(file), metadata(-1, 2))
