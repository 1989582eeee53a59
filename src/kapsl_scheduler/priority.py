"""The classes of requests, apart from the other nouns (`types`): those need numpy, and the command line starts fast."""

from __future__ import annotations

import enum
from typing import Any

__all__ = ["Priority"]


class Priority(enum.IntEnum):
    """The class of a request. Lower numbers are served first."""

    LATENCY_CRITICAL = 0
    THROUGHPUT = 1
    BACKGROUND = 2

    @classmethod
    def of(cls, value: Any) -> Priority:
        """The class that a value names: a member, its number, or its name in any case. Raises `ValueError`."""
        try:
            return cls[value.upper()] if isinstance(value, str) else cls(value)
        except (KeyError, ValueError):
            known = ", ".join(f"{priority.value} ({priority.name})" for priority in cls)
            raise ValueError(f"expected one of {known}, got {value!r}") from None
