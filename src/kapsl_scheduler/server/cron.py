"""Jobs over HTTP: the routes under `/v2/cron`, over a `CronScheduler`.

What is not here: the form of a job (`core.definition`), the table from error to status (`server.http`), events
(`server.event_stream`).
"""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Annotated, Any, Final, TypeVar
from urllib.parse import unquote

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.core.admission import Admission
from kapsl_scheduler.core.cron import CronExpression
from kapsl_scheduler.core.jobs import CronJob, Named
from kapsl_scheduler.core.runs import RunState
from kapsl_scheduler.errors import EngineError, InvalidExpression, InvalidInput, InvalidJob, ModelNotLoaded
from kapsl_scheduler.ports import is_source
from kapsl_scheduler.runtime.cron_metrics import CronStatistics
from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.runtime.cron_views import CronJobInfo, CronRun
from kapsl_scheduler.runtime.registry import ModelRegistry
from kapsl_scheduler.server.answers import json_response
from kapsl_scheduler.server.bodies import LONG_BODY, beside_the_loop, read_body
from kapsl_scheduler.server.event_stream import EventStreams
from kapsl_scheduler.types import InferenceRequest, ModelInfo

__all__ = ["NO_JOBS", "CronApi", "misfit"]

Asked = TypeVar("Asked", bound=msgspec.Struct)

NO_JOBS: Final = {"/v2/cron/": "this server runs no jobs: it was started with --no-cron"}
"""What `HttpApi` is to say where there is no `CronApi`."""

_JOBS: Final = "/v2/cron/jobs/"
_PAGE: Final = 100
_MOST: Final = 1000  # items of a page, times of a preview
_DEFINITION_BYTES: Final = 16 << 20
_ORDER_BYTES: Final = 64 << 10  # bodies that say what to do with a job say next to nothing


class _Pause(msgspec.Struct, forbid_unknown_fields=True):
    reason: str = ""


class _Resume(msgspec.Struct, forbid_unknown_fields=True):
    catch_up: bool = False


class _Trigger(msgspec.Struct, forbid_unknown_fields=True):
    origin: str | None = None


class _Backfill(msgspec.Struct, forbid_unknown_fields=True):
    start: dt.datetime
    end: dt.datetime
    concurrency: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 1
    origin: str | None = None


class CronApi:
    """The routes of a scheduler's jobs. `check_open` raises while the server is closing: then nothing is changed."""

    def __init__(
        self,
        cron: CronScheduler,
        models: ModelRegistry[Any],
        check_open: Callable[[], None],
        *,
        max_body_bytes: int,
    ) -> None:
        self._cron = cron
        self._models = models
        self._check_open = check_open
        self._definition_bytes = min(_DEFINITION_BYTES, max_body_bytes)
        self._order_bytes = min(_ORDER_BYTES, max_body_bytes)
        self._streams = EventStreams(cron.events)
        self._of_job: Mapping[str, Mapping[str, Callable[[Request, str], Awaitable[Response]]]] = {
            "": {"GET": self._show, "PUT": self._put, "DELETE": self._delete},
            "pause": {"POST": self._pause},
            "resume": {"POST": self._resume},
            "trigger": {"POST": self._trigger},
            "backfill": {"POST": self._backfill},
            "preview": {"GET": self._preview},
            "runs": {"GET": self._history},
        }

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v2/cron/jobs", self._list),
            Route(_JOBS + "{rest:path}", self._job, methods=["GET", "PUT", "DELETE", "POST"]),
            Route("/v2/cron/runs", self._all_runs),
            Route("/v2/cron/runs/{number}", self._run),
            Route("/v2/cron/events", self._events),
            Route("/v2/cron/statistics", self._statistics),
            Route("/v2/cron/compact", self._compact, methods=["POST"]),
            Route("/v2/cron/explain", self._explain),
        ]

    async def _job(self, request: Request) -> Response:
        """Everything about one job. Its id is taken from the path as it came: one with a slash in it stays whole."""
        raw: bytes = request.scope.get("raw_path") or request.scope["path"].encode()
        encoded, _, action = raw.partition(_JOBS.encode())[2].decode("ascii", "replace").partition("/")
        methods = self._of_job.get(action)
        if methods is None or not encoded:
            raise HTTPException(404)
        handle = methods.get("GET" if request.method == "HEAD" else request.method)
        if handle is None:
            raise HTTPException(405, headers={"allow": ", ".join(methods)})
        if request.method not in ("GET", "HEAD"):
            self._check_open()
        return await handle(request, unquote(encoded))

    # ---------------------------------------------------------------------------------------------- jobs

    async def _list(self, request: Request) -> Response:
        query = _Query(request, "limit", "after")
        limit = query.number("limit", _PAGE, _MOST)
        found = await self._cron.list_jobs(after=query.text("after"), limit=limit + 1)
        page = found[:limit]
        return json_response(
            {"jobs": [_info(info) for info in page], "next": page[-1].id if len(found) > limit else None}
        )

    async def _show(self, request: Request, id: str) -> Response:
        _Query(request)
        definition = self._cron.definition(id)
        return self._shown(await self._cron.job_info(id), definition=msgspec.Raw(definition))

    async def _put(self, request: Request, id: str) -> Response:
        _Query(request)
        body = await read_body(request.scope, request.receive, self._definition_bytes)
        job = await beside_the_loop(len(body) > LONG_BODY, self._described, body, id)
        if job.model is None and len(loaded := self._models.list()) == 1:
            job = msgspec.structs.replace(job, model=loaded[0].name)
        self._check(job)
        self._check_open()  # it may have begun to close while the body came
        if await self._cron.job_info(id) is None:
            await self._cron.register(job)
            return self._shown(await self._cron.job_info(id), 201)
        return self._shown(await self._cron.update(job))

    def _described(self, body: bytes, id: str) -> CronJob:
        keys = _decode(body, dict[str, Any])
        if keys.setdefault("id", id) != id:
            raise InvalidJob([f"id: expected {id!r}, which the path names, or none, got {keys['id']!r}"], id)
        return self._cron.parse(msgspec.json.encode(keys))

    def _check(self, job: CronJob) -> None:
        """Raises `InvalidJob` with everything that is wrong with a job, as far as that can be said beforehand."""
        faults: list[str] = []
        wrong: InvalidExpression | None = None
        try:
            job.check(allow_latency_critical=self._cron.allow_latency_critical)
        except InvalidJob as error:
            faults += error.faults
        except InvalidExpression as error:
            wrong = error
            faults.append(f"schedule: {error}")
        if job.package is not None and job.package != self._package_of(job.id):
            faults.append(f"package: jobs come with a package when it is loaded, got {job.package!r}")
        if job.model is None:
            faults.append("model: expected the name of a model, got none")
        else:
            try:
                faults += misfit(job.request, self._models.get(job.model).info)
            except ModelNotLoaded as error:
                faults.append(f"model: {error}")
        if wrong is not None and len(faults) == 1:
            raise wrong
        if faults:
            raise InvalidJob(faults, job.id)

    def _package_of(self, id: str) -> str | None:
        """The package that a job has come with."""
        try:
            return self._cron.job(id).package
        except (LookupError, InvalidJob):
            return None

    async def _delete(self, request: Request, id: str) -> Response:
        cancel = _Query(request, "cancel").flag("cancel")
        self._cron.definition(id)  # says so if there is none
        await self._cron.unregister(id, cancel=cancel)
        return json_response({"id": id, "removed": True})

    async def _pause(self, request: Request, id: str) -> Response:
        order = await self._order(request, _Pause)
        return self._shown(await self._cron.pause(id, reason=order.reason))

    async def _resume(self, request: Request, id: str) -> Response:
        order = await self._order(request, _Resume)
        return self._shown(await self._cron.resume(id, catch_up=order.catch_up))

    async def _trigger(self, request: Request, id: str) -> Response:
        order = await self._order(request, _Trigger)
        return json_response(_run(await self._cron.trigger(id, origin=order.origin)))

    async def _backfill(self, request: Request, id: str) -> Response:
        order = await self._order(request, _Backfill)
        origin, runs = await self._cron.backfill(
            id, order.start, order.end, concurrency=order.concurrency, origin=order.origin
        )
        return json_response({"origin": origin, "runs": runs})

    async def _preview(self, request: Request, id: str) -> Response:
        number = _Query(request, "n").number("n", 5, _MOST)
        return json_response({"id": id, "next": self._cron.preview(id, number)})

    async def _order(self, request: Request, kind: type[Asked]) -> Asked:
        _Query(request)
        body = await read_body(request.scope, request.receive, self._order_bytes)
        order: Asked = _decode(body or b"{}", kind)
        return order

    def _shown(self, info: CronJobInfo | None, status: int = 200, **more: Any) -> Response:
        assert info is not None
        return json_response(_info(info) | more, status)

    # ---------------------------------------------------------------------------------------------- runs

    async def _all_runs(self, request: Request) -> Response:
        return await self._history(request, None)

    async def _history(self, request: Request, id: str | None) -> Response:
        query = _Query(request, "limit", "before", "state", "origin")
        limit = query.number("limit", _PAGE, _MOST)
        found = await self._cron.runs(
            id,
            limit=limit + 1,
            before=query.number("before", 0, sys.maxsize) or None,
            states=query.states("state"),
            origin=query.text("origin") or None,
        )
        if id is not None and not found:
            self._cron.definition(id)  # a job that is gone has its history; one that never was has none
        page = found[:limit]
        return json_response(
            {"runs": [_run(run) for run in page], "next": page[-1].number if len(found) > limit else None}
        )

    async def _run(self, request: Request) -> Response:
        _Query(request)
        text = request.path_params["number"]
        return json_response(_run(await self._cron.run(_number("the run's number", text, 1, sys.maxsize))))

    # ---------------------------------------------------------------------------------------- the scheduler

    async def _events(self, request: Request) -> Response:
        _Query(request)
        return await self._streams.open()

    async def _statistics(self, request: Request) -> Response:
        _Query(request)
        return json_response(_statistics(self._cron.statistics()))

    async def _compact(self, request: Request) -> Response:
        _Query(request)
        self._check_open()
        await self._cron.compact()
        return json_response({"compacted": True})

    async def _explain(self, request: Request) -> Response:
        query = _Query(request, "expression", "tz", "n", "after")
        expression = CronExpression(query.text("expression"), query.text("tz") or "UTC")
        number = query.number("n", 5, _MOST)
        moment = query.moment("after") or dt.datetime.now(dt.UTC)
        times: list[dt.datetime] = []
        for time in expression.iter(moment):
            times.append(time)
            if len(times) == number:
                break
        return json_response(
            {
                "expression": expression.text,
                "tz": expression.tz_name,
                "description": expression.explain(),
                "next": [{"utc": time.astimezone(dt.UTC), "local": time} for time in times],
            }
        )


# ----------------------------------------------------------------------------------------------- values out


def _info(info: CronJobInfo) -> dict[str, Any]:
    return msgspec.structs.asdict(info) | {"priority": info.priority.name.lower()}


def _run(run: CronRun) -> dict[str, Any]:
    return msgspec.structs.asdict(run)


def _statistics(statistics: CronStatistics) -> dict[str, Any]:
    def listed(outcomes: Mapping[tuple[str, str], int]) -> list[dict[str, Any]]:
        return [
            {"state": state, "reason": reason, "count": count} for (state, reason), count in sorted(outcomes.items())
        ]

    return msgspec.structs.asdict(statistics) | {
        "outcomes": listed(statistics.outcomes),
        "outcomes_by_job": {job: listed(outcomes) for job, outcomes in statistics.outcomes_by_job.items()},
    }


def misfit(request: Any, info: ModelInfo) -> list[str]:
    """Why a model would refuse what a job sends it each time; nothing where that is made anew by each firing."""
    if isinstance(request, InferenceRequest):
        request = request.inputs
    made_anew = callable(request) or isinstance(request, Named) or is_source(request)
    if request is None or made_anew or not info.inputs:
        return []
    try:
        Admission(info, sys.maxsize).admit(request)
    except EngineError as error:
        return [f"request: {error}"]
    return []


# ------------------------------------------------------------------------------------------------ values in


def _decode(body: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the request body: {error}") from None


def _number(name: str, text: str, least: int, most: int) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 20 and least <= (number := int(text)) <= most:
        return number
    raise InvalidInput(f"{name}: expected an integer from {least} to {most}, got {text!r}")


class _Query:
    """The parameters of a URL's query; `known` are those that may be there. Everything raises `InvalidInput`."""

    def __init__(self, request: Request, *known: str) -> None:
        self._values = request.query_params
        for name in self._values:
            if name not in known:
                expected = f"one of {', '.join(known)}" if known else "none"
                raise InvalidInput(f"there is no query parameter {name!r}, expected {expected}")

    def text(self, name: str) -> str:
        """The value; empty without one."""
        return self._values.get(name, "")

    def number(self, name: str, default: int, most: int) -> int:
        text = self._values.get(name)
        return default if text is None else _number(name, text, 1, most)

    def flag(self, name: str) -> bool:
        text = self.text(name).lower() or "false"
        if text not in ("true", "false"):
            raise InvalidInput(f"{name}: expected true or false, got {text!r}")
        return text == "true"

    def states(self, name: str) -> list[RunState]:
        """States that are listed with commas, or one by one."""
        words = [word for value in self._values.getlist(name) for word in value.split(",") if word]
        known = {state.value: state for state in RunState}
        for word in words:
            if word not in known:
                raise InvalidInput(f"{name}: expected one of {', '.join(known)}, got {word!r}")
        return [known[word] for word in words]

    def moment(self, name: str) -> dt.datetime | None:
        text = self.text(name)
        if not text:
            return None
        try:
            moment = msgspec.convert(text, dt.datetime)
        except msgspec.ValidationError:
            moment = None
        if moment is None or moment.tzinfo is None:
            raise InvalidInput(f"{name}: expected a moment as 2026-03-29T01:00:00Z, got {text!r}")
        return moment
