"""Who asked for what, and what became of it: a line of JSON for each request, without what was in it.

`kapsl_scheduler.audit` has what changes something, always; `kapsl_scheduler.access` everything, where that is wanted.
"""

from __future__ import annotations

import logging
import time
from typing import Final

import msgspec

__all__ = ["ACCESS", "AUDIT", "log_request"]

AUDIT: Final = logging.getLogger("kapsl_scheduler.audit")
ACCESS: Final = logging.getLogger("kapsl_scheduler.access")

_LONGEST: Final = 500
"""Characters of a path that are told."""


def log_request(log: logging.Logger, who: str, method: str, path: str, status: int, begun: float) -> None:
    """`who` is the name of a token, empty where nobody said; `begun` a moment of `time.perf_counter`."""
    if log.isEnabledFor(logging.INFO):
        line = {
            "who": who,
            "method": method,
            "path": path[:_LONGEST],
            "status": status,
            "ms": round((time.perf_counter() - begun) * 1e3, 3),
        }
        log.info("%s", msgspec.json.encode(line).decode())
