"""The real server with tokens, with TLS and with client certificates, and those who are kept out."""

from __future__ import annotations

import signal
import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from kapsl_scheduler.demo.run import PACKAGE
from tests.e2e.process import run, serving

pytestmark = pytest.mark.slow


async def test_tokens_are_made_and_asked_for(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    made: dict[str, str] = {}
    for name, role in (("ann", "reader"), ("eve", "admin")):
        code, text, said = await run("token", "new", "--name", name, "--role", role, "--file", tokens)
        assert (code, said) == (0, "")
        made[name] = text.strip()
    assert tokens.stat().st_mode & 0o077 == 0
    assert not any(text in tokens.read_text() for text in made.values())

    async with serving(f"digits={PACKAGE}", "--store", "memory", "--tokens", tokens, "--access-log") as server:
        code, _, said = await run("models", "--url", server.url)
        assert code == 1
        assert "a token is needed" in said
        assert "Set KAPSL_TOKEN" in said
        code, listed, _ = await run("models", "--url", server.url, KAPSL_TOKEN=made["ann"])
        assert (code, "digits" in listed) == (0, True)
        pause = ("jobs", "pause", "digits:heartbeat", "--url", server.url)
        code, _, said = await run(*pause, KAPSL_TOKEN=made["ann"])
        assert code == 1
        assert "'ann' is a reader, and this takes a writer" in said
        assert (await run(*pause, KAPSL_TOKEN=made["eve"]))[0] == 0
        async with httpx.AsyncClient(base_url=server.url) as client:
            assert (await client.get("/v2/health/ready")).status_code == 200
            evil = await client.get("/v2", headers={"host": "evil.example"})
            assert evil.status_code == 403
        server.send(signal.SIGTERM)
        code, log = await server.end()
    assert code == 0
    assert not any(text in log for text in made.values())
    audit = [line for line in log.splitlines() if "kapsl_scheduler.audit" in line]
    assert ['"who":"eve"' in line and '"status":200' in line for line in audit] == [False, True]
    assert any(
        "kapsl_scheduler.access" in line and '"path":"/v2/repository/index"' in line for line in log.splitlines()
    )


async def test_tokens_may_come_from_the_environment_and_open_the_server_to_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, text, _ = await run("token", "new", "--name", "ann")
    assert code == 0
    token, line = (part.split(": ", 1)[1] for part in text.splitlines())
    code, _, said = await run("serve", PACKAGE, "--host", "0.0.0.0", "--port", "0", KAPSL_TOKENS_TEXT="ann reader")
    assert code == 2
    assert "KAPSL_TOKENS_TEXT, entry 1: expected name, role, id and sha256, got 2 words" in said

    monkeypatch.setattr("tests.e2e.process.ALSO", {"KAPSL_TOKENS_TEXT": line})
    async with serving(PACKAGE, "--no-cron", "--host", "0.0.0.0") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/v2/models/digits")).status_code == 401
            shown = await client.get("/v2/models/digits", headers={"authorization": f"Bearer {token}"})
            assert shown.status_code == 200


class Certificates:
    """A server's, a client's, and the authority behind both; and another authority."""

    def __init__(self, folder: Path) -> None:
        self.authority, other = trustme.CA(), trustme.CA()
        server, client = self.authority.issue_cert("127.0.0.1", "localhost"), self.authority.issue_cert("ann@example")
        self.paths = {name: folder / f"{name}.pem" for name in ("ca", "other", "cert", "key", "client")}
        self.authority.cert_pem.write_to_path(self.paths["ca"])
        other.cert_pem.write_to_path(self.paths["other"])
        server.cert_chain_pems[0].write_to_path(self.paths["cert"])
        server.private_key_pem.write_to_path(self.paths["key"])
        client.private_key_and_cert_chain_pem.write_to_path(self.paths["client"])

    def context(self, authority: str = "ca", *, client: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.paths[authority])
        if client:
            context.load_cert_chain(self.paths["client"])
        return context


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certificates"))


async def status(url: str, context: ssl.SSLContext | bool) -> int | str:
    try:
        async with httpx.AsyncClient(base_url=url, verify=context) as client:
            return (await client.get("/v2/health/live")).status_code
    except httpx.HTTPError as error:
        return type(error).__name__


async def test_tls_is_spoken_to_those_who_trust_its_authority(certificates: Certificates) -> None:
    paths = certificates.paths
    async with serving(PACKAGE, "--no-cron", "--tls-cert", paths["cert"], "--tls-key", paths["key"]) as server:
        assert server.url.startswith("https://")
        assert await status(server.url, certificates.context()) == 200
        assert await status(server.url, certificates.context("other")) == "ConnectError"
        assert await status(server.url.replace("https", "http"), True) in ("RemoteProtocolError", "ReadError")
        old = certificates.context()
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert await status(server.url, old) == 200
        code, listed, _ = await run("models", "--url", server.url, SSL_CERT_FILE=str(paths["ca"]))
        assert (code, "digits" in listed) == (0, True)


async def test_with_an_authority_for_clients_each_must_have_a_certificate(certificates: Certificates) -> None:
    paths = certificates.paths
    files = ("--tls-cert", paths["cert"], "--tls-key", paths["key"], "--tls-client-ca", paths["ca"])
    async with serving(PACKAGE, "--no-cron", *files) as server:
        assert await status(server.url, certificates.context(client=True)) == 200
        assert await status(server.url, certificates.context()) in ("ReadError", "RemoteProtocolError", "ConnectError")


async def test_certificates_that_do_not_do_are_said(certificates: Certificates) -> None:
    paths = certificates.paths
    code, _, said = await run("serve", PACKAGE, "--no-cron", "--tls-cert", paths["cert"], "--tls-key", paths["ca"])
    assert code == 2
    assert "tls_cert, tls_key, tls_client_ca: " in said
    assert str(paths["ca"]) in said
