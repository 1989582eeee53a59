"""The place of the Kapsl socket: for its owner only, never taken from a live server, taken over from a dead one."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from kapsl_scheduler.server.kapsl_listen import listening_at


def connects(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return False
        return True


def left_behind(path: Path) -> None:
    """As by a process that was killed."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_it_is_for_its_owner_and_goes_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "kapsl.sock"

    with listening_at(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert connects(path)
    assert os.listdir(tmp_path) == []


def test_it_is_closed_to_others_from_the_first_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "chmod", lambda path, mode: None)

    with listening_at(tmp_path / "kapsl.sock"):
        assert stat.S_IMODE((tmp_path / "kapsl.sock").stat().st_mode) == 0o600


def test_a_live_server_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kapsl.sock"
    with listening_at(path):
        with pytest.raises(OSError, match=f"cannot listen on {path}: another server listens there"), listening_at(path):
            raise AssertionError("it was taken")
        assert connects(path)


def test_a_server_that_is_too_busy_to_answer_is_live(tmp_path: Path) -> None:
    path = tmp_path / "kapsl.sock"
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as client:
        busy.bind(str(path))
        busy.listen(0)
        client.connect(str(path))
        with pytest.raises(OSError, match="another server listens there"), listening_at(path):
            raise AssertionError("it was taken")


def test_what_a_dead_server_left_behind_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "kapsl.sock"
    left_behind(path)

    with listening_at(path):
        assert connects(path)
    assert os.listdir(tmp_path) == []


def test_a_server_that_takes_the_place_in_between_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kapsl.sock"
    left_behind(path)
    rename = os.rename
    others = []

    def meanwhile(source: Path, target: Path) -> None:
        if not others:
            path.unlink()
            others.append(socket.socket(socket.AF_UNIX))
            others[0].bind(str(path))
            others[0].listen()
        rename(source, target)

    monkeypatch.setattr(os, "rename", meanwhile)
    with pytest.raises(OSError, match="another server listens there"), listening_at(path):
        raise AssertionError("it was taken")
    assert connects(path)
    assert os.listdir(tmp_path) == ["kapsl.sock"]
    others[0].close()


def test_a_file_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "kapsl.sock"
    path.write_text("mine")

    with pytest.raises(OSError, match="there is something else in that place"), listening_at(path):
        raise AssertionError("it was taken")
    assert path.read_text() == "mine"


def test_another_server_that_came_after_is_not_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "kapsl.sock"
    with listening_at(path) as listener:
        listener.close()
        later = listening_at(path)
        later.__enter__()
    assert connects(path)
    later.__exit__(None, None, None)
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / ("x" * 200), tmp_path / "nowhere" / "kapsl.sock"):
        with pytest.raises(OSError, match=f"^cannot listen on {path}: "), listening_at(path):
            raise AssertionError("it was taken")
