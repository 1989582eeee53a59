"""The JSON form of results, for sinks that write or send JSON.

An item is `{"key": ..., "outputs": {name: nested lists}}` or `{"key": ..., "error": {"code": ..., "message": ...}}`.
Outputs have the batch axis in front, as the model gave them. A narrow float is written with as many digits as it takes
to read it back, not with those of the double beside it. JSON has no NaN and no infinity: they are `null`, as in the
server's answers. Bytes are base64 text.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import numpy as np

from kapsl_scheduler.ports import SinkItem
from kapsl_scheduler.types import Array

__all__ = ["encode_item", "fault_of"]

_ENCODER: Final = msgspec.json.Encoder(enc_hook=str)  # whatever else a function may have answered with


def encode_item(item: SinkItem) -> bytes:
    """The item as one line of JSON, without a line end."""
    fault = fault_of(item)
    if fault is not None:
        code, message = fault
        return _ENCODER.encode({"key": item.key, "error": {"code": code, "message": message}})
    outputs = item.response.outputs if item.response is not None else {}
    return _ENCODER.encode({"key": item.key, "outputs": {name: _lists(array) for name, array in outputs.items()}})


def fault_of(item: SinkItem) -> tuple[str, str] | None:
    """Code and message of the item's error: the code of our own errors, the class's name for others."""
    if item.error is None:
        return None
    return getattr(item.error, "code", type(item.error).__name__), str(item.error)


def _lists(array: Array) -> Any:
    if array.dtype.kind != "f" or array.dtype.itemsize >= 8:
        return array.tolist()
    exact = array.astype(np.float64)
    short = array.astype(str).astype(np.float64)
    # A decimal that ends up beside the number, should there be one, is not worth its brevity.
    with np.errstate(over="ignore"):
        same = short.astype(array.dtype) == array
    return np.where(same, short, exact).tolist()
