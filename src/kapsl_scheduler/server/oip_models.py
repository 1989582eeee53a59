"""Models, statistics and settings as the Open Inference Protocol shows them, whatever carries them: plain values, which
REST writes as JSON and gRPC as messages.

What is not here: tensors (`server.oip_json`), routes and calls.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.runtime.registry import ServedModel
from kapsl_scheduler.server.oip import datatype_of
from kapsl_scheduler.server.service import Figures
from kapsl_scheduler.types import ModelInfo, TensorSpec

__all__ = [
    "EXTENSIONS",
    "LogSettings",
    "check_order",
    "checked_traces",
    "index_entry",
    "model_config",
    "model_metadata",
    "model_statistics",
    "server_metadata",
]

EXTENSIONS: Final = (
    "binary_tensor_data",
    "statistics",
    "model_repository",
    "model_configuration",
    "schedule_policy",
    "logging",
)
"""What we offer beyond the protocol's core, by Triton's names."""


def server_metadata(version: str) -> dict[str, Any]:
    """What the server says of itself."""
    return {"name": "kapsl-scheduler", "version": version, "extensions": EXTENSIONS}


def index_entry(model: ServedModel) -> dict[str, str]:
    """A model in the repository's index."""
    state, reason = ("READY", "") if model.ready else ("UNAVAILABLE", "its engines are not ready")
    return {"name": model.name, "version": model.info.version, "state": state, "reason": reason}


def model_metadata(name: str, model: ModelInfo, versions: Sequence[str]) -> dict[str, Any]:
    """The metadata answer; a dimension that is not fixed is -1."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": _dimensions(spec)}

    return {
        "name": name,
        "versions": list(versions),
        "platform": model.framework,
        "inputs": [tensor(spec) for spec in model.inputs],
        "outputs": [tensor(spec) for spec in model.outputs],
    }


def _dimensions(spec: TensorSpec) -> list[int]:
    return [dimension if isinstance(dimension, int) else -1 for dimension in spec.shape]


def model_config(model: ServedModel) -> dict[str, Any]:
    """The model as Triton configures it. Where it is batched on the first axis of all tensors, that axis is not one of
    `dims` but has `max_batch_size`; else that is 0."""
    info, statistics = model.info, model.scheduler.statistics()
    number = int(info.version) if re.fullmatch(r"[0-9]{1,18}", info.version) else None  # as the protocol has versions
    batched = info.batchable and all(spec.batch_axis == 0 for spec in (*info.inputs, *info.outputs))

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        name = datatype_of(spec.dtype)
        dims = _dimensions(spec)[1 if batched else 0 :]
        return {"name": spec.name, "data_type": "TYPE_STRING" if name == "BYTES" else f"TYPE_{name}", "dims": dims}

    return {
        "name": model.name,
        "platform": info.framework,
        "backend": info.framework,
        "max_batch_size": statistics.max_batch_size if batched else 0,
        "input": [tensor(spec) for spec in info.inputs],
        "output": [tensor(spec) for spec in info.outputs],
        "version_policy": {"specific": {"versions": [number]}} if number is not None else {},
        "instance_group": [{"name": model.name, "count": statistics.slots, "kind": "KIND_AUTO"}],
        **({"dynamic_batching": {"max_queue_delay_microseconds": 0}} if info.batchable else {}),
        **({"model_transaction_policy": {"decoupled": True}} if info.streams else {}),
    }


def model_statistics(model: ServedModel, figures: Figures) -> dict[str, Any]:
    """Triton's statistics of a model, and ours behind them (`answers` by HTTP status, `scheduler`)."""
    statistics = model.scheduler.statistics()

    success = figures.success

    def took(count: int, ns: int) -> dict[str, int]:
        return {"count": count, "ns": ns}

    return {
        "name": model.name,
        "version": model.info.version,
        "last_inference": _milliseconds_since_1970(figures.last) if success else 0,
        "inference_count": statistics.rows,
        "execution_count": statistics.calls,
        "inference_stats": {
            "success": took(success, figures.success_ns),
            "fail": took(figures.fail, figures.fail_ns),
            "queue": took(success, round(figures.queue_time * 1e9)),
            "compute_input": took(success, figures.read_ns),
            "compute_infer": took(success, round(figures.compute_time * 1e9)),
            "compute_output": took(success, figures.write_ns),
            "cache_hit": took(0, 0),
            "cache_miss": took(0, 0),
        },
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": took(0, 0),
                "compute_infer": took(count, 0),
                "compute_output": took(0, 0),
            }
            for size, count in sorted(statistics.batch_sizes.items())
        ],
        "answers": {str(status): count for status, count in sorted(figures.answers.items())},
        "scheduler": statistics,
    }


_NO_TRACES: Final[Mapping[str, Any]] = {
    "trace_level": ["OFF"],
    "trace_rate": "0",
    "trace_count": "-1",
    "log_frequency": "0",
    "trace_file": "",
    "trace_mode": "opentelemetry",
}


def checked_traces(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of traces, of which none can be changed from a client. Raises `InvalidInput` for another value."""
    for key, value in asked.items():
        if key not in _NO_TRACES or value not in (None, [], _NO_TRACES[key], [_NO_TRACES[key]]):
            raise InvalidInput(f"{key}: traces are configured where the server is started, and not from here")
    return _NO_TRACES


def check_order(parameters: Mapping[str, Any], what: str) -> None:
    """A request to load or unload a model has nothing to say but its name. Raises `InvalidInput` if it says more."""
    said = [name for name in parameters if name != "unload_dependents"]  # which no model here has
    if said:
        raise InvalidInput(f"parameters: {', '.join(said)} came, expected none: a model is {what}ed as is")


def _milliseconds_since_1970(moment: int) -> int:
    return (time.time_ns() - (time.perf_counter_ns() - moment)) // 1_000_000


class LogSettings:
    """What is logged, by Triton's switches: each is a level of one logger and all below it."""

    _LEVELS: Final[Mapping[str, int]] = {
        "log_error": logging.ERROR,
        "log_warning": logging.WARNING,
        "log_info": logging.INFO,
    }

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def shown(self) -> dict[str, Any]:
        level = self._logger.getEffectiveLevel()
        return {
            "log_file": "",
            **{name: level <= least for name, least in self._LEVELS.items()},
            "log_verbose_level": int(level <= logging.DEBUG),
            "log_format": "default",
        }

    def set(self, asked: Mapping[str, Any]) -> None:
        """Raises `InvalidInput` for a setting that there is not, or a value that it cannot have."""
        for name, value in asked.items():
            if name in self._LEVELS:
                if not isinstance(value, bool):
                    raise InvalidInput(f"{name}: expected true or false, got {value!r}")
            elif name == "log_verbose_level":
                if type(value) is not int or value < 0:
                    raise InvalidInput(f"{name}: expected 0 or more, got {value!r}")
            elif name not in ("log_file", "log_format") or value not in ("", "default"):
                raise InvalidInput(f"{name}: cannot be set from here, got {value!r}")
        wanted = {**self.shown(), **asked}
        level = logging.CRITICAL
        for name, least in self._LEVELS.items():
            if not wanted[name]:
                break
            level = least
        else:
            level = logging.DEBUG if wanted["log_verbose_level"] else level
        self._logger.setLevel(level)
