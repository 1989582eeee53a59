"""Images: one file, one row. Decoded by pillow (extra `images`), then numbers as the settings say.

An image of more pixels than pillow's `Image.MAX_IMAGE_PIXELS` is refused before it is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Literal

import msgspec
import numpy as np

from kapsl_scheduler.errors import Backend, InvalidInput
from kapsl_scheduler.sources.columns import Columns
from kapsl_scheduler.sources.reading import OpenFile, Place, Row
from kapsl_scheduler.types import Array

__all__ = ["ImageSettings", "read_image"]

_FORMATS: Final = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
_CHANNELS: Final = {"L": 1, "RGB": 3, "RGBA": 4}


class ImageSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How an image becomes an array.

    `mode` is pillow's: L (grey, 1 channel), RGB or RGBA. `size` (width, height) in pixels scales it (bilinear), None
    leaves it as it is. A pixel from 0 to 255 becomes (pixel x `scale` - `mean`) / `std`, with one value of `mean` and
    `std` for all channels or one for each, as float32 unless the source asks for another dtype. `layout` is the shape
    of one image: CHW, HWC, HW (mode L only), or flat (one vector, in the order of HWC).
    """

    mode: Literal["L", "RGB", "RGBA"] = "RGB"
    size: tuple[int, int] | None = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["CHW", "HWC", "HW", "flat"] = "CHW"

    def __post_init__(self) -> None:
        channels = _CHANNELS.get(self.mode)
        if channels is None:
            raise ValueError(f"mode: expected one of {', '.join(_CHANNELS)}, got {self.mode!r}")
        if self.layout not in ("CHW", "HWC", "HW", "flat"):
            raise ValueError(f"layout: expected CHW, HWC, HW or flat, got {self.layout!r}")
        if self.layout == "HW" and channels > 1:
            raise ValueError(f"layout: HW has no channels, mode {self.mode} has {channels}")
        for name, given in (("mean", self.mean), ("std", self.std)):
            if len(given) not in (1, channels):
                raise ValueError(f"{name}: expected 1 or {channels} numbers for mode {self.mode}, got {len(given)}")
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size: expected a width and a height above 0, got {self.size}")
        if not all(self.std):
            raise ValueError("std: expected numbers other than 0")


def read_image(opened: OpenFile, columns: Columns, start: Place, settings: ImageSettings) -> Iterator[Row]:
    """The image is the only input. Of a file with several images the first is read."""
    pixels = _decoded(opened, settings)
    try:
        values = columns.bare(_arranged(pixels, settings))
    except InvalidInput as error:
        raise InvalidInput(f"{opened.name}: {error}") from None
    yield Row(None, values, None, Place(1), 1.0)


def _decoded(opened: OpenFile, settings: ImageSettings) -> Array:
    """Pixels from 0 to 255 as float32 [height, width, channels]."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise Backend("images need pillow: pip install 'kapsl-scheduler[images]'") from error
    try:
        with Image.open(opened.file, formats=_FORMATS) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise InvalidInput(f"expected at most {most} pixels, got {image.width} x {image.height}")
            if image.mode[0] in "IF":  # whose values `convert` would cut off at 255
                raise InvalidInput(f"expected 8 bits for a channel, got an image of mode {image.mode}")
            turned = ImageOps.exif_transpose(image).convert(settings.mode)
            if settings.size is not None:
                turned = turned.resize(settings.size, Image.Resampling.BILINEAR)
            pixels = np.asarray(turned, np.float32)
    except Exception as error:  # a decoder raises whatever it stumbles over
        if isinstance(error, OSError) and error.errno is not None:
            raise  # reading failed, not decoding
        raise InvalidInput(f"{opened.name}: expected an image: {error}") from error
    return pixels.reshape(pixels.shape[0], pixels.shape[1], _CHANNELS[settings.mode])


def _arranged(pixels: Array, settings: ImageSettings) -> Array:
    values: Array = (pixels * np.float32(settings.scale) - _each(settings.mean)) / _each(settings.std)
    if settings.layout == "flat":
        return values.ravel()
    if settings.layout == "HW":
        return values[:, :, 0]
    return values.transpose(2, 0, 1) if settings.layout == "CHW" else values


def _each(numbers: tuple[float, ...]) -> Any:
    return np.array(numbers, np.float32)
