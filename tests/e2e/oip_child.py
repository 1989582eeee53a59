"""A server of a program's own models for the clients of the Open Inference Protocol. `mixed` gives back what it gets, a
tensor of each kind, and `brief` one of bfloat16; `count` streams the numbers below its input. Its arguments are
`KEY=VALUE` settings, all texts."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from typing import Any

from kapsl_scheduler.app import Listening, run
from kapsl_scheduler.engines import CallableEngine

KINDS = {"x": ("float32", (None, 2)), "t": ("string", (None,)), "b": ("bool", (None,)), "h": ("float16", (None, 2))}


async def mixed(x: Any, t: Any, b: Any, h: Any) -> Any:
    return {"x_out": x, "t_out": t, "b_out": b, "h_out": h}


async def brief(f: Any) -> Any:
    return {"f_out": f}


async def count(n: Any) -> AsyncIterator[Any]:
    for number in range(int(n[0, 0])):
        yield n * 0 + number


def tell(listening: Listening) -> None:
    sys.stdout.write(f"listening on {listening.url} and {listening.grpc}\n")
    sys.stdout.flush()


def main() -> None:
    outputs = {f"{name}_out": kind for name, kind in KINDS.items()}
    number = ("int32", (None, 1))
    engines = {
        "mixed": CallableEngine(mixed, inputs=KINDS, outputs=outputs),
        "brief": CallableEngine(
            brief, inputs={"f": ("bfloat16", (None, 2))}, outputs={"f_out": ("bfloat16", (None, 2))}
        ),
        "count": CallableEngine(count, inputs={"n": number}, outputs={"number": number}),
    }
    settings = dict(setting.split("=", 1) for setting in sys.argv[1:])
    run(engines, **{"port": "0", "socket_enabled": "false", "cron_enabled": "false"} | settings, announce=tell)


if __name__ == "__main__":
    main()
