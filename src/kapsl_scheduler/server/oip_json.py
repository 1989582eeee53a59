"""The Open Inference Protocol v2 in JSON and with the binary tensor extension: bytes to arrays and back, for the server
and for the client.

A tensor is held to what it says of itself. What is not here: what a request is decoded to (`server.oip`), HTTP
(`server.http`), the bytes of a tensor (`server.oip_raw`), and the fit of the inputs to a model (`core.admission`).

JSON has no NaN and no infinity: in an answer they are `null`, in a request they are refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from types import GenericAlias
from typing import Annotated, Any, Final

import msgspec
import numpy as np

from kapsl_scheduler.errors import InferenceError, InvalidInput
from kapsl_scheduler.server.oip import (
    NO_CLASSIFICATION,
    NO_SHARED_MEMORY,
    InferCall,
    chosen_outputs,
    datatype_of_dtype,
    set_outputs,
    set_parameters,
)
from kapsl_scheduler.server.oip_raw import (
    CANONICAL,
    RawBytes,
    RawTensor,
    decode_raw,
    decode_strings,
    encode_raw,
    raw_tensor,
)
from kapsl_scheduler.types import (
    Array,
    InferenceRequest,
    ModelInfo,
    Priority,
    Tensors,
    numpy_dtype,
)

__all__ = ["InferReply", "decode_reply", "decode_request", "encode_reply", "encode_request"]

# --------------------------------------------------------------------------------------------- datatypes

# Deeper nesting than this is refused; a flat list may have any rank.
_MAX_NESTING: Final = 8

# What is decoded or encoded in one go: about a millisecond's work, during which the interpreter runs nothing else.
_PIECE_BYTES: Final = 64 << 10
_PIECE_VALUES: Final = 8 << 10

# The first doubles that round to infinity in the narrower format, not its largest finite value.
_FLOAT_LIMITS: Final[Mapping[str, float]] = {
    "FP16": 65520.0,
    "BF16": 3.3961775292304957e38,
    "FP32": 3.4028235677973366e38,
}


class _Kind:
    """How the elements of one datatype are read: `decoders[depth - 1]` reads lists nested `depth` deep.

    The range is checked by the decoder itself, in C, while it parses.
    """

    __slots__ = ("decoders", "dtype", "expected")

    def __init__(self, datatype: str) -> None:
        self.dtype = numpy_dtype(CANONICAL[datatype])
        element, self.expected = self._element(datatype)
        self.decoders: list[msgspec.json.Decoder[Any]] = []
        for _ in range(_MAX_NESTING):
            element = GenericAlias(list, (element,))
            self.decoders.append(msgspec.json.Decoder(element))

    def _element(self, datatype: str) -> tuple[Any, str]:
        if datatype == "BYTES":
            return str, "a string"
        if datatype == "BOOL":
            return bool | Annotated[int, msgspec.Meta(ge=0, le=1)], "true, false, 0 or 1"
        if datatype in _FLOAT_LIMITS:
            limit = msgspec.Meta(gt=-_FLOAT_LIMITS[datatype], lt=_FLOAT_LIMITS[datatype])
            return Annotated[float, limit], f"a number within the range of {datatype}"
        if self.dtype.kind == "f":
            return float, "a number"
        bounds = np.iinfo(self.dtype)
        # msgspec takes no bound beyond 64 signed bits; numpy refuses what UINT64 lets through.
        upper = None if datatype == "UINT64" else int(bounds.max)
        constraint = msgspec.Meta(ge=int(bounds.min), le=upper)
        return Annotated[int, constraint], f"an integer from {bounds.min} to {bounds.max}"


_KINDS: Final[Mapping[str, _Kind]] = {datatype: _Kind(datatype) for datatype in CANONICAL}


_BFLOAT16: Final = numpy_dtype("bfloat16")


# ---------------------------------------------------------------------------------------------- requests


# JSON's integers have no end; one that floats or the text of an error cannot hold must not come past the decoder.
_Unsigned = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
# Names stand in the messages of errors, tensors each have one: without these bounds an error could be larger than the
# request that it answers.
_Name = Annotated[str, msgspec.Meta(max_length=1024)]
_PerTensor = msgspec.Meta(max_length=1024)


class _WireInputParameters(msgspec.Struct):
    binary_data_size: _Unsigned | None = None
    shared_memory_region: msgspec.Raw | None = None


class _WireInput(msgspec.Struct):
    name: _Name
    shape: Annotated[list[_Unsigned], msgspec.Meta(max_length=32)]  # numpy's own limit, 64 since its 2.0
    datatype: Annotated[str, msgspec.Meta(max_length=64)]
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: _WireInputParameters | None = None


class _WireOutputParameters(msgspec.Struct):
    binary_data: bool | None = None
    classification: _Unsigned = 0
    shared_memory_region: msgspec.Raw | None = None


class _WireRequestedOutput(msgspec.Struct):
    name: _Name
    parameters: _WireOutputParameters | None = None


class _WireParameters(msgspec.Struct):
    priority: _Unsigned = 0
    timeout: _Unsigned = 0
    sequence_id: _Unsigned | Annotated[str, msgspec.Meta(max_length=1024)] = 0
    binary_data_output: bool = False


class _WireRequest(msgspec.Struct):
    inputs: Annotated[list[_WireInput], _PerTensor]
    id: str | None = None
    parameters: _WireParameters | None = None
    outputs: Annotated[list[_WireRequestedOutput], _PerTensor] | None = None


class _WireTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: Any  # a list, or one that is encoded already


class _WireSize(msgspec.Struct, gc=False):
    binary_data_size: int


class _WireRawTensor(msgspec.Struct, gc=False):
    name: str
    shape: tuple[int, ...]
    datatype: str
    parameters: _WireSize


class _WireReply(msgspec.Struct, omit_defaults=True):
    model_name: str
    model_version: str = ""
    id: str = ""
    outputs: list[Any] = []


class _ReadTensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    data: list[Any] = []
    parameters: _WireSize | None = None


class _ReadReply(msgspec.Struct):
    model_name: str
    model_version: str = ""
    id: str = ""
    outputs: list[_ReadTensor] = []


_REQUEST: Final = msgspec.json.Decoder(_WireRequest)
_REPLY: Final = msgspec.json.Decoder(_ReadReply)
_ENCODER: Final = msgspec.json.Encoder()
_OPENING: Final = re.compile(rb"[\s\[]*")
_ELEMENT_PATH: Final = re.compile(r"`\$((?:\[\d+\])+)`")


def decode_request(
    body: bytes | bytearray | memoryview, header_length: int | None = None, *, model: ModelInfo | None = None
) -> InferCall:
    """The call in a request body. With a `header_length` (`Inference-Header-Content-Length`) so many bytes of it are
    JSON, behind which the tensors come as bytes; 0 is a body that is the one input of the `model`, and nothing else.

    Raises `InvalidInput` with every tensor's fault, or with what is wrong with the JSON around them.
    """
    raw = None
    if header_length is not None:
        if header_length > len(body):
            raise InvalidInput(f"inference-header-content-length: {header_length} came, the body has {len(body)} bytes")
        if header_length == 0:
            return InferCall(InferenceRequest(_lone_input(body, model)), binary=True)
        if header_length <= _KNOWN_BYTES:
            layout = _raw_layout(bytes(body[:header_length]))
            if layout is not None and layout.size == len(body) - header_length:
                return layout.read(body, header_length)
        raw = RawBytes(body, header_length)
        body = memoryview(body)[:header_length]
    wire = _read(body)
    inputs: dict[str, Array] = {}
    faults = []
    for tensor in wire.inputs:
        try:
            if tensor.name in inputs:
                raise InvalidInput(f"input {tensor.name!r} came twice, expected once")
            inputs[tensor.name] = _decode_tensor(tensor) if tensor.parameters is None else _decode_raw(tensor, raw)
        except InvalidInput as error:
            faults.append(str(error))
    if not faults and raw is not None and raw.left:
        faults.append(f"{raw.left} bytes came behind the last tensor, expected none")
    if faults:
        raise InvalidInput("; ".join(faults))
    return _call(wire, inputs)


def _read(body: bytes | bytearray | memoryview) -> _WireRequest:
    try:
        return _REQUEST.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the request body is not an inference request: {error}") from None


def _call(wire: _WireRequest, inputs: dict[str, Array]) -> InferCall:
    """What was asked, with its tensors as they were read."""
    call = InferCall(InferenceRequest(inputs), wire.id or "")
    if wire.parameters is not None:
        set_parameters(call, wire.parameters.priority, wire.parameters.timeout, wire.parameters.sequence_id)
        call.binary = wire.parameters.binary_data_output
    if wire.outputs:
        _ask_for(call, wire.outputs)
    return call


class _RawLayout:
    """What the JSON of a request says whose tensors are all numbers as bytes, `size` of them: where each lies behind
    it, and what was asked. Clients send the same JSON again and again."""

    __slots__ = ("_call", "_tensors", "size")

    def __init__(self, call: InferCall, tensors: Sequence[RawTensor]) -> None:
        self._call = call
        self._tensors = tensors
        self.size = sum(tensor.size for tensor in tensors)

    def read(self, body: bytes | bytearray | memoryview, start: int) -> InferCall:
        """The call whose tensors begin at `start` of a body. They are views of it, which nobody can write to."""
        inputs: dict[str, Array] = {}
        for tensor in self._tensors:
            inputs[tensor.name] = tensor.view(body, start)
            start += tensor.size
        asked = self._call
        request = InferenceRequest(inputs, session_id=asked.request.session_id)
        return InferCall(request, asked.id, asked.priority, asked.timeout, asked.outputs, asked.binary)


_KNOWN_BYTES: Final = 2048
"""Of JSON that is remembered, of so many requests:"""
_KNOWN_LAYOUTS: Final = 256


@lru_cache(_KNOWN_LAYOUTS)
def _raw_layout(header: bytes) -> _RawLayout | None:
    """None for JSON that is to be read the long way, which also says what is wrong with it."""
    try:
        wire = _read(header)
        tensors = [
            raw_tensor(tensor.name, tensor.datatype, tensor.shape, tensor.parameters.binary_data_size)
            for tensor in wire.inputs
            if tensor.parameters is not None
            and tensor.parameters.binary_data_size is not None
            and tensor.parameters.shared_memory_region is None
            and not bytes(tensor.data)
        ]
        call = _call(wire, {})
    except InvalidInput:
        return None
    if len({tensor.name for tensor in tensors if tensor is not None}) < len(wire.inputs):
        return None
    return _RawLayout(call, [tensor for tensor in tensors if tensor is not None])


def _ask_for(call: InferCall, wanted: Sequence[_WireRequestedOutput]) -> None:
    """Which outputs, and in which form."""
    set_outputs(call, [output.name for output in wanted])
    binary: set[str] = set()
    for output in wanted:
        parameters = output.parameters or _NO_PARAMETERS
        if parameters.shared_memory_region is not None:
            raise InvalidInput(f"output {output.name!r}: {NO_SHARED_MEMORY}")
        if parameters.classification:
            raise InvalidInput(f"output {output.name!r}: {NO_CLASSIFICATION}")
        if call.binary if parameters.binary_data is None else parameters.binary_data:
            binary.add(output.name)
    call.binary = len(binary) == len(wanted) or (frozenset(binary) if binary else False)


_NO_PARAMETERS: Final = _WireOutputParameters()


def _decode_raw(tensor: _WireInput, raw: RawBytes | None) -> Array:
    """A tensor with parameters, which say how its data comes."""
    assert tensor.parameters is not None
    where = f"input {tensor.name!r}"
    if tensor.parameters.shared_memory_region is not None:
        raise InvalidInput(f"{where}: {NO_SHARED_MEMORY}")
    size = tensor.parameters.binary_data_size
    if size is None:
        return _decode_tensor(tensor)
    if raw is None:
        raise InvalidInput(f"{where}: binary_data_size came, expected with an inference-header-content-length header")
    if bytes(tensor.data):
        raise InvalidInput(f"{where}: data came as JSON and as bytes, expected one of them")
    return decode_raw(tensor.datatype, tensor.shape, raw.take(size, where), where)


def _lone_input(body: bytes | bytearray | memoryview, model: ModelInfo | None) -> dict[str, Array]:
    """A body without JSON. One dimension may be open, and follows from the length."""
    if model is None or len(model.inputs) != 1:
        number = 0 if model is None else len(model.inputs)
        raise InvalidInput(f"a body without JSON is for a model with one input, and this one has {number}")
    spec = model.inputs[0]
    shape = [dimension if isinstance(dimension, int) else -1 for dimension in spec.shape]
    where = f"input {spec.name!r}"
    if spec.dtype == "string":
        array = decode_strings(body, where)
    else:
        dtype = numpy_dtype(spec.dtype)
        if len(body) % dtype.itemsize:
            raise InvalidInput(f"{where}: {len(body)} bytes came, expected elements of {dtype.itemsize}")
        array = np.frombuffer(body, dtype)
    try:
        if shape.count(-1) > 1:
            shape = [1 if dimension < 0 and index else dimension for index, dimension in enumerate(shape)]
        return {spec.name: array.reshape(shape)}
    except ValueError:
        raise InvalidInput(f"{where}: {array.size} elements came, expected shape {list(spec.shape)}") from None


def _decode_tensor(tensor: _WireInput) -> Array:
    kind = _KINDS.get(tensor.datatype)
    where = f"input {tensor.name!r}"
    if kind is None:
        raise InvalidInput(f"{where}: datatype {tensor.datatype!r} came, expected one of {', '.join(_KINDS)}")
    raw = bytes(tensor.data)
    if not raw:
        raise InvalidInput(f"{where}: no data came, expected a list of {math.prod(tensor.shape)} elements")
    depth = _OPENING.match(raw).group().count(b"[")  # type: ignore[union-attr]  # it matches everything
    if depth not in (1, len(tensor.shape)) or depth > _MAX_NESTING:
        came = "something that is not a list" if depth == 0 else f"a list nested {depth} deep"
        nested = f" or one nested {len(tensor.shape)} deep" if 1 < len(tensor.shape) <= _MAX_NESTING else ""
        raise InvalidInput(f"{where}: data is {came}, expected a flat list{nested}")
    try:
        array = _decode_values(kind, raw, depth)
        if array.ndim != depth:  # an array of objects takes lists for elements
            raise ValueError
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{where}: {_element_fault(raw, str(error), kind)}") from None
    except OverflowError:
        raise InvalidInput(f"{where}: a value is out of range, expected {kind.expected}") from None
    except ValueError:
        raise InvalidInput(f"{where}: data is a ragged list, expected shape {tensor.shape}") from None
    shape = tuple(tensor.shape)
    if depth > 1 and array.shape != shape:
        raise InvalidInput(f"{where}: data has shape {list(array.shape)}, expected {tensor.shape}")
    if array.size != math.prod(shape):
        raise InvalidInput(
            f"{where}: data has {array.size} elements, expected {math.prod(shape)} for shape {tensor.shape}"
        )
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):
        raise InvalidInput(f"{where}: shape {tensor.shape} is beyond what an array can have") from None


def _decode_values(kind: _Kind, raw: bytes, depth: int) -> Array:
    try:
        return _decode_exactly(kind, raw, depth)
    except msgspec.ValidationError:
        whole = _whole_numbers(kind, raw, depth) if kind.dtype.kind in "biu" else None
        if whole is None:
            raise
        return whole


def _whole_numbers(kind: _Kind, raw: bytes, depth: int) -> Array | None:
    """Integers that come as `3.0`, as clients send them that know JSON's numbers only as floats. None for other data,
    and for numbers of which a float does not know whether they are whole."""
    try:
        floats = np.array(_KINDS["FP64"].decoders[depth - 1].decode(raw), np.float64)
    except msgspec.DecodeError:
        return None
    low, high = (0, 1) if kind.dtype.kind == "b" else (np.iinfo(kind.dtype).min, np.iinfo(kind.dtype).max)
    known = np.abs(floats) < 2**53
    if not np.all(known & (floats >= low) & (floats <= high) & (floats == np.trunc(floats))):
        return None
    return floats.astype(kind.dtype)


def _decode_exactly(kind: _Kind, raw: bytes, depth: int) -> Array:
    if depth > 1 or len(raw) < 2 * _PIECE_BYTES or kind.dtype.kind == "O":
        return np.array(kind.decoders[depth - 1].decode(raw), kind.dtype)
    try:
        return np.concatenate([np.array(kind.decoders[0].decode(piece), kind.dtype) for piece in _pieces(raw)])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return np.array(kind.decoders[0].decode(raw), kind.dtype)  # which fails too, and says where


def _pieces(raw: bytes) -> Iterator[bytes]:
    """A long list of numbers as several short ones, which take as much time but let other threads run in between,
    and do not hold a Python object for every number at once."""
    start, end = raw.index(b"[") + 1, raw.rindex(b"]")
    while (comma := raw.find(b",", start + _PIECE_BYTES, end)) >= 0:
        yield b"[%b]" % raw[start:comma]
        start = comma + 1
    yield b"[%b]" % raw[start:end]


def _element_fault(raw: bytes, message: str, kind: _Kind) -> str:
    """Names the element that the typed decoder refused and shows it; only errors pay for this second look."""
    path = _ELEMENT_PATH.search(message)
    if path is None:
        return f"data: {message}, expected {kind.expected}"
    try:
        came = msgspec.json.decode(raw)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):  # as 1e999: no decoder can show it
        return f"data{path.group(1)} cannot be read, expected {kind.expected}"
    for index in re.findall(r"\d+", path.group(1)):
        came = came[int(index)]
    shown = _ENCODER.encode(came).decode()
    shown = shown if len(shown) <= 40 else shown[:40] + "…"
    return f"data{path.group(1)} is {shown}, expected {kind.expected}"


def encode_request(
    inputs: Tensors,
    *,
    id: str = "",
    priority: Priority | None = None,
    timeout: float | None = None,
    outputs: Sequence[str] | None = None,
) -> bytes:
    """A request body. `priority` None is the model's default class; `timeout` is in seconds."""
    wire: dict[str, Any] = {"inputs": _encode_tensors(inputs.items())}
    if id:
        wire["id"] = id
    parameters = {}
    if priority is not None:
        parameters["priority"] = priority + 1
    if timeout is not None:
        parameters["timeout"] = max(1, round(timeout * 1e6))
    if parameters:
        wire["parameters"] = parameters
    if outputs is not None:
        wire["outputs"] = [{"name": name} for name in outputs]
    return _ENCODER.encode(wire)


# ----------------------------------------------------------------------------------------------- replies


class InferReply(msgspec.Struct):
    """A decoded answer: arrays by output name, in the server's order."""

    outputs: dict[str, Array]
    model_name: str
    model_version: str = ""
    id: str = ""


def encode_reply(model: ModelInfo, name: str, outputs: Tensors, call: InferCall) -> tuple[bytes, int | None]:
    """The answer to a call: the outputs that it asked for, in its order; all of them if it named none. With it, where
    it has outputs as bytes, the number of those of JSON before them.

    Raises `InvalidInput` for an output that the model did not return and `InferenceError` for one that JSON
    cannot carry (bytes that are not UTF-8).
    """
    chosen = chosen_outputs(outputs, call)
    binary = call.binary
    if not binary:
        return _ENCODER.encode(_WireReply(name, model.version, call.id, _encode_tensors(chosen))), None
    raws: list[bytes] = []
    if binary is True and not call.id:
        described = []
        for output, array in chosen:
            raws.append(encode_raw(array))
            described.append((output, array.shape, array.dtype, len(raws[-1])))
        header = _raw_header(name, model.version, tuple(described))
        return b"".join((header, *raws)), len(header)
    tensors: list[Any] = []
    for output, array in chosen:
        if binary is True or output in binary:
            raws.append(encode_raw(array))
            tensors.append(_described(output, array.shape, array.dtype, len(raws[-1])))
        else:
            tensors.append(_encode_tensor(output, array))
    header = _ENCODER.encode(_WireReply(name, model.version, call.id, tensors))
    return b"".join((header, *raws)), len(header)


@lru_cache(_KNOWN_LAYOUTS)
def _raw_header(name: str, version: str, tensors: tuple[tuple[str, tuple[int, ...], Any, int], ...]) -> bytes:
    """The JSON of an answer to a call without an id, all of whose tensors follow as bytes."""
    return _ENCODER.encode(_WireReply(name, version, "", [_described(*tensor) for tensor in tensors]))


def _described(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> _WireRawTensor:
    return _WireRawTensor(name, shape, datatype_of_dtype(dtype), _WireSize(size))


def decode_reply(body: bytes, header_length: int | None = None) -> InferReply:
    """The answer in a response body; `null` in a floating-point output is NaN. Raises `InferenceError` for
    a body that is no answer."""
    raw = None if header_length is None else RawBytes(body, header_length)
    try:
        wire = _REPLY.decode(body if header_length is None else memoryview(body)[:header_length])
        outputs = {
            tensor.name: np.array(tensor.data, _KINDS[tensor.datatype].dtype).reshape(tensor.shape)
            if tensor.parameters is None or raw is None
            else decode_raw(
                tensor.datatype, tensor.shape, raw.take(tensor.parameters.binary_data_size, tensor.name), tensor.name
            )
            for tensor in wire.outputs
        }
    except (msgspec.DecodeError, InvalidInput, KeyError, TypeError, ValueError, OverflowError) as error:
        raise InferenceError(f"the server's answer cannot be read: {error}") from error
    return InferReply(outputs, wire.model_name, wire.model_version, wire.id)


def _encode_tensors(tensors: Iterable[tuple[str, Array]]) -> list[_WireTensor]:
    return [_encode_tensor(name, array) for name, array in tensors]


def _encode_tensor(name: str, array: Array) -> _WireTensor:
    flat = array.ravel()
    if array.dtype == _BFLOAT16:
        flat = flat.astype(np.float32)  # whose values are Python's numbers
    data: Any
    if flat.size > _PIECE_VALUES and flat.dtype.kind in "biuf":
        starts = range(0, flat.size, _PIECE_VALUES)
        pieces = [_ENCODER.encode(flat[start : start + _PIECE_VALUES].tolist())[1:-1] for start in starts]
        pieces[0], pieces[-1] = b"[" + pieces[0], pieces[-1] + b"]"
        data = msgspec.Raw(b",".join(pieces))
    else:
        data = flat.tolist()
    if array.dtype.kind in "OS":
        try:
            data = [item.decode() if isinstance(item, bytes) else item for item in data]
        except UnicodeDecodeError:
            message = f"tensor {name!r} holds bytes that are not UTF-8, which JSON cannot carry"
            raise InferenceError(message) from None
    return _WireTensor(name, list(array.shape), datatype_of_dtype(array.dtype), data)
