"""The Open Inference Protocol v2 in protobuf: its messages, a request to an `InferCall`, outputs to an answer.

The messages are made of `proto/descriptors.binpb` in a pool of their own. Generated modules would register them in the
process's one pool, where a second file of package `inference`, as every client of the protocol brings one, is an error.

What is not here: calls and statuses (`server.oip_grpc`), the bytes of a tensor (`server.oip_raw`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from operator import attrgetter
from typing import Any, Final

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.server.oip import (
    NO_CLASSIFICATION,
    NO_SHARED_MEMORY,
    InferCall,
    chosen_outputs,
    datatype_of_dtype,
    set_outputs,
    set_parameters,
)
from kapsl_scheduler.server.oip_raw import CANONICAL, decode_raw, encode_raw
from kapsl_scheduler.types import Array, InferenceRequest, ModelInfo, Tensors, numpy_dtype

__all__ = ["POOL", "Message", "decode_call", "encode_response", "message_class", "parameters_of", "parsed"]

Message = Any
"""A protobuf message. Its fields are known to the descriptors only."""

_MAX_RANK: Final = 32  # numpy's own limit, 64 since its 2.0
_MAX_TENSORS: Final = 1024

_TYPED: Final[Mapping[str, str]] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""The field that a datatype's elements come in. FP16 and BF16 have none."""
_COME_AS: Final = {"int_contents": np.dtype(np.int32), "uint_contents": np.dtype(np.uint32)}
"""Fields whose elements are wider than those of some of their datatypes."""


def _private_pool() -> descriptor_pool.DescriptorPool:
    described = files("kapsl_scheduler.server").joinpath("proto", "descriptors.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(described).file:
        pool.Add(file)
        if file.package == "grpc.reflection.v1":  # its version v1alpha has the same messages
            pool.Add(_renamed(file, file.package, "grpc.reflection.v1alpha"))
    return pool


def _renamed(file: Message, before: str, after: str) -> Message:
    """A file with another name and package."""
    renamed = descriptor_pb2.FileDescriptorProto()
    renamed.CopyFrom(file)
    renamed.name, renamed.package = f"{after}.proto", after
    for message in renamed.message_type:
        for field in filter(attrgetter("type_name"), message.field):
            field.type_name = field.type_name.replace(f".{before}.", f".{after}.")
    for service in renamed.service:
        for method in service.method:
            method.input_type = method.input_type.replace(f".{before}.", f".{after}.")
            method.output_type = method.output_type.replace(f".{before}.", f".{after}.")
    return renamed


POOL: Final = _private_pool()
"""The files of the services that are offered."""


def message_class(name: str) -> Message:
    """The class of a message by its full name."""
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))


_Request: Final = message_class("inference.ModelInferRequest")
_Response: Final = message_class("inference.ModelInferResponse")
_Output: Final = message_class("inference.ModelInferResponse.InferOutputTensor")


def parsed(kind: Message, data: bytes) -> Message:
    """The message in some bytes. Raises `InvalidInput`."""
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise InvalidInput(f"the message is no {kind.DESCRIPTOR.name}: {error}") from None


def parameters_of(parameters: Mapping[str, Message]) -> dict[str, Any]:
    """Parameters as plain values. One that says nothing is left out."""
    return {
        name: getattr(value, choice)
        for name, value in parameters.items()
        if (choice := value.WhichOneof("parameter_choice")) is not None
    }


# ---------------------------------------------------------------------------------------------------- requests


def decode_call(request: Message) -> tuple[InferCall, dict[str, Any]]:
    """The call in a `ModelInferRequest`, and all its parameters. Tensors come as raw contents, one for each input, or
    as typed ones.

    Raises `InvalidInput` with every tensor's fault, or with what is wrong beside them.
    """
    raws = request.raw_input_contents
    wanted = request.inputs
    if len(wanted) > _MAX_TENSORS:
        raise InvalidInput(f"{len(wanted)} inputs came, expected at most {_MAX_TENSORS}")
    if raws and len(raws) != len(wanted):
        raise InvalidInput(f"{len(raws)} raw contents came, expected one for each of {len(wanted)} inputs")
    inputs: dict[str, Array] = {}
    faults = []
    for index, tensor in enumerate(wanted):
        name = tensor.name
        try:
            if name in inputs:
                raise InvalidInput(f"input {name!r} came twice, expected once")
            inputs[name] = _tensor(tensor, raws[index] if raws else None)
        except InvalidInput as error:
            faults.append(str(error))
    if faults:
        raise InvalidInput("; ".join(faults))
    call = InferCall(InferenceRequest(inputs), request.id, binary=True)
    parameters = parameters_of(request.parameters) if request.parameters else {}
    if parameters:
        set_parameters(
            call,
            _unsigned(parameters, "priority"),
            _unsigned(parameters, "timeout"),
            "" if "sequence_id" not in parameters else _sequence(parameters["sequence_id"]),
        )
    if request.outputs:
        _ask_for(call, request.outputs)
    return call, parameters


def _ask_for(call: InferCall, wanted: Any) -> None:
    if len(wanted) > _MAX_TENSORS:
        raise InvalidInput(f"{len(wanted)} outputs were asked for, expected at most {_MAX_TENSORS}")
    set_outputs(call, [output.name for output in wanted])
    for output in wanted:
        if not output.parameters:
            continue
        parameters = parameters_of(output.parameters)
        if "shared_memory_region" in parameters:
            raise InvalidInput(f"output {output.name!r}: {NO_SHARED_MEMORY}")
        if parameters.get("classification"):
            raise InvalidInput(f"output {output.name!r}: {NO_CLASSIFICATION}")


def _unsigned(parameters: Mapping[str, Any], name: str) -> int:
    value = parameters.get(name, 0)
    if type(value) is not int or not 0 <= value < 2**63:
        raise InvalidInput(f"parameters: {name}: expected an integer from 0 to {2**63 - 1}, got {value!r}")
    return value


def _sequence(value: Any) -> int | str:
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise InvalidInput(f"parameters: sequence_id: expected a text or an integer of 0 or more, got {value!r}")


def _tensor(tensor: Message, raw: bytes | None) -> Array:
    where = f"input {tensor.name!r}"
    if tensor.parameters and "shared_memory_region" in tensor.parameters:
        raise InvalidInput(f"{where}: {NO_SHARED_MEMORY}")
    shape = tensor.shape[:]
    if len(shape) > _MAX_RANK:
        raise InvalidInput(f"{where}: {len(shape)} dimensions came, expected at most {_MAX_RANK}")
    if shape and min(shape) < 0:
        raise InvalidInput(f"{where}: shape {shape} came, expected dimensions of 0 or more")
    if raw is None:
        return _typed(tensor, shape, where)
    if tensor.HasField("contents"):
        raise InvalidInput(f"{where}: contents came typed and raw, expected one of them")
    return decode_raw(tensor.datatype, shape, raw, where)


def _typed(tensor: Message, shape: list[int], where: str) -> Array:
    datatype = tensor.datatype
    if datatype not in CANONICAL:
        raise InvalidInput(f"{where}: datatype {datatype!r} came, expected one of {', '.join(CANONICAL)}")
    field = _TYPED.get(datatype)
    if field is None:
        raise InvalidInput(f"{where}: {datatype} has no typed contents, expected raw ones")
    others = [filled.name for filled, _ in tensor.contents.ListFields() if filled.name != field]
    if others:
        raise InvalidInput(f"{where}: {', '.join(others)} came for {datatype}, expected {field}")
    values = getattr(tensor.contents, field)
    if len(values) != math.prod(shape):
        raise InvalidInput(f"{where}: {len(values)} elements came, expected {math.prod(shape)} for shape {shape}")
    dtype = numpy_dtype(CANONICAL[datatype])
    array = np.array(values[:], _COME_AS.get(field, dtype))
    if array.dtype != dtype:
        array = _narrowed(array, dtype, where)
    try:
        return array.reshape(shape)
    except (ValueError, OverflowError):
        raise InvalidInput(f"{where}: shape {shape} is beyond what an array can have") from None


def _narrowed(array: Array, dtype: np.dtype[Any], where: str) -> Array:
    bounds = np.iinfo(dtype)
    if array.size and (array.min() < bounds.min or array.max() > bounds.max):
        raise InvalidInput(f"{where}: a value is out of range, expected integers from {bounds.min} to {bounds.max}")
    return array.astype(dtype)


# ----------------------------------------------------------------------------------------------------- answers


def encode_response(model: ModelInfo, name: str, outputs: Tensors, call: InferCall) -> Message:
    """The `ModelInferResponse` with the outputs that a call asked for, as raw contents. Raises `InvalidInput` for an
    output that the model did not return."""
    tensors, raws = [], []
    for output, array in chosen_outputs(outputs, call):
        tensors.append(_Output(name=output, datatype=datatype_of_dtype(array.dtype), shape=array.shape))
        raws.append(encode_raw(array))
    return _Response(
        model_name=name, model_version=model.version, id=call.id, outputs=tensors, raw_output_contents=raws
    )
