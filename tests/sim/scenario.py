"""What a chaotic run is made of, drawn from its seed: engines and their faults, policies, load, the end.

Data and how it is drawn. What is done with it: `chaos`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kapsl_scheduler.core.batch import BatchPolicy
from kapsl_scheduler.core.queue import QueueOverflowPolicy, QueuePolicy
from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.testing import Fault

__all__ = ["POISON", "PoisonError", "Scenario", "draw"]

POISON = -1.0
"""A number that makes the engines fail whatever call it is in."""

BYTES_PER_ROW = 12


class PoisonError(Exception):
    """What poison makes the engines raise."""


@dataclass(frozen=True)
class Scenario:
    """Times are virtual seconds. `load` is the rows offered over the rows that the engines could run."""

    engines: int
    workers: int
    cpu: str  # "self", "own" or "none": what `for_cpu` returns
    fallback: bool
    batchable: bool
    retry: bool
    max_streams: int
    chunks: int
    call_time: float
    row_time: float
    batch: BatchPolicy
    queue: QueuePolicy
    load: float
    burst: int
    max_rows: int
    faults: tuple[Fault, ...]
    released: bool  # whether hanging calls go on, and everybody has heard, before the scheduler is closed
    closed_at: float | None  # the share of the arrivals after which the scheduler is closed
    drain: float

    @property
    def may_be_unavailable(self) -> bool:
        """Whether anything ever ends a request for a reason that is not its own or the queue's."""
        lost = any(fault.error is Unavailable for fault in self.faults)
        return lost or not self.released or self.closed_at is not None


def draw(rng: random.Random) -> Scenario:
    """A scenario. The same generator state gives the same one."""
    max_batch = rng.choice((1, 4, 8, 16))
    cpu = rng.choice(("self", "own", "own", "none"))
    hangs = rng.random() < 0.2
    return Scenario(
        engines=rng.choice((1, 1, 2, 3)),
        workers=rng.choice((1, 1, 2)),
        cpu=cpu,
        fallback=cpu != "none" and rng.random() < 0.6,
        batchable=rng.random() < 0.9,
        retry=rng.random() < 0.85,
        max_streams=rng.choice((0, 0, 1, 2)),
        chunks=rng.choice((1, 3, 3, 24)),
        call_time=rng.uniform(0.5e-3, 5e-3),
        row_time=rng.choice((0.0, 0.02e-3, 0.5e-3)),
        batch=_batch_policy(rng, max_batch),
        queue=_queue_policy(rng),
        load=rng.uniform(0.3, 3.0),
        burst=rng.choice((1, 1, 5, 40)),
        max_rows=rng.choice((1, 1, max_batch)),
        faults=_faults(rng, hangs),
        released=rng.random() < 0.6,
        closed_at=rng.uniform(0.3, 1.0) if rng.random() < 0.25 else None,
        drain=rng.choice((0.0, 0.01, 30.0)),
    )


def _batch_policy(rng: random.Random, max_batch: int) -> BatchPolicy:
    return BatchPolicy(
        max_batch_size=max_batch,
        max_queue_delay=rng.choice((0.0, 0.0, 0.004)),
        preferred_batch_sizes=rng.choice(((), (), (max_batch,), (1, max_batch))),
        max_batch_time=rng.choice((None, None, 0.004)),
        background_slice=rng.choice((0.0, 0.005)),
    )


def _queue_policy(rng: random.Random) -> QueuePolicy:
    return QueuePolicy(
        max_size=rng.choice((2, 8, 64, 1024)),
        max_bytes=rng.choice((None, None, 20 * BYTES_PER_ROW)),
        overflow=rng.choice(list(QueueOverflowPolicy)),
        block_timeout=rng.choice((None, None, 0.02)),
        max_waiting=rng.choice((0, 10, 1024)),
        shares=rng.choice((0.0, 0.05, 0.3)),
        tenant_fairness=rng.random() < 0.3,
    )


def _faults(rng: random.Random, hangs: bool) -> tuple[Fault, ...]:
    """Poison always; a choice of hanging calls, lost engines, failures out of the blue and slow calls."""
    faults = [Fault(value=POISON, error=PoisonError)]
    if hangs:
        faults.append(Fault(calls={rng.randrange(1, 60)}, hang=True))
    if rng.random() < 0.4:
        faults.append(Fault(probability=rng.uniform(0, 0.03), error=Unavailable, failed_checks=rng.randrange(3)))
    if rng.random() < 0.4:
        faults.append(Fault(probability=rng.uniform(0, 0.1), error=RuntimeError))
    if rng.random() < 0.4:
        faults.append(Fault(probability=rng.uniform(0, 0.1), delay=rng.uniform(0, 0.05)))
    return tuple(faults)
