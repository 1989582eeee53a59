"""The dashboard's pages and files: one page for every view's URL, and what it consists of, from memory.

Every file has an address with the digest of all of them in it, so that browsers may keep it for ever and never mix two
versions; the page itself is asked for each time. What is not here: data of any kind (`server.dashboard.live` and the
other routes), and so nothing that is not for everybody.
"""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from kapsl_scheduler.server.answers import Answer, response_of
from kapsl_scheduler.server.bodies import compressed

__all__ = ["Pages"]

_FOLDER: Final = Path(__file__).with_name("static")
_PAGE: Final = "index.html"
_DIGEST: Final = b"DIGEST"  # where the page has the address of its files
_VIEWS: Final = (
    "/",
    "/models",
    "/models/{rest:path}",
    "/jobs",
    "/jobs/{rest:path}",
    "/runs",
    "/runs/{number}",
    "/events",
)
_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_EVERYWHERE: Final = (
    # What the vendored chart library does to styles it does through the DOM, which a policy does not restrict.
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'",
    ),
    ("cross-origin-opener-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
)


class Pages:
    """The routes of the pages. `digest` names this version of them."""

    def __init__(self) -> None:
        contents = {
            path.relative_to(_FOLDER).as_posix(): path.read_bytes()
            for path in sorted(_FOLDER.rglob("*"))
            if path.is_file()
        }
        digest = hashlib.sha256()
        for name, content in contents.items():
            digest.update(b"%b\0%d\0%b" % (name.encode(), len(content), content))
        self.digest: Final = digest.hexdigest()[:16]
        self._page = contents.pop(_PAGE).replace(_DIGEST, self.digest.encode())
        self._files = contents

    def routes(self) -> list[BaseRoute]:
        return [
            *(Route(path, self._view) for path in _VIEWS),
            Route("/dashboard/static/{digest}/{name:path}", self._file),
        ]

    async def _view(self, request: Request) -> Response:
        tag = f'"{self.digest}"'
        headers = (("etag", tag), ("cache-control", "no-cache"))
        if tag in request.headers.get("if-none-match", ""):
            return response_of(Answer(304, b"", (*headers, *_EVERYWHERE)))
        return await _answered(request, _PAGE, self._page, headers)

    async def _file(self, request: Request) -> Response:
        content = self._files.get(request.path_params["name"])
        if content is None or request.path_params["digest"] != self.digest:
            raise HTTPException(404)
        kept = (("cache-control", "public, max-age=31536000, immutable"),)
        return await _answered(request, request.path_params["name"], content, kept)


async def _answered(request: Request, name: str, content: bytes, headers: tuple[tuple[str, str], ...]) -> Response:
    kind = _TYPES.get(Path(name).suffix) or mimetypes.guess_type(name)[0] or "text/plain; charset=utf-8"
    answer = Answer(200, content, (("content-type", kind), *headers, *_EVERYWHERE))
    accepted = request.headers.get("accept-encoding", "").encode("latin-1")
    return response_of(await compressed(answer, accepted))
