"""Who may ask for what: tokens and their limits, roles by route, hosts and origins."""

from __future__ import annotations

import json
import logging
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.errors import Forbidden, Overloaded, Unauthorized
from kapsl_scheduler.server.access import Access, Caller, Guard, Hosts, Role, Token, made_token, role_for, tokens_of
from tests.server.api import api_over, assert_error, body_of, serving, serving_jobs
from tests.server.test_door import answer, connected, decoded, infer

INFER = "/v2/models/m/infer"


def access_of(**roles: Role) -> tuple[Access, dict[str, str]]:
    """Tokens by name, and what knows them."""
    made = {name: made_token(name, role) for name, role in roles.items()}
    lines = "\n".join(line for _, line in made.values())
    return Access(tokens_of(lines, "here")), {name: text for name, (text, _) in made.items()}


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


# ----------------------------------------------------------------------------------------------- tokens


def test_a_token_is_known_by_its_line_and_nobody_else_is() -> None:
    access, tokens = access_of(ann=Role.READER, bob=Role.ADMIN)

    assert access.caller(f"Bearer {tokens['ann']}", Role.READER).token.name == "ann"
    assert access.caller(f"bearer  {tokens['bob']} ", Role.ADMIN).token.name == "bob"
    assert access.caller(tokens["bob"], Role.WRITER).token.name == "bob"
    with pytest.raises(Forbidden, match="'ann' is a reader, and this takes a writer"):
        access.caller(tokens["ann"], Role.WRITER)
    other = tokens["ann"][:-1] + ("A" if tokens["ann"][-1] != "A" else "B")
    mixed = tokens["ann"][:15] + tokens["bob"][15:]
    for wrong in (other, mixed, "", "Bearer", "Basic eDp5", tokens["ann"] + "x", "kapsl_00000000_" + "a" * 43):
        with pytest.raises(Unauthorized):
            access.caller(wrong, Role.READER)


def test_tokens_are_kept_with_their_limits() -> None:
    line = made_token("ann", Role.WRITER)[1]
    (token,) = tokens_of(f"# who\n\n{line} in_flight=3 rate=0.5  # slowly\n", "tokens")

    assert (token.name, token.role, token.in_flight, token.rate) == ("ann", Role.WRITER, 3, 0.5)
    assert [one.name for one in tokens_of(f"{line};{made_token('bob', Role.READER)[1]}", "here")] == ["ann", "bob"]


def test_all_that_is_wrong_with_entries_is_said() -> None:
    good = made_token("ann", Role.READER)[1]
    name, role, id, digest = good.split()
    text = "\n".join(
        [
            good,
            "ann reader",
            f"a/b {role} {id} {digest}",
            f"{name} king {id} {digest}",
            f"{name} {role} {id} {digest[:-1]}",
            f"{name} {role} 00000000 {digest} rate=0",
            f"{name} {role} 00000000 {digest} speed=1",
            good,
        ]
    )
    with pytest.raises(ValueError, match="tokens, entry 2") as caught:
        tokens_of(text, "tokens")

    assert [fault.partition(": ")[2] for fault in str(caught.value).splitlines()] == [
        "expected name, role, id and sha256, got 2 words",
        "name: expected 1 to 100 letters, digits or . _ @ -, got 'a/b'",
        "role: expected one of reader, writer, admin, got 'king'",
        "expected an id of 8 and a sha256 of 64 hexadecimal digits: is it the token itself?",
        "expected in_flight=N or rate=N above 0, got 'rate=0'",
        "expected in_flight=N or rate=N above 0, got 'speed=1'",
        f"the id {id} is there twice",
    ]
    with pytest.raises(ValueError, match="name: expected"):
        made_token("a b", Role.READER)


# ----------------------------------------------------------------------------------------------- limits


def a_caller(**limits: Any) -> Caller:
    return Caller(Token("ann", Role.READER, "00000000", "0" * 64, **limits))


def test_requests_in_flight_are_bounded() -> None:
    caller = a_caller(in_flight=2)
    caller.enter(0.0)
    caller.enter(0.0)
    with pytest.raises(Overloaded, match="2 requests of 'ann' are in flight"):
        caller.enter(0.0)
    caller.leave()
    caller.enter(0.0)


@given(st.floats(0.1, 50), st.lists(st.floats(0, 3), max_size=60))
def test_never_more_than_a_seconds_requests_beyond_the_rate(rate: float, waits: list[float]) -> None:
    caller, now, admitted = a_caller(rate=rate), 100.0, []
    told: list[float | None] = []
    for wait in waits:
        now += wait
        try:
            caller.enter(now)
        except Overloaded as error:
            told.append(error.retry_after)
        else:
            admitted.append(now)
            caller.leave()
    assert all(wait is not None and 0 < wait <= 1 / rate + 1e-6 for wait in told)
    for start, first in enumerate(admitted):
        for end in range(start, len(admitted)):
            assert end - start + 1 <= max(1.0, rate) + (admitted[end] - first) * rate + 1e-6


def test_who_was_refused_is_let_in_when_it_was_told_to_come() -> None:
    caller = a_caller(rate=2.0)
    for _ in range(2):
        caller.enter(10.0)
    with pytest.raises(Overloaded) as caught:
        caller.enter(10.0)
    assert caught.value.retry_after == pytest.approx(0.5)
    caller.enter(10.5)


# ------------------------------------------------------------------------------------------------ roles


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/v2/health/ready", None),
        ("POST", INFER, Role.READER),
        ("POST", "/v2/models/m/versions/2/generate_stream", Role.READER),
        ("GET", "/v2/models/m/stats", Role.READER),
        ("POST", "/v2/models/m/trace/setting", Role.ADMIN),
        ("POST", "/v2/models/m/infer/x", Role.ADMIN),
        ("POST", "/v2/repository/index", Role.READER),
        ("POST", "/v2/repository/models/m/load", Role.ADMIN),
        ("POST", "/v2/logging", Role.ADMIN),
        ("GET", "/v2/logging", Role.READER),
        ("GET", "/", None),
        ("HEAD", "/models/m/versions/2", None),
        ("GET", "/runs/7", None),
        ("GET", "/events", None),
        ("GET", "/eventsx", Role.READER),
        ("GET", "/modelsx", Role.READER),
        ("POST", "/jobs/a", Role.ADMIN),
        ("GET", "/dashboard/static/0/app.js", None),
        ("GET", "/dashboard/live", Role.READER),
        ("GET", "/metrics", Role.ADMIN),
        ("GET", "/metrics/triton", Role.ADMIN),
        ("GET", "/debug", Role.ADMIN),
        ("POST", "/v1/chat/completions", Role.READER),
        ("GET", "/api/health", None),
        ("GET", "/openapi.json", Role.READER),  # it has the names of models
        ("GET", "/api/models", Role.READER),
        ("POST", "/api/models/0/infer", Role.READER),
        ("POST", "/api/models/start", Role.ADMIN),
        ("POST", "/api/models/0/stop", Role.ADMIN),
        ("POST", "/api/models/0/scaling", Role.ADMIN),
        ("GET", "/v2/cron/jobs", Role.READER),
        ("PUT", "/v2/cron/jobs/a", Role.WRITER),
        ("DELETE", "/v2/cron/jobs/a", Role.WRITER),
        ("POST", "/v2/cron/jobs/a/trigger", Role.WRITER),
        ("POST", "/v2/cron/compact", Role.ADMIN),
        ("OPTIONS", "/v2", Role.ADMIN),
        ("POST", "/anything", Role.ADMIN),
    ],
)
def test_what_a_request_takes(method: str, path: str, role: Role | None) -> None:
    assert role_for(method, path) is role


async def test_routes_ask_for_tokens_of_their_role(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kapsl_scheduler.audit")
    access, tokens = access_of(ann=Role.READER, bob=Role.WRITER, eve=Role.ADMIN)
    job = {"schedule": "0 0 3 * * *", "inputs": {"x": [[1, 2]]}}
    async with serving_jobs() as server:
        api = api_over(server.registry, cron=server.cron, guard=Guard(access, None))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://server") as client:
            assert (await client.get("/v2/health/ready")).status_code == 200
            nobody = await client.post(INFER, content=body_of())
            assert_error(nobody, 401, "unauthorized")
            assert nobody.headers["www-authenticate"] == "Bearer"
            assert (await client.post(INFER, content=body_of(), headers=bearer(tokens["ann"]))).status_code == 200
            for name, statuses in {"ann": (403, 403), "bob": (201, 403), "eve": (200, 200)}.items():
                put = await client.put("/v2/cron/jobs/a", json=job, headers=bearer(tokens[name]))
                metrics = await client.get("/metrics", headers=bearer(tokens[name]))
                assert (put.status_code, metrics.status_code) == statuses
    audit = [json.loads(record.message) for record in caplog.records if record.name == "kapsl_scheduler.audit"]
    assert [(line["who"], line["method"], line["path"], line["status"]) for line in audit] == [
        ("", "PUT", "/v2/cron/jobs/a", 403),
        ("bob", "PUT", "/v2/cron/jobs/a", 201),
        ("eve", "PUT", "/v2/cron/jobs/a", 200),
    ]


async def test_the_door_asks_for_tokens_and_keeps_their_limits(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kapsl_scheduler.access")
    text, line = made_token("ann", Role.READER)
    access = Access(tokens_of(f"{line} rate=2", "here"))
    who = f"authorization: Bearer {text}".encode()
    async with serving() as plain:
        api = api_over(plain.registry, guard=Guard(access, None), access_log=True)
        async with connected(api) as (_, reader, writer):
            found = []
            for request in (infer(), infer((1, 2), who), infer((1, 2), who), infer((1, 2), who)):
                writer.write(request)
                status, body = await answer(reader)
                found.append((status, decoded(body).get("code")))
        assert api.inference.service.in_flight == 0
    assert found == [(401, "unauthorized"), (200, None), (200, None), (429, "overloaded")]
    log = [json.loads(record.message) for record in caplog.records if record.name == "kapsl_scheduler.access"]
    assert [(entry["who"], entry["path"], entry["status"]) for entry in log] == [
        ("", INFER, 401),
        ("ann", INFER, 200),
        ("ann", INFER, 200),
        ("ann", INFER, 429),
    ]


async def test_who_may_not_ask_is_told_before_the_body_is_there() -> None:
    access, _ = access_of(ann=Role.READER)
    guard = Guard(access, None)
    async with serving() as plain, connected(api_over(plain.registry, guard=guard)) as (_, reader, writer):
        writer.write(infer()[:-1])
        assert (await answer(reader))[0] == 401
        assert await reader.read() == b""


# ------------------------------------------------------------------------------------- hosts and origins


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({}, True),
        ({b"host": b"localhost:8080"}, True),
        ({b"host": b"LOCALHOST"}, True),
        ({b"host": b"[::1]:8080"}, True),
        ({b"host": b"evil.example:8080"}, False),
        ({b"host": b"localhost.evil.example"}, False),
        ({b"host": b"evil.example@localhost"}, True),  # the host is what stands behind the @
        ({b"host": b"localhost@evil.example"}, False),
        ({b"host": b"["}, False),
        ({b"host": b""}, False),
        ({b"host": b"localhost:3000", b"origin": b"http://LOCALHOST:3000"}, True),
        ({b"host": b"localhost:8080", b"origin": b"http://localhost:3000"}, False),  # another program's
        ({b"host": b"localhost:8080", b"origin": b"https://front.example"}, True),
        ({b"origin": b"http://localhost:8080"}, False),
        ({b"host": b"localhost", b"origin": b"https://evil.example"}, False),
        ({b"host": b"localhost", b"origin": b"null"}, False),
        ({b"host": b"localhost", b"origin": b"http://[localhost"}, False),
        ({b"host": b"localhost", b"origin": b"localhost"}, False),
    ],
)
def test_requests_for_others_and_from_their_pages_are_refused(headers: dict[bytes, bytes], ours: bool) -> None:
    hosts = Hosts(["localhost", "::1"], ["front.example"])
    if ours:
        hosts.check(headers)
        return
    with pytest.raises(Forbidden):
        hosts.check(headers)


def test_a_server_that_is_reached_by_any_name_is_asked_by_its_own_pages_only() -> None:
    hosts = Hosts(None)
    hosts.check({b"host": b"box.example:8080"})
    hosts.check({b"host": b"box.example:8080", b"origin": b"http://box.example:8080"})
    with pytest.raises(Forbidden, match=r"origin: pages of 'http://evil\.example'"):
        hosts.check({b"host": b"box.example:8080", b"origin": b"http://evil.example"})


async def test_neither_the_door_nor_a_route_answers_for_another_host() -> None:
    guard = Guard(None, Hosts(["localhost"]))
    async with serving() as plain:
        api = api_over(plain.registry, guard=guard)
        async with connected(api) as (_, reader, writer):
            found = []
            for request in (
                infer((1, 2), b"host: localhost"),
                infer((1, 2), b"host: evil.example"),
                infer((1, 2), b"host: localhost", b"origin: http://evil.example"),
                infer((1, 2), b"host: localhost", b"origin: http://[bad"),
                b"GET /v2 HTTP/1.1\r\nhost: localhost\r\norigin: http://[bad\r\n\r\n",
                b"GET /v2 HTTP/1.1\r\nhost: evil.example\r\n\r\n",
                b"GET /v2 HTTP/1.1\r\nhost: localhost\r\n\r\n",
            ):
                writer.write(request)
                found.append((await answer(reader))[0])
    assert found == [200, 403, 403, 403, 403, 403, 200]
