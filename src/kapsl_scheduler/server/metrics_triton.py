"""The figures of the models under the names that Triton gives them, for dashboards and scalers that were made for it.

They have a page of their own: their names are not what Prometheus recommends, and every one of them is at `/metrics`
under a name of ours too. What is not here: figures that Triton has and we do not (its cache, its devices).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from kapsl_scheduler.server.metrics_models import ModelFigures

__all__ = ["CONTENT_TYPE", "triton_page"]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_REASONS: Final = {429: "REJECTED", 499: "CANCELED", 500: "BACKEND"}


class _Name(NamedTuple):
    name: str
    kind: str
    text: str
    of: Callable[[ModelFigures], float]


_NAMES: Final = (
    _Name(
        "nv_inference_request_success",
        "counter",
        "Inference requests that succeeded, whatever their batch size",
        lambda model: model.success,
    ),
    _Name(
        "nv_inference_count", "counter", "Inferences (rows, batches counted by their size)", lambda m: m.statistics.rows
    ),
    _Name("nv_inference_exec_count", "counter", "Calls of the model", lambda m: m.statistics.calls),
    _Name(
        "nv_inference_request_duration_us",
        "counter",
        "Sum of request durations in microseconds, of those that succeeded",
        lambda model: model.success_ns // 1000,
    ),
    _Name("nv_inference_queue_duration_us", "counter", "Sum of times in the queue", lambda m: m.queue_ns // 1000),
    _Name(
        "nv_inference_compute_input_duration_us", "counter", "Sum of times to read inputs", lambda m: m.read_ns // 1000
    ),
    _Name(
        "nv_inference_compute_infer_duration_us", "counter", "Sum of times in the model", lambda m: m.compute_ns // 1000
    ),
    _Name(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Sum of times to write outputs",
        lambda model: model.write_ns // 1000,
    ),
    _Name(
        "nv_inference_pending_request_count",
        "gauge",
        "Requests that wait for an engine",
        lambda model: model.statistics.queued + model.statistics.waiting,
    ),
)


def triton_page(models: Sequence[ModelFigures]) -> bytes:
    """All of it, in Prometheus's text format."""
    lines: list[str] = []
    for name in _NAMES:
        lines += _head(name.name, name.kind, name.text)
        lines += (f"{name.name}{{{_labels(model)}}} {name.of(model)}" for model in models)
    failed = "nv_inference_request_failure"
    lines += _head(failed, "counter", "Inference requests that failed, by reason")
    for model in models:
        for reason, count in _failures(model):
            lines.append(f'{failed}{{{_labels(model)},reason="{reason}"}} {count}')
    return "".join(f"{line}\n" for line in lines).encode()


def _head(name: str, kind: str, text: str) -> Iterable[str]:
    return (f"# HELP {name} {text}", f"# TYPE {name} {kind}")


def _labels(model: ModelFigures) -> str:
    return f'model="{_escaped(model.name)}",version="{_escaped(model.version)}"'


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _failures(model: ModelFigures) -> Iterable[tuple[str, int]]:
    by_reason = dict.fromkeys((*_REASONS.values(), "OTHER"), 0)
    for status, count in model.answers.items():
        if status != 200:
            by_reason[_REASONS.get(status, "OTHER")] += count
    return by_reason.items()
