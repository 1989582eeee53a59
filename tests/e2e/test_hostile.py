"""Thousands of hostile requests against the real process: none is a failure of the server's, nothing is left of them,
and whoever asks properly is answered all the while.

The everyday run is short; `KAPSL_STRESS=1` makes it 10,000.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import random
import re
import signal
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest

from kapsl_scheduler.client import Client
from tests.e2e.process import DIGITS, Process, serving

pytestmark = pytest.mark.slow

REQUESTS = 10_000 if os.environ.get("KAPSL_STRESS") else 1_500
SENDERS = 16
LONGEST_BODY = 200_000
GROWTH = 32 << 20
"""Bytes by which the process may have grown between the first fifth of the requests and the last: bodies in flight,
caches that fill, and what the allocator keeps; a leak of 4 KiB a request would be more in the long run."""
QUIET = 1.0
"""Seconds without an answer after which a sender takes it that the server waits for more, and goes."""

STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r]*\r\n(?:[^\r]+\r\n)*\r\n")
PIXELS = {"pixels": np.zeros((1, 64), np.float32)}


class Hostile(NamedTuple):
    """What is sent, and whether the sender goes without waiting for an answer."""

    sent: bytes
    goes: bool = False


def body(rng: random.Random, **keys: Any) -> bytes:
    tensor = {"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": [rng.random() for _ in range(64)]}
    return json.dumps({"inputs": [tensor | keys.pop("tensor", {})], **keys}).encode()


INFER = b"/v2/models/digits/infer"
HEAD = b"POST %b HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" % INFER


def request(content: bytes, *headers: bytes, path: bytes = INFER, method: bytes = b"POST") -> bytes:
    lines = b"".join(header + b"\r\n" for header in (b"host: localhost", b"connection: close", *headers))
    return b"%b %b HTTP/1.1\r\n%bcontent-length: %d\r\n\r\n%b" % (method, path, lines, len(content), content)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """With some bytes changed, cut out, doubled or added."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(changed) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            changed[at : at + 1] = rng.randbytes(1)
        elif kind == 1:
            del changed[at : at + rng.choice((1, 3, 50))]
        elif kind == 2:
            changed[at:at] = changed[at : at + 40]
        else:
            changed[at:at] = rng.choice((b"[", b"]" * 9, b'"', b"{}", b"-", b"1e999", b"\x00", b"\xff\xfe", b"null"))
    return bytes(changed)


# ---------------------------------------------------------------------------------------------- kinds


def broken_json(rng: random.Random) -> Hostile:
    return Hostile(request(mutated(rng, body(rng, parameters={"priority": 1, "timeout": 5_000_000}))))


def absurd_tensor(rng: random.Random) -> Hostile:
    absurd: list[dict[str, Any]] = [
        {"shape": [2**62, 2**62]},
        {"shape": [-1, 64]},
        {"shape": [0, 2**63 - 1], "data": []},
        {"shape": [1] * 40},
        {"shape": [1, 64.5]},
        {"datatype": "FP" + "9" * 1000},
        {"datatype": rng.choice(("BYTES", "BOOL", "UINT64", "INT8", "FP16", "FP64"))},
        {"name": "x" * 5000},
        {"name": "\u0000\ud800".encode("utf-8", "surrogatepass").decode("latin-1")},
        {"data": [[[[[[[[[[1.0]]]]]]]]]]},
        {"data": [1e308] * 64},
        {"data": [10**400] * 64},
        {"data": {"a": 1}},
        {"parameters": {"binary_data_size": rng.choice((-1, 0, 256, 2**63))}},
        {"parameters": {"shared_memory_region": "x"}},
    ]
    return Hostile(request(body(rng, tensor=rng.choice(absurd), id=rng.choice(("", "x" * 3000, None)))))


def deep(rng: random.Random) -> Hostile:
    opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
    depth = rng.choice((100, 5_000, 20_000))
    return Hostile(request(b'{"inputs":' + opening * depth + b"1" + closing * rng.choice((0, depth)) + b"}"))


def wrong_length(rng: random.Random) -> Hostile:
    content = body(rng)
    lengths = [
        b"-1",
        b"0",
        b"1",
        b"%d" % (len(content) - 1),
        b"9" * 30,
        b"1,1",
        b"0x10",
        b"",
        b"1\r\ncontent-length: 2",
    ]
    return Hostile(HEAD + b"content-length: %b\r\n\r\n" % rng.choice(lengths) + content)


def wrong_chunks(rng: random.Random) -> Hostile:
    chunks = [
        b"zz\r\n{}\r\n",
        b"ffffffffffffffffff\r\n{",
        b"-1\r\n",
        b"2\r\n{}0\r\n\r\n",
        b"2;" + b"x" * 9000 + b"\r\n{}\r\n",
    ]
    extra = rng.choice((b"", b"content-length: 5\r\n", b"transfer-encoding: identity\r\n"))
    return Hostile(HEAD + extra + b"transfer-encoding: chunked\r\n\r\n" + rng.choice(chunks) + b"0\r\n\r\n")


def too_long(rng: random.Random) -> Hostile:
    return Hostile(request(b" " * (LONGEST_BODY + rng.choice((1, 1000)))))


def huge_head(rng: random.Random) -> Hostile:
    headers = [b"x: " + b"v" * 70_000, b"x" * 70_000 + b": v", b"\r\n".join([b"x: y"] * 14_000)]
    path = b"/" + b"p" * rng.choice((1000, 70_000))
    return Hostile(rng.choice((request(b"", rng.choice(headers)), request(b"", path=path, method=b"GET"))))


def odd_head(rng: random.Random) -> Hostile:
    odd = [b"x\x00y: z", b": v", b"x : y", b"x: a\x0bb\x7f", b"\xff\xfe: \xff", b"host: evil.example", b"origin: null"]
    odd += [
        b"expect: 100-continue",
        b"upgrade: websocket\r\nconnection: upgrade",
        b"upgrade: h2c",
        b"x: y\r\n folded: z",
    ]
    odd += [b"authorization: Bearer " + b"x" * 9000, b"authorization: \xff", b"inference-header-content-length: 99999"]
    odd += [b"inference-header-content-length: " + rng.choice((b"-1", b"5", b"0", b"9" * 25, b"x"))]
    odd += [b"content-encoding: " + rng.choice((b"br", b"gzip", b"gzip, gzip", b"\xff")), b"accept-encoding: ;q=x,\xff"]
    return Hostile(request(body(rng), rng.choice(odd)))


def packed(rng: random.Random) -> Hostile:
    bomb = gzip.compress(bytes(rng.choice((300_000, 20_000_000))), 1)[:LONGEST_BODY]
    inside = rng.choice((bomb, gzip.compress(body(rng))[: rng.randrange(20, 200)], zlib.compress(bomb), b"\x1f\x8b"))
    if rng.random() < 0.3:
        inside = mutated(rng, inside)
    return Hostile(request(inside, b"content-encoding: " + rng.choice((b"gzip", b"deflate"))))


def bytes_and_lies(rng: random.Random) -> Hostile:
    size = rng.choice((0, 1, 255, 256, 257, 2**40))
    tensor = {"data": [], "parameters": {"binary_data_size": size}}
    header = body(rng, tensor=tensor).replace(b'"data": [], ', rng.choice((b"", b'"data": [], ')))
    length = max(0, len(header) + rng.choice((0, 0, -1, 1, 1000)))
    return Hostile(request(header + rng.randbytes(256), b"inference-header-content-length: %d" % length))


def noise(rng: random.Random) -> Hostile:
    return Hostile(rng.randbytes(rng.choice((1, 10, 100, 5000))) + b"\r\n\r\n")


def mutated_request(rng: random.Random) -> Hostile:
    return Hostile(mutated(rng, request(body(rng))))


def cut(rng: random.Random) -> Hostile:
    whole = request(body(rng))
    return Hostile(whole[: rng.randrange(len(whole))], goes=True)


def sent_ahead(rng: random.Random) -> Hostile:
    good = request(body(rng)).replace(b"connection: close\r\n", b"")
    return Hostile(good * rng.choice((2, 40)) + noise(rng).sent, goes=rng.random() < 0.5)


def other_route(rng: random.Random) -> Hostile:
    paths = [
        b"/v2/repository/models/%s/load",
        b"/v2/repository/models/%s/unload",
        b"/v2/models/%s/stats",
        b"/v2/models/%s",
    ]
    paths += [
        b"/v2/cron/jobs/%s",
        b"/v2/cron/jobs/%s/trigger",
        b"/v2/cron/jobs/%s/backfill",
        b"/v2/cron/runs/%s",
        b"/%s",
    ]
    paths += [b"/v2/cron/jobs?limit=%s", b"/v2/cron/explain?expression=%s", b"/v2/cron/jobs/%s/preview?n=%s"]
    names = [b"..%2f..%2fetc%2fpasswd", b"%00", b"%ff%fe", b"a" * 3000, b"../..", b"%", b"-1", b"9" * 30, b"nan", b"*"]
    path = rng.choice(paths).replace(b"%s", rng.choice(names))
    method = rng.choice((b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"TRACE"))
    return Hostile(request(rng.choice((b"", b"{}", b"[", b"\xff", body(rng))), path=path, method=method))


def order(rng: random.Random) -> Hostile:
    """What is there to be told something, told nonsense."""
    settings: list[tuple[bytes, Any]] = [
        (b"/v2/logging", {"log_verbose_level": 10**30}),
        (b"/v2/logging", {"log_file": "/etc/passwd"}),
        (b"/v2/trace/setting", {"trace_file": "/etc/passwd"}),
        (b"/v2/repository/index", {"ready": "maybe"}),
        (b"/v2/repository/models/digits/load", {"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}}),
        (b"/v2/cron/jobs/x/trigger", {"origin": "x" * 5000}),
    ]
    path, said = rng.choice(settings)
    return Hostile(request(rng.choice((json.dumps(said).encode(), mutated(rng, json.dumps(said).encode()))), path=path))


def job(rng: random.Random) -> Hostile:
    """A job that nobody can want. None of these is one: the store stays empty."""
    definition: dict[str, Any] = {"schedule": "0 0 3 * * *", "model": "digits", "request": {}}
    absurd: list[dict[str, Any]] = [
        {"schedule": "0 0 0 30 2 *"},
        {"schedule": "*/0 " * 2000},
        {"schedule": ",".join("1-59/1" for _ in range(9000)) + " * * * * *"},
        {"schedule": -1},
        {"tz": "../../etc/passwd"},
        {"on_result": "os:system"},
        {"source": {"kind": "folder", "path": "/"}},
        {"request": {"inputs": {"pixels": {"shape": [2**40], "dtype": "float32", "data_base64": "AA=="}}}},
        {"x": 1},
    ]
    return Hostile(
        request(json.dumps(definition | rng.choice(absurd)).encode(), path=b"/v2/cron/jobs/x", method=b"PUT")
    )


KINDS: tuple[Callable[[random.Random], Hostile], ...] = (
    *(broken_json, absurd_tensor, deep, wrong_length, wrong_chunks, too_long, huge_head, odd_head, packed, order, job),
    *(bytes_and_lies, noise, mutated_request, cut, sent_ahead, other_route),
)


# ------------------------------------------------------------------------------------------------ sending


async def send(address: tuple[str, str], hostile: Hostile) -> list[int]:
    """The statuses of what is answered."""
    reader, writer = await asyncio.open_connection(*address)
    said = b""
    try:
        writer.write(hostile.sent)
        if hostile.goes:
            return []
        async with asyncio.timeout(QUIET):
            while piece := await reader.read(1 << 16):
                said += piece
    except (TimeoutError, ConnectionError):  # it waits for more, or has closed what it would not read
        pass
    finally:
        writer.close()
    return [int(status) for status in STATUS.findall(said)]


def memory(server: Process) -> int:
    """Bytes of the process that are in memory."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(900)
async def test_hostile_requests_are_refused_and_leave_nothing_behind() -> None:
    rng = random.Random(2024)
    statuses: Counter[tuple[str, int]] = Counter()
    failures: list[tuple[str, bytes]] = []
    options = ("--max-body-bytes", str(LONGEST_BODY), "--client-patience", "5")
    async with serving(DIGITS, *options) as server, Client(server.url) as client:
        host, port = urlsplit(server.url).netloc.split(":")

        async def sender(seed: int, number: int) -> None:
            rng = random.Random(seed)
            for _ in range(number):
                kind = rng.choice(KINDS)
                hostile = kind(rng)
                for status in await send((host, port), hostile):
                    statuses[kind.__name__, status] += 1
                    if status >= 500 and status != 504:
                        failures.append((kind.__name__, hostile.sent[:2000]))

        async def attack(number: int) -> None:
            async with asyncio.TaskGroup() as group:
                for _ in range(SENDERS):
                    group.create_task(sender(rng.getrandbits(64), number // SENDERS))
                for _ in range(number // 10):  # and in between somebody who means it
                    reply = await client.infer("digits", PIXELS, timeout=20.0)
                    assert reply.outputs["probabilities"].shape == (1, 10)

        await attack(REQUESTS // 5)
        before = memory(server)
        await attack(REQUESTS - REQUESTS // 5)
        grown = memory(server) - before

        assert failures == []
        assert await client.get("/v2/health/ready") == {"ready": True}
        scheduler = (await client.stats("digits"))["scheduler"]
        assert (scheduler["queued"], scheduler["calls_in_flight"]) == (0, 0)
        assert await client.jobs() == []
        server.send(signal.SIGTERM)
        code, said = await server.end()

    assert code == 0
    assert "Traceback" not in said
    assert grown < GROWTH
    print(sorted(statuses.items()), grown)  # noqa: T201
    refused = {kind for kind, status in statuses if 400 <= status < 500}
    # Each kind came, and came to nothing. Those two are let go of without a word.
    assert refused >= {kind.__name__ for kind in KINDS} - {"cut", "sent_ahead"}
