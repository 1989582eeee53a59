"""One model inside your own program: live answers while a pile of bulk work is served behind them."""

import asyncio
from pathlib import Path

import numpy as np

from kapsl_scheduler import BatchPolicy, Priority, Scheduler
from kapsl_scheduler.engines import OnnxEngine

ROOT = Path(__file__).parents[1]


async def main() -> None:
    held_out = np.load(ROOT / "src/kapsl_scheduler/demo/digits_test.npz")
    images = held_out["images"].astype(np.float32)
    engine = OnnxEngine(ROOT / "models/digits/digits.onnx")
    async with Scheduler([engine], batch=BatchPolicy(max_batch_size=32)) as scheduler:
        bulk = asyncio.create_task(scheduler.infer_many(images, priority=Priority.THROUGHPUT))
        await asyncio.sleep(0)  # let all of it get into the queue
        live = await scheduler.infer(images[0], priority=Priority.LATENCY_CRITICAL, timeout=1.0)
        answers = await bulk

        right = sum(answer.output.argmax() == label for answer, label in zip(answers, held_out["labels"], strict=True))
        statistics = scheduler.statistics()
        print(f"live: a {live.output.argmax()}, answered {(live.queue_time + live.compute_time) * 1e3:.2f} ms later")
        print(f"bulk: {right} of {len(answers)} right")
        print(f"{statistics.rows} rows in {statistics.calls} calls of the model")


if __name__ == "__main__":
    asyncio.run(main())
