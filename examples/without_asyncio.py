"""For programs without an event loop: the same scheduler behind plain calls, from as many threads as you like."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kapsl_scheduler import SyncScheduler
from kapsl_scheduler.engines import OnnxEngine

MODEL = Path(__file__).parents[1] / "models/digits/digits.onnx"


def main() -> None:
    images = np.zeros((100, 64), np.float32)
    with SyncScheduler([OnnxEngine(MODEL)]) as scheduler, ThreadPoolExecutor(16) as threads:
        answers = list(threads.map(scheduler.infer, images))
        one_more = scheduler.submit(images[0]).result()
        print(f"{len(answers)} answers of shape {answers[0].output.shape}, and one more: {one_more.output.shape}")


if __name__ == "__main__":
    main()
