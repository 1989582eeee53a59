"""What may be set of queues and batches: values, checked. They load fast, for the command line's sake.

What is not here: what a queue makes of them (`core.queue`, `core.forming`).
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

import msgspec

from kapsl_scheduler.priority import Priority

__all__ = ["BatchPolicy", "QueueOverflowPolicy", "QueuePolicy"]


class BatchPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How batches form. Times are seconds, sizes are rows.

    `max_batch_size`, `preferred_batch_sizes` and `max_queue_delay` mean what Triton's dynamic batcher means by
    them; the delay holds only work below `LATENCY_CRITICAL`. `max_batch_time` cuts batches that `THROUGHPUT`
    leads by their predicted time. `fill_slack`: rows of lower classes ride along while the batch's predicted
    time stays within (1 + fill_slack) x the leaders' own. `background_slice`: the predicted time that a batch of
    `BACKGROUND` may take, the bound on what it can add to a live request.
    """

    max_batch_size: int = 32
    max_queue_delay: float = 0.0
    preferred_batch_sizes: tuple[int, ...] = ()
    max_batch_time: float | None = None
    fill_slack: float = 0.25
    background_slice: float = 0.005

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ValueError(f"max_batch_size: expected at least 1, got {self.max_batch_size}")
        for field in ("max_queue_delay", "fill_slack", "background_slice"):
            value = getattr(self, field)
            if not value >= 0:
                raise ValueError(f"{field}: expected a number of at least 0, got {value}")
        if self.max_batch_time is not None and not self.max_batch_time > 0:
            raise ValueError(f"max_batch_time: expected more than 0 seconds, got {self.max_batch_time}")
        wrong = [size for size in self.preferred_batch_sizes if not 1 <= size <= self.max_batch_size]
        if wrong:
            raise ValueError(
                f"preferred_batch_sizes: expected sizes from 1 to max_batch_size ({self.max_batch_size}), got {wrong}"
            )


class QueueOverflowPolicy(enum.Enum):
    """What a full queue does with one more request.

    `BLOCK`: it waits for room, in class, then arrival order; nothing is evicted. `DROP_NEWEST`: the newest
    request of the lowest class below it makes room, else it is refused. `DROP_OLDEST`: the oldest request of
    the lowest class not above it makes room, else it is refused.
    """

    BLOCK = "block"
    DROP_NEWEST = "drop_newest"
    DROP_OLDEST = "drop_oldest"


class QueuePolicy(msgspec.Struct, frozen=True, kw_only=True):
    """How much may be queued, and what happens beyond.

    `max_size` counts queued requests of all classes, `max_bytes` their inputs; neither counts what runs or waits
    for room. `block_timeout` (seconds, None: no limit) and `max_waiting` (requests) bound the wait for room.
    `shares`: the fraction of engine time that a class below `LATENCY_CRITICAL` keeps while it is backlogged, one
    number for both or a mapping. `tenant_fairness`: serve the `metadata.tenant` with the least cost served first.
    """

    max_size: int = 1024
    max_bytes: int | None = None
    overflow: QueueOverflowPolicy = QueueOverflowPolicy.BLOCK
    block_timeout: float | None = None
    max_waiting: int = 1024
    shares: float | Mapping[Priority, float] = 0.05
    tenant_fairness: bool = False

    def __post_init__(self) -> None:
        # A policy may be given by its value, as in "block".
        msgspec.structs.force_setattr(self, "overflow", QueueOverflowPolicy(self.overflow))
        if self.max_size < 1:
            raise ValueError(f"max_size: expected at least 1, got {self.max_size}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes: expected at least 1 or None, got {self.max_bytes}")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting: expected at least 0, got {self.max_waiting}")
        if self.block_timeout is not None and not self.block_timeout >= 0:
            raise ValueError(f"block_timeout: expected at least 0 seconds or None, got {self.block_timeout}")
        if isinstance(self.shares, Mapping):
            try:
                by_class = {Priority.of(key): share for key, share in self.shares.items()}
            except ValueError as error:
                raise ValueError(f"shares: {error}") from None
            if Priority.LATENCY_CRITICAL in by_class:
                raise ValueError("shares: expected classes below LATENCY_CRITICAL, which keeps what the others leave")
            msgspec.structs.force_setattr(self, "shares", by_class)
        shares = self.share_by_class()
        if any(not 0 <= share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
            raise ValueError(f"shares: expected fractions from 0 that add up to less than 1, got {self.shares}")

    def share_by_class(self) -> dict[Priority, float]:
        """The share of each class below the first."""
        below = (Priority.THROUGHPUT, Priority.BACKGROUND)
        if isinstance(self.shares, Mapping):
            return {priority: self.shares.get(priority, 0.05) for priority in below}
        return dict.fromkeys(below, self.shares)
