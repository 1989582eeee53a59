"""The original's own client in a process of its own, which it needs: while it waits it lets no other thread run.

Its one argument is JSON, the keywords of the client. Each line of its input is a call, `[method, arguments, keywords]`
in JSON, with bytes in hexadecimal; each line of its output what became of it. `stream` reads the first `take` chunks of
`infer_stream` (all, without it) and lets go of the rest.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Any

from kapsl_sdk import KapslClient


def shown(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    return [shown(one) for one in value] if isinstance(value, list | tuple) else value


def call(client: Any, method: str, model: int, shape: list[int], dtype: str, data: str, **more: Any) -> Any:
    raw = bytes.fromhex(data)
    others = {name: (sizes, kind, bytes.fromhex(text)) for name, (sizes, kind, text) in more.pop("others", {}).items()}
    if others:
        more["additional_inputs"] = others
    if method != "stream":
        return getattr(client, method)(model, shape, dtype, raw, **more)
    take = more.pop("take", None)
    chunks = client.infer_stream(model, shape, dtype, raw, **more)
    return list(islice(chunks, take))


def main() -> None:
    client = KapslClient(**json.loads(sys.argv[1]))
    for line in sys.stdin:
        method, arguments, keywords = json.loads(line)
        try:
            answer = {"answer": shown(call(client, method, *arguments, **keywords))}
        except Exception as error:
            answer = {"error": str(error), "type": type(error).__name__}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
