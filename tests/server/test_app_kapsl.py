"""Which Kapsl sockets a configuration gives, and what becomes of one that cannot be had."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path

import pytest

from kapsl_scheduler.app_kapsl import endpoint_of, kapsl_listeners
from kapsl_scheduler.config import ServerSettings
from kapsl_scheduler.server.kapsl_listen import listening_at


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def endpoints(settings: ServerSettings) -> list[str]:
    with kapsl_listeners(settings) as listeners:
        return [endpoint_of(listener) for listener in listeners]


def test_it_is_in_the_temp_directory_unless_it_is_said_where(temp: Path) -> None:
    assert endpoints(ServerSettings()) == [f"unix://{temp}/kapsl.sock"]
    assert endpoints(ServerSettings(socket=str(temp / "k"))) == [f"unix://{temp}/k"]
    assert endpoints(ServerSettings(socket_enabled=False)) == []
    assert endpoints(ServerSettings(socket=str(temp / "k"), socket_enabled=False)) == []
    assert list(temp.iterdir()) == []


def test_tcp_is_beside_it_where_a_port_is_given(temp: Path) -> None:
    unix, tcp = endpoints(ServerSettings(socket_port=0))
    assert (unix, tcp.rpartition(":")[0]) == (f"unix://{temp}/kapsl.sock", "tcp://127.0.0.1")
    (tcp,) = endpoints(ServerSettings(socket_port=0, socket_enabled=False, socket_host="::1"))
    assert tcp.startswith("tcp://[::1]:")


def test_one_that_nobody_asked_for_is_left_to_the_server_that_has_it(
    temp: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with listening_at(temp / "kapsl.sock"):
        assert endpoints(ServerSettings()) == []
        (said,) = caplog.messages
        assert said.startswith(f"no Kapsl socket: cannot listen on {temp}/kapsl.sock: another server listens there; ")
        with pytest.raises(OSError, match="another server listens there"):
            endpoints(ServerSettings(socket=str(temp / "kapsl.sock")))


def test_a_port_that_is_taken_is_said_and_nothing_is_left_behind(temp: Path) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match=r"cannot listen on 127.0.0.1:\d+: .* --socket-port"),
    ):
        endpoints(ServerSettings(socket_port=taken.getsockname()[1]))
    assert list(temp.iterdir()) == []
