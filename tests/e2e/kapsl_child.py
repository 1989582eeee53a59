"""A server of a program's own models, over the Kapsl socket at the path that is its argument: `words` says the last
word of a prompt again and again, and stops at the word `never`; `sum` adds two inputs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from kapsl_scheduler.app import Listening, run
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.errors import InferenceError


async def words(text_input: Any, max_tokens: Any) -> AsyncIterator[Any]:
    word = str(text_input[0]).split()[-1]
    for number in range(int(max_tokens[0]) or 1_000_000):
        if number == 2 and word == "never":
            raise InferenceError("the words are gone")
        yield np.array([f"{word}{number} "], object)
        await asyncio.sleep(0)


async def add(a: Any, b: Any) -> Any:
    return a + b


def tell(listening: Listening) -> None:
    sys.stdout.write(f"listening on {listening.url}\n")
    sys.stdout.flush()


def main() -> None:
    texts = CallableEngine(
        words,
        batched=False,
        inputs={"text_input": ("string", (1,)), "max_tokens": ("int32", (1,))},
        outputs={"text_output": ("string", (1,))},
    )
    numbers = ("int64", (None, 2))
    total = CallableEngine(add, inputs={"a": numbers, "b": numbers}, outputs={"c": numbers})
    run({"words": texts, "sum": total}, port=0, socket=sys.argv[1], cron_store="memory", announce=tell)


if __name__ == "__main__":
    main()
