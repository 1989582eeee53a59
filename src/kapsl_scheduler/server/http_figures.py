"""What the server has answered over HTTP, by route and status: counted by the door and by the application, read by
`/metrics`.

What is not here: what became of a model's requests, over whatever protocol (`server.service`).
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from starlette.types import Scope

__all__ = ["INFER_ROUTE", "NO_ROUTE", "HttpFigures"]

INFER_ROUTE: Final = "/v2/models/{model}/infer"
NO_ROUTE: Final = "(none)"
"""Where a request went that no route answers: its path is a stranger's own, and no label."""

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MOST: Final = 2000
"""Different answers that are counted apart. No set of routes comes near it; a route with names in it that nobody
thought of would."""
_OTHER: Final = ("(other)", "(other)", 0)


class HttpFigures:
    """Answers by method, route (its pattern, never a path) and status; `inferences` are those of the door, by
    status."""

    __slots__ = ("_answers", "inferences")

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str, int]] = Counter()
        self.inferences: Counter[int] = Counter()

    def answered(self, scope: Scope, status: int) -> None:
        """The application has answered a request."""
        route = getattr(scope.get("route"), "path", None)
        pattern = NO_ROUTE if route is None else scope.get("root_path", "") + route
        self.count(scope["method"], pattern, status)

    def count(self, method: str, route: str, status: int) -> None:
        """One answer more."""
        key = (method if method in _METHODS else "(other)", route, status)
        self._answers[key if key in self._answers or len(self._answers) < _MOST else _OTHER] += 1

    def answers(self) -> Counter[tuple[str, str, int]]:
        """All of them, those of the door among them."""
        door = {("POST", INFER_ROUTE, status): count for status, count in self.inferences.items()}
        return self._answers + Counter(door)
