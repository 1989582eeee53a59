"""Where the file of a test is, and connections that do as it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stores.connections import Connections


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs.db"


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    return Connections(monkeypatch)
