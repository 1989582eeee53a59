"""Other processes on the same store: that this one lives, which of them have died, what they have changed.

Nobody compares clocks: each process counts its heartbeats in the store, and one whose count stands still for as long as
a lease, by the clock of a watcher that could look all the while, is dead. What is not here: what becomes of the dead
one's runs (`Rescue`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from typing import Final

from kapsl_scheduler.core.runs import RunState
from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import RunQuery
from kapsl_scheduler.runtime.cron_intents import Rescue
from kapsl_scheduler.runtime.cron_ledger import Ledger
from kapsl_scheduler.runtime.cron_runs import Runs

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

BEATS: Final = 3
"""Heartbeats in a lease."""
AGE_EVERY: Final = 3600.0
"""Seconds after which the history is looked at in any case, for what has become too old."""
PAGE: Final = 500


class Watch:
    """The heartbeat of one process, and its eye on the others."""

    def __init__(self, ledger: Ledger, runs: Runs, *, lease: float, keep: int, max_age: float) -> None:
        self._ledger = ledger
        self._store = ledger.store
        self._runs = runs
        self._lease = lease
        self._keep = keep
        self._max_age = max_age
        self._seen: dict[str, tuple[int, float]] = {}  # owner: its count, and since when it is that
        self._looked = -math.inf  # when it last could
        self._unknown: set[tuple[str, int, str]] = set()

    async def serve(self) -> None:
        """Until cancelled. An instant store is this process's own: once whoever fell over before it is buried, only the
        history is looked after."""
        loop = asyncio.get_running_loop()
        beat = 0.0
        prune = loop.time() + AGE_EVERY
        failing = False
        while True:
            try:
                if (now := loop.time()) >= beat:
                    alone = await self.look()
                    # From one look to the next, however long the store takes for each.
                    beat = math.inf if alone and self._store.instant else now + self._lease / BEATS
                if self._runs.history_grows.is_set() or loop.time() >= prune:
                    await self.prune()
                    prune = loop.time() + AGE_EVERY
                if failing:
                    logger.warning("the store of the cron jobs is looked after again")
                failing = False
            except Exception as error:
                if not failing:
                    expected = isinstance(error, StoreError)
                    logger.warning("the store of the cron jobs was not looked after: %s", error, exc_info=not expected)
                failing = True
                prune = loop.time() + self._lease / BEATS
                beat = prune if beat <= prune else beat  # never, where there is nobody to hear it
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(beat, prune)):
                    await self._runs.history_grows.wait()

    async def look(self) -> bool:
        """One heartbeat, and what others have done since the last. Returns whether there are no others."""
        await self._store.beat(self._runs.owner)
        await self._ledger.read_changes()
        beats = await self._store.beats()
        now = asyncio.get_running_loop().time()
        if now - self._looked > self._lease / 2:
            self._seen = {}  # the store failed, or this process stood still: others may have met the same
        self._looked = now
        self._seen = {
            owner: self._seen[owner] if self._seen.get(owner, (None,))[0] == count else (count, now)
            for owner, count in beats.items()
        }
        for owner, (_, since) in self._seen.items():
            if owner != self._runs.owner and (now - since >= self._lease or self._store.instant):
                await self._bury(owner)
        await self._check_own()
        return self._seen.keys() <= {self._runs.owner}

    async def _bury(self, owner: str) -> None:
        """Its runs are nobody's any more."""
        versions = self._ledger.versions()
        found = await self._store.runs(RunQuery(states=(RunState.RUNNING,), owner=owner, limit=PAGE))
        if not found:
            await self._store.forget(owner)
            return
        logger.warning(
            "process %s has died; of its runs %d are taken over or recorded as interrupted", owner, len(found)
        )
        for run in found:
            self._ledger.post(Rescue(self._runs, run, versions.get(run.job, 0)))

    async def _check_own(self) -> None:
        """What another process has taken from this one (which it thought dead) is not ours to go on with; and what is
        ours in the store but not here was never dispatched, because the store failed after it had written it."""
        if not self._ledger.idle:
            return  # what is being written looks like either
        versions = self._ledger.versions()
        before = {execution.run.key: execution for execution in self._runs.everyone()}
        ours = {
            run.key: run
            for run in await self._store.runs(
                RunQuery(states=(RunState.RUNNING,), owner=self._runs.owner, limit=len(before) + PAGE)
            )
        }
        after = {execution.run.key for execution in self._runs.everyone()}
        for key, execution in before.items():
            if key not in ours and key in after and not (execution.recording or execution.discarded):
                logger.warning("job %r: another process has taken over a run of this one", key[0])
                execution.discard("taken over")
        unknown = {key for key in ours if key not in before and key not in after}
        for key in unknown & self._unknown:  # seen twice: not one that was just about to begin
            self._ledger.post(Rescue(self._runs, ours[key], versions.get(key[0], 0)))
        self._unknown = unknown

    async def prune(self) -> None:
        """Hold the history to its bounds."""
        self._runs.ended_since_pruned = 0
        self._runs.history_grows.clear()
        before = self._runs.wall() - round(self._max_age * 1e6)
        await self._store.prune(keep=self._keep, before=before)
