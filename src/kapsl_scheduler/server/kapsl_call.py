"""What Kapsl's protocols ask for and hear, whatever carries it: the parts of a request, the one tensor of an answer,
the words of errors.

What is not here: bytes on the socket (`server.bincode`), JSON (`server.kapsl_http`), the form of tensors (`core.wire`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from kapsl_scheduler import errors
from kapsl_scheduler.core.admission import UNDECLARED_INPUT
from kapsl_scheduler.core.wire import encode_bytes
from kapsl_scheduler.errors import InferenceError, InvalidInput, ModelNotLoaded
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.model_ids import ModelIds
from kapsl_scheduler.server.oip import InferCall
from kapsl_scheduler.server.service import Service
from kapsl_scheduler.server.texts import TEXT_INPUT, text_inputs
from kapsl_scheduler.types import (
    Array,
    InferenceRequest,
    InferenceResponse,
    Priority,
    RequestMetadata,
)

__all__ = [
    "Answered",
    "KapslRequest",
    "Malformed",
    "Metadata",
    "answer_of",
    "call_of",
    "error_text",
    "model_of",
    "priority_of",
]


class Metadata(msgspec.Struct):
    """What a request says beside its tensors. `timeout_ms` is in milliseconds; `priority` counts from 0, the highest.
    From `max_new_tokens` on these are options of models of text."""

    request_id: str | None = None
    timeout_ms: int | None = None
    priority: int | None = None
    force_cpu: bool | None = None
    model_version: str | None = None
    auth_token: str | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None


class KapslRequest(msgspec.Struct):
    """A decoded request: `input` is for the model's first input, `additional` for those of these names."""

    input: Array
    additional: Sequence[tuple[str, Array]] = ()
    session_id: str | None = None
    metadata: Metadata = msgspec.field(default_factory=Metadata)


class Answered(msgspec.Struct):
    """The tensor that answers a request."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes


class Malformed(InvalidInput):
    """Bytes that are no request at all."""


def model_of(service: Service, ids: ModelIds, id: int, version: str | None = None) -> ServedModel:
    """The model of an id, and of a version where one is named. Raises `ModelNotLoaded`, in the original's words."""
    name = ids.name(id)
    try:
        return service.registry.get(name, version or "")
    except ModelNotLoaded as error:
        more = f": {error}" if name in service.registry else ""
        raise ModelNotLoaded(f"Model {id} not found{more}") from None


def priority_of(number: int | None) -> Priority | None:
    """0 is latency-critical, 1 throughput, everything above background; None says nothing."""
    if number is None:
        return None
    if number < 0:
        raise InvalidInput(f"metadata.priority: expected 0 or more, got {number}")
    return Priority(min(number, Priority.BACKGROUND))


def call_of(request: KapslRequest, model: ServedModel, default: Priority | None) -> InferCall:
    """The call that a request is, of `default` class (None: the model's) if it names none. Raises `InvalidInput`."""
    specs = model.info.inputs
    first = specs[0].name if specs else UNDECLARED_INPUT
    inputs = {first: request.input}
    for name, array in request.additional:
        if name in inputs:
            whose = "which is the name of the first input" if name == first else "expected each once"
            raise InvalidInput(f"additional_inputs: {name!r} came, {whose}")
        inputs[name] = array
    if first == TEXT_INPUT:
        inputs = _text_inputs(inputs, request.metadata, model)
    given = request.metadata
    priority = priority_of(given.priority)
    if given.timeout_ms is not None and given.timeout_ms < 1:
        raise InvalidInput(f"metadata.timeout_ms: expected 1 or more, got {given.timeout_ms}")
    metadata = None
    if given.force_cpu or given.request_id is not None:
        metadata = RequestMetadata(request_id=given.request_id, force_cpu=bool(given.force_cpu))
    return InferCall(
        InferenceRequest(inputs, session_id=request.session_id, metadata=metadata),
        id=given.request_id or "",
        priority=default if priority is None else priority,
        timeout=None if given.timeout_ms is None else given.timeout_ms / 1e3,
    )


def _text_inputs(inputs: Mapping[str, Array], metadata: Metadata, model: ServedModel) -> dict[str, Array]:
    """Those of a model of text, whose prompt comes in any shape and whose options need not come."""
    said = {**msgspec.structs.asdict(metadata), "max_tokens": metadata.max_new_tokens}
    given: dict[str, Any] = {name: said[name] for name in _OPTIONS if said[name] is not None}
    given |= inputs
    prompt = inputs[TEXT_INPUT]
    if prompt.dtype.kind == "O":  # one text, by the form of the tensor
        given[TEXT_INPUT] = prompt.item()
    return {**inputs, **text_inputs(model, given, _OPTIONS)}


def answer_of(response: InferenceResponse) -> Answered:
    """The first output, which is all that an answer has. Raises `InferenceError` for one that the form cannot hold."""
    array = response.output
    try:
        dtype, data = encode_bytes(array)
    except InvalidInput as error:
        raise InferenceError(f"the model's first output cannot be told over this protocol: {error}") from None
    return Answered(array.shape, dtype, data)


_OPTIONS: Final[Mapping[str, Any]] = {
    "max_tokens": 0,  # no limit but the model's own
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,  # all
    "repetition_penalty": 1.0,
    "seed": 0,
}
"""What a text model's inputs of these names get where the request says nothing."""

_WORDS: Final[Mapping[type[BaseException], str]] = {
    Malformed: "Deserialization error",
    errors.InvalidInput: "Invalid input",
    errors.Overloaded: "System overloaded",
    errors.DeadlineExceeded: "Timeout",
    errors.ResourceExhausted: "Resource exhausted",
    errors.Unavailable: "Unavailable",
    errors.Cancelled: "Cancelled",
    errors.Forbidden: "Forbidden",
    errors.InferenceError: "Inference error",
    errors.EngineError: "Backend error",
}
"""A class that is not here has the words of its nearest base."""


def error_text(error: BaseException) -> str:
    """What a client is told, never nothing: it shows these words as they are. What is no error of ours is not shown."""
    if isinstance(error, errors.ModelNotLoaded):
        return str(error)
    if isinstance(error, errors.Unauthorized):
        return "Unauthorized"
    words = next((_WORDS[kind] for kind in type(error).__mro__ if kind in _WORDS), None)
    return "Internal error: the server failed; its log says why" if words is None else f"{words}: {error}"
