"""The one writer of a CronScheduler's jobs and runs: decisions in, transactions out.

Whoever wants something changed hands in an `Intent`. Intents are decided one after another on the jobs as this process
knows them, and what they decided in one round is one batch for the store. Where the store says that another process was
faster, the job is read again and the intent decides anew, so that it may be asked more than once and must not act
before it hears `done`. What is not here: what is decided (`core.firing`, `runtime.cron_intents`), running anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from kapsl_scheduler.core.firing import Timetable
from kapsl_scheduler.core.jobs import CronJob
from kapsl_scheduler.core.runs import Change, JobRecord, Run
from kapsl_scheduler.errors import CronError, StoreError
from kapsl_scheduler.ports import Committed, Exists, JobStore, Stale

__all__ = ["Draft", "Entry", "Intent", "Ledger"]

logger = logging.getLogger(__name__)

ROUND: Final = 128
"""Intents that are decided before others get the loop: one or two milliseconds."""
RETRY_FIRST: Final = 0.2
RETRY_MOST: Final = 2.0
"""Seconds between attempts to write, from the first to the longest wait, while the store fails."""


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


class Draft:
    """What the intents of one round want of one job; `state` is None where there is no such job."""

    __slots__ = (
        "created",
        "definition",
        "entry",
        "expected",
        "intents",
        "job",
        "memory",
        "remove",
        "state",
        "taken_from",
        "updated",
    )

    def __init__(self, job: str, entry: Entry | None) -> None:
        self.job = job
        self.entry = entry
        self.intents: list[Intent] = []
        self.expected: int | None = 0 if entry is None else entry.version
        self.state = None if entry is None else entry.state
        self.definition: bytes | None = None
        self.remove = False
        self.created: tuple[Run, ...] = ()
        self.updated: tuple[Run, ...] = ()
        self.taken_from: str | None = None
        self.memory: Mapping[str, str | None] = {}

    def change(self) -> Change | None:
        """None where nothing is to be written."""
        before = None if self.entry is None else self.entry.state
        state = self.state if self.state is not before or self.definition is not None else None
        if state is None and not (self.remove or self.created or self.updated or self.memory):
            return None
        return Change(
            job=self.job,
            expected=self.expected,
            state=state,
            definition=self.definition,
            remove=self.remove,
            created=self.created,
            updated=self.updated,
            taken_from=self.taken_from,
            memory=self.memory,
        )


class Intent:
    """Something that is to be decided and written about one job.

    `alone` intents share no transaction part with others of their job. `lasting` intents are kept and tried again while
    the store fails; others fail with it.
    """

    __slots__ = ("future", "job")

    alone = False
    lasting = False

    def __init__(self, job: str) -> None:
        self.job = job
        self.future: asyncio.Future[Any] | None = None

    def decide(self, draft: Draft) -> None:
        """Put into the draft what is to be written. Raises `CronError` for what cannot be, having put in nothing."""
        raise NotImplementedError

    def done(self, entry: Entry | None, numbers: Sequence[int]) -> Any:
        """It is written: `entry` is the job now, `numbers` are those of all runs that the draft created. Returns what
        whoever waits is to hear."""

    def refused(self) -> Any:
        """A run of which it wanted to write the end has ended already, or is another's: nothing was written."""

    def exists(self, run: Run) -> Any:
        """A run that it wanted to create is there: nothing was written."""

    def fail(self, error: Exception) -> None:
        """Tell whoever waits."""
        if self.future is not None and not self.future.done():
            self.future.set_exception(error)


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
        self._apart: set[str] = set()  # jobs of which only one intent goes into a round
        self._writing = False
        self._sleeper: asyncio.Future[None] | None = None  # of `serve`, while there is nothing to write
        self._waiters: list[asyncio.Future[None]] = []  # until nothing is left to write

    # ---------------------------------------------------------------------------------------- handing in

    async def do(self, intent: Intent) -> Any:
        """Have it decided and written. Returns what it says; raises what it raises, and `StoreError`.

        Cancelling the await leaves it in: it may be written nevertheless.
        """
        future = intent.future = asyncio.get_running_loop().create_future()
        await self.settle(intent)
        return await future

    async def settle(self, *intents: Intent) -> None:
        """Hand them in, and write here and now what was handed in, if that takes no wait; else `serve` will."""
        if not self.store.instant or self._writing:
            for intent in intents:
                self.post(intent)
            return
        self._queue.extend(intents)
        if self._queue:
            await self._write_all()  # it does not suspend: no other task sees it half done

    def post(self, intent: Intent) -> None:
        """Hand it in and go on."""
        self._queue.append(intent)
        self._wake()

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
        """Write what is handed in, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            if self._writing or not self._queue:
                self._sleeper = loop.create_future()
                await self._sleeper
                self._sleeper = None
            else:
                await self._write_all(gently=True)

    async def _write_all(self, *, gently: bool = False) -> None:
        """All that is in the queue; if `gently`, others get the loop between two rounds."""
        self._writing = True
        wait = RETRY_FIRST
        try:
            while self._queue:
                try:
                    await self._round()
                except StoreError as error:
                    if self.failing is None:
                        logger.error("the store of the cron jobs fails, it is tried again: %s", error)
                    self.failing = error
                    await asyncio.sleep(wait if self._queue else 0)
                    wait = min(wait * 2, RETRY_MOST)
                else:
                    if self.failing is not None:
                        logger.warning("the store of the cron jobs works again")
                        self.failing, wait = None, RETRY_FIRST
                    if gently and self._queue:
                        await asyncio.sleep(0)
        finally:
            self._writing = False
            if self._queue:
                self._wake()
            elif self._waiters:
                self._release()

    async def _round(self) -> None:
        drafts: list[Draft] = []
        changes: list[Change] = []
        for draft in self._decided():
            if (change := draft.change()) is not None:
                drafts.append(draft)
                changes.append(change)
            else:
                _answer(draft, draft.entry, ())
        if not changes:
            return
        try:
            results = await self.store.commit(changes)
        except StoreError as error:
            lasting = [intent for draft in drafts for intent in draft.intents if intent.lasting]
            self._queue.extendleft(reversed(lasting))
            for draft in drafts:
                for intent in draft.intents:
                    if not intent.lasting:
                        intent.fail(error)
            raise
        for draft, result in zip(drafts, results, strict=True):
            if isinstance(result, Committed):
                self._committed(draft, result)
            else:
                self._queue.extendleft(reversed(self._again(draft, result)))

    def _decided(self) -> Iterable[Draft]:
        """Ask the intents of the queue: of each job those that can go together. The rest stays in the queue."""
        drafts: dict[str, Draft] = {}
        full: set[str] = set()  # jobs of which no more goes into this round
        later: list[Intent] = []
        for _ in range(min(len(self._queue), ROUND)):
            intent = self._queue.popleft()
            job = intent.job
            draft = drafts.get(job)
            if draft is None:
                draft = drafts[job] = Draft(job, self.entries.get(job))
            elif job in full or (draft.intents and (intent.alone or draft.intents[-1].alone or job in self._apart)):
                full.add(job)  # none may overtake another
                later.append(intent)
                continue
            try:
                intent.decide(draft)
            except Exception as error:
                if not isinstance(error, CronError):
                    logger.exception("job %r: a change could not be decided", job)
                intent.fail(error)
            else:
                draft.intents.append(intent)
        self._queue.extendleft(reversed(later))
        return drafts.values()

    def _committed(self, draft: Draft, result: Committed) -> None:
        if self._apart:
            self._apart.discard(draft.job)
        entry = draft.entry
        if draft.remove:
            if entry is not None and self.entries.pop(draft.job, None) is not None:
                self._gone(entry)
            entry = None
        elif result.version and draft.state is not None:
            if entry is None:
                assert draft.definition is not None
                entry = Entry(JobRecord(draft.job, draft.definition, draft.state, result.version))
                self.entries[draft.job] = entry
            entry.state, entry.version = draft.state, result.version
            if draft.definition is not None:
                entry.definition = draft.definition
        _answer(draft, entry, result.numbers)

    def _again(self, draft: Draft, result: Stale | Exists) -> list[Intent]:
        """Nothing of the draft was written. What is to be decided again; the rest is told."""
        job, intents = draft.job, draft.intents
        if len(intents) > 1:
            self._apart.add(job)  # find out which of them it was
            if isinstance(result, Stale):
                self.refresh(job, result.record)
            return intents
        self._apart.discard(job)
        (intent,) = intents
        if isinstance(result, Exists):
            _tell(intent, intent.exists, result.run)
            return []
        record = result.record
        if draft.expected is None or draft.expected == (0 if record is None else record.version):
            _tell(intent, intent.refused)
            return []
        self.refresh(job, record)
        return intents

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
            if entry.definition != record.definition:
                entry.definition, entry.timetable = record.definition, None
            entry.state, entry.version = record.state, record.version
        self._changed(entry)

    async def read_changes(self) -> None:
        """Take over what other processes have changed. Raises `StoreError`."""
        versions = await self.store.versions()
        different = [
            job
            for job, version in versions.items()
            if (entry := self.entries.get(job)) is None or entry.version != version
        ]
        records = {record.id: record for record in await self.store.jobs(different)} if different else {}
        different.extend([job for job in self.entries if job not in versions])
        if self._writing or self._queue:
            return  # what is being written meanwhile is newer; the next look will do
        for job in different:
            self.refresh(job, records.get(job))


def _answer(draft: Draft, entry: Entry | None, numbers: Sequence[int]) -> None:
    for intent in draft.intents:
        try:
            answer = intent.done(entry, numbers)
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
