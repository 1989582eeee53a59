"""A model of your own behind the server, with OpenAI's API in front of it: a chain of words that has read the README.

Ends by itself after one answer; leave out `ask` to keep it running.
"""

import json
import os
import random
import signal
import threading
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from kapsl_scheduler.app import Listening, run
from kapsl_scheduler.engines import CallableEngine

README = Path(__file__).parents[1] / "README.md"


class Chain:
    """Which words follow which."""

    def __init__(self, text: str) -> None:
        self._next: dict[str, list[str]] = defaultdict(list)
        words = text.split()
        for word, following in pairwise(words):
            self._next[word].append(following)

    def __call__(self, text_input: Any, seed: Any, max_tokens: Any) -> Iterator[Any]:
        """Yields one word after another, so that they are streamed."""
        chance = random.Random(int(seed[0]))
        known = [word for word in str(text_input[0]).split() if word in self._next]
        word = known[-1] if known else "The"
        for _ in range(int(max_tokens[0]) or 20):
            if not self._next[word]:
                return
            word = chance.choice(self._next[word])
            yield np.array([word + " "], object)


def ask(listening: Listening) -> None:
    """What any client of OpenAI's API does."""
    chat = {"model": "chain", "seed": 3, "max_tokens": 12, "messages": [{"role": "user", "content": "live requests"}]}
    request = urllib.request.Request(f"{listening.url}/v1/chat/completions", json.dumps(chat).encode())
    with urllib.request.urlopen(request) as answer:
        print(json.load(answer)["choices"][0]["message"]["content"].strip())
    os.kill(os.getpid(), signal.SIGTERM)


def once_up(listening: Listening) -> None:
    threading.Thread(target=ask, args=[listening]).start()


def main() -> None:
    engine = CallableEngine(
        Chain(README.read_text("utf-8")),
        batched=False,
        inputs={"text_input": ("string", (1,)), "seed": ("int64", (1,)), "max_tokens": ("int64", (1,))},
        outputs={"text_output": ("string", (1,))},
    )
    run(
        {"chain": engine},
        port=0,
        cron_store="memory",
        announce=lambda on: threading.Thread(target=ask, args=[on]).start(),
    )


if __name__ == "__main__":
    main()
