"""What is particular to ONNX Runtime: what a model says of itself, dtypes, strings, providers, its errors."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from kapsl_scheduler.engines import OnnxEngine
from kapsl_scheduler.errors import (
    Backend,
    EngineError,
    InferenceError,
    InvalidInput,
    ModelLoadError,
    ModelNotLoaded,
    Unavailable,
)
from kapsl_scheduler.types import TensorSpec, numpy_dtype
from tests.engines import onnx_models


def loaded(path: Path, built: Any, **options: Any) -> OnnxEngine:
    engine = OnnxEngine(onnx_models.saved(path / "model.onnx", built), **options)
    engine.load()
    return engine


def row(*values: float) -> Any:
    return np.array([values], dtype=np.float32)


# ------------------------------------------------------------------------------------------------ model


def test_the_model_says_its_names_dtypes_and_axes(tmp_path: Path) -> None:
    info = loaded(tmp_path, onnx_models.recurrent(), name="vad", version="7").model_info()
    assert (info.name, info.version, info.framework, info.batchable) == ("vad", "7", "onnx", True)
    assert info.inputs == (
        TensorSpec("input", "float32", ("batch", 6), 0),
        TensorSpec("state", "float32", (2, "batch", 5), 1),
        TensorSpec("sr", "int64", (), None),
    )
    assert info.outputs == (
        TensorSpec("output", "float32", ("batch", 1), 0),
        TensorSpec("next_state", "float32", (2, "batch", 5), 1),
    )
    assert info.metadata == {"producer": "kapsl tests"}


def test_the_name_defaults_to_that_of_the_file(tmp_path: Path) -> None:
    assert loaded(tmp_path, onnx_models.dense()).model_info().name == "model"


def test_a_fixed_batch_is_never_batched_and_says_why(tmp_path: Path) -> None:
    info = loaded(tmp_path, onnx_models.dense(rows=1)).model_info()
    assert not info.batchable
    assert info.metadata["not_batched"] == "no input has a batch axis"


def test_unnamed_dimensions_are_none(tmp_path: Path) -> None:
    info = loaded(tmp_path, onnx_models.dense(rows=None)).model_info()
    assert info.inputs == (TensorSpec("x", "float32", (None, 4), 0),)


def test_the_answer_is_right(tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    y = loaded(tmp_path, onnx_models.dense()).infer({"x": x})["y"]
    np.testing.assert_allclose(y, x @ onnx_models.WEIGHT + onnx_models.BIAS, rtol=1e-6)


def test_any_mapping_and_any_memory_layout_will_do(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.dense())
    x = np.arange(8, dtype=np.float32).reshape(4, 2).T
    assert not x.flags["C_CONTIGUOUS"]
    y = engine.infer(MappingProxyType({"x": x}))["y"]
    np.testing.assert_allclose(y, x @ onnx_models.WEIGHT + onnx_models.BIAS, rtol=1e-6)


DTYPES = ["float16", "bfloat16", "float32", "float64", "bool"] + [
    f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)
]


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_goes_in_and_out(tmp_path: Path, name: str) -> None:
    dtype = numpy_dtype(name)
    engine = loaded(tmp_path, onnx_models.identity(helper.np_dtype_to_tensor_dtype(dtype)))
    x = np.array([[0, 1], [1, 0]]).astype(dtype)
    y = engine.infer({"x": x})["y"]
    assert engine.model_info().inputs[0].dtype == name
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x)


def test_bfloat16_goes_beside_other_types_and_in_slices(tmp_path: Path) -> None:
    bf16, cast = TensorProto.BFLOAT16, helper.make_node("Cast", ["x"], ["wide"], to=TensorProto.FLOAT)
    built = onnx_models.model(
        [cast, helper.make_node("Add", ["wide", "add"], ["sum"]), helper.make_node("Cast", ["sum"], ["y"], to=bf16)],
        [onnx_models.tensor("x", bf16, ["n", 2]), onnx_models.tensor("add", TensorProto.FLOAT, ["n", 2])],
        [onnx_models.tensor("y", bf16, ["n", 2]), onnx_models.tensor("sum", TensorProto.FLOAT, ["n", 2])],
    )
    engine = loaded(tmp_path, built)
    x = np.arange(8).reshape(4, 2).astype(numpy_dtype("bfloat16"))[::2]
    answer = engine.infer({"x": x, "add": np.ones((2, 2), np.float32)})
    assert (answer["y"].dtype, answer["sum"].dtype) == (numpy_dtype("bfloat16"), np.float32)
    assert answer["y"].tolist() == [[1, 2], [5, 6]]
    answer["y"] += 1  # its own
    empty = engine.infer({"x": x[:0], "add": np.ones((0, 2), np.float32)})
    assert empty["y"].shape == (0, 2)


@pytest.mark.parametrize(
    "text",
    [
        np.array([["zwölf", ""]], dtype=object),
        np.array([["zwölf".encode(), b""]], dtype=object),
        np.array([["zwölf", b""]], dtype=object),
        np.array([["zwölf", ""]]),
    ],
    ids=["str", "bytes", "both", "numpy str"],
)
def test_strings_are_str_or_utf8(tmp_path: Path, text: Any) -> None:
    doubled = loaded(tmp_path, onnx_models.doubled_text()).infer({"text": text})["doubled"]
    assert doubled.dtype == object
    assert doubled.tolist() == [["zwölfzwölf", ""]]


@pytest.mark.parametrize(
    ("element", "message"),
    [
        (b"\xff", "input 'text': element 1 is not UTF-8"),
        (7, "input 'text': element 1: expected str or bytes, got int"),
        (None, "input 'text': element 1: expected str or bytes, got NoneType"),
        ("\ud800", "surrogates not allowed"),
    ],
)
def test_strings_that_are_none(tmp_path: Path, element: Any, message: str) -> None:
    engine = loaded(tmp_path, onnx_models.doubled_text())
    with pytest.raises(InvalidInput, match=message):
        engine.infer({"text": np.array([["fine", element]], dtype=object)})
    assert engine.metrics().errors == 1


@pytest.mark.parametrize(
    ("build", "bounded"),
    [
        (onnx_models.dense, True),
        (lambda: onnx_models.dense(rows=1), True),
        (onnx_models.recurrent, True),
        (onnx_models.lengths, False),
        (onnx_models.doubled_text, False),
    ],
    ids=["rows open", "all fixed", "rows open on axis 1", "length open", "text"],
)
def test_a_call_is_bounded_if_the_shapes_bound_it(tmp_path: Path, build: Any, bounded: bool) -> None:
    engine = loaded(tmp_path, build())
    assert engine.bounded_call is bounded


def test_a_model_that_branches_on_values_is_not_bounded_by_its_shapes(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.branching())
    assert not engine.bounded_call
    x = np.array([[1, 2, 3, 4]], np.float32)
    np.testing.assert_array_equal(engine.infer({"x": -x})["y"], x)


def test_a_call_elsewhere_than_on_the_cpu_is_not_bounded(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.dense(), providers=["azure", "cpu"])
    assert not engine.bounded_call


def test_overrides_reach_the_model(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.lengths(), batch_axes={"x": None})
    assert not engine.model_info().batchable
    assert engine.model_info().metadata["not_batched"] == "no input has a batch axis"


# ------------------------------------------------------------------------------------- options, loading


@pytest.mark.parametrize("level", ["disable", "basic", "extended", "all"])
def test_graph_levels(tmp_path: Path, level: str) -> None:
    engine = loaded(tmp_path, onnx_models.dense(), graph_optimization_level=level)
    assert engine.infer({"x": row(0, 0, 0, 0)})["y"].tolist() == [onnx_models.BIAS.tolist()]


def test_options_are_checked_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of disable, basic, extended, all, got 'fast'"):
        OnnxEngine(tmp_path / "model.onnx", graph_optimization_level="fast")
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        OnnxEngine(tmp_path / "model.onnx", threads=0)


def test_threads_and_level_reach_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    real = onnxruntime.InferenceSession

    def watched(path: str, options: Any, **rest: Any) -> Any:
        seen.append(options)
        return real(path, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    loaded(tmp_path, onnx_models.dense(), threads=2, graph_optimization_level="basic")
    assert seen[0].intra_op_num_threads == 2
    assert seen[0].graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC


@pytest.mark.parametrize("provider", ["cuda", "CUDAExecutionProvider", ("cuda", {"device_id": 0})])
def test_a_provider_that_is_not_there(tmp_path: Path, provider: Any) -> None:
    with pytest.raises(ModelLoadError, match=r"this onnxruntime has .*CPUExecutionProvider; not .*(cuda|CUDA)"):
        loaded(tmp_path, onnx_models.dense(), providers=[provider, "cpu"])


@pytest.mark.parametrize("provider", ["cpu", "CPU", "CPUExecutionProvider", ("cpu", {"use_arena": "1"})])
def test_providers_may_be_given_in_short_and_with_options(tmp_path: Path, provider: Any) -> None:
    engine = loaded(tmp_path, onnx_models.dense(), providers=[provider])
    assert engine.bounded_call


def without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime as it is where a device's library is missing: the provider is known, but does not start."""
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )


def test_a_provider_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_others(monkeypatch)
    with pytest.raises(ModelLoadError, match="AzureExecutionProvider did not start"):
        loaded(tmp_path, onnx_models.dense(), providers=["azure"])


def test_unless_the_cpu_is_listed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_the_others(monkeypatch)
    engine = loaded(tmp_path, onnx_models.dense(), providers=["azure", "cpu"])
    assert engine.for_cpu() is engine


def test_onnxruntime_may_not_change_the_device_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disabled: list[Any] = []

    def disable(session: Any) -> None:
        disabled.append(session)

    monkeypatch.setattr(onnxruntime.InferenceSession, "disable_fallback", disable)
    engine = loaded(tmp_path, onnx_models.dense())
    assert engine._opened is not None
    assert disabled == [engine._opened.session]


def test_without_onnxruntime_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ModelLoadError, match=r"pip install 'kapsl-scheduler\[onnx\]'"):
        loaded(tmp_path, onnx_models.dense())


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"no such file: .*absent\.onnx"):
        OnnxEngine(tmp_path / "absent.onnx").load()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is not a protobuf")
    with pytest.raises(ModelLoadError, match="broken: ") as caught:
        OnnxEngine(broken).load()
    assert caught.value.__cause__ is not None


def test_missing_external_data_is_a_load_error(tmp_path: Path) -> None:
    path = onnx_models.save_with_external_data(tmp_path / "model.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelLoadError, match=r"weights\.bin"):
        OnnxEngine(path).load()


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "{absolute}"])
def test_external_data_is_read_from_beside_the_model_only(tmp_path: Path, location: str) -> None:
    (tmp_path / "package").mkdir()
    path = onnx_models.save_with_external_data(tmp_path / "package" / "model.onnx")
    secret = (tmp_path / "package" / "weights.bin").rename(tmp_path / "secret.bin")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location.format(absolute=secret)
    path.write_bytes(model.SerializeToString())

    with pytest.raises(ModelLoadError, match=r"(?i)external data"):
        OnnxEngine(path).load()


def test_types_without_an_array_are_load_errors(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    built = onnx_models.model(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [onnx_models.tensor("x", TensorProto.FLOAT, ["n"])],
        [sequence],
    )
    with pytest.raises(ModelLoadError, match=r"output 'y' is a seq\(tensor\(float\)\); expected one of"):
        loaded(tmp_path, built)


def test_overrides_that_do_not_fit_are_load_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="model: batch_axes: there are x, y; not z"):
        loaded(tmp_path, onnx_models.dense(), batch_axes={"z": 0})


def test_a_failed_load_leaves_it_unloaded(tmp_path: Path) -> None:
    engine = OnnxEngine(tmp_path / "later.onnx")
    with pytest.raises(ModelLoadError):
        engine.load()
    with pytest.raises(ModelNotLoaded):
        engine.model_info()
    with pytest.raises(ModelNotLoaded):
        engine.warmup()
    onnx.save(onnx_models.dense(), tmp_path / "later.onnx")
    engine.load()
    assert engine.health_check()


def test_for_cpu_is_another_engine_with_the_same_options(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.dense(), providers=["azure"], name="m", version="3", batch_axes={"x": 0})
    on_cpu = engine.for_cpu()
    assert on_cpu is not engine
    with pytest.raises(ModelNotLoaded):
        on_cpu.model_info()
    on_cpu.load()
    assert on_cpu.bounded_call
    assert on_cpu.model_info() == engine.model_info()


def test_for_cpu_is_itself_before_and_after_load(tmp_path: Path) -> None:
    engine = OnnxEngine(onnx_models.saved(tmp_path / "model.onnx", onnx_models.dense()))
    assert engine.for_cpu() is engine
    engine.load()
    assert engine.for_cpu() is engine


# ----------------------------------------------------------------------------------------------- errors


def test_invalid_arguments_are_invalid_input(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.dense())
    for bad in ({"x": np.zeros((1, 5), dtype=np.float32)}, {"x": np.zeros((1, 4))}, {}, {"z": row(0, 0, 0, 0)}):
        with pytest.raises(InvalidInput) as caught:
            engine.infer(bad)
        assert caught.value.__cause__ is not None


def test_a_fault_that_data_cause_is_invalid_input_and_not_logged(tmp_path: Path, capfd: Any) -> None:
    engine = loaded(tmp_path, onnx_models.lookup())
    with pytest.raises(InvalidInput, match="indices element out of data bounds"):
        engine.infer({"i": np.array([0, 9])})
    assert capfd.readouterr() == ("", "")


class Refusing:
    """A session that fails as it is told."""

    def __init__(self, session: Any, error: Exception) -> None:
        self.session = session
        self.error: Exception | None = error

    def run(self, *arguments: Any) -> Any:
        if self.error is not None:
            raise self.error
        return self.session.run(*arguments)


def refusing(engine: OnnxEngine, kind: str) -> Refusing:
    errors = onnxruntime.capi.onnxruntime_pybind11_state
    assert engine._opened is not None
    session = Refusing(engine._opened.session, getattr(errors, kind)(f"{kind} happened"))
    engine._opened.session = session
    return session


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("Fail", InferenceError),
        ("RuntimeException", InferenceError),
        ("NotImplemented", Backend),
        ("EngineError", Backend),
        ("EPFail", Unavailable),
        ("InvalidArgument", InvalidInput),
    ],
)
def test_errors_of_onnxruntime_have_a_class_of_ours(tmp_path: Path, kind: str, error: type[EngineError]) -> None:
    engine = loaded(tmp_path, onnx_models.dense())
    session = refusing(engine, kind)
    with pytest.raises(error, match=f"model: {kind} happened") as caught:
        engine.infer({"x": row(0, 0, 0, 0)})
    assert type(caught.value) is error
    assert caught.value.__cause__ is session.error


def test_a_failed_device_is_unhealthy_until_it_answers(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.dense())
    session = refusing(engine, "EPFail")
    with pytest.raises(Unavailable):
        engine.infer({"x": row(0, 0, 0, 0)})
    assert not engine.health_check()
    with pytest.raises(Unavailable, match="warm-up"):
        engine.warmup()
    session.error = None
    assert engine.health_check()
    assert engine.infer({"x": row(0, 0, 0, 0)})["y"].shape == (1, 3)


def test_a_model_that_refuses_zeros_warms_up_all_the_same(tmp_path: Path) -> None:
    engine = loaded(tmp_path, onnx_models.dense())
    refusing(engine, "InvalidArgument")
    engine.warmup()
    assert engine.health_check()
    assert engine.metrics().calls == 0
