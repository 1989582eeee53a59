"""Good packages: built, loaded, removed; raw models and directories."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler.core.wire import encode_tensor
from kapsl_scheduler.errors import InvalidPackage, ModelLoadError
from kapsl_scheduler.packages import LoadedPackage, PackageLimits, build_package, load_model, load_package

Write = Callable[[Iterable[Any]], Path]


def names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def test_every_file_keeps_its_place_beside_the_model(write_package: Write, good: list[Any], workdir: Path) -> None:
    package = load_package(write_package([*good, ("labels/en.txt", b"zero\n")]), workdir=workdir)
    assert package.manifest.project_name == "digits"
    assert package.model_path == package.directory / "model.onnx"
    assert package.model_path.read_bytes() == b"weights"
    assert (package.directory / "model.onnx_data").read_bytes() == b"more"
    assert names(package.directory) == ["labels", "labels/en.txt", "metadata.json", "model.onnx", "model.onnx_data"]
    assert [path.name for path in workdir.iterdir()] == [package.directory.name]
    assert package.directory.name.startswith("digits-")


def test_each_load_has_a_directory_of_its_own_and_removes_only_that(
    write_package: Write, good: list[Any], workdir: Path
) -> None:
    path = write_package(good)
    first, second = load_package(path, workdir=workdir), load_package(path, workdir=workdir)
    first.remove()
    assert not first.directory.exists()
    assert second.model_path.exists()
    assert path.exists()


def test_warnings_of_the_manifest_are_handed_on(write_package: Write, good: list[Any], workdir: Path) -> None:
    manifest = json.dumps({**json.loads(good[0][1]), "task": "classify"}).encode()
    package = load_package(write_package([("metadata.json", manifest), *good[1:]]), workdir=workdir)
    assert package.warnings == ("task: unknown key, ignored",)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_of_other_writers_load(tar_format: int, tmp_path: Path, good: list[Any], workdir: Path) -> None:
    long = "weights/" + "x" * 90 + "/" + "y" * 90
    path = tmp_path / "x.aimod"
    with tarfile.open(path, "w:gz", format=tar_format) as tar:
        root = tarfile.TarInfo("./")
        root.type = tarfile.DIRTYPE
        tar.addfile(root)
        for name, content in [*good, (long, b"external"), ("ungefähr", b"")]:
            header = tarfile.TarInfo(f"./{name}")
            header.size, header.mode, header.uid, header.mtime = len(content), 0o4755, 1000, 1.5
            tar.addfile(header, io.BytesIO(content))
    package = load_package(path, workdir=workdir)
    assert (package.directory / long).read_bytes() == b"external"
    assert (package.directory / "ungefähr").exists()
    assert package.model_path.stat().st_mode & 0o7111 == 0  # neither set-user-id nor executable


def test_code_in_a_package_is_data(write_package: Write, good: list[Any], workdir: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    manifest = json.dumps({**json.loads(good[0][1]), "framework": "python", "model_file": "model.py"}).encode()
    code = f"import pathlib; pathlib.Path({str(ran)!r}).touch()".encode()
    package = load_package(write_package([("metadata.json", manifest), ("model.py", code)]), workdir=workdir)
    assert package.manifest.framework == "python"
    assert package.model_path.read_bytes() == code
    assert not ran.exists()


# ------------------------------------------------------------------------------------------------- build


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "churn.onnx"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def test_what_is_built_loads_again(model: Path, tmp_path: Path, workdir: Path) -> None:
    weights = tmp_path / "churn.onnx_data"
    weights.write_bytes(b"weights")
    state = np.array([[1.0, -2.0]], np.float32)
    output = build_package(
        model,
        tmp_path / "churn.aimod",
        extra_files=[weights],
        project_name="Churn",
        version="3.1",
        created_at="2024-05-01T12:00:00+00:00",
        metadata={"labels": ["stays", "leaves"]},
        hardware_requirements={"preferred_provider": "cpu", "fallback_providers": ["cuda"]},
        cron_jobs=[{"id": "beat", "schedule": {"interval_secs": 5}, "input": encode_tensor(state, base64=True)}],
    )
    package = load_package(output, workdir=workdir)
    manifest = package.manifest
    assert package.warnings == ()
    assert (manifest.project_name, manifest.version, manifest.framework) == ("Churn", "3.1", "onnx")
    assert manifest.created_at == "2024-05-01T12:00:00+00:00"
    assert manifest.metadata == {"labels": ["stays", "leaves"]}
    assert manifest.hardware_requirements.fallback_providers == ("cuda",)
    np.testing.assert_array_equal(manifest.cron_jobs[0].input, state, strict=True)
    assert package.model_path.read_bytes() == model.read_bytes()
    assert names(package.directory) == ["churn.onnx", "churn.onnx_data", "metadata.json"]


def test_the_same_input_gives_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1714564800")
    extra = [tmp_path / "a" / "b.txt", tmp_path / "b" / "a.txt"]
    for file in extra:
        file.parent.mkdir()
        file.write_text("x")
    first = build_package(model, tmp_path / "one.aimod", extra_files=extra).read_bytes()
    for file in (model, *extra):
        file.chmod(0o600)
        file.touch()
    assert build_package(model, tmp_path / "two.aimod", extra_files=reversed(extra)).read_bytes() == first
    with tarfile.open(fileobj=io.BytesIO(first)) as tar:
        assert tar.getnames() == ["metadata.json", "churn.onnx", "a.txt", "b.txt"]
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
    assert first[4:8] == bytes(4)  # gzip's own time
    assert gzip.decompress(first).count(b'"created_at": "2024-05-01T12:00:00+00:00"') == 1


def test_a_whole_manifest_serves_as_fields(model: Path, tmp_path: Path, good: list[Any], workdir: Path) -> None:
    fields = json.loads(good[0][1])
    manifest = load_package(build_package(model, tmp_path / "out.aimod", **fields), workdir=workdir).manifest
    assert (manifest.project_name, manifest.created_at) == (fields["project_name"], fields["created_at"])
    assert manifest.model_file == "churn.onnx"


def test_a_manifest_that_would_not_load_is_not_built(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.aimod"
    with pytest.raises(InvalidPackage) as caught:
        build_package(model, output, version=3, colour="red", cron_jobs=[{"id": "x"}])  # type: ignore[arg-type, call-arg]
    assert caught.value.faults == (
        "version: expected a string, got 3",
        'cron_jobs[0].schedule: expected a cron expression or {"interval_secs": seconds}, got nothing',
        "cron_jobs[0].input: expected a tensor, got nothing",
    )
    with pytest.raises(InvalidPackage) as caught:
        build_package(tmp_path / "none.onnx", output, version=3)  # type: ignore[arg-type]
    assert caught.value.faults == (f"{tmp_path / 'none.onnx'}: no such file", "version: expected a string, got 3")
    with pytest.raises(InvalidPackage, match=r"colour: unknown key, ignored$"):
        build_package(model, output, colour="red")  # type: ignore[call-arg]
    assert not output.exists()


def test_files_that_cannot_be_packed_are_all_named(model: Path, tmp_path: Path) -> None:
    bad = [tmp_path / "metadata.json", tmp_path / "missing", tmp_path / "other" / "churn.onnx", tmp_path / "a\nb"]
    bad[2].parent.mkdir()
    for file in (bad[0], bad[2], bad[3]):
        file.write_text("x")
    with pytest.raises(InvalidPackage) as caught:
        build_package(model, tmp_path / "out.aimod", extra_files=bad)
    assert sorted(caught.value.faults) == sorted(
        [
            f"{bad[0]}: a file of that name is in the package already",
            f"{bad[1]}: no such file",
            f"{bad[2]}: a file of that name is in the package already",
            "'a\\nb' has control characters",
        ]
    )
    assert not (tmp_path / "out.aimod").exists()


def test_a_directory_that_is_not_there_is_a_fault_like_others(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidPackage) as caught:
        build_package(model, tmp_path / "none" / "out.aimod")
    assert caught.value.faults == (f"{tmp_path / 'none'}: no such directory",)


def test_a_package_never_overwrites_what_goes_into_it(model: Path) -> None:
    before = model.read_bytes()
    with pytest.raises(InvalidPackage, match="would be overwritten by the package"):
        build_package(model, model)
    assert model.read_bytes() == before


def test_a_source_date_that_is_no_number(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(InvalidPackage, match="SOURCE_DATE_EPOCH: expected seconds since 1970, got 'yesterday'"):
        build_package(model, tmp_path / "out.aimod")


def test_a_build_that_fails_leaves_the_old_package(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = build_package(model, tmp_path / "out.aimod", created_at="x")
    before, files = output.read_bytes(), names(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile, "copyfileobj", full)
    with pytest.raises(OSError, match="No space left"):
        build_package(model, output, created_at="y")
    assert output.read_bytes() == before
    assert names(tmp_path) == files


# ------------------------------------------------------------------------------------------ other sources


def test_a_raw_model_gets_a_manifest_of_its_name(model: Path, workdir: Path) -> None:
    package = load_model(model, workdir=workdir)
    assert (package.manifest.project_name, package.manifest.framework) == ("churn", "onnx")
    assert (package.model_path, package.directory) == (model, model.parent)
    package.remove()
    assert model.exists()
    assert not list(workdir.iterdir())


def test_a_directory_with_a_manifest_loads_and_stays(tmp_path: Path, good: list[Any], workdir: Path) -> None:
    directory = tmp_path / "unpacked"
    directory.mkdir()
    for name, content in good:
        (directory / name).write_bytes(content)
    package = load_model(directory, workdir=workdir)
    assert package.model_path == directory / "model.onnx"
    package.remove()
    assert package.model_path.exists()
    (directory / "model.onnx").unlink()
    with pytest.raises(InvalidPackage, match=r"model_file: 'model\.onnx' is not in the package$"):
        load_model(directory, workdir=workdir)


def test_the_suffix_decides_in_any_case(write_package: Write, good: list[Any], workdir: Path) -> None:
    path = write_package(good)
    package = load_model(path.rename(path.with_suffix(".AIMOD")), workdir=workdir)
    assert isinstance(package, LoadedPackage)
    with pytest.raises(InvalidPackage, match=r"expected \.aimod, \.onnx or a directory with metadata\.json$"):
        load_model(path.with_suffix(".gguf"), workdir=workdir)


@pytest.mark.parametrize("name", ["none.aimod", "none.onnx"])
def test_a_missing_file_is_a_load_error(name: str, tmp_path: Path, workdir: Path) -> None:
    with pytest.raises(ModelLoadError, match=rf"{name}.*[Nn]o such file"):
        load_model(tmp_path / name, workdir=workdir)
    assert not list(workdir.iterdir())


def test_a_full_disk_is_a_load_error_and_leaves_nothing(
    write_package: Write, good: list[Any], workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kapsl_scheduler.packages.aimod.shutil.copyfileobj", full)
    with pytest.raises(ModelLoadError, match="No space left") as caught:
        load_package(write_package(good), workdir=workdir, limits=PackageLimits())
    assert not isinstance(caught.value, InvalidPackage)
    assert not list(workdir.iterdir())
