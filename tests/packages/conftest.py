"""Archives made by hand, good and hostile."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

MANIFEST = {
    "project_name": "digits",
    "framework": "onnx",
    "version": "1.0.0",
    "created_at": "2024-05-01T12:00:00",
    "model_file": "model.onnx",
}
Member = tuple[str | tarfile.TarInfo, bytes]


def tar_bytes(members: Iterable[Member]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for header, content in members:
            if isinstance(header, str):
                header = tarfile.TarInfo(header)
                header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def good() -> list[Member]:
    """The members of a small package that loads."""
    return [("metadata.json", json.dumps(MANIFEST).encode()), ("model.onnx", b"weights"), ("model.onnx_data", b"more")]


@pytest.fixture
def write_package(tmp_path: Path) -> Callable[[Iterable[Member]], Path]:
    """Writes the members, as they are, to an `.aimod` file."""

    def write(members: Iterable[Member]) -> Path:
        path = tmp_path / "digits.aimod"
        path.write_bytes(gzip.compress(tar_bytes(members), mtime=0))
        return path

    return write


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    directory = tmp_path / "work"
    directory.mkdir()
    return directory
