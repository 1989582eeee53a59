"""What sinks have their job remember: how far each run's results are in safety."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from typing import Final

import msgspec

from kapsl_scheduler.core.runs import Firing

__all__ = ["Mark", "Remembered", "compact"]

_PREFIX: Final = "sink:"
_RUNS: Final = 100
"""The most runs that a job's sink remembers, the newest: more than are open at a time."""


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a run has come: `at` counts what the sink counts (bytes, parts, items), in what is at `path`."""

    at: int
    path: str = ""


def compact(nominal: dt.datetime) -> str:
    """The time in UTC as it may stand in a file's name: 20261125T030000Z, with a fraction if it has one."""
    utc = nominal.astimezone(dt.UTC)
    fraction = f".{utc.microsecond:06}" if utc.microsecond else ""
    return f"{utc:%Y%m%dT%H%M%S}{fraction}Z"


class Remembered:
    """The part of a job's memory that is about one run."""

    def __init__(self, memory: Mapping[str, str], firing: Firing) -> None:
        self._key = f"{_PREFIX}{compact(firing.nominal)}:{firing.origin}"
        known = sorted(key for key in memory if key.startswith(_PREFIX) and key != self._key)
        self._stale: dict[str, str | None] = dict.fromkeys(known[: max(0, len(known) + 1 - _RUNS)])
        self._others = [mark for key in known if (mark := _read(memory[key])) is not None]
        self._mark = _read(memory[self._key]) if firing.attempt > 1 and self._key in memory else None

    @property
    def mark(self) -> Mark | None:
        """Where the attempts before this one got, behind which all is to be done again. None if nothing is known, or if
        another run has gone on behind it at the same place: then nothing may be taken away."""
        mark = self._mark
        if mark is None or any(other.path == mark.path and other.at > mark.at for other in self._others):
            return None
        return mark

    @property
    def at(self) -> int:
        """How far the attempts before this one got."""
        return 0 if self._mark is None else self._mark.at

    def reached(self, at: int, path: str = "") -> dict[str, str | None]:
        """What is to be remembered now."""
        marks = {**self._stale, self._key: msgspec.json.encode(Mark(at, path)).decode()}
        self._stale = {}
        return marks


def _read(text: str) -> Mark | None:
    try:
        return msgspec.json.decode(text, type=Mark)
    except msgspec.MsgspecError:
        return None
