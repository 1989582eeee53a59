"""Train the digits model: an MLP 64-256-256-10 on scikit-learn's handwritten digits, and write it as ONNX.

    python models/digits/train.py

writes `digits.onnx` beside this file and the held-out images to `src/kapsl_scheduler/demo/digits_test.npz`, and
prints the accuracy of the written model on them. Needs the extra `train`.

The model takes the raw pixels, 0 to 16, of 8x8 images: the scaling is folded into its first weights. It answers
with probabilities alone; an ArgMax for the label costs a sixth of a call of one row, more than a client's own.

Everything is seeded: the same versions on the same machine write the same bytes. Another processor or another
linear algebra library rounds differently: the probabilities may then differ, by less than 1e-3.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

Array = np.ndarray[Any, np.dtype[Any]]

HERE: Final = Path(__file__).resolve().parent
MODEL: Final = HERE / "digits.onnx"
HELD_OUT: Final = HERE.parents[1] / "src" / "kapsl_scheduler" / "demo" / "digits_test.npz"

SEED: Final = 7
EPOCHS: Final = 60
HELD_OUT_SHARE: Final = 0.25
BRIGHTEST: Final = 16.0
ACCURACY_EXPECTED: Final = 0.97


def train(pixels: Array, labels: Array) -> MLPClassifier:
    """Fit the network to raw pixels [n, 64]."""
    network = MLPClassifier(hidden_layer_sizes=(256, 256), alpha=1e-3, batch_size=64, random_state=SEED)
    for _ in range(EPOCHS):
        network.partial_fit(pixels / BRIGHTEST, labels, classes=range(10))
    return network


def to_onnx(network: MLPClassifier) -> onnx.ModelProto:
    """The network as ONNX: `pixels` float32 [batch, 64] to `probabilities` float32 [batch, 10]."""
    scales = (1 / BRIGHTEST, 1.0, 1.0)
    weights: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    flowing = "pixels"
    for layer, (weight, bias, scale) in enumerate(zip(network.coefs_, network.intercepts_, scales, strict=True), 1):
        weights.append(numpy_helper.from_array((weight * scale).astype(np.float32), f"weight_{layer}"))
        weights.append(numpy_helper.from_array(bias.astype(np.float32), f"bias_{layer}"))
        nodes.append(helper.make_node("Gemm", [flowing, f"weight_{layer}", f"bias_{layer}"], [f"sum_{layer}"]))
        flowing = f"sum_{layer}"
        if layer < len(scales):
            nodes.append(helper.make_node("Relu", [flowing], [f"hidden_{layer}"]))
            flowing = f"hidden_{layer}"
    nodes.append(helper.make_node("Softmax", [flowing], ["probabilities"], axis=1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    # An old opset and IR version: any onnxruntime of the last years opens the file.
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8, producer_name="models/digits/train.py"
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def accuracy(model: onnx.ModelProto, pixels: Array, labels: Array) -> float:
    """The share of images that the model names rightly."""
    (probabilities,) = ReferenceEvaluator(model).run(None, {"pixels": pixels.astype(np.float32)})
    return float(np.mean(np.argmax(probabilities, axis=1) == labels))


def main() -> None:
    """Train, write, and check what was written."""
    digits = load_digits()
    seen, held_out, seen_labels, held_out_labels = train_test_split(
        digits.data, digits.target, test_size=HELD_OUT_SHARE, random_state=SEED, stratify=digits.target
    )
    model = to_onnx(train(seen, seen_labels))
    onnx.save(model, MODEL)
    np.savez_compressed(HELD_OUT, images=held_out.astype(np.uint8), labels=held_out_labels.astype(np.uint8))
    reached = accuracy(onnx.load(MODEL), held_out, held_out_labels)
    print(f"accuracy on {len(held_out)} held-out images: {reached:.4f}")
    print(
        f"wrote {MODEL.name} ({MODEL.stat().st_size:,} bytes) and {HELD_OUT.name} ({HELD_OUT.stat().st_size:,} bytes)"
    )
    if reached < ACCURACY_EXPECTED:
        raise SystemExit(f"expected at least {ACCURACY_EXPECTED}: not a model to ship")


if __name__ == "__main__":
    main()
