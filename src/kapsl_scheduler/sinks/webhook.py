"""Results as signed POST requests to a web server of somebody's, tried again where that may help (extra `webhook`).

What is not here: the JSON of an item (`sinks.documents`). Requests go out one at a time, so results arrive in order.
"""

from __future__ import annotations

import datetime as dt
import email.utils
import hashlib
import hmac
import http.client
import io
import math
import os
import re
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import msgspec

from kapsl_scheduler.core.runs import Firing
from kapsl_scheduler.errors import Backend, InvalidInput, Unavailable
from kapsl_scheduler.ports import SinkItem, SinkWriter
from kapsl_scheduler.sinks.documents import encode_item
from kapsl_scheduler.sinks.memory import Remembered

__all__ = ["WebhookSink", "verify"]

_BODY: Final = 4 << 20
"""Bytes of items after which a request goes out before it has `batch` of them."""
_LONGEST_WAIT: Final = 30.0
_SHOWN: Final = 200
_PASSING: Final = frozenset((408, 429))
_HEADER: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_OURS: Final = frozenset(
    (
        "connection",
        "content-length",
        "content-type",
        "host",
        "idempotency-key",
        "transfer-encoding",
        "x-kapsl-signature",
    )
)


class WebhookSink(
    msgspec.Struct,
    frozen=True,
    tag="webhook",
    tag_field="type",
    forbid_unknown_fields=True,
    omit_defaults=True,
):
    """POSTs results to `url`, up to `batch` at a time, and again until they are taken.

    The body is `{"job", "nominal", "origin", "attempt", "sequence", "items": [...]}`: `nominal` in ISO 8601, `sequence`
    how many items of the run went before, items as in `sinks.documents`. `headers` are sent along. Two more:

    - `X-Kapsl-Signature: t=SECONDS,v1=HEX`, the HMAC-SHA256 of `SECONDS.BODY` with the secret, which is what the
      environment variable `secret_env` holds when a run opens the sink: a definition has no secret in it. None: no
      signature. Receivers check it with `verify`.
    - `Idempotency-Key`: the same whenever the same items are sent again, by a retry or by a resumed run, so that a
      receiver can drop what it has.

    Tried again, after a wait that doubles from half a second (at most 30 s, with jitter) or that `Retry-After` asks
    for: errors of the connection, 408, 429 and 5xx. `timeout` (seconds) bounds one request as a whole; `attempts` and
    `patience` (seconds) bound them together. Then the call raises `Unavailable`. Any other answer but 2xx raises
    `Backend` at once: redirects are not followed. Certificates are checked; proxies of the environment are not used.

    `open` raises `Backend` without stamina and `InvalidInput` where the variable is not set. `ValueError` is raised for
    settings that cannot be.
    """

    url: str
    secret_env: str | None = None
    batch: int = 100
    timeout: float = 10.0
    attempts: int = 5
    patience: float = 120.0
    headers: dict[str, str] = {}

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError("url: expected http://HOST or https://HOST")
        if parts.username is not None or parts.password is not None:
            raise ValueError("url: expected no user and no password in it")
        if not self.url.isascii() or not self.url.isprintable() or " " in self.url:
            raise ValueError("url: expected ASCII without spaces; encode other characters as %XX")
        if self.secret_env is not None and (not self.secret_env or "=" in self.secret_env or "\0" in self.secret_env):
            raise ValueError("secret_env: expected the name of an environment variable")
        if self.batch < 1 or self.attempts < 1:
            raise ValueError("batch, attempts: expected at least 1")
        if not all(math.isfinite(seconds) and seconds > 0 for seconds in (self.timeout, self.patience)):
            raise ValueError("timeout, patience: expected seconds above 0")
        for name, value in self.headers.items():
            if not _HEADER.fullmatch(name) or name.lower() in _OURS:
                raise ValueError(f"headers: {name!r} is no name of a header, or of one that is set here")
            if not (value.isascii() and value.isprintable()):
                raise ValueError(f"headers: {name}: expected printable ASCII")

    def open(self, firing: Firing, memory: Mapping[str, str]) -> SinkWriter:
        try:
            import stamina
        except ImportError as error:
            raise Backend("webhooks need stamina: pip install 'kapsl-scheduler[webhook]'") from error
        secret = None
        if self.secret_env is not None:
            secret = os.environ.get(self.secret_env, "").encode()
            if not secret:
                raise InvalidInput(f"sink: the environment variable {self.secret_env} is not set; it holds the secret")
        return _Writer(self, stamina, secret, firing, Remembered(memory, firing))


def verify(
    secret: str | bytes, header: str, body: bytes, *, tolerance: float = 300.0, now: float | None = None
) -> bool:
    """For receivers: whether `header` (`X-Kapsl-Signature`) signs `body`, not more than `tolerance` seconds ago.

    How long it takes tells nothing of the signature that would have been right. `now` is seconds since 1970; None: by
    the clock.
    """
    fields = [part.strip().partition("=") for part in header.split(",")]
    stamps = [value for name, _, value in fields if name == "t"]
    if len(stamps) != 1 or not re.fullmatch("[0-9]{1,12}", stamps[0]):
        return False
    fresh = abs((time.time() if now is None else now) - int(stamps[0])) <= tolerance
    expected = _signature(secret.encode() if isinstance(secret, str) else secret, stamps[0], body).encode()
    given = [value.encode("utf-8", "replace") for name, _, value in fields if name == "v1"]
    return fresh and any(hmac.compare_digest(expected, value) for value in given)


def _signature(secret: bytes, stamp: str, body: bytes) -> str:
    return hmac.new(secret, stamp.encode() + b"." + body, hashlib.sha256).hexdigest()


# ----------------------------------------------------------------------------------------------- writer


class _Writer:
    def __init__(
        self, sink: WebhookSink, stamina: Any, secret: bytes | None, firing: Firing, remembered: Remembered
    ) -> None:
        self._sink = sink
        self._stamina = stamina
        self._secret = secret
        self._firing = firing
        self._remembered = remembered
        self._url = urlsplit(sink.url)
        self._tls = ssl.create_default_context() if self._url.scheme == "https" else None
        self._sent = remembered.at
        self._keys: list[str] = []
        self._items: list[msgspec.Raw] = []
        self._size = 0

    def write(self, items: Sequence[SinkItem]) -> None:
        for item in items:
            document = encode_item(item)
            self._keys.append(item.key)
            self._items.append(msgspec.Raw(document))
            self._size += len(document)
            if len(self._items) >= self._sink.batch or self._size >= _BODY:
                self._send()

    def flush(self) -> Mapping[str, str | None]:
        if self._items:
            self._send()
        return self._remembered.reached(self._sent)

    def close(self) -> None:
        self._keys, self._items = [], []

    def _send(self) -> None:
        run = self._firing
        head = {"job": run.job, "nominal": run.nominal.astimezone(dt.UTC), "origin": run.origin}
        body = {**head, "attempt": run.attempt, "sequence": self._sent, "items": self._items}
        # The keys too: what was taken between two flushes depends on the moment, and a resumed run may cut otherwise.
        same = msgspec.json.encode({**head, "sequence": self._sent, "keys": self._keys})
        self._deliver(msgspec.json.encode(body), hashlib.sha256(same).hexdigest())
        self._sent += len(self._items)
        self._keys, self._items, self._size = [], [], 0

    def _deliver(self, body: bytes, key: str) -> None:
        patience = self._sink.patience
        deadline = time.monotonic() + patience

        def again(error: Exception) -> bool | float:
            if not isinstance(error, Unavailable):
                return False
            if error.retry_after is None:
                return True
            return error.retry_after <= deadline - time.monotonic() and min(error.retry_after, _LONGEST_WAIT)

        for attempt in self._stamina.retry_context(
            on=again,
            attempts=self._sink.attempts,
            timeout=patience,
            wait_initial=0.5,
            wait_max=min(_LONGEST_WAIT, patience),
            wait_jitter=0.5,
        ):
            with attempt:
                self._post(body, key)

    def _post(self, body: bytes, key: str) -> None:
        headers = {
            "User-Agent": "kapsl-scheduler",
            **self._sink.headers,
            "Content-Type": "application/json",
            "Idempotency-Key": key,
            "Connection": "close",
        }
        if self._secret is not None:
            stamp = str(int(time.time()))
            headers["X-Kapsl-Signature"] = f"t={stamp},v1={_signature(self._secret, stamp, body)}"
        status, retry_after, text = _exchange(self._url, self._tls, self._sink.timeout, headers, body)
        where = _where(self._url)
        if 200 <= status < 300:
            return
        if status in _PASSING or status >= 500:
            raise Unavailable(f"sink: {where} answered {status}: {text!r}", retry_after=_seconds(retry_after))
        if 300 <= status < 400:
            raise Backend(f"sink: {where} answered {status}: redirects are not followed")
        raise Backend(f"sink: {where} answered {status}: {text!r}")


# ------------------------------------------------------------------------------------------------- HTTP


def _exchange(
    url: SplitResult, tls: ssl.SSLContext | None, timeout: float, headers: Mapping[str, str], body: bytes
) -> tuple[int, str | None, str]:
    """Status, `Retry-After` and how the answer begins. Raises `Unavailable` if none comes within `timeout` seconds and
    `Backend` for a certificate that does not hold."""
    deadline = time.monotonic() + timeout
    host, port = url.hostname or "", url.port or (443 if tls else 80)
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    if tls is None:
        connection = http.client.HTTPConnection(host, port, timeout=timeout)
    else:
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=tls)
    try:
        connection.connect()
        connection.request("POST", target, body, headers)
        response = http.client.HTTPResponse(_Timed(connection.sock, deadline), method="POST")  # type: ignore[arg-type]
        response.begin()
        return response.status, response.headers["Retry-After"], response.read(_SHOWN).decode("utf-8", "replace")
    except ssl.SSLCertVerificationError as error:
        raise Backend(f"sink: {_where(url)}: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(f"sink: {_where(url)}: {error or type(error).__name__}") from error
    finally:
        connection.close()


class _Timed:
    """A socket whose answer must be there by a deadline, however slowly it comes."""

    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._socket, self._deadline))


class _TimedReader(io.RawIOBase):
    def __init__(self, connected: socket.socket, deadline: float) -> None:
        self._socket = connected
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(left)
        return self._socket.recv_into(buffer)


def _where(url: SplitResult) -> str:
    """The server, without the path: that may be a secret."""
    return f"{url.scheme}://{url.netloc}"


def _seconds(retry_after: str | None) -> float | None:
    """What a `Retry-After` header asks for: seconds, or a date. None for what is neither."""
    if retry_after is None:
        return None
    if re.fullmatch("[0-9]{1,9}", retry_after):
        return float(retry_after)
    try:
        when = email.utils.parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, when.timestamp() - time.time())
