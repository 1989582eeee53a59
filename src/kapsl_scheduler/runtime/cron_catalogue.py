"""Which jobs a CronScheduler has: registered one by one, together or by a package, replaced, removed; and what stored
ones wait for.

What is not here: what is written for each (`runtime.cron_changes`), names for callables (`runtime.cron_bindings`), the
form of a package (`packages.manifest`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, Final

import msgspec

from kapsl_scheduler.core.definition import Adapters, encode_job, frozen_request
from kapsl_scheduler.core.firing import Timetable
from kapsl_scheduler.core.jobs import CronJob
from kapsl_scheduler.errors import DuplicateId, EngineError, InvalidExpression, InvalidJob, NotFound, StoreError
from kapsl_scheduler.packages.manifest import CronJobDef, Manifest
from kapsl_scheduler.ports import is_source
from kapsl_scheduler.runtime.cron_bindings import Bindings
from kapsl_scheduler.runtime.cron_changes import Define, Remove
from kapsl_scheduler.runtime.cron_execution import nbytes
from kapsl_scheduler.runtime.cron_ledger import Entry, Ledger
from kapsl_scheduler.runtime.cron_manifest import declared_job
from kapsl_scheduler.runtime.cron_runs import AT_ONCE, Runs
from kapsl_scheduler.runtime.offload import in_thread
from kapsl_scheduler.types import ModelInfo

__all__ = ["Catalogue"]

LARGE: Final = 1 << 18
"""Bytes of a request from which on it is copied and written as text in a thread: half a millisecond."""


class Catalogue:
    """The jobs of one scheduler. `target` is what they fire into; `registered` are the ids that were registered here,
    which is a mistake to do twice."""

    def __init__(
        self, ledger: Ledger, runs: Runs, target: Any, adapters: Adapters | None, *, allow_latency_critical: bool
    ) -> None:
        self.registered: set[str] = set()
        self.bindings = Bindings(adapters, self._lacks if hasattr(target, "target") else None)
        self._ledger = ledger
        self._runs = runs
        self._target = target
        self._allow_critical = allow_latency_critical
        self._undo: dict[str, tuple[CronJob, bytes] | None] = {}  # jobs as they were before what is to be taken back
        self._undoing = asyncio.Lock()

    async def open(self) -> None:
        """Read what the store has. Raises `StoreError`."""
        for number, record in enumerate(await self._ledger.store.jobs()):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
            self._ledger.refresh(record.id, record)

    def entry(self, id: str) -> Entry:
        """Raises `NotFound`."""
        entry = self._ledger.entries.get(id)
        if entry is None:
            raise NotFound(f"no job {id!r}")
        return entry

    # ---------------------------------------------------------------------------------------- coming and going

    async def register(self, job: CronJob, *, refuse: bool) -> None:
        define = await self._define(job, refuse=refuse)
        await self._keep((job.id,))
        self._check_new(job.id)
        self.registered.add(job.id)
        try:
            await self._ledger.do(define)
        except BaseException:
            self.registered.discard(job.id)
            raise

    async def register_all(self, jobs: Iterable[CronJob], *, refuse: bool = False, own: Set[str] = frozenset()) -> None:
        """All or none. `own` are ids that may be registered already: those jobs are updated."""
        defines = await self._decided(jobs, refuse, own)
        await self._keep(defines)
        for id in defines.keys() - own:
            self._check_new(id)
        entries = self._ledger.entries
        before = {id: (entry.job, entry.definition) for id in defines if (entry := entries.get(id)) is not None}
        fresh = defines.keys() - self.registered
        self.registered.update(fresh)
        intents = list(defines.values())
        handed_in = 0
        try:
            while handed_in < len(intents):
                some = intents[handed_in : handed_in + AT_ONCE]
                handed_in += len(some)
                await self._ledger.do_all(some)
        except BaseException:
            self.registered.difference_update(fresh)
            for intent in intents[:handed_in]:
                id = intent.job
                job, definition = before.get(id, (None, b""))
                if id not in before:
                    self._undo[id] = None
                elif job is not None and definition != intent.definition:
                    self._undo[id] = job, definition
            try:
                with contextlib.suppress(StoreError):
                    await self._take_back()
            finally:  # cancelled again, perhaps
                if self._undo:
                    self._runs.see_to("", "take back", self._take_back)
            raise

    async def _decided(self, jobs: Iterable[CronJob], refuse: bool, own: Set[str]) -> dict[str, Define]:
        """What is to be written, if it can be. Raises `InvalidJob` with the faults of all."""
        faults: list[str] = []
        defines: dict[str, Define] = {}
        for number, job in enumerate(jobs):
            if number % AT_ONCE == AT_ONCE - 1:
                await asyncio.sleep(0)
            try:
                intent = await self._define(job, refuse=refuse)
            except (InvalidJob, InvalidExpression) as error:
                faults.append(str(error) if isinstance(error, InvalidJob) else f"job {job.id!r}: schedule: {error}")
                continue
            if job.id in defines or job.id not in own:
                self._check_new(job.id, defines)
            defines[job.id] = intent
            try:
                intent.decide(self._ledger.entries.get(job.id))
            except InvalidJob as error:
                faults.append(str(error))
        if faults:
            raise InvalidJob(faults)
        return defines

    async def _take_back(self) -> None:
        """Undo what is written of a registration that failed. Raises `StoreError`; then it is to be tried again."""
        async with self._undoing:
            while self._undo:
                id, before = next(iter(self._undo.items()))
                # Also what is not there: it may have been handed in, and be written before this is decided.
                if before is None:
                    await self.remove(id, cancel=True)
                else:
                    learn = functools.partial(self.bindings.learn_callables, before[0])
                    with contextlib.suppress(NotFound, InvalidJob):  # it is gone, or would never fire again
                        await self._ledger.do(Define(self._runs, *before, learn, known=True))
                del self._undo[id]

    async def _keep(self, ids: Iterable[str]) -> None:
        """These are registered again, and not taken back any more."""
        if self._undo:
            async with self._undoing:
                for id in ids:
                    self._undo.pop(id, None)

    async def update(self, job: CronJob) -> None:
        """Raises `NotFound`."""
        self.entry(job.id)
        define = await self._define(job, known=True)
        await self._keep((job.id,))
        await self._ledger.do(define)
        self.registered.add(job.id)

    async def remove(self, id: str, *, cancel: bool) -> bool:
        """Whether it was there."""
        try:
            await self._ledger.do(Remove(self._runs, id, cancel=cancel))
        except NotFound:
            return False
        self.registered.discard(id)
        return True

    def _check_new(self, id: str, also: Iterable[str] = ()) -> None:
        if id in self.registered or id in also:
            raise DuplicateId(f"a job {id!r} is registered already: update it, or unregister it first")

    async def _define(self, job: CronJob, *, refuse: bool = False, known: bool = False) -> Define:
        """To be written: the job as it will fire, and as it is stored. What it refers to by name is there."""
        checked = job.check(allow_latency_critical=self._allow_critical)
        if hasattr(self._target, "target"):
            if checked.model is None:
                raise InvalidJob(["model: expected the name of a model, got None"], checked.id)
        elif checked.model is not None:
            raise InvalidJob(["model: there is but one model here; leave it out"], checked.id)
        bound, missing = self.bindings.bind(checked, loaded=checked.package)
        if missing:
            raise InvalidJob(missing, checked.id)
        if callable(bound.request) or is_source(bound.request):
            definition = encode_job(checked)
        elif nbytes(bound.request) < LARGE:
            bound, definition = _kept(bound, checked)
        else:
            bound, definition = await in_thread(_kept, bound, checked)
        learn = functools.partial(self.bindings.learn, checked)
        return Define(self._runs, bound, definition, learn, refuse=refuse, known=known)

    # ------------------------------------------------------------------------------------------------ packages

    async def register_package(self, manifest: Manifest, model: str | None) -> None:
        package = manifest.project_name if model is None else model
        jobs = [self.declared(definition, model, package) for definition in manifest.cron_jobs]
        own = set(self._of_package(package))
        if strangers := [
            f"job {job.id!r}: id: a job that is not the package's has it"
            for job in jobs
            if job.id not in own and (entry := self._ledger.entries.get(job.id)) is not None and entry.job is not None
        ]:
            raise InvalidJob(strangers)
        packages = self.bindings.packages
        there_before = package in packages
        try:
            await self.register_all(jobs, own=own)
        except BaseException:
            if not there_before:
                packages.discard(package)
            raise
        packages.add(package)
        await self._remove_all(sorted(own - {job.id for job in jobs}), cancel=False)

    async def remove_package(self, package: str, *, cancel: bool) -> list[str]:
        """Their ids."""
        ids = self._of_package(package)
        await self._remove_all(ids, cancel=cancel)
        self.bindings.packages.discard(package)
        return ids

    async def _remove_all(self, ids: Sequence[str], *, cancel: bool) -> None:
        for id in ids:
            await self.remove(id, cancel=cancel)

    def _of_package(self, package: str) -> list[str]:
        entries = self._ledger.entries.values()
        return [entry.id for entry in entries if entry.job is not None and entry.job.package == package]

    def declared(self, definition: CronJobDef, model: str | None, package: str | None) -> CronJob:
        """The job that a package declares."""
        info: ModelInfo = self._runs.target(model).model_info()  # type: ignore[attr-defined]
        return declared_job(definition, info, model=model, package=package, allow_latency_critical=self._allow_critical)

    # ------------------------------------------------------------------------------------- what jobs wait for

    def bind(self, name: str, function: Callable[..., Any]) -> None:
        self.bindings.name(name, function)
        self._read_some([entry for entry in self._ledger.entries.values() if entry.unbound is not None])

    def look_again(self) -> None:
        """Models have come or gone."""
        again: list[Entry] = []
        for entry in self._ledger.entries.values():
            if entry.unbound is None and entry.job is not None and entry.job.model is not None:
                entry.unbound = self._lacks(entry.job.model)
            if entry.unbound is not None:
                again.append(entry)
        self._read_some(again)

    def _read_some(self, entries: list[Entry]) -> None:
        """Of many, others get the loop in between."""
        for entry in entries[:AT_ONCE]:
            if self._ledger.entries.get(entry.id) is entry:
                self.read(entry)
        if len(entries) > AT_ONCE:
            asyncio.get_running_loop().call_soon(self._read_some, entries[AT_ONCE:])

    def read(self, entry: Entry) -> None:
        """A job is not what it was: another process changed it, or what it refers to by name is there now."""
        if entry.timetable is None or entry.unbound is not None:
            entry.job, entry.unbound = self.bindings.read(entry.definition, allow_latency_critical=self._allow_critical)
            entry.timetable = None if entry.job is None else Timetable.of(entry.job, entry.state.anchor)
        self._runs.reschedule(entry)
        self._runs.room_for_waiting(entry)

    def gone(self, entry: Entry) -> None:
        """There is no such job any more."""
        self._runs.schedule(entry, None, None)
        self.registered.discard(entry.id)
        self.bindings.forget(entry.id)

    def _lacks(self, model: str) -> str | None:
        """Why jobs of a model cannot fire; None if they can."""
        try:
            self._target.target(model)
        except EngineError as error:
            return str(error)
        return None


def _kept(bound: CronJob, checked: CronJob) -> tuple[CronJob, bytes]:
    """The job with a request that nobody can change, and as text."""
    bound = msgspec.structs.replace(bound, request=frozen_request(bound.request))
    return bound, encode_job(msgspec.structs.replace(checked, request=bound.request))
