"""The in-process batchers that people would pick, each behind the same small face: `batched`, `async-batcher`, Ray.

`PEERS` lists the ways in which each is run. As recommended: the engine off the loop where the library offers that,
batches wait at most 2 ms (their defaults of 5 and 10 ms are slower here). Tuned: what is fastest for this one
engine, at the price of blocking the loop. What is measured with them lives in digits.py.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Awaitable, Callable, Sequence
from importlib import util
from typing import Any, Final, NamedTuple, Protocol

import numpy as np

from kapsl_scheduler.types import Array

__all__ = ["PEERS", "BatchFunction", "Peer", "PeerMissing", "check_peers", "installed_peers", "open_peer"]

BatchFunction = Callable[[Array], Array]
"""The engine: rows stacked into one array in, the answers' rows stacked out."""

RowsFunction = Callable[[list[Array]], list[Array]]
"""The engine as the peers want it: a list of items in, a list as long out."""


class PeerMissing(Exception):
    """A peer that was asked for is not installed."""


class Peer(Protocol):
    """One batcher at work on the running loop."""

    call: Callable[[Array], Awaitable[Any]]
    """The answer for one row, without a batch axis."""

    async def close(self) -> None: ...


class _Way(NamedTuple):
    """One way to run a peer: the module it needs, the seconds its batches wait, whether the engine blocks the loop."""

    module: str
    wait: float
    on_loop: bool
    recommended: bool


PEERS: Final = {
    "batched": _Way("batched", 0.002, on_loop=False, recommended=True),
    "batched.aio": _Way("batched.aio", 0.002, on_loop=False, recommended=True),
    "async-batcher": _Way("async_batcher.batcher", 0.002, on_loop=False, recommended=True),
    "ray.serve.batch": _Way("ray.serve", 0.002, on_loop=True, recommended=True),
    "batched.aio-tuned": _Way("batched.aio", 0.0, on_loop=True, recommended=False),
    "async-batcher-tuned": _Way("async_batcher.batcher", 0.0, on_loop=True, recommended=False),
    "ray.serve.batch-tuned": _Way("ray.serve", 0.0, on_loop=True, recommended=False),
}


def check_peers(names: Sequence[str]) -> None:
    """Raise `PeerMissing` with what to install, naming all that are missing; `ValueError` for unknown names."""
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise ValueError(f"unknown peers: {', '.join(unknown)}; known: {'; '.join(PEERS)}")
    missing = sorted({_package(name) for name in names} - {_package(name) for name in installed_peers()})
    if missing:
        raise PeerMissing(
            f"not installed: {', '.join(missing)}. Install the extra `bench` (pip install -e '.[bench]') or run "
            "with `--peers none`."
        )


def installed_peers() -> list[str]:
    """The ways whose package is installed."""
    return [name for name in PEERS if util.find_spec(_package(name)) is not None]


def _package(name: str) -> str:
    return PEERS[name].module.partition(".")[0]


def open_peer(name: str, function: BatchFunction, *, max_batch: int, slow: bool = False) -> Peer:
    """A fresh batcher over `function` for the running loop. With `slow` the function is kept off the loop in any case:
    nobody would block a loop with it."""
    way = PEERS[name]
    if slow:
        way = way._replace(on_loop=False)

    def over_rows(rows: list[Array]) -> list[Array]:
        # The fastest way to stack and split that numpy has, so that a peer loses nothing to its function.
        return list(function(np.concatenate(rows).reshape(len(rows), -1)))

    return _OPENERS[way.module](over_rows, max_batch, way)


def _in_thread(function: RowsFunction) -> Callable[[list[Array]], Awaitable[list[Array]]]:
    async def over_rows(rows: list[Array]) -> list[Array]:
        return await asyncio.to_thread(function, rows)

    return over_rows


def _as_coroutine(function: RowsFunction) -> Callable[[list[Array]], Awaitable[list[Array]]]:
    async def over_rows(rows: list[Array]) -> list[Array]:
        return function(rows)

    return over_rows


class _Batched:
    """`batched.dynamically`: a thread of its own forms the batches and runs the function."""

    def __init__(self, function: RowsFunction, max_batch: int, way: _Way) -> None:
        decorate = importlib.import_module(way.module).dynamically
        self._processor = decorate(function, batch_size=max_batch, timeout_ms=way.wait * 1000)
        self.call: Callable[[Array], Awaitable[Any]] = self._processor.acall

    async def close(self) -> None:
        await asyncio.to_thread(self._processor.shutdown)


class _BatchedAio:
    """`batched.aio.dynamically`: a task forms the batches; a plain function runs in `asyncio.to_thread`."""

    def __init__(self, function: RowsFunction, max_batch: int, way: _Way) -> None:
        decorate = importlib.import_module(way.module).dynamically
        self.call: Callable[[Array], Awaitable[Any]] = decorate(
            _as_coroutine(function) if way.on_loop else function, batch_size=max_batch, timeout_ms=way.wait * 1000
        )

    async def close(self) -> None:
        """Its task has no end of its own: it goes with the loop."""


class _AsyncBatcher:
    """A subclass of `AsyncBatcher` with a `process_batch`, as its documentation shows."""

    def __init__(self, function: RowsFunction, max_batch: int, way: _Way) -> None:
        base: Any = importlib.import_module(way.module).AsyncBatcher
        process = _as_coroutine(function)

        def in_executor(_batcher: object, batch: list[Array]) -> list[Array]:
            return function(batch)

        async def on_loop(_batcher: object, batch: list[Array]) -> list[Array]:
            return await process(batch)

        subclass = type("Batcher", (base,), {"process_batch": on_loop if way.on_loop else in_executor})
        self._batcher = subclass(max_batch_size=max_batch, max_queue_time=way.wait)
        self.call: Callable[[Array], Awaitable[Any]] = self._batcher.process

    async def close(self) -> None:
        await self._batcher.stop(force=True)


class _RayServe:
    """`ray.serve.batch` over an async function, as in a replica but without a cluster around it."""

    def __init__(self, function: RowsFunction, max_batch: int, way: _Way) -> None:
        _pretend_replica()
        decorate = importlib.import_module(way.module).batch(max_batch_size=max_batch, batch_wait_timeout_s=way.wait)
        self.call: Callable[[Array], Awaitable[Any]] = decorate(
            _as_coroutine(function) if way.on_loop else _in_thread(function)
        )

    async def close(self) -> None:
        """Its task has no end of its own: it goes with the loop."""


def _pretend_replica() -> None:
    """Since Ray 2.50 or so the decorator asks the replica for its limits: set one up as Ray's own unit tests do."""
    context = importlib.import_module("ray.serve.context")
    common = importlib.import_module("ray.serve._private.common")
    config = importlib.import_module("ray.serve._private.config")
    deployment = common.DeploymentID(name="benchmark")
    context._set_internal_replica_context(
        replica_id=common.ReplicaID(unique_id="benchmark", deployment_id=deployment),
        servable_object=None,
        _deployment_config=config.DeploymentConfig(max_ongoing_requests=1024),
        rank=None,
        world_size=1,
    )


_OPENERS: Final[dict[str, Callable[[RowsFunction, int, _Way], Peer]]] = {
    "batched": _Batched,
    "batched.aio": _BatchedAio,
    "async_batcher.batcher": _AsyncBatcher,
    "ray.serve": _RayServe,
}
