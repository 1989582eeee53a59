"""The composition root in process: what becomes of a package's files, and the limit on open files."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from kapsl_scheduler import app
from kapsl_scheduler.config import Config
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.errors import ModelLoadError
from kapsl_scheduler.packages import build_package, load_package
from kapsl_scheduler.runtime.registry import ModelRegistry


@pytest.mark.slow
async def test_what_a_package_was_unpacked_to_goes_with_its_model(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    unpacked = tmp_path / "unpacked"
    given = [f"old={PACKAGE}", f"new={PACKAGE}", f"bad={build_package(broken, tmp_path / 'broken.aimod')}"]
    old, new, bad = await app._open_all(Config(), given, unpacked)
    assert len(list(unpacked.iterdir())) == 3

    async with ModelRegistry(app._start) as registry:
        await registry.load("digits", old)
        with pytest.raises(ModelLoadError):
            await registry.replace("digits", bad)
        assert set(unpacked.iterdir()) == {old.package.directory, new.package.directory}

        await registry.replace("digits", new)
        assert list(unpacked.iterdir()) == [new.package.directory]

        await registry.unload("digits")
        assert list(unpacked.iterdir()) == []


async def test_what_a_manifest_says_in_vain_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    package = load_package(PACKAGE, workdir=tmp_path)
    manifest = package.directory / "metadata.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"task": "digits"}))
    shutil.move(package.directory, tmp_path / "model")

    await app._open_all(Config(), [str(tmp_path / "model")], tmp_path)

    assert caplog.messages == [f"{tmp_path / 'model'}: task: unknown key, ignored"]


@pytest.fixture
def limit() -> Iterator[tuple[int, int]]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield limits
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_the_limit_on_open_files_is_raised_as_far_as_it_may_and_never_lowered(limit: tuple[int, int]) -> None:
    hard = limit[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))

    for wanted, got in [(300, 300), (250, 300), *([(hard + 1, hard)] if hard > 0 else [])]:
        app._allow_files(wanted)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (got, hard)
