"""What sinks have their job remember: how far each run's results are in safety."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from kapsl_scheduler.core.runs import Firing

__all__ = ["Mark", "Remembered"]

_PREFIX: Final = "sink:"


class Mark(msgspec.Struct, frozen=True, omit_defaults=True):
    """How far a run has come: `at` counts what the sink counts (bytes, parts, items), in what is at `path`."""

    at: int
    path: str = ""


class Remembered:
    """The part of a job's memory that is about one run. What is there of runs that have ended is forgotten on the way,
    but for a mark behind which an open run must not take anything away."""

    def __init__(self, memory: Mapping[str, str], firing: Firing) -> None:
        self._key = _PREFIX + firing.key
        others = {key: _read(text) for key, text in memory.items() if key.startswith(_PREFIX) and key != self._key}
        self._furthest: dict[str, int] = {}
        for mark in others.values():
            if mark is not None:
                self._furthest[mark.path] = max(mark.at, self._furthest.get(mark.path, 0))
        ended = {key for key in others if key.removeprefix(_PREFIX) in firing.ended}
        passed = {mark.path for key, mark in others.items() if key not in ended and mark and self._is_passed(mark)}
        self._stale: dict[str, str | None] = {
            key: None
            for key in sorted(ended)
            if (mark := others[key]) is None or mark.path not in passed or self._is_passed(mark)
        }
        self._mark = _read(memory[self._key]) if firing.attempt > 1 and self._key in memory else None

    def _is_passed(self, mark: Mark) -> bool:
        """Whether another run has gone on behind it at the same place."""
        return mark.path != "" and mark.at < self._furthest.get(mark.path, 0)

    @property
    def mark(self) -> Mark | None:
        """Where the attempts before this one got, behind which all is to be done again. None if nothing is known, or if
        another run has gone on behind it at the same place: then nothing may be taken away."""
        return None if self._mark is None or self._is_passed(self._mark) else self._mark

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
