"""Images: how pixels become numbers, what is refused, and the digits model reading digits from PNG files."""

from __future__ import annotations

import sys
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kapsl_scheduler.engines import OnnxEngine
from kapsl_scheduler.errors import Backend, InvalidInput
from kapsl_scheduler.ports import SourceItem
from kapsl_scheduler.sources import FolderSource, ImageSettings
from tests.sources.files import firing

MODEL = Path(__file__).parents[2] / "models" / "digits" / "digits.onnx"
COLOURS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10


def items_of(folder: Path, dtype: str | None = None, **settings: Any) -> list[SourceItem]:
    source = FolderSource(path=str(folder), image=ImageSettings(**settings), dtype=dtype)
    return list(source.items(firing(), {}))


def test_the_digits_model_reads_digits_from_images(tmp_path: Path) -> None:
    with as_file(files("kapsl_scheduler.demo") / "digits_test.npz") as path, np.load(path) as held_out:
        pixels, labels = held_out["images"][:40], held_out["labels"][:40]
    for index, image in enumerate(pixels):
        Image.fromarray(image.reshape(8, 8) * 15).save(tmp_path / f"{index:03}.png")
    engine = OnnxEngine(MODEL)
    engine.load()
    items = items_of(tmp_path, mode="L", scale=1 / 15, layout="flat")
    assert [item.key for item in items] == [f"{index:03}.png" for index in range(40)]
    requests = np.concatenate([item.request for item in items])
    np.testing.assert_allclose(requests, pixels, rtol=1e-6)
    answers = engine.infer({"pixels": requests})["probabilities"].argmax(axis=1)
    assert np.mean(answers == labels) >= 0.95


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "tiff", "jpg", "jpeg", "webp", "TIF"])
def test_every_format_is_read(suffix: str, tmp_path: Path) -> None:
    grey = np.full((4, 6), 128, np.uint8)
    Image.fromarray(grey).save(tmp_path / f"a.{suffix}")
    (item,) = items_of(tmp_path)
    assert item.request.shape == (1, 3, 4, 6)
    np.testing.assert_allclose(item.request, 128, atol=2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, COLOURS.transpose(2, 0, 1)),
        ({"layout": "HWC"}, COLOURS),
        ({"layout": "flat"}, COLOURS.ravel()),
        ({"scale": 0.5, "mean": (1.0, 2.0, 3.0), "std": (2.0,)}, ((COLOURS * 0.5 - [1, 2, 3]) / 2).transpose(2, 0, 1)),
    ],
)
def test_layout_scale_mean_and_std(settings: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    (item,) = items_of(tmp_path, **settings)
    assert item.request.dtype == np.float32
    np.testing.assert_allclose(item.request, [expected], rtol=1e-6)


@pytest.mark.parametrize(("layout", "shape"), [("HW", (2, 3)), ("HWC", (2, 3, 1)), ("CHW", (1, 2, 3)), ("flat", (6,))])
def test_grey_in_every_layout(layout: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    Image.fromarray(COLOURS[:, :, 0]).save(tmp_path / "a.png")
    (item,) = items_of(tmp_path, mode="L", layout=layout)
    np.testing.assert_array_equal(item.request, [COLOURS[:, :, 0].reshape(shape)])


def test_pixels_may_stay_bytes_but_not_if_they_are_no_whole_numbers(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    (item,) = items_of(tmp_path, "uint8")
    assert item.request.dtype == np.uint8
    (item,) = items_of(tmp_path, "uint8", scale=1 / 255)
    assert str(item.error).startswith("a.png: row: expected numbers that uint8 can hold")
    assert item.key == "a.png"


def test_an_image_is_scaled_to_width_and_height(tmp_path: Path) -> None:
    left, right = np.zeros((20, 20), np.uint8), np.full((20, 20), 200, np.uint8)
    Image.fromarray(np.hstack([left, right])).save(tmp_path / "a.png")
    (item,) = items_of(tmp_path, mode="L", size=(4, 3), layout="HW")
    assert item.request.shape == (1, 3, 4)
    assert item.request[0, 0, 0] < 30 < 170 < item.request[0, 2, 3]


def test_a_photograph_is_turned_as_it_says(tmp_path: Path) -> None:
    image = Image.fromarray(COLOURS)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    (item,) = items_of(tmp_path, layout="HWC")
    np.testing.assert_array_equal(item.request[0], np.rot90(COLOURS, -1))


@pytest.mark.parametrize("filtered", [False, True], ids=["pillow warns", "pillow is silent"])
@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_an_image_of_too_many_pixels_is_refused(
    filtered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: Any
) -> None:
    Image.new("1", (40, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1999)
    if filtered:
        monkeypatch.setattr(Image, "_decompression_bomb_check", lambda size: None)
    (item,) = items_of(tmp_path)
    assert isinstance(item.error, InvalidInput)
    assert "1999" in str(item.error)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert items_of(tmp_path)[0].error is None


def test_sixteen_bits_are_not_cut_to_eight(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 4000, np.uint16)).save(tmp_path / "a.png")
    (item,) = items_of(tmp_path)
    assert "expected 8 bits for a channel" in str(item.error)


def test_other_formats_under_such_a_name_are_refused(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png", format="PPM")
    assert "expected an image" in str(items_of(tmp_path)[0].error)


def test_reading_that_fails_is_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", fail)
    (item,) = items_of(tmp_path)
    assert str(item.error) == "a.png: cannot be read: Input/output error"
    assert item.marks == {}  # and so it is tried again


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Backend, match=r"pip install 'kapsl-scheduler\[images\]'"):
        items_of(tmp_path)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"mode": "CMYK"}, "mode: expected one of L, RGB, RGBA"),
        ({"layout": "WHC"}, "layout: expected CHW"),
        ({"layout": "HW"}, "HW has no channels, mode RGB has 3"),
        ({"mean": (1.0, 2.0)}, "mean: expected 1 or 3 numbers"),
        ({"std": ()}, "std: expected 1 or 3 numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std: expected numbers other than 0"),
        ({"size": (0, 5)}, "size: expected a width and a height above 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        ImageSettings(**settings)
