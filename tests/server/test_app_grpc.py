"""Where a configuration has gRPC, and what becomes of it where it cannot be had."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest

from kapsl_scheduler import app_grpc
from kapsl_scheduler.app_grpc import check_grpc, grpc_port
from kapsl_scheduler.config import ConfigError, ServerSettings, load_config


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody else has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


async def address(settings: ServerSettings) -> str | None:
    async with grpc_port(settings) as server:
        return None if server is None else server.address


async def test_it_is_where_clients_look_for_it_unless_it_is_said_where(
    monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    assert app_grpc.DEFAULT_PORT == 8001
    monkeypatch.setattr(app_grpc, "DEFAULT_PORT", free)
    assert await address(ServerSettings()) == f"127.0.0.1:{free}"
    chosen = await address(ServerSettings(port=0))
    assert chosen is not None
    assert chosen not in (f"127.0.0.1:{free}", "127.0.0.1:0")
    assert await address(ServerSettings(grpc_port=free)) == f"127.0.0.1:{free}"
    assert await address(ServerSettings(grpc_enabled=False, grpc_port=taken)) is None


async def test_a_port_that_nobody_asked_for_is_left_to_the_server_that_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, taken: int
) -> None:
    monkeypatch.setattr(app_grpc, "DEFAULT_PORT", taken)
    assert await address(ServerSettings()) is None
    (said,) = caplog.messages
    assert said.startswith(f"no gRPC: cannot listen on 127.0.0.1:{taken}: ")
    assert said.endswith("; --no-grpc does without")
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1:{taken}: .* --grpc-port, or 0"):
        await address(ServerSettings(grpc_port=taken))


async def test_without_grpcio_it_is_said_what_to_install_to_those_who_ask_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)  # as if it were not installed
    for name in [name for name in sys.modules if name.startswith("kapsl_scheduler.server.grpc_")]:
        monkeypatch.delitem(sys.modules, name)

    assert await address(ServerSettings()) is None
    for settings in (ServerSettings(grpc_port=8001), ServerSettings(grpc_port=0)):
        with pytest.raises(ConfigError, match=r"grpc_port: gRPC needs grpcio: pip install 'kapsl-scheduler\[grpc\]'"):
            check_grpc(settings)
    assert check_grpc(ServerSettings(grpc_port=8001, grpc_enabled=False)) is None


def test_it_is_set_as_all_settings_are() -> None:
    config = load_config(flags={"grpc_port": "9001"}, environment={"KAPSL_GRPC_ENABLED": "false"})
    assert (config.server.grpc_port, config.server.grpc_enabled) == (9001, False)
    shown = {setting.name: (setting.value, setting.where) for setting in config.settings()}
    assert shown["server.grpc_port"] == (9001, "--grpc-port")
    with pytest.raises(ConfigError, match=r"--grpc-port: .*, got '70000'"):
        load_config(flags={"grpc_port": "70000"}, environment={})
