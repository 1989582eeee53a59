"""Who may ask a server for what: tokens with roles and limits of their own, and which hosts a request may be meant for.

Decisions only, with the time as an argument. A token is 32 random bytes: nobody can guess one, or find it from its
SHA-256, so that no slow hash is needed; its public part names its entry, and the rest is compared in constant time.
What is not here: where tokens are kept (`config`), the routes and connections that ask (`server.http`, `server.door`).
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import urlsplit

import msgspec

from kapsl_scheduler.errors import Forbidden, Overloaded, Unauthorized

__all__ = ["Access", "Caller", "Guard", "Hosts", "Role", "Token", "made_token", "role_for", "tokens_of"]


class Role(enum.IntEnum):
    """What a token may do; each may what those before it may. Readers ask models and look; writers change jobs; admins
    load and unload models, change settings and read the figures."""

    READER = 1
    WRITER = 2
    ADMIN = 3


class Token(msgspec.Struct, frozen=True):
    """An entry: whose it is, its role, its public part and the SHA-256 (in hex) of the whole. At most `in_flight`
    requests at a time, `rate` a second (with bursts of as many); None: no limit of its own."""

    name: str
    role: Role
    id: str
    digest: str
    in_flight: int | None = None
    rate: float | None = None


_TEXT: Final = re.compile(r"kapsl_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")
_NAME: Final = re.compile(r"[\w.@-]{1,100}")
_LIMITS: Final = ("in_flight", "rate")


def made_token(name: str, role: Role) -> tuple[str, str]:
    """A new token, and the line that stands for it where tokens are kept. Raises `ValueError` for the name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected 1 to 100 letters, digits or . _ @ -, got {name!r}")
    id = secrets.token_hex(4)
    text = f"kapsl_{id}_{secrets.token_urlsafe(32)}"
    return text, f"{name} {role.name.lower()} {id} {_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokens_of(text: str, where: str) -> list[Token]:
    """The entries of a text: a line `name role id sha256` for each, `in_flight=N` and `rate=N` behind it where it has
    limits; what follows a # is a remark. Raises `ValueError`, which says all that is wrong."""
    found: list[Token] = []
    faults: list[str] = []
    for number, line in enumerate(re.split(r"[\n;]", text), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            token = _token(words)
            if any(token.id == other.id for other in found):
                raise ValueError(f"the id {token.id} is there twice")
        except ValueError as error:
            faults.append(f"{where}, entry {number}: {error}")
        else:
            found.append(token)
    if faults:
        raise ValueError("\n".join(faults))
    return found


def _token(words: list[str]) -> Token:
    if len(words) < 4:
        raise ValueError(f"expected name, role, id and sha256, got {len(words)} words")
    name, role, id, digest = words[:4]
    if not _NAME.fullmatch(name):
        raise ValueError(f"name: expected 1 to 100 letters, digits or . _ @ -, got {name!r}")
    if role.upper() not in Role.__members__:
        raise ValueError(f"role: expected one of {', '.join(one.name.lower() for one in Role)}, got {role!r}")
    if not re.fullmatch("[0-9a-f]{8}", id) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError("expected an id of 8 and a sha256 of 64 hexadecimal digits: is it the token itself?")
    limits: dict[str, float] = {}
    for word in words[4:]:
        key, _, value = word.partition("=")
        try:
            if key not in _LIMITS or not (number := float(value)) > 0:
                raise ValueError
        except ValueError:
            raise ValueError(f"expected in_flight=N or rate=N above 0, got {word!r}") from None
        limits[key] = number
    in_flight = limits.get("in_flight")
    return Token(
        name, Role[role.upper()], id, digest, None if in_flight is None else int(in_flight), limits.get("rate")
    )


class Caller:
    """A token in use: what it has in flight, and what it may still ask in this moment."""

    __slots__ = ("_allowance", "_at", "_flying", "token")

    def __init__(self, token: Token) -> None:
        self.token = token
        self._flying = 0
        self._allowance = max(1.0, token.rate or 0.0)
        self._at = 0.0

    def enter(self, now: float) -> None:
        """It asks for an inference, of which `leave` is to be called. Raises `Overloaded`."""
        token = self.token
        if token.in_flight is not None and self._flying >= token.in_flight:
            raise Overloaded(f"{token.in_flight} requests of {token.name!r} are in flight, which is its limit")
        if token.rate is not None:
            # A bucket that holds a second's requests and is filled at that rate.
            self._allowance = min(max(1.0, token.rate), self._allowance + (now - self._at) * token.rate)
            self._at = now
            if self._allowance < 1.0:
                wait = (1.0 - self._allowance) / token.rate
                raise Overloaded(f"{token.name!r} may ask {token.rate:g} times a second", retry_after=wait)
            self._allowance -= 1.0
        self._flying += 1

    def leave(self) -> None:
        self._flying -= 1


class Access:
    """The tokens of a server."""

    def __init__(self, tokens: Iterable[Token]) -> None:
        self._callers = {token.id: Caller(token) for token in tokens}

    def caller(self, credential: str, role: Role) -> Caller:
        """Whose an `Authorization` header (or a bare token) is. Raises `Unauthorized`, and `Forbidden` for one whose
        role is too low."""
        text = credential.strip()
        scheme, _, rest = text.partition(" ")
        if scheme.lower() == "bearer":
            text = rest.strip()
        match = _TEXT.fullmatch(text)
        caller = None if match is None else self._callers.get(match.group(1))
        # Also for an unknown id: how long it takes says nothing of which there are.
        right = hmac.compare_digest(_digest(text), _NOBODY if caller is None else caller.token.digest)
        if caller is None or not right:
            raise Unauthorized("a token is needed: Authorization: Bearer kapsl_..." if not text else "no such token")
        if caller.token.role < role:
            raise Forbidden(
                f"{caller.token.name!r} is a {caller.token.role.name.lower()}, and this takes a {role.name.lower()}"
            )
        return caller


_NOBODY: Final = "0" * 64

# The first that fits: methods (empty: all; a call of gRPC has GRPC), the path's beginning, the role (None: anybody).
_ROLES: Final[tuple[tuple[frozenset[str], re.Pattern[str], Role | None], ...]] = tuple(
    (frozenset(methods.split()), re.compile(path), role)
    for methods, path, role in (
        ("GRPC", r"/grpc\.health\.", None),
        ("GRPC", r"/inference\.GRPCInferenceService/Server(Live|Ready)$", None),
        ("GRPC", r"/inference\.GRPCInferenceService/(RepositoryModel|Log|Trace)", Role.ADMIN),
        ("GRPC", r"/", Role.READER),
        ("", r"/v2/health/", None),
        ("", r"/api/health$", None),
        # The dashboard's pages and their files, which hold no data.
        ("GET HEAD", r"/((models|jobs|runs)(/.*)?|events)?$", None),
        ("GET HEAD", r"/dashboard/static/", None),
        ("", r"/metrics", Role.ADMIN),
        ("", r"/debug", Role.ADMIN),
        ("POST", r"/v2/models/[^/]+(/versions/[^/]+)?/(infer|generate|generate_stream)$", Role.READER),
        ("POST", r"/api/models/[^/]+/infer$", Role.READER),
        ("POST", r"/v2/repository/index$", Role.READER),
        ("", r"/v2/repository/", Role.ADMIN),
        ("POST", r"/v1/", Role.READER),
        ("POST", r"/v2/cron/compact$", Role.ADMIN),
        ("POST PUT DELETE", r"/v2/cron/", Role.WRITER),
        ("GET HEAD", r"/", Role.READER),
        ("", r"", Role.ADMIN),
    )
)


def role_for(method: str, path: str) -> Role | None:
    """What a request takes; None for what anybody may ask."""
    for methods, pattern, role in _ROLES:
        if (not methods or method in methods) and pattern.match(path):
            return role
    return Role.ADMIN


class Hosts:
    """The names under which a server is reached: its `own` (None: any) and those that are `allowed`. A page of somebody
    else's can have a browser send requests to a server, on loopback under a name that leads there (DNS rebinding) or
    across origins; neither is for us. Another port of the same host is somebody else too."""

    def __init__(self, own: Iterable[str] | None, allowed: Iterable[str] = ()) -> None:
        self._allowed = frozenset(name.lower() for name in allowed)
        self._names = None if own is None else self._allowed | {name.lower() for name in own}

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Raises `Forbidden` for a request to another host, or from a page of one. Programs send no `Origin`."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if b"host" in headers and self._names is not None and _name_in(host) not in self._names:
            raise Forbidden(f"host: {host!r} is not a name of this server; --allowed-hosts adds one")
        if b"origin" in headers:
            origin = headers[b"origin"].decode("latin-1").lower()
            authority = origin.partition("://")[2]
            if not authority or (authority != host and _name_in(authority) not in self._allowed):
                raise Forbidden(f"origin: pages of {origin!r} may not ask this server; --allowed-hosts allows them")


def _name_in(authority: str) -> str:
    """The host of `host:port`, empty where there is none."""
    try:
        return urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """What stands before all HTTP routes: the hosts a request may be for, and who may ask."""

    def __init__(self, access: Access | None, hosts: Hosts | None) -> None:
        self._access = access
        self._hosts = hosts

    def admit(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Caller | None:
        """Who asks, where that is known. Raises `Unauthorized`, `Forbidden`."""
        return self._admit(role_for(method, path), headers)

    def admit_inference(self, headers: Mapping[bytes, bytes]) -> Caller | None:
        """The same for an inference request, whose path is known."""
        return self._admit(Role.READER, headers)

    def _admit(self, role: Role | None, headers: Mapping[bytes, bytes]) -> Caller | None:
        if self._hosts is not None:
            self._hosts.check(headers)
        if self._access is None or role is None:
            return None
        return self._access.caller(headers.get(b"authorization", b"").decode("latin-1"), role)
