"""The manifest of a package (`metadata.json`): its form, and the reader that reports every fault at once.

The structs are the table of what may stand in a manifest: their annotations are what the reader checks. Cron
jobs are kept as declared; whether a cron expression can be parsed, and what the classes mean, is decided where
jobs are registered. Archives are `packages.aimod`.
"""

from __future__ import annotations

import reprlib
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import msgspec

from kapsl_scheduler.core.wire import WireTensor, read_tensor
from kapsl_scheduler.errors import InvalidPackage
from kapsl_scheduler.types import Array

__all__ = [
    "CronJobDef",
    "HardwareRequirements",
    "IntervalDef",
    "Manifest",
    "NamedTensor",
    "package_path",
    "parse_manifest",
]

_LARGEST: Final = 2**63 - 1
_MAX_FINDINGS: Final = 1000
_MAX_PATH_BYTES: Final = 512
_MAX_PATH_PARTS: Final = 16

_Name = Annotated[str, msgspec.Meta(min_length=1, description="a string that is not empty")]
_Path = Annotated[str, msgspec.Meta(description="a relative path inside the package")]
_Amount = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST, description="an integer of 0 or more")]
_Seconds = Annotated[int, msgspec.Meta(gt=0, le=_LARGEST, description="an integer above 0")]
_SCHEDULE_WORDS: Final = 'a cron expression or {"interval_secs": seconds}'
_CronText = Annotated[str, msgspec.Meta(pattern=r"\S", description=_SCHEDULE_WORDS)]


class IntervalDef(msgspec.Struct, frozen=True):
    """A schedule of a fixed period, in seconds."""

    interval_secs: _Seconds


_Schedule = _CronText | IntervalDef


class NamedTensor(msgspec.Struct, frozen=True, eq=False):
    """The value of one named input of the model."""

    name: _Name
    tensor: Array


class CronJobDef(msgspec.Struct, frozen=True, eq=False):
    """A periodic inference as a package declares it.

    `schedule` is the text of a cron expression, unparsed, or an interval. `input` feeds the model's first
    input. `priority` and `overflow_policy` are the manifest's words.
    """

    id: _Name
    schedule: _Schedule
    input: Array
    additional_inputs: tuple[NamedTensor, ...] = ()
    priority: Literal["throughput", "latency_critical"] = "throughput"
    force_cpu: bool = False
    overflow_policy: Literal["skip_if_busy", "block"] = "skip_if_busy"


class HardwareRequirements(msgspec.Struct, frozen=True):
    """What the model asks of the machine. Memory is in MB, `gpu_compute_share_milli` in thousandths of a GPU."""

    preferred_provider: str | None = None
    fallback_providers: tuple[str, ...] = ()
    min_memory_mb: _Amount | None = None
    min_vram_mb: _Amount | None = None
    gpu_memory_reservation_mb: _Amount | None = None
    gpu_memory_limit_mb: _Amount | None = None
    gpu_compute_share_milli: _Amount | None = None
    isolation_mode: str | None = None
    min_cuda_version: str | None = None
    required_precision: str | None = None
    optimized_for: tuple[str, ...] = ()
    graph_optimization_level: Literal["disable", "basic", "extended", "all"] | None = None
    device_id: int | None = None
    gpu_device_ids: tuple[int, ...] = ()
    strategy: str | None = None


class Manifest(msgspec.Struct, frozen=True):
    """What a package says of itself.

    `created_at` is kept as the text that was written (ISO 8601, or seconds since 1970). `metadata` is whatever
    JSON the author put there.
    """

    project_name: _Name
    framework: str
    version: str
    created_at: str
    model_file: _Path
    metadata: Any = None
    hardware_requirements: HardwareRequirements = HardwareRequirements()
    cron_jobs: tuple[CronJobDef, ...] = ()
    _warnings: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was ignored while reading, each with its path."""
        return self._warnings


def parse_manifest(data: bytes, *, source: str = "package") -> Manifest:
    """Read the bytes of a `metadata.json`. An optional key that is null counts as absent.

    Raises `InvalidPackage` with every fault, each with its path, such as `cron_jobs[1].input.dtype: ...`.
    `source` names the package in the message.
    """
    try:
        document = msgspec.json.decode(data)
    except (ValueError, RecursionError) as error:
        raise InvalidPackage([f"metadata.json: not JSON: {error}"], source=source) from error
    reader = _Reader()
    manifest: Manifest = reader.read(Manifest, document, "")
    if reader.faults:
        raise InvalidPackage(reader.faults, source=source)
    return msgspec.structs.replace(manifest, _warnings=tuple(reader.warnings))


def package_path(text: str) -> PurePosixPath:
    """`text` as a path that stays inside a package on every system. Raises `ValueError` saying why it is none."""
    path, windows = PurePosixPath(text), PureWindowsPath(text)
    try:
        encoded = text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not UTF-8") from None
    if any(byte < 0x20 or byte == 0x7F for byte in encoded):
        raise ValueError("has control characters")
    if path.is_absolute() or windows.anchor:
        raise ValueError("is an absolute path")
    if ".." in windows.parts:  # both kinds of slash
        raise ValueError("leaves the package")
    if len(encoded) > _MAX_PATH_BYTES or len(path.parts) > _MAX_PATH_PARTS:
        raise ValueError(f"is longer than {_MAX_PATH_BYTES} bytes or {_MAX_PATH_PARTS} levels")
    if any(len(part.encode()) > 255 for part in path.parts):
        raise ValueError("has a name of more than 255 bytes")
    return path


# ------------------------------------------------------------------------------------------------ reader


class _Findings(list[str]):
    """Bounded: a few megabytes of hostile JSON could hold a million faults."""

    def append(self, finding: str) -> None:
        if len(self) < _MAX_FINDINGS:
            super().append(finding)
        elif len(self) == _MAX_FINDINGS:
            super().append("and more")


class _Reader:
    """Turns plain JSON values into structs field by field, and goes on after a fault.

    What `read` returns means something only while `faults` is empty.
    """

    def __init__(self) -> None:
        self.faults = _Findings()
        self.warnings = _Findings()

    def read(self, kind: Any, value: Any, path: str) -> Any:
        if read := _READERS.get(kind):
            return read(self, value, path)
        if get_origin(kind) is tuple:
            return self._sequence(get_args(kind)[0], value, path)
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            return self._struct(kind, value, path)
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            return self._expected(kind, value, path)

    def _struct(self, kind: type[msgspec.Struct], value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            return self._expected(kind, value, path or "metadata.json")
        fields = [field for field in msgspec.structs.fields(kind) if not field.name.startswith("_")]
        self._unknown(value, (field.name for field in fields), path)
        found = {}
        for field in fields:
            content, at, wanted = value.get(field.name), _join(path, field.name), _without_none(field.type)
            if content is not None:
                found[field.name] = self.read(wanted, content, at)
            elif field.required:
                self._expected(wanted, None, at)
        return None if self.faults else kind(**found)

    def _sequence(self, kind: Any, value: Any, path: str) -> Any:
        if not isinstance(value, list):
            return self._expected(tuple, value, path)
        if key := _UNIQUE.get(kind):
            self._unique(key, value, path)
        return tuple(self.read(kind, item, f"{path}[{index}]") for index, item in enumerate(value))

    def _unique(self, key: str, items: list[Any], path: str) -> None:
        first: dict[str, str] = {}
        for index, item in enumerate(items):
            at, name = f"{path}[{index}].{key}", item.get(key) if isinstance(item, dict) else None
            if isinstance(name, str) and first.setdefault(name, at) != at:
                self.faults.append(f"{at}: {reprlib.repr(name)} is taken by {first[name]}")

    def tensor(self, value: Any, path: str) -> Any:
        if isinstance(value, dict):
            self._unknown(value, WireTensor.__struct_fields__, path)
        return read_tensor(value, path, self.faults)

    def schedule(self, value: Any, path: str) -> Any:
        return self.read(IntervalDef if isinstance(value, dict) else _CronText, value, path)

    def file(self, value: Any, path: str) -> Any:
        if not isinstance(value, str) or not PurePosixPath(value).parts:
            return self._expected(_Path, value, path)
        try:
            return str(package_path(value))
        except ValueError as error:
            self.faults.append(f"{path}: {reprlib.repr(value)} {error}")
            return None

    def _expected(self, kind: Any, value: Any, path: str) -> Any:
        """Report the fault. Stands in for the value, so that readers can return it."""
        came = "nothing" if value is None else reprlib.repr(value)
        self.faults.append(f"{path}: expected {_describe(kind)}, got {came}")
        return None

    def _unknown(self, value: Mapping[str, Any], known: Iterable[str], path: str) -> None:
        names = set(known)
        for key in value:
            if key not in names:
                shown = key if key.isidentifier() else reprlib.repr(key)
                self.warnings.append(f"{_join(path, shown)}: unknown key, ignored")


_READERS: Final[Mapping[Any, Callable[[_Reader, Any, str], Any]]] = {
    Array: _Reader.tensor,
    _Schedule: _Reader.schedule,
    _Path: _Reader.file,
}
_UNIQUE: Final[Mapping[Any, str]] = {CronJobDef: "id", NamedTensor: "name"}
_WORDS: Final[Mapping[Any, str]] = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    tuple: "a list",
    Array: "a tensor",
    _Schedule: _SCHEDULE_WORDS,
}


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is Annotated:
        return str(kind.__metadata__[0].description)
    return _WORDS.get(kind, "an object")


def _without_none(kind: Any) -> Any:
    """`X` of `X | None`: null counts as absent, so no reader meets it."""
    if get_origin(kind) not in (Union, types.UnionType) or type(None) not in get_args(kind):
        return kind
    (inner,) = (part for part in get_args(kind) if part is not type(None))
    return inner


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
