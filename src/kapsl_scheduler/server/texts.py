"""Models that read and write text, as routes for text see them: which model is one, its inputs made of a prompt and
options, its answer as pieces of text.

A text model has a BYTES input `text_input` and a BYTES output `text_output` (the names of Triton's generate extension);
what its engine streams are the pieces of its answer. Other inputs are options, by name. What is not here: the forms in
which clients ask (`server.generate`, `server.openai`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from kapsl_scheduler.errors import InferenceError, InvalidInput
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.types import Array, TensorSpec, numpy_dtype

__all__ = ["TEXT_INPUT", "TEXT_OUTPUT", "StopWords", "check_text_model", "text_inputs", "texts_of"]

TEXT_INPUT: Final = "text_input"
TEXT_OUTPUT: Final = "text_output"


def check_text_model(model: ServedModel) -> None:
    """Raises `InvalidInput` unless a prompt can be sent to it, and text comes back."""
    info = model.info
    reads = any(spec.name == TEXT_INPUT and spec.dtype == "string" for spec in info.inputs)
    if not reads or not any(spec.name == TEXT_OUTPUT and spec.dtype == "string" for spec in info.outputs):
        raise InvalidInput(
            f"model {model.name!r} has no BYTES input {TEXT_INPUT!r} and output {TEXT_OUTPUT!r}: it is no model of text"
        )


def text_inputs(model: ServedModel, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs of one request: for each input of the model the value given under its name (an array as it is), else
    its default. Raises `InvalidInput` for one that has neither, and for a value that does not fit."""
    inputs: dict[str, Array] = {}
    for spec in model.info.inputs:
        if spec.name in given:
            value = given[spec.name]
        elif spec.name in defaults:
            value = defaults[spec.name]
        else:
            raise InvalidInput(f"{spec.name}: model {model.name!r} expects it, and nothing came")
        inputs[spec.name] = value if isinstance(value, np.ndarray) else _tensor(spec, value)
    return inputs


def _tensor(spec: TensorSpec, value: Any) -> Array:
    """One value, or a list of them, in the shape that the model has: open dimensions are 1, but for one that a list
    needs."""
    values = value if isinstance(value, list) else [value]
    shape = [dimension if isinstance(dimension, int) else 1 for dimension in spec.shape]
    if len(values) != 1 and not all(isinstance(dimension, int) for dimension in spec.shape):
        last = max(index for index, dimension in enumerate(spec.shape) if not isinstance(dimension, int))
        shape[last] = len(values)
    try:
        if spec.dtype == "string":
            if not all(isinstance(one, str) for one in values):
                raise TypeError
            array = np.empty(len(values), object)
            array[:] = values
        else:
            array = np.array(values, numpy_dtype(spec.dtype))
        return array.reshape(shape)
    except (TypeError, ValueError, OverflowError):
        raise InvalidInput(
            f"{spec.name}: expected {spec.dtype} of shape {list(spec.shape)}, got {str(value)[:100]!r}"
        ) from None


def texts_of(array: Array) -> list[str]:
    """The elements of a BYTES tensor as text. Raises `InferenceError` for what is not UTF-8."""
    try:
        return [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InferenceError(f"{TEXT_OUTPUT}: the model's text is not UTF-8: {error}") from error


class StopWords:
    """Ends a text before the first of some words, which may be cut in two between pieces: what might be the beginning
    of one is held back until that is known."""

    def __init__(self, words: list[str]) -> None:
        self.found = False
        self._words = [word for word in words if word]
        self._held = ""

    def take(self, piece: str) -> str:
        """What of the text so far may be shown now. Nothing more is, once `found`."""
        text = self._held + piece
        starts = [at for word in self._words if (at := text.find(word)) >= 0]
        if starts:
            self.found, self._held = True, ""
            return text[: min(starts)]
        keep = max(
            (size for word in self._words for size in range(1, len(word)) if text.endswith(word[:size])), default=0
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back, now that the text is at its end."""
        rest, self._held = self._held, ""
        return rest
