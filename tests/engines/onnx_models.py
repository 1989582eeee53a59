"""Small ONNX models, built on the spot, for the tests of engines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 20

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
BIAS = np.array([1.0, -1.0, 0.5], dtype=np.float32)


def tensor(name: str, dtype: int, shape: Sequence[int | str | None] | None) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any] | None = None) -> Any:
    initialisers = [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initialisers)
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="kapsl tests"
    )


def saved(path: Path, built: Any) -> Path:
    onnx.save(built, path)
    return path


def dense(rows: int | str | None = "batch") -> Any:
    """y = x @ WEIGHT + BIAS; float32 [rows, 4] -> [rows, 3]."""
    return model(
        [helper.make_node("Gemm", ["x", "weight", "bias"], ["y"])],
        [tensor("x", TensorProto.FLOAT, [rows, 4])],
        [tensor("y", TensorProto.FLOAT, [rows, 3])],
        {"weight": WEIGHT, "bias": BIAS},
    )


def recurrent() -> Any:
    """Silero's layout: input [batch, 6], state [2, batch, 5] and the scalar sr to output [batch, 1], next_state."""
    return model(
        [
            helper.make_node("ReduceMean", ["input", "axis"], ["mean"], keepdims=1),
            helper.make_node("Add", ["state", "mean"], ["next_state"]),
            helper.make_node("Cast", ["sr"], ["rate"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["mean", "rate"], ["output"]),
        ],
        [
            tensor("input", TensorProto.FLOAT, ["batch", 6]),
            tensor("state", TensorProto.FLOAT, [2, "batch", 5]),
            tensor("sr", TensorProto.INT64, []),
        ],
        [
            tensor("output", TensorProto.FLOAT, ["batch", 1]),
            tensor("next_state", TensorProto.FLOAT, [2, "batch", 5]),
        ],
        {"axis": np.array([1], dtype=np.int64)},
    )


def doubled_text() -> Any:
    """text string [batch, 2] -> twice the text, one after the other."""
    return model(
        [helper.make_node("StringConcat", ["text", "text"], ["doubled"])],
        [tensor("text", TensorProto.STRING, ["batch", 2])],
        [tensor("doubled", TensorProto.STRING, ["batch", 2])],
    )


def lengths() -> Any:
    """total = the sum of each row; float32 [batch, length] -> [batch]."""
    return model(
        [helper.make_node("ReduceSum", ["x", "axis"], ["total"], keepdims=0)],
        [tensor("x", TensorProto.FLOAT, ["batch", "length"])],
        [tensor("total", TensorProto.FLOAT, ["batch"])],
        {"axis": np.array([1], dtype=np.int64)},
    )


def identity(dtype: int, shape: Sequence[int | str | None] | None = ("batch", 2)) -> Any:
    return model([helper.make_node("Identity", ["x"], ["y"])], [tensor("x", dtype, shape)], [tensor("y", dtype, shape)])


def branching() -> Any:
    """y = x where the sum of x is positive, else -x: which, no shape says."""

    def branch(name: str, op: str) -> Any:
        out = tensor(f"{name}_y", TensorProto.FLOAT, ["batch", 4])
        return helper.make_graph([helper.make_node(op, ["x"], [f"{name}_y"])], name, [], [out])

    return model(
        [
            helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
            helper.make_node("Greater", ["sum", "zero"], ["positive"]),
            helper.make_node(
                "If", ["positive"], ["y"], then_branch=branch("same", "Identity"), else_branch=branch("minus", "Neg")
            ),
        ],
        [tensor("x", TensorProto.FLOAT, ["batch", 4])],
        [tensor("y", TensorProto.FLOAT, ["batch", 4])],
        {"zero": np.zeros((), np.float32)},
    )


def lookup() -> Any:
    """y = table[i] of three entries: an index beyond them fails inside the run."""
    return model(
        [helper.make_node("Gather", ["table", "i"], ["y"])],
        [tensor("i", TensorProto.INT64, ["batch"])],
        [tensor("y", TensorProto.FLOAT, ["batch"])],
        {"table": np.ones(3, dtype=np.float32)},
    )


def save_with_external_data(path: Path) -> Path:
    """The dense model, its weights in a file of their own beside it."""
    onnx.save(dense(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (path.parent / "weights.bin").stat().st_size >= WEIGHT.nbytes
    return path
