"""`/debug`: what the process is doing right now, as JSON, for somebody who has to find out why it does not.

For admins only: it names jobs, models, paths and peers. Who may ask is decided in front of it (access control has its
route in its table). It shows no payload of a request and no secret of the configuration; of threads and tasks it shows
where they are, and none of their values.

What is not here: figures over time (`server.metrics`).
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import FrameType
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.runtime.cron_scheduler import CronScheduler
from kapsl_scheduler.server.answers import json_response
from kapsl_scheduler.server.service import Service

__all__ = ["DebugApi", "without_secrets"]

_MOST: Final = 1000
"""Tasks and connections that are shown one by one."""
_DEEPEST: Final = 50
_HIDDEN: Final = "(hidden)"
_SECRET: Final = re.compile(r"token|secret|password|passphrase|credential|api_?key|private|header", re.IGNORECASE)
_IN_URL: Final = re.compile(r"(?<=://)[^/?#\s]+(?=@)|(?<=\?)[^\s#]+")  # a user and a password; a query
_PACKAGES: Final = (
    "kapsl-scheduler",
    "numpy",
    "msgspec",
    "onnxruntime",
    "starlette",
    "uvicorn",
    "uvloop",
    "httptools",
    "prometheus-client",
    "opentelemetry-sdk",
    "grpcio",
)


class DebugApi:
    """The route over a service. `config` is what was configured, as plain values; `connections` are the HTTP
    connections that are open (uvicorn's protocols)."""

    def __init__(
        self,
        service: Service,
        cron: CronScheduler | None,
        config: Mapping[str, Any],
        connections: Callable[[], Iterable[Any]],
    ) -> None:
        self._service = service
        self._cron = cron
        self._config = without_secrets(config)
        self._connections = connections
        self._started = time.monotonic()

    def routes(self) -> list[BaseRoute]:
        return [Route("/debug", self._dump)]

    async def _dump(self, request: Request) -> Response:
        service, cron = self._service, self._cron
        tasks = list(asyncio.all_tasks())
        connections = list(self._connections())
        return json_response(
            {
                "versions": _versions(),
                "process": {
                    "pid": os.getpid(),
                    "seconds": time.monotonic() - self._started,
                    "threads": threading.active_count(),
                    "loop": type(asyncio.get_running_loop()).__module__,
                },
                "service": {
                    "ready": service.ready(),
                    "draining": service.draining,
                    "in_flight": service.in_flight,
                    "max_in_flight": service.max_in_flight,
                    "refused": service.refused,
                },
                "models": [
                    {
                        "name": model.name,
                        "version": model.info.version,
                        "repr": repr(model.scheduler),
                        "health": model.scheduler.health(),
                        "statistics": model.scheduler.statistics(),
                    }
                    for model in service.registry.list()
                ],
                "cron": None if cron is None else {"repr": repr(cron), "statistics": _figures(cron)},
                "config": self._config,
                "tasks": {"number": len(tasks), "shown": [_task(task) for task in tasks[:_MOST]]},
                "threads": _threads(),
                "connections": {
                    "number": len(connections),
                    "shown": [_connection(connection) for connection in connections[:_MOST]],
                },
            }
        )


def without_secrets(value: Any) -> Any:
    """Plain values without those whose names say that they are nobody's business; without users and queries in URLs."""
    if isinstance(value, Mapping):
        return {
            key: _HIDDEN if each and _SECRET.search(str(key)) else without_secrets(each) for key, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(each) for each in value]
    if isinstance(value, str):
        return _IN_URL.sub(_HIDDEN, value) if "://" in value else value
    return value


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "system": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _figures(cron: CronScheduler) -> dict[str, Any]:
    """Those of all jobs together: those of each have their own routes, and JSON has no pairs for keys."""
    figures: dict[str, Any] = msgspec.structs.asdict(cron.statistics())
    figures["outcomes"] = [
        {"state": state, "reason": reason, "count": count} for (state, reason), count in figures["outcomes"].items()
    ]
    return {name: value for name, value in figures.items() if not name.endswith("_by_job")}


def _task(task: asyncio.Task[Any]) -> dict[str, Any]:
    coroutine: Any = task.get_coro()
    return {
        "name": task.get_name(),
        "coroutine": getattr(coroutine, "__qualname__", type(coroutine).__name__),
        "stack": [_place(frame, frame.f_lineno) for frame in task.get_stack(limit=_DEEPEST)],
    }


def _threads() -> list[dict[str, Any]]:
    frames = sys._current_frames()
    return [
        {
            "name": thread.name,
            "daemon": thread.daemon,
            "stack": [_place(frame, line) for frame, line in _stack(frames.get(thread.ident or 0))],
        }
        for thread in threading.enumerate()
    ]


def _stack(frame: FrameType | None) -> list[tuple[FrameType, int]]:
    """From the call that the thread is in outwards."""
    walked = [] if frame is None else list(traceback.walk_stack(frame))
    return walked[:_DEEPEST]


def _place(frame: FrameType, line: int) -> str:
    code = frame.f_code
    return f"{code.co_filename}:{line} {code.co_qualname}"


def _connection(connection: Any) -> dict[str, Any]:
    client = getattr(connection, "client", None)
    cycle = getattr(connection, "cycle", None)
    return {
        "client": None if client is None else f"{client[0]}:{client[1]}",
        "busy": cycle is not None and not cycle.response_complete,
        "waiting": len(getattr(connection, "pipeline", ())),
    }
