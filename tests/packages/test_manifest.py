"""The manifest: what the original writes is read in full, and every fault is told at once with its path."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.errors import InvalidPackage
from kapsl_scheduler.packages.manifest import (
    CronJobDef,
    HardwareRequirements,
    IntervalDef,
    Manifest,
    package_path,
    parse_manifest,
)

BASIC: dict[str, Any] = {
    "project_name": "digits",
    "framework": "onnx",
    "version": "1.0.0",
    "created_at": "2024-05-01T12:00:00",
    "model_file": "model.onnx",
}
TENSOR: dict[str, Any] = {"shape": [1], "dtype": "uint8", "data": [7]}
JOB: dict[str, Any] = {"id": "beat", "schedule": "0 * * * * *", "input": TENSOR}

# As the original writes it: every field present, null where nothing was said, tensors in base64 beside a null `data`.
GOLDEN = b"""{
  "project_name": "churn",
  "framework": "onnx",
  "version": "2.1.0",
  "created_at": "1714564800",
  "model_file": "churn.onnx",
  "metadata": {"labels": ["stays", "leaves"], "preprocess": null, "threshold": 0.5},
  "hardware_requirements": {
    "preferred_provider": "cuda",
    "fallback_providers": ["coreml", "cpu"],
    "min_memory_mb": 2048,
    "min_vram_mb": null,
    "gpu_memory_reservation_mb": null,
    "gpu_memory_limit_mb": 4096,
    "gpu_compute_share_milli": 500,
    "isolation_mode": "best_effort",
    "min_cuda_version": "11.8",
    "required_precision": "fp32",
    "optimized_for": ["cuda_11.8"],
    "graph_optimization_level": "all",
    "device_id": 0,
    "gpu_device_ids": [0, 1],
    "strategy": "round-robin"
  },
  "cron_jobs": [
    {
      "id": "nightly",
      "schedule": "0 30 2 * * *",
      "input": {"shape": [1, 2], "dtype": "float32", "data": null, "data_base64": "AACAPwAAAMA="},
      "additional_inputs": [
        {"name": "state", "tensor": {"shape": [], "dtype": "int64", "data": [5, 0, 0, 0, 0, 0, 0, 0]}}
      ],
      "priority": "latency_critical",
      "force_cpu": true,
      "overflow_policy": "block"
    },
    {
      "id": "heartbeat",
      "schedule": {"interval_secs": 30},
      "input": {"shape": [1, 1], "dtype": "string", "base64": "aGVsbG8="},
      "additional_inputs": [],
      "priority": "throughput",
      "force_cpu": false,
      "overflow_policy": "skip_if_busy"
    }
  ]
}"""


def parse(document: Any) -> Manifest:
    return parse_manifest(json.dumps(document).encode())


def faults(document: Any) -> tuple[str, ...]:
    with pytest.raises(InvalidPackage) as caught:
        parse(document)
    return caught.value.faults


def test_a_manifest_of_the_original_is_read_in_full() -> None:
    manifest = parse_manifest(GOLDEN)
    assert manifest.warnings == ()
    assert msgspec.structs.replace(manifest, cron_jobs=()) == Manifest(
        project_name="churn",
        framework="onnx",
        version="2.1.0",
        created_at="1714564800",
        model_file="churn.onnx",
        metadata={"labels": ["stays", "leaves"], "preprocess": None, "threshold": 0.5},
        hardware_requirements=HardwareRequirements(
            preferred_provider="cuda",
            fallback_providers=("coreml", "cpu"),
            min_memory_mb=2048,
            gpu_memory_limit_mb=4096,
            gpu_compute_share_milli=500,
            isolation_mode="best_effort",
            min_cuda_version="11.8",
            required_precision="fp32",
            optimized_for=("cuda_11.8",),
            graph_optimization_level="all",
            device_id=0,
            gpu_device_ids=(0, 1),
            strategy="round-robin",
        ),
    )
    nightly, heartbeat = manifest.cron_jobs
    assert isinstance(nightly, CronJobDef)
    assert (nightly.id, nightly.schedule, nightly.priority) == ("nightly", "0 30 2 * * *", "latency_critical")
    assert (nightly.force_cpu, nightly.overflow_policy) == (True, "block")
    np.testing.assert_array_equal(nightly.input, np.array([[1.0, -2.0]], np.float32), strict=True)
    (state,) = nightly.additional_inputs
    assert state.name == "state"
    np.testing.assert_array_equal(state.tensor, np.array(5, np.int64), strict=True)
    assert (heartbeat.id, heartbeat.schedule) == ("heartbeat", IntervalDef(30))
    assert heartbeat.input.tolist() == [["hello"]]


def test_the_least_manifest_has_the_defaults() -> None:
    manifest = parse({**BASIC, "cron_jobs": [JOB]})
    assert manifest.metadata is None
    assert manifest.hardware_requirements == HardwareRequirements()
    (job,) = manifest.cron_jobs
    assert (job.additional_inputs, job.priority, job.force_cpu, job.overflow_policy) == (
        (),
        "throughput",
        False,
        "skip_if_busy",
    )
    assert parse(BASIC).cron_jobs == ()


def test_null_counts_as_absent() -> None:
    assert parse({**BASIC, "hardware_requirements": None, "cron_jobs": None, "metadata": None}) == parse(BASIC)
    assert faults({**BASIC, "version": None}) == ("version: expected a string, got nothing",)


def test_unknown_keys_are_ignored_with_a_warning() -> None:
    manifest = parse(
        {
            **BASIC,
            "task": None,
            "_warnings": ["x"],
            "line\nbreak": 1,
            "hardware_requirements": {"colour": "red"},
            "cron_jobs": [{**JOB, "schedule": {"interval_secs": 1, "unit": "s"}, "input": {**TENSOR, "name": "x"}}],
        }
    )
    assert manifest.warnings == (
        "task: unknown key, ignored",
        "_warnings: unknown key, ignored",
        "'line\\nbreak': unknown key, ignored",
        "hardware_requirements.colour: unknown key, ignored",
        "cron_jobs[0].schedule.unit: unknown key, ignored",
        "cron_jobs[0].input.name: unknown key, ignored",
    )


FAULTY: dict[str, Any] = {
    "framework": 3,
    "version": "1",
    "created_at": "",
    "model_file": "../model.onnx",
    "hardware_requirements": {
        "min_memory_mb": -1,
        "min_vram_mb": True,
        "fallback_providers": ["cpu", 1, 2],
        "optimized_for": "cuda",
        "graph_optimization_level": "max",
        "device_id": 1.5,
        "gpu_device_ids": [None],
    },
    "cron_jobs": [
        JOB,
        {
            **JOB,
            "schedule": " ",
            "input": {"shape": [0], "dtype": "complex"},
            "additional_inputs": [{"name": "", "tensor": 3}, {"name": "x"}, {"name": "x", "tensor": TENSOR}],
            "priority": "high",
            "force_cpu": "no",
            "overflow_policy": "drop",
        },
        {"id": 5, "schedule": {"interval_secs": 0}, "input": {**TENSOR, "data_base64": "Bw=="}},
        {"id": "last", "schedule": 30, "input": {**TENSOR, "data": [7, 8]}},
        "daily",
    ],
}
EVERY_FAULT = (
    "project_name: expected a string that is not empty, got nothing",
    "framework: expected a string, got 3",
    "model_file: '../model.onnx' leaves the package",
    "hardware_requirements.fallback_providers[1]: expected a string, got 1",
    "hardware_requirements.fallback_providers[2]: expected a string, got 2",
    "hardware_requirements.min_memory_mb: expected an integer of 0 or more, got -1",
    "hardware_requirements.min_vram_mb: expected an integer of 0 or more, got True",
    "hardware_requirements.optimized_for: expected a list, got 'cuda'",
    "hardware_requirements.graph_optimization_level: expected one of disable, basic, extended, all, got 'max'",
    "hardware_requirements.device_id: expected an integer, got 1.5",
    "hardware_requirements.gpu_device_ids[0]: expected an integer, got nothing",
    "cron_jobs[1].id: 'beat' is taken by cron_jobs[0].id",
    "cron_jobs[1].schedule: expected a cron expression or {\"interval_secs\": seconds}, got ' '",
    "cron_jobs[1].input.shape: expected a list of at most 32 integers above 0, got [0]",
    "cron_jobs[1].input.dtype: expected one of float32, float64, float16, int32, int64, uint8, string, got 'complex'",
    "cron_jobs[1].input: expected exactly one of data and data_base64, got neither",
    "cron_jobs[1].additional_inputs[2].name: 'x' is taken by cron_jobs[1].additional_inputs[1].name",
    "cron_jobs[1].additional_inputs[0].name: expected a string that is not empty, got ''",
    "cron_jobs[1].additional_inputs[0].tensor: expected {shape, dtype, data or data_base64}, got 3",
    "cron_jobs[1].additional_inputs[1].tensor: expected a tensor, got nothing",
    "cron_jobs[1].priority: expected one of throughput, latency_critical, got 'high'",
    "cron_jobs[1].force_cpu: expected true or false, got 'no'",
    "cron_jobs[1].overflow_policy: expected one of skip_if_busy, block, got 'drop'",
    "cron_jobs[2].id: expected a string that is not empty, got 5",
    "cron_jobs[2].schedule.interval_secs: expected an integer above 0, got 0",
    "cron_jobs[2].input: expected exactly one of data and data_base64, got data and data_base64",
    'cron_jobs[3].schedule: expected a cron expression or {"interval_secs": seconds}, got 30',
    "cron_jobs[3].input: expected 1 bytes for uint8 [1], got 2",
    "cron_jobs[4]: expected an object, got 'daily'",
)


def test_every_fault_is_told_at_once_with_its_path() -> None:
    assert faults(FAULTY) == EVERY_FAULT


def test_the_text_of_a_cron_expression_is_kept() -> None:
    (job,) = parse({**BASIC, "cron_jobs": [{**JOB, "schedule": " any text at all "}]}).cron_jobs
    assert job.schedule == " any text at all "


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff", b'{"version": "\xff"}', b"\xef\xbb\xbf{}", b"[" * 100_000, b"1" * 5000, b'{"a": NaN}'],
    ids=["empty", "open", "not utf-8", "bad text", "byte order mark", "deep", "long number", "nan"],
)
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidPackage, match=r"^x\.aimod: metadata\.json: not JSON: "):
        parse_manifest(data, source="x.aimod")


@pytest.mark.parametrize("document", [[], "text", 3, None])
def test_what_is_no_object_is_refused(document: Any) -> None:
    (fault,) = faults(document)
    assert fault.startswith("metadata.json: expected an object, got ")


def test_the_number_of_faults_is_bounded() -> None:
    found = faults({**BASIC, "cron_jobs": [1] * 5000})
    assert len(found) == 1001
    assert found[-1] == "and more"


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/etc/passwd", "is an absolute path"),
        ("C:/model.onnx", "is an absolute path"),
        ("C:model.onnx", "is an absolute path"),
        ("\\\\host\\share\\model.onnx", "is an absolute path"),
        ("..", "leaves the package"),
        ("a/../../b", "leaves the package"),
        ("a\\..\\b", "leaves the package"),
        ("a\0b", "has control characters"),
        ("a\nb", "has control characters"),
        ("a\udcffb", "is not UTF-8"),
        ("a/" * 16 + "b", "is longer than 512 bytes or 16 levels"),
        (("é" * 100 + "/") * 3, "is longer than 512 bytes or 16 levels"),
        ("é" * 128, "has a name of more than 255 bytes"),
    ],
)
def test_paths_that_are_refused(path: str, fault: str) -> None:
    with pytest.raises(ValueError, match=f"^{fault}$"):
        package_path(path)
    if path.isprintable():
        (found,) = faults({**BASIC, "model_file": path})
        assert found.startswith("model_file: ")
        assert found.endswith(f" {fault}")


@pytest.mark.parametrize(
    ("path", "plain"),
    [
        ("model.onnx", "model.onnx"),
        ("./a//b.onnx", "a/b.onnx"),
        ("a..b/..c", "a..b/..c"),
        ("模型 1.onnx", "模型 1.onnx"),
    ],
)
def test_paths_that_are_taken(path: str, plain: str) -> None:
    assert parse({**BASIC, "model_file": path}).model_file == plain


@pytest.mark.parametrize("path", ["", ".", "./"])
def test_a_model_file_has_a_name(path: str) -> None:
    assert faults({**BASIC, "model_file": path}) == (
        f"model_file: expected a relative path inside the package, got {path!r}",
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, *way: str | int) -> Iterator[tuple[str | int, ...]]:
    """The way to every value inside `value`."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*way, key)
        yield from places(inner, *way, key)


@pytest.mark.slow
@given(way=st.sampled_from(list(places(json.loads(GOLDEN)))), replacement=json_values)
def test_one_wrong_value_is_blamed_where_it_stands(way: tuple[str | int, ...], replacement: Any) -> None:
    document = place = json.loads(GOLDEN)
    for key in way[:-1]:
        place = place[key]
    place[way[-1]] = replacement
    try:
        manifest = parse(document)
    except InvalidPackage as error:
        blamed = {fault.partition(":")[0].partition("[")[0].partition(".")[0] for fault in error.faults}
    else:
        blamed = set()
        assert isinstance(manifest, Manifest)
    assert blamed <= {way[0]}


@given(document=json_values)
def test_any_json_that_is_no_manifest_is_an_invalid_package(document: Any) -> None:
    with pytest.raises(InvalidPackage):
        parse(document)
