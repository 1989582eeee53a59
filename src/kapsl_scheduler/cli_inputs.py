"""What a person hands in as a model's inputs: images, arrays and JSON, made into calls as the model's metadata asks.

What a file holds is told by its first bytes, so that stdin needs no name. What is not here: how an image is decoded
(`sources.images`), how values are fitted to a model's inputs (`client`), and the sending (`cli_infer`).
"""

from __future__ import annotations

import io
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import msgspec
import numpy as np

from kapsl_scheduler.client import read_call
from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.server.oip import InferCall, numpy_dtype_of
from kapsl_scheduler.sources.columns import Columns
from kapsl_scheduler.sources.images import ImageSettings, read_image
from kapsl_scheduler.sources.reading import OpenFile, Place
from kapsl_scheduler.types import Array, InferenceRequest

__all__ = ["NamedCall", "Pixels", "image_settings", "is_one_call", "read_calls", "read_first", "stdin_of"]

STDIN: Final = "-"
_NPY: Final = b"\x93NUMPY"
_ZIP: Final = b"PK\x03\x04"
_IMAGES: Final = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
_HEAD: Final = 8
_LINES: Final = (".jsonl", ".ndjson")
_MODES: Final = {1: "L", 3: "RGB", 4: "RGBA"}


_NO_ARRAY: Final = (
    ValueError,
    EOFError,
    MemoryError,
    RecursionError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
)
"""What numpy raises, and what it lets through, for files that are damaged."""


class NamedCall(NamedTuple):
    """One call, and what it was read from: the file, with the line behind it in JSON lines."""

    name: str
    call: InferCall


class Pixels(NamedTuple):
    """What becomes of a pixel from 0 to 255: (pixel x `scale` - `mean`) / `std`, one number for all channels or one
    each."""

    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)


def stdin_of(*sources: str | None) -> bytes:
    """All of stdin if one of the sources is that. It is read before an event loop runs, which would keep an interrupt
    from ending the wait for it."""
    return sys.stdin.buffer.read() if STDIN in sources else b""


def read_calls(
    source: str, metadata: Mapping[str, Any], pixels: Pixels | None = None, *, stdin: bytes = b""
) -> Iterator[NamedCall]:
    """The calls in a file, or in what was read of stdin (`-`).

    An image, an array (.npy), arrays by the names of inputs (.npz) and a JSON document are one call each; JSON is what
    `client.read_call` takes. Several JSON documents, one a line, are as many. Raises `InvalidInput`, which names the
    file, and `OSError`.
    """
    if source == STDIN:
        yield from _read("stdin", io.BytesIO(stdin), metadata, pixels or Pixels())
        return
    with Path(source).open("rb") as file:
        yield from _read(source, file, metadata, pixels or Pixels())


def read_first(source: str, metadata: Mapping[str, Any], *, stdin: bytes = b"") -> InferCall:
    """The first of the calls that `read_calls` reads. Raises `InvalidInput` where there is none, too."""
    for named in read_calls(source, metadata, stdin=stdin):
        return named.call
    raise InvalidInput(f"{source}: expected inputs, got none")


def is_one_call(source: str) -> bool:
    """Whether it is known before it is read that there is one call in it."""
    return source != STDIN and not source.endswith(_LINES)


def _read(name: str, file: BinaryIO, metadata: Mapping[str, Any], pixels: Pixels) -> Iterator[NamedCall]:
    head = file.read(_HEAD)
    file.seek(0)
    try:
        if head.startswith(_IMAGES):
            yield NamedCall(name, InferCall(InferenceRequest(_image(name, file, metadata, pixels))))
        elif head.startswith((_NPY, _ZIP)):
            yield NamedCall(name, read_call(_arrays(file), metadata))
        elif name.endswith(_LINES):
            yield from _lines(name, file, metadata)
        else:
            yield from _documents(name, file.read(), metadata)
    except InvalidInput as error:
        if str(error).startswith(name):
            raise
        raise InvalidInput(f"{name}: {error}") from error


def _arrays(file: BinaryIO) -> Any:
    """One array, or arrays by name. Nothing is unpickled."""
    try:
        loaded = np.load(file, allow_pickle=False)
        return loaded if isinstance(loaded, np.ndarray) else dict(loaded)
    except _NO_ARRAY as error:
        raise InvalidInput(f"is not an array: {error}") from error


def _documents(name: str, data: bytes, metadata: Mapping[str, Any]) -> Iterator[NamedCall]:
    try:
        document = _decoded(data)
    except InvalidInput as error:
        lines = data.splitlines()
        if len(lines) < 2 or not _is_json(lines[0]):
            raise InvalidInput(f"expected an image, an array (.npy, .npz) or JSON: {error}") from error
        yield from _lines(name, lines, metadata)
        return
    yield NamedCall(name, read_call(document, metadata))


def _decoded(data: bytes) -> Any:
    """Raises `InvalidInput`."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(str(error)) from error


def _is_json(line: bytes) -> bool:
    try:
        _decoded(line)
    except InvalidInput:
        return False
    return True


def _lines(name: str, lines: Iterable[bytes], metadata: Mapping[str, Any]) -> Iterator[NamedCall]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield NamedCall(f"{name}:{number}", read_call(_decoded(line), metadata))
        except InvalidInput as error:
            raise InvalidInput(f"{name}:{number}: {error}") from error


# ------------------------------------------------------------------------------------------------ images


def _image(name: str, file: BinaryIO, metadata: Mapping[str, Any], pixels: Pixels) -> dict[str, Array]:
    settings = image_settings(metadata, pixels)
    spec = metadata["inputs"][0]
    columns = Columns(None, numpy_dtype_of(spec["datatype"]).name)
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    (row,) = read_image(OpenFile(name, file, size), columns, Place(), settings)
    values = row.values
    assert isinstance(values, np.ndarray)  # columns that are not chosen give the one input
    return {spec["name"]: values[np.newaxis] if _has_batch_axis(spec["shape"]) else values}


def image_settings(metadata: Mapping[str, Any], pixels: Pixels) -> ImageSettings:
    """How an image becomes the only input of a model: grey or coloured, scaled to the height and width that the input
    has, in the order of its axes. Raises `InvalidInput` where the shape does not say."""
    inputs = metadata["inputs"]
    if len(inputs) != 1:
        names = ", ".join(spec["name"] for spec in inputs)
        raise InvalidInput(f"is an image, but the model has the inputs {names}: put arrays of these names in an .npz")
    spec = inputs[0]
    if spec["datatype"] == "BYTES":
        raise InvalidInput(f"is an image, but input {spec['name']!r} takes text")
    shape = spec["shape"]
    found = _arrangement(shape[1:] if _has_batch_axis(shape) else shape)
    if found is None:
        shown = ", ".join("?" if size < 0 else str(size) for size in shape)
        raise InvalidInput(
            f"is an image, but the shape [{shown}] of input {spec['name']!r} does not say how it is laid out: "
            "send an array (.npy)"
        )
    mode, size, layout = found
    try:
        return ImageSettings(mode=mode, size=size, layout=layout, **pixels._asdict())
    except ValueError as error:
        raise InvalidInput(str(error)) from error


def _has_batch_axis(shape: list[int]) -> bool:
    return len(shape) > 1 and shape[0] in (-1, 1)


def _arrangement(dims: list[int]) -> tuple[Any, tuple[int, int] | None, Any] | None:
    """Mode, size (width, height; None: that of the image) and layout by the axes of one image, -1 where one is open."""
    match dims:
        case [channels, height, width] if channels in _MODES and (height < 0) == (width < 0):
            return _MODES[channels], (None if height < 0 else (width, height)), "CHW"
        case [height, width, channels] if channels in _MODES and (height < 0) == (width < 0):
            return _MODES[channels], (None if height < 0 else (width, height)), "HWC"
        case [height, width] if (height < 0) == (width < 0):
            return "L", (None if height < 0 else (width, height)), "HW"
        case [length] if length > 0:
            for channels in (1, 3):
                side = round((length / channels) ** 0.5)
                if side * side * channels == length:
                    return _MODES[channels], (side, side), "flat"
    return None
