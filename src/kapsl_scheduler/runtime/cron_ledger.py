"""The one writer of a CronScheduler's jobs and runs: decisions in, transactions out.

Whoever wants something changed hands in an `Intent`. Intents are decided one after another on the jobs as this process
knows them, and what they decided in one round is one batch for the store. Where the store says that another process was
faster, the job is read again and the intent decides anew, so that it may be asked more than once and must not act
before it hears `done`. What is not here: what is decided (`core.firing`, `runtime.cron_intents`,
`runtime.cron_changes`), running anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

from kapsl_scheduler.core.firing import Timetable
from kapsl_scheduler.core.jobs import CronJob
from kapsl_scheduler.core.runs import Change, JobRecord, Run
from kapsl_scheduler.errors import CronError, StoreError
from kapsl_scheduler.ports import Committed, Exists, JobStore, Result, Stale

__all__ = ["Entry", "Intent", "Ledger"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

ROUND: Final = 128
"""Intents that are decided before others get the loop: one or two milliseconds."""
RETRY_FIRST: Final = 0.2
RETRY_MOST: Final = 2.0
"""Seconds between attempts to write, from the first to the longest wait, while the store fails."""


NOTHING: Final = Committed(0)
"""What was written for an intent that wanted nothing written, or has it from before."""


class Entry:
    """A job as this process knows it: what the store had when last asked, and what it needs to fire."""

    __slots__ = ("definition", "due", "id", "job", "next", "place", "state", "timetable", "unbound", "version")

    def __init__(self, record: JobRecord) -> None:
        self.id = record.id
        self.definition = record.definition
        self.state = record.state
        self.version = record.version
        self.job: CronJob | None = None  # None: the definition cannot be understood here
        self.timetable: Timetable | None = None
        self.unbound: str | None = "not read yet"  # why it cannot fire here, None if it can
        self.next: int | None = None
        self.due: int | None = None
        self.place = 0  # of its entry on the timer's heap; an older one is void


class Intent:
    """Something that is to be decided and written about one job. `lasting` intents are kept and tried again while the
    store fails; others fail with it."""

    __slots__ = ("future", "job")

    lasting = False

    def __init__(self, job: str) -> None:
        self.job = job
        self.future: asyncio.Future[Any] | None = None

    def decide(self, entry: Entry | None) -> Change | None:
        """What is to be written (None: nothing), the job being as `entry` says, or not there. Raises `CronError` for
        what cannot be."""
        raise NotImplementedError

    def done(self, entry: Entry | None, written: Committed) -> Any:
        """It is written: `entry` is the job now. Returns what whoever waits is to hear."""

    @property
    def turns(self) -> tuple[Run, Run] | None:
        """What a lasting one makes of a run that is there: before and after. Where the store fails, that may have been
        written nevertheless, and would be counted twice."""
        return None

    def refused(self) -> Any:
        """A run of which it wanted to write the end has ended already, or is another's: nothing was written."""

    def gives_way(self) -> bool:
        """The same, asked first: whether it is to be decided again, without that run."""
        return False

    def exists(self, run: Run) -> Any:
        """A run that it wanted to create is there: nothing was written. Returns what whoever waits is to hear."""
        raise RuntimeError(f"job {self.job!r}: nothing was written, since run {run.key} is there already")

    def meets(self, run: Run) -> bool:
        """The same, asked first: whether it is to be decided again, without that run."""
        return False

    def fail(self, error: Exception) -> None:
        """Tell whoever waits."""
        if self.future is not None and not self.future.done():
            self.future.set_exception(error)


Asked = tuple[Intent, Entry | None]
"""An intent that has been asked, and the job that it saw."""


class Ledger:
    """Serialises intents into rounds. `entries` are the jobs. `changed(entry)` is called whenever a job is not what it
    was: read or written; `gone(entry)` when it is no more."""

    def __init__(self, store: JobStore, *, changed: Callable[[Entry], None], gone: Callable[[Entry], None]) -> None:
        self.store = store
        self.entries: dict[str, Entry] = {}
        self.failing: StoreError | None = None
        self._changed = changed
        self._gone = gone
        self._queue: deque[Intent] = deque()
        self._unsure: list[Intent] = []  # those that `turn` a run, and of which the store said that it failed
        self._writing = False
        self._soon = False  # a round is to come in the next pass of the loop
        self._closed: Exception | None = None  # what whoever hands something in is told from now on
        self._sleeper: asyncio.Future[None] | None = None  # of `serve`, while there is nothing to write
        self._waiters: list[asyncio.Future[None]] = []  # until nothing is left to write

    # ---------------------------------------------------------------------------------------- handing in

    async def do(self, intent: Intent) -> Any:
        """Have it decided and written. Returns what it says; raises what it raises, and `StoreError`.

        Cancelling the await leaves it in: it may be written nevertheless.
        """
        future = intent.future = asyncio.get_running_loop().create_future()
        self.settle(intent)
        return await future

    async def do_all(self, intents: Sequence[Intent]) -> list[Any]:
        """The same for several, which are written together if they can be. Raises the first error of them."""
        loop = asyncio.get_running_loop()
        futures = []
        for intent in intents:
            intent.future = loop.create_future()
            futures.append(intent.future)
        self.settle(*intents)
        if futures:
            try:
                await asyncio.wait(futures)
            except asyncio.CancelledError:
                for future in futures:
                    future.cancel()
                raise
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]

    def settle(self, *intents: Intent) -> None:
        """Hand them in, and write here and now what was handed in, if that takes no wait; else it will be written."""
        if not self.store.instant or self._writing or self._closed is not None or self.failing is not None:
            for intent in intents:
                self.post(intent)
            return
        self._queue.extend(intents)
        while self._queue and self.failing is None:
            self._round_now()

    def post(self, intent: Intent) -> None:
        """Hand it in and go on. Nothing is written before the next pass of the loop."""
        if self._closed is not None:
            intent.fail(self._closed)
            return
        self._queue.append(intent)
        if not self.store.instant or self.failing is not None:
            self._wake()
        elif not self._soon:
            self._soon = True
            asyncio.get_running_loop().call_soon(self._write_soon)

    def _write_soon(self) -> None:
        """A round of what was handed in; others get the loop before the next."""
        self._soon = False
        if self._queue and not self._writing and self.failing is None:
            self._round_now()
            if self._queue and self.failing is None and not self._soon:
                self._soon = True
                asyncio.get_running_loop().call_soon(self._write_soon)

    def close(self, error: Exception) -> None:
        """Nothing more is written: whoever waits for something, or hands something in, is told so."""
        self._closed = error
        while self._queue:
            self._queue.popleft().fail(error)
        self._release()

    def _wake(self) -> None:
        if self._sleeper is not None and not self._sleeper.done():
            self._sleeper.set_result(None)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to write."""
        return not self._queue and not self._writing

    async def settled(self) -> None:
        """Wait until everything that was handed in is written."""
        while not self.idle:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter

    def _release(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    # ------------------------------------------------------------------------------------------- writing

    async def serve(self) -> None:
        """Write what is handed in and was not written there and then, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if self._writing or not self._queue:
                self._sleeper = loop.create_future()
                await self._sleeper
                self._sleeper = None
            else:
                await self._write_all()

    async def _write_all(self) -> None:
        """Until nothing is left. Others get the loop between two rounds; while the store fails, it is tried again."""
        self._writing = True
        wait = RETRY_FIRST
        try:
            while self._queue:
                if await self._round():
                    wait = RETRY_FIRST
                    if self._queue:
                        await asyncio.sleep(0)
                else:
                    await asyncio.sleep(wait if self._queue else 0)
                    wait = min(wait * 2, RETRY_MOST)
        finally:
            self._writing = False
            if not self._queue:
                self._release()

    async def _round(self) -> bool:
        """Decide what is there, and write it. Returns whether the store does what it should."""
        asked: list[Asked] = []
        try:
            if self._unsure:
                await self._find_out()
            asked, changes = self._decided()
            if not changes:
                return True
            results = await self.store.commit(changes)
        except asyncio.CancelledError:  # at the end: `close` tells them
            self._queue.extendleft(intent for intent, _ in reversed(asked))
            raise
        except Exception as error:
            self._not_written(asked, error)
            return False
        self._written(asked, changes, results)
        if self.failing is not None:
            logger.warning("the store of the cron jobs works again")
            self.failing = None
        return True

    def _round_now(self) -> None:
        """The same with a store that nobody waits for. While it fails, `serve` goes on."""
        self._writing = True
        try:
            asked, changes = self._decided()
            if changes:
                try:
                    results = _at_once(self.store.commit(changes))
                except Exception as error:
                    self._not_written(asked, error)
                    self._wake()
                else:
                    self._written(asked, changes, results)
        finally:
            self._writing = False
            if self._waiters and not self._queue:
                self._release()

    def _written(self, asked: Sequence[Asked], changes: Sequence[Change], results: Sequence[Result]) -> None:
        """Tell each what the store said. Those that are to decide anew come first in the next round."""
        again: list[Intent] = []
        for (intent, entry), change, result in zip(asked, changes, results, strict=True):
            if isinstance(result, Committed):
                _answer(intent, self._committed(entry, change, result), result)
            elif self._again(intent, change, result):
                again.append(intent)
        if again:
            self._queue.extendleft(reversed(again))

    def _not_written(self, asked: Sequence[Asked], error: Exception) -> None:
        """The store fails. The lasting ones are tried again, before all others; the others fail, also those that have
        not been asked yet."""
        if not isinstance(error, StoreError):
            logger.error("the store of the cron jobs raised what it should not", exc_info=error)
            error = StoreError(f"{type(error).__name__}: {error}")
        if self.failing is None:
            logger.error("the store of the cron jobs fails, it is tried again: %s", error)
        self.failing = error
        self._queue.extendleft(intent for intent, _ in reversed(asked) if intent.lasting)
        for intent, _ in asked:
            if not intent.lasting:
                intent.fail(error)
            elif intent.turns is not None:
                self._unsure.append(intent)
        self._fail_calls(error)

    def _fail_calls(self, error: StoreError) -> None:
        """Whoever waits for an answer is not kept by what others have to write."""
        waiting, self._queue = self._queue, deque(intent for intent in self._queue if intent.lasting)
        for intent in waiting:
            if not intent.lasting:
                intent.fail(error)

    async def _find_out(self) -> None:
        """What has become of what may have been written. Raises whatever the store raises."""
        for intent in list(self._unsure):
            turns = intent.turns
            assert turns is not None
            before, after = turns
            run = await self.store.run(*before.key)
            if run is not None and _same(run, before):
                self._unsure.remove(intent)
                continue
            records = await self.store.jobs([intent.job])
            self._unsure.remove(intent)
            self._queue.remove(intent)
            self.refresh(intent.job, records[0] if records else None)
            if run is not None and _same(run, after):
                _tell(intent, intent.done, self.entries.get(intent.job), NOTHING)
            else:
                _tell(intent, intent.refused)

    def _decided(self) -> tuple[list[Asked], list[Change]]:
        """Ask the intents of the queue, one of each job: the next one has to see what becomes of it. Returns those that
        want something written, and what."""
        asked: list[Asked] = []
        changes: list[Change] = []
        jobs: set[str] = set()
        later: list[Intent] = []
        queue = self._queue
        for _ in range(min(len(queue), ROUND)):
            intent = queue.popleft()
            job = intent.job
            if job in jobs:
                later.append(intent)
                continue
            entry = self.entries.get(job)
            try:
                change = intent.decide(entry)
            except Exception as error:
                if not isinstance(error, CronError):
                    logger.exception("job %r: a change could not be decided", job)
                intent.fail(error)
                continue
            if change is None:
                _answer(intent, entry, NOTHING)
            else:
                jobs.add(job)
                asked.append((intent, entry))
                changes.append(change)
        if later:
            queue.extendleft(reversed(later))
        return asked, changes

    def _committed(self, entry: Entry | None, change: Change, result: Committed) -> Entry | None:
        """Take over what was written. Returns the job as it is now."""
        if change.remove is not None:
            if entry is not None and self.entries.pop(change.job, None) is not None:
                self._gone(entry)
            return None
        state = change.state
        if state is None:
            return entry
        if entry is None and (entry := self.entries.get(change.job)) is None:  # it may have been read meanwhile
            assert change.definition is not None
            entry = Entry(JobRecord(change.job, change.definition, state, result.version))
            self.entries[change.job] = entry
        entry.state, entry.version = state, result.version
        if change.definition is not None:
            entry.definition = change.definition
        return entry

    def _again(self, intent: Intent, change: Change, result: Stale | Exists) -> bool:
        """Nothing of it was written. Whether it is to be decided again; if not, it is told."""
        if isinstance(result, Exists):
            if intent.meets(result.run):
                return True
            _tell(intent, intent.exists, result.run)
            return False
        record = result.record
        if change.expected is not None and change.expected != (0 if record is None else record.version):
            self.refresh(change.job, record)
            return True
        if intent.gives_way():
            return True
        _tell(intent, intent.refused)
        return False

    # ------------------------------------------------------------------------------------------- reading

    def refresh(self, job: str, record: JobRecord | None) -> None:
        """Take over what the store says of a job."""
        entry = self.entries.get(job)
        if record is None:
            if entry is not None:
                del self.entries[job]
                self._gone(entry)
            return
        if entry is None:
            entry = self.entries[job] = Entry(record)
        elif entry.version == record.version:
            return
        else:
            if entry.definition != record.definition or entry.state.anchor != record.state.anchor:
                entry.definition, entry.timetable = record.definition, None
            entry.state, entry.version = record.state, record.version
        self._changed(entry)

    def versions(self) -> dict[str, int]:
        """Of the jobs as they are known here."""
        return {job: entry.version for job, entry in self.entries.items()}

    async def read_changes(self) -> None:
        """Take over what other processes have changed. Raises `StoreError`.

        What was written from here meanwhile is newer than what was read: versions rise, and none is used twice.
        """
        before = self.versions()
        versions = await self.store.versions()
        different = [job for job, version in versions.items() if before.get(job, 0) < version]
        for number, record in enumerate(await self.store.jobs(different) if different else ()):
            if number % ROUND == ROUND - 1:
                await asyncio.sleep(0)
            entry = self.entries.get(record.id)
            if entry is None or entry.version < record.version:
                self.refresh(record.id, record)
        for job, version in before.items():
            if job not in versions and (entry := self.entries.get(job)) is not None and entry.version == version:
                self.refresh(job, None)


def _at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run it to its end here and now: an instant store is never waited for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]
    coroutine.close()
    raise RuntimeError("a store that calls itself instant has to be waited for")


def _same(run: Run, other: Run) -> bool:
    return run.state is other.state and run.owner == other.owner and run.attempt == other.attempt


def _answer(intent: Intent, entry: Entry | None, written: Committed) -> None:
    try:
        answer = intent.done(entry, written)
    except Exception as error:
        _not_acted_on(intent, error)
    else:
        if intent.future is not None:
            _hear(intent.future, answer)


def _tell(intent: Intent, method: Callable[..., Any], *words: Any) -> None:
    try:
        answer = method(*words)
    except Exception as error:
        _not_acted_on(intent, error)
    else:
        if intent.future is not None:
            _hear(intent.future, answer)


def _hear(future: asyncio.Future[Any], answer: Any) -> None:
    if not future.done():
        future.set_result(answer)


def _not_acted_on(intent: Intent, error: Exception) -> None:
    """A mistake of ours: the others of the round are to hear their answers all the same."""
    logger.error("job %r: what was written was not acted on", intent.job, exc_info=error)
    intent.fail(error)
