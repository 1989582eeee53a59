"""The webhook: what is sent and signed, what is tried again, what is not, and receivers that never come to an end."""

from __future__ import annotations

import email.utils
import http.client
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import stamina

from kapsl_scheduler.errors import Backend, InvalidInput, Unavailable
from kapsl_scheduler.ports import SinkItem
from kapsl_scheduler.sinks import WebhookSink, verify, webhook
from tests.sinks.answers import Receiver, answers, firing, keys, raw_server, receiver, remember


@pytest.fixture
def server() -> Iterator[Receiver]:
    with receiver() as state:
        yield state


@pytest.fixture(autouse=True)
def _no_waits() -> Iterator[None]:
    with stamina.set_testing(True, attempts=9, cap=True):
        yield


def send(url: str, items: list[SinkItem] | None = None, attempt: int = 1, **settings: Any) -> dict[str, str]:
    memory: dict[str, str] = {}
    writer = WebhookSink(url, **settings).open(firing(attempt=attempt), memory)
    try:
        writer.write(answers(1) if items is None else items)
        remember(memory, writer.flush())
    finally:
        writer.close()
    return memory


def test_the_body_says_of_which_run_it_is(server: Receiver) -> None:
    send(server.url + "/hook?a=b", answers(5), batch=3, headers={"X-Team": "blue", "user-agent": "mine"}, attempt=2)
    first, second = server.posts
    assert first.path == "/hook?a=b"
    assert first.headers["content-type"] == "application/json"
    assert first.headers["x-team"] == "blue"
    assert first.headers["user-agent"] == "mine"
    assert "x-kapsl-signature" not in first.headers
    head = {"job": "job", "nominal": "2026-11-25T03:00:00Z", "origin": "schedule", "attempt": 2}
    assert {key: value for key, value in first.body.items() if key != "items"} == {**head, "sequence": 0}
    assert second.body["sequence"] == 3
    assert second.body["items"][0] == {
        "key": "file.csv:3",
        "error": {"code": "deadline_exceeded", "message": "too late: 3"},
    }
    assert second.body["items"][1] == {"key": "file.csv:4", "outputs": {"y": [[4.0, 0.1]]}}


def test_large_answers_go_out_in_smaller_numbers(server: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "_BODY", 60)
    send(server.url, answers(4))
    assert [len(post.body["items"]) for post in server.posts] == [2, 2]


def test_idempotency_keys_are_those_of_the_items(server: Receiver) -> None:
    memory = send(server.url, answers(4), batch=2)
    server.answers = [500, 200]
    send(server.url, answers(4), batch=2, attempt=2)
    one, two, again, once_more, two_again = (post.headers["idempotency-key"] for post in server.posts)
    assert one == again == once_more != two == two_again

    writer = WebhookSink(server.url).open(firing(attempt=2), memory)
    writer.write(answers(2))  # the same items at another place
    writer.write(answers(1, start=2))
    writer.flush()
    other = server.posts[-1]
    assert other.body["sequence"] == 4
    assert other.headers["idempotency-key"] not in (one, two)
    send(server.url, answers(3))
    assert server.posts[-1].headers["idempotency-key"] not in (one, two)


# --------------------------------------------------------------------------------------------- signature


def test_a_signature_holds_for_its_secret_its_body_and_its_time(
    server: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", "sesame")
    send(server.url, secret_env="HOOK_SECRET")
    (post,) = server.posts
    header = post.headers["x-kapsl-signature"]
    stamp = int(header.partition(",")[0].removeprefix("t="))
    assert abs(stamp - time.time()) < 60
    assert verify("sesame", header, post.raw)
    assert verify(b"sesame", header, post.raw, now=stamp + 300)
    assert verify("sesame", f"v1=00, {header}, v2=x", post.raw)
    assert not verify("sesame", header, post.raw, now=stamp + 301)
    assert not verify("sesame", header, post.raw, now=stamp - 11, tolerance=10)
    assert not verify("other", header, post.raw)
    assert not verify("sesame", header, post.raw + b" ")


def test_the_form_of_a_signature_is_what_others_compute() -> None:
    header = "t=1700000000,v1=ea3a8c4ff7eaf0b8a9c8a4a6c83b2f7f5d0e36b18ea6d5d5a6d9c5d4d5c0b0c0"
    assert not verify("key", header, b"{}", now=1700000000)
    signature = webhook._signature(b"key", "1700000000", b"{}")
    assert verify("key", f"t=1700000000,v1={signature}", b"{}", now=1700000000)


@pytest.mark.parametrize("header", ["", "t=1", "v1=00", "t=x,v1=00", "t=1,t=2,v1=00", "t=1,v1=ä", "t=²,v1=0", ",,=,"])
def test_a_header_that_is_none_does_not_hold(header: str) -> None:
    assert not verify("sesame", header, b"", now=1)


@pytest.mark.parametrize("value", [None, ""])
def test_a_secret_that_is_not_there_is_an_error_before_anything_is_sent(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is not None:
        monkeypatch.setenv("HOOK_SECRET", value)
    with pytest.raises(InvalidInput, match="variable HOOK_SECRET is not set"):
        WebhookSink("http://localhost", secret_env="HOOK_SECRET").open(firing(), {})


# ------------------------------------------------------------------------------------------ trying again


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 599])
def test_what_may_pass_is_tried_again(status: int, server: Receiver) -> None:
    server.answers = [status, status]
    send(server.url)
    assert len(server.posts) == 3
    assert len({post.headers["idempotency-key"] for post in server.posts}) == 1


def test_not_for_ever(server: Receiver) -> None:
    server.answers = [(503, {}, "down for the night")] * 9
    with pytest.raises(Unavailable, match=r"http://127\.0\.0\.1:\d+ answered 503: 'down for the night'"):
        send(server.url + "/token", attempts=4)
    assert len(server.posts) == 4


@pytest.mark.parametrize("status", [400, 401, 404, 410, 413, 422])
def test_a_refusal_is_final(status: int, server: Receiver) -> None:
    server.answers = [(status, {}, "x" * 5000)]
    with pytest.raises(Backend, match=f"answered {status}: 'x{{200}}'"):
        send(server.url + "/token")
    assert len(server.posts) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(status: int, server: Receiver) -> None:
    server.answers = [(status, {"Location": server.url + "/elsewhere"}, "")]
    with pytest.raises(Backend, match=f"answered {status}: redirects are not followed"):
        send(server.url)
    assert len(server.posts) == 1


def waits(error: Unavailable, monkeypatch: pytest.MonkeyPatch, patience: float = 100.0) -> Any:
    """What the hook says that stamina asks about an error."""
    hooks = []

    def retry_context(on: Any, **settings: Any) -> Iterator[Any]:
        hooks.append((on(error), settings))
        return iter(())

    sink = WebhookSink("http://localhost", patience=patience)
    writer = sink.open(firing(), {})
    monkeypatch.setattr(stamina, "retry_context", retry_context)
    writer.write(answers(1))
    writer.flush()
    return hooks[0]


@pytest.mark.parametrize(("retry_after", "wait"), [(None, True), (0, 0), (7, 7), (45, 30), (101, False)], ids=str)
def test_a_receiver_may_ask_for_a_wait_within_bounds(
    retry_after: float | None, wait: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, settings = waits(Unavailable("busy", retry_after=retry_after), monkeypatch)
    assert answer == wait
    assert (settings["attempts"], settings["timeout"], settings["wait_max"]) == (5, 100.0, 30.0)
    assert settings["wait_jitter"] > 0


def test_waits_are_no_longer_than_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    _, settings = waits(Unavailable("busy"), monkeypatch, patience=3.0)
    assert (settings["timeout"], settings["wait_max"]) == (3.0, 3.0)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("7", 7),
        ("soon", None),
        ("-1", None),
        (email.utils.formatdate(0, usegmt=True), 0),
        # Made when the tests are collected, which may be a while before it is read.
        (email.utils.formatdate(time.time() + 36_000, usegmt=True), pytest.approx(36_000, abs=3_600)),
    ],
)
def test_the_wait_is_seconds_or_a_date(header: str, expected: Any, server: Receiver) -> None:
    server.answers = [(503, {"Retry-After": header}, "")] * 9
    with pytest.raises(Unavailable) as caught:
        send(server.url)
    assert caught.value.retry_after == expected


def test_nobody_there_is_tried_again_and_then_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(Unavailable, match=f"sink: http://127.0.0.1:{port}: .*refused"):
        send(f"http://127.0.0.1:{port}/token", attempts=2)


@pytest.mark.parametrize("answer", [b"", b"hello\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 200])
def test_what_is_no_http_is_tried_again(answer: bytes) -> None:
    calls = []

    def serve(connection: socket.socket) -> None:
        calls.append(connection.recv(1 << 16))
        connection.sendall(answer)

    with raw_server(serve) as url, pytest.raises(Unavailable):
        send(url, attempts=3)
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 500 No\r\n\r\n"], ids=["in the head", "in the body"])
def test_an_answer_that_never_ends_is_given_up(start: bytes) -> None:
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(start)
        while not over.wait(0.01):
            connection.sendall(b"H")

    with raw_server(drip) as url:
        try:
            with pytest.raises(Unavailable, match=r"timed out|answered 500"):
                send(url, timeout=0.2, attempts=1)
        finally:
            over.set()


def test_the_deadline_holds_before_each_read() -> None:
    one, other = socket.socketpair()
    with one, other:
        other.send(b"late")
        reader = webhook._Timed(one, time.monotonic() - 1).makefile("rb")
        with pytest.raises(TimeoutError):
            reader.read(1)


def test_an_endless_body_is_read_no_further_than_it_is_shown() -> None:
    def pour(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 400 No\r\n\r\n")
        while True:
            connection.sendall(b"x" * 1024)

    with raw_server(pour) as url, pytest.raises(Backend, match=r"answered 400: 'x{200}'"):
        send(url)


# -------------------------------------------------------------------------------------------------- TLS


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with openssl")
def test_a_server_with_a_certificate_of_its_own_is_not_trusted(tmp_path: Path, server: Receiver) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*make.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def greet(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secured, secured.makefile("rb") as request:
            # All of it: closing a connection that holds something unread resets it, and the answer may be lost.
            head = [line.lower() for line in iter(request.readline, b"\r\n")]
            request.read(next(int(line.split(b":")[1]) for line in head if line.startswith(b"content-length:")))
            secured.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    with raw_server(greet) as url:
        there = url.replace("http://127.0.0.1", "https://localhost")
        with pytest.raises(Backend, match="certificate verify failed"):
            send(there)
        trusting = WebhookSink(there).open(firing(), {})
        trusting._tls.load_verify_locations(certificate)  # type: ignore[attr-defined]
        trusting.write(answers(1))
        trusting.flush()


def test_a_certificate_that_does_not_hold_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(self: Any) -> None:
        calls.append(self)
        raise ssl.SSLCertVerificationError(1, "certificate verify failed")

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", refuse)
    with pytest.raises(Backend, match="sink: https://localhost: "):
        send("https://localhost/token")
    (connection,) = calls
    assert connection.port == 443
    assert connection._context.verify_mode == ssl.CERT_REQUIRED
    assert connection._context.check_hostname


# ---------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"url": "ftp://host"}, "url: expected http"),
        ({"url": "file:///etc/passwd"}, "url: expected http"),
        ({"url": "https://"}, "url: expected http"),
        ({"url": "http://host:0"}, "url: expected http"),
        ({"url": "http://host:99999"}, "ort"),
        ({"url": "http://me@host"}, "no user and no password"),
        ({"url": "http://me:pw@host"}, "no user and no password"),
        ({"url": "http://host/a b"}, "without spaces"),
        ({"url": "http://host/ä"}, "without spaces"),
        ({"secret_env": ""}, "secret_env: expected the name"),
        ({"secret_env": "a=b"}, "secret_env: expected the name"),
        ({"batch": 0}, "at least 1"),
        ({"attempts": 0}, "at least 1"),
        ({"timeout": 0.0}, "seconds above 0"),
        ({"patience": float("inf")}, "seconds above 0"),
        ({"headers": {"Host": "other"}}, "headers: 'Host'"),
        ({"headers": {"bad name": "x"}}, "headers: 'bad name'"),
        ({"headers": {"X-A": "x\r\nX-B: y"}}, "headers: X-A: expected printable ASCII"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        WebhookSink(**{"url": "http://host", **settings})
    stored = msgspec.json.encode({"type": "webhook", "url": "http://host", **settings})
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(stored, type=WebhookSink)


def test_without_stamina_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "stamina", None)
    with pytest.raises(Backend, match=r"pip install 'kapsl-scheduler\[webhook\]'"):
        WebhookSink("http://localhost").open(firing(), {})


def test_items_that_were_not_sent_are_dropped_when_a_run_fails(server: Receiver) -> None:
    writer = WebhookSink(server.url).open(firing(), {})
    writer.write(answers(2))
    writer.close()
    assert writer.flush()
    assert server.posts == []
    assert keys(answers(1)) == ["file.csv:0"]
