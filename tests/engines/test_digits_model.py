"""The digits model of the repository: what it answers, and that it is what the demo relies on."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import numpy as np

from kapsl_scheduler.engines import OnnxEngine
from kapsl_scheduler.types import TensorSpec

MODEL = Path(__file__).parents[2] / "models" / "digits" / "digits.onnx"


def test_it_names_held_out_digits() -> None:
    with as_file(files("kapsl_scheduler.demo") / "digits_test.npz") as path, np.load(path) as held_out:
        images, labels = held_out["images"], held_out["labels"]
    assert images.dtype == np.uint8
    assert images.shape == (len(labels), 64)
    assert images.max() == 16
    engine = OnnxEngine(MODEL)
    engine.load()
    probabilities = engine.infer({"pixels": images.astype(np.float32)})["probabilities"]
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert np.mean(probabilities.argmax(axis=1) == labels) >= 0.97


def test_its_rows_batch_and_its_calls_are_bounded() -> None:
    engine = OnnxEngine(MODEL)
    engine.load()
    info = engine.model_info()
    assert (info.name, info.batchable, engine.bounded_call) == ("digits", True, True)
    assert info.inputs == (TensorSpec("pixels", "float32", ("batch", 64), 0),)
    assert info.outputs == (TensorSpec("probabilities", "float32", ("batch", 10), 0),)
