"""The names that a running server has, for the shell that completes them: quick or not at all, and silent.

This is asked at each press of a key. So it goes by the standard library's client and not by ours, which takes numpy and
an event loop along, and it gives up soon. What is not here: the shells (`cli_completion`).
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Final

from kapsl_scheduler.config import TOKEN_VARIABLE

if TYPE_CHECKING:
    import click

__all__ = ["DEFAULT_URL", "complete_job", "complete_model"]

DEFAULT_URL: Final = "http://127.0.0.1:8080"
_PATIENCE: Final = 0.5  # seconds


def complete_model(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The served models whose names begin so."""
    found = _asked(context, "POST", "/v2/repository/index") or []
    return sorted({entry["name"] for entry in found if entry["name"].startswith(incomplete)})


def complete_job(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """The jobs whose ids begin so: of the first thousand."""
    found = _asked(context, "GET", "/v2/cron/jobs?limit=1000") or {"jobs": []}
    return [job["id"] for job in found["jobs"] if job["id"].startswith(incomplete)]


def _asked(context: click.Context, method: str, path: str) -> Any:
    """What the server answers, None where it does not, or not with what was asked for."""
    import http.client
    from urllib.parse import urlsplit

    url = context.params.get("url") or DEFAULT_URL
    token = os.environ.get(TOKEN_VARIABLE)
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=_PATIENCE)
        try:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            connection.request(method, parts.path.rstrip("/") + path, b"{}" if method == "POST" else None, headers)
            answer = connection.getresponse()
            return json.loads(answer.read()) if answer.status == 200 else None
        finally:
            connection.close()
    except (OSError, ValueError, http.client.HTTPException):
        return None
