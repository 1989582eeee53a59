"""A job as text: the JSON form in which jobs are stored, sent over HTTP and written to files.

Callables stand in it by name, sources and sinks by their tagged settings, arrays as tensors (`core.wire`). What is not
here: what a job may be (`core.jobs`), finding the callables that the names stand for (`runtime`).
"""

from __future__ import annotations

import binascii
import datetime as dt
import io
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec
import numpy as np

from kapsl_scheduler.core.cron import CronExpression, Interval
from kapsl_scheduler.core.jobs import CronJob, CronOverflowPolicy, FiringPolicy, Named, RunPolicy
from kapsl_scheduler.core.wire import WIRE_DTYPES, decode_tensor, encode_tensor
from kapsl_scheduler.errors import InvalidExpression, InvalidInput, InvalidJob
from kapsl_scheduler.types import Array, InferenceRequest, Priority, RequestMetadata, dtype_name

__all__ = ["Definition", "IntervalDefinition", "callable_name", "decode_job", "encode_job", "frozen_request"]


class IntervalDefinition(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """A schedule of a fixed period in seconds; `anchor` is one of its moments."""

    interval_secs: float
    anchor: dt.datetime | None = None


class Definition(msgspec.Struct, kw_only=True, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """The keys of the JSON form.

    The request is exactly one of: `input` (a tensor for the model's one input, as it is), `value` (numbers or text for
    it), `inputs` (by name; a tensor or plain values each), `callable` (the name it is bound under), `source`.
    """

    id: str
    schedule: str | IntervalDefinition
    tz: str = "UTC"
    literal: bool = False
    input: dict[str, Any] | None = None
    value: Any = None
    inputs: dict[str, Any] | None = None
    session_id: str | None = None
    metadata: RequestMetadata | None = None
    callable: str | None = None
    source: dict[str, Any] | None = None
    sink: dict[str, Any] | None = None
    on_result: str | None = None
    condition: str | None = None
    priority: str = "background"
    overflow_policy: str = "skip_if_busy"
    force_cpu: bool = False
    model: str | None = None
    package: str | None = None
    firing: FiringPolicy = FiringPolicy()
    run: RunPolicy = RunPolicy()
    enabled: bool = True


class Adapters(Protocol):
    """What sources and sinks there are: settings in, adapter out. Raises `ValueError`."""

    def __call__(self, kind: str, settings: Mapping[str, Any]) -> Any: ...


_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(Definition)


def callable_name(function: Callable[..., Any]) -> str:
    """The name of a callable of somebody's code: `module:qualified name`. Lambdas, methods and the like share it with
    others."""
    inner = getattr(function, "__func__", function)
    name = getattr(inner, "__qualname__", type(function).__qualname__)
    return f"{getattr(inner, '__module__', None) or type(function).__module__}:{name}"


# ------------------------------------------------------------------------------------------------ out


def encode_job(job: CronJob) -> bytes:
    """A checked job as JSON text; equal jobs give equal text. Raises `InvalidJob` for what has no such form: a
    request that is no tensor, a source or sink without settings."""
    schedule = job.schedule
    keys: dict[str, Any] = {"id": job.id}
    if isinstance(schedule, CronExpression):
        keys["schedule"] = schedule.text
        if schedule.tz_name != "UTC":
            keys["tz"] = schedule.tz_name
        if schedule.literal:
            keys["literal"] = True
        _check_zone(job, schedule)
    else:
        assert isinstance(schedule, Interval)
        keys["schedule"] = {"interval_secs": schedule.period_us / 1e6}
        if schedule.anchor is not None:
            keys["schedule"]["anchor"] = schedule.anchor
    _encode_request(job, keys)
    if job.sink is not None:
        if callable(job.sink) or isinstance(job.sink, Named):
            keys["sink"] = {"callable": _name(job.sink)}
        else:
            keys["sink"] = _settings(job, "sink", job.sink)
    for field in ("on_result", "condition"):
        value = getattr(job, field)
        if value is not None:
            keys[field] = _name(value)
    if job.priority is not Priority.BACKGROUND:
        keys["priority"] = job.priority.name.lower()
    if job.overflow_policy is not CronOverflowPolicy.SKIP_IF_BUSY:
        keys["overflow_policy"] = job.overflow_policy.value
    if job.force_cpu:
        keys["force_cpu"] = True
    if job.model is not None:
        keys["model"] = job.model
    if job.package is not None:
        keys["package"] = job.package
    if job.firing != _PLAIN_FIRING:
        keys["firing"] = job.firing
    if job.run != _PLAIN_RUN:
        keys["run"] = job.run
    if not job.enabled:
        keys["enabled"] = False
    return _ENCODER.encode(keys)


_PLAIN_FIRING: Final = FiringPolicy()
_PLAIN_RUN: Final = RunPolicy()


def _name(value: Any) -> str:
    return value.name if isinstance(value, Named) else callable_name(value)


def _settings(job: CronJob, field: str, adapter: Any) -> dict[str, Any]:
    settings = msgspec.to_builtins(adapter) if isinstance(adapter, msgspec.Struct) else None
    if not isinstance(settings, dict) or "type" not in settings:
        raise InvalidJob([f"{field}: expected an adapter with settings, got {reprlib.repr(adapter)}"], job.id)
    return settings


def _check_zone(job: CronJob, schedule: CronExpression) -> None:
    """A zone of somebody's own has no name by which it is found again."""
    try:
        if CronExpression(schedule.text, schedule.tz_name, literal=schedule.literal) == schedule:
            return
    except InvalidExpression:
        pass
    raise InvalidJob([f"tz: expected an IANA name or a fixed offset, got {reprlib.repr(schedule.tz)}"], job.id)


def _encode_request(job: CronJob, keys: dict[str, Any]) -> None:
    request = job.request
    if isinstance(request, InferenceRequest):
        if request.session_id is not None:
            keys["session_id"] = request.session_id
        if request.metadata is not None:
            keys["metadata"] = request.metadata
        request = request.inputs
    if isinstance(request, Named) or callable(request):
        keys["callable"] = _name(request)
    elif isinstance(request, np.ndarray):
        keys["input"] = _tensor(job, "input", request)
    elif isinstance(request, Mapping):
        keys["inputs"] = {
            str(name): _tensor(job, f"inputs.{name}", value)
            if isinstance(value, np.ndarray)
            else _plain(job, f"inputs.{name}", value)
            for name, value in request.items()
        }
    elif hasattr(request, "items"):
        keys["source"] = _settings(job, "source", request)
    else:
        keys["value"] = _plain(job, "value", request)


def _plain(job: CronJob, where: str, value: Any) -> Any:
    try:
        plain = msgspec.to_builtins(value)
        _ENCODER.encode(plain)
    except (TypeError, ValueError) as error:
        raise InvalidJob([f"request.{where}: {reprlib.repr(value)} cannot be stored: {error}"], job.id) from None
    return plain


def _tensor(job: CronJob, where: str, array: Array) -> dict[str, Any]:
    """The wire form where it can hold the array, else text by text, else numpy's own file format."""
    dtype = dtype_name(array.dtype)
    try:
        if dtype == "string":
            texts = [_text(element) for element in array.flat]
            if array.size != 1:
                return {"shape": list(array.shape), "dtype": dtype, "values": texts}
            array = np.array(texts, object).reshape(array.shape)
        if dtype in WIRE_DTYPES and array.size:
            return encode_tensor(array, base64=True)
        if dtype == "bfloat16":  # numpy would store its bytes and forget what they are
            raise TypeError("no file has a form for it")
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
    except (TypeError, ValueError) as error:
        raise InvalidJob([f"request.{where}: an array of {array.dtype} cannot be stored: {error}"], job.id) from None
    return {"npy_base64": binascii.b2a_base64(file.getvalue(), newline=False).decode("ascii")}


def _text(element: Any) -> str:
    """Raises `ValueError`, `TypeError` for what is no text."""
    if isinstance(element, bytes):
        return element.decode("utf-8")
    if not isinstance(element, str):
        raise TypeError(f"expected str or bytes, got {reprlib.repr(element)}")
    element.encode("utf-8")  # a lone surrogate would not come back
    return str(element)


# ------------------------------------------------------------------------------------------------- in


def decode_job(text: bytes, adapters: Adapters) -> CronJob:
    """The job that the text describes, its callables as `Named`; not yet checked (`CronJob.check`).

    Raises `InvalidJob`, which says where the text is wrong.
    """
    try:
        definition = _DECODER.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:  # a ValidationError says which key, and what was expected
        raise InvalidJob([str(error)]) from None
    faults: list[str] = []
    schedule = _schedule(definition, faults)
    request = _request(definition, adapters, faults)
    sink = None if definition.sink is None else _sink(definition.sink, adapters, faults)
    if faults:
        raise InvalidJob(faults, definition.id)
    return CronJob(
        definition.id,
        schedule,
        request,
        priority=definition.priority,  # type: ignore[arg-type]  # `check` makes it a member, or says what is wrong
        overflow_policy=definition.overflow_policy,  # type: ignore[arg-type]
        on_result=None if definition.on_result is None else Named(definition.on_result),
        condition=None if definition.condition is None else Named(definition.condition),
        sink=sink,
        force_cpu=definition.force_cpu,
        model=definition.model,
        package=definition.package,
        tz=definition.tz,
        firing=definition.firing,
        run=definition.run,
        enabled=definition.enabled,
    )


def _schedule(definition: Definition, faults: list[str]) -> CronExpression | Interval | str:
    schedule = definition.schedule
    try:
        if isinstance(schedule, IntervalDefinition):
            return Interval(schedule.interval_secs, schedule.anchor)
        return CronExpression(schedule, definition.tz, literal=True) if definition.literal else schedule
    except InvalidExpression as error:
        faults.append(f"schedule: {error}")
        return ""


def _request(definition: Definition, adapters: Adapters, faults: list[str]) -> Any:
    ways = ("input", "value", "inputs", "callable", "source")
    given = [key for key in ways if getattr(definition, key) is not None]
    if len(given) != 1:
        faults.append(f"expected exactly one of {', '.join(ways)}, got {' and '.join(given) or 'none'}")
        return None
    way = given[0]
    if way in ("callable", "source"):
        faults.extend(
            f"{key}: means something only with input, value or inputs"
            for key in ("session_id", "metadata")
            if getattr(definition, key) is not None
        )
    if way == "callable":
        return Named(definition.callable or "")
    if way == "source":
        return _adapter(adapters, "source", definition.source or {}, faults)
    inputs: Any
    if way == "value":
        inputs = definition.value
    elif way == "inputs":
        inputs = {name: _value(value, f"inputs.{name}", faults) for name, value in (definition.inputs or {}).items()}
    else:
        inputs = _array(definition.input or {}, "input", faults)
    if definition.session_id is None and definition.metadata is None:
        return inputs
    return InferenceRequest(inputs, session_id=definition.session_id, metadata=definition.metadata)


def _sink(settings: dict[str, Any], adapters: Adapters, faults: list[str]) -> Any:
    if "callable" not in settings:
        return _adapter(adapters, "sink", settings, faults)
    if len(settings) == 1 and isinstance(settings["callable"], str):
        return Named(settings["callable"])
    faults.append(f"sink: expected {{callable: name}} or the settings of a sink, got {reprlib.repr(settings)}")
    return None


def _adapter(adapters: Adapters, kind: str, settings: dict[str, Any], faults: list[str]) -> Any:
    try:
        return adapters(kind, settings)
    except ValueError as error:  # msgspec.ValidationError is one
        faults.append(f"{kind}: {error}")
        return None


def _value(value: Any, where: str, faults: list[str]) -> Any:
    return _array(value, where, faults) if isinstance(value, dict) else value


def _array(form: dict[str, Any], where: str, faults: list[str]) -> Any:
    try:
        if "npy_base64" in form:
            raw = binascii.a2b_base64(form["npy_base64"], strict_mode=True)
            return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
        if "values" in form:
            return np.array(msgspec.convert(form["values"], list[str]), dtype=object).reshape(form.get("shape", -1))
        return decode_tensor(form, where)
    except InvalidInput as error:
        faults.append(str(error))
    except Exception as error:  # whatever numpy's reader meets in damaged bytes, from SyntaxError to MemoryError
        faults.append(f"{where}: {error}")
    return None


# -------------------------------------------------------------------------------------------- in memory


def frozen_request(request: Any) -> Any:
    """A fixed request with arrays of its own, which nobody can change: what a job keeps from its registration on."""
    if isinstance(request, np.ndarray):
        array = request.copy()
        array.flags.writeable = False
        return array
    if isinstance(request, InferenceRequest):
        return InferenceRequest(
            frozen_request(request.inputs), session_id=request.session_id, metadata=request.metadata
        )
    if isinstance(request, Mapping):
        return {name: frozen_request(value) for name, value in request.items()}
    if isinstance(request, list):
        return [frozen_request(value) for value in request]
    return request
