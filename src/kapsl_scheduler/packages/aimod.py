"""Packages as files: `.aimod` archives (tar.gz) in and out, and raw model files.

An archive is taken for hostile. It is unpacked front to back under bounds that hold while bytes come out of it,
into a directory that gets its name only when the package is whole. Nothing in a package is ever run. The form
of the manifest is `packages.manifest`; opening the model is the engine's business.
"""

from __future__ import annotations

import gzip
import io
import os
import reprlib
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Self, TypedDict, Unpack, cast

import msgspec

from kapsl_scheduler.errors import InvalidPackage, ModelLoadError
from kapsl_scheduler.packages.manifest import Manifest, package_path, parse_manifest

__all__ = ["LoadedPackage", "ManifestFields", "PackageLimits", "build_package", "load_model", "load_package"]

_MANIFEST: Final = "metadata.json"
_STAGING: Final = ".loading-"
_CHUNK: Final = 1 << 20
# What one member's headers may take, extended ones included. tarfile reads those into memory whole, and on
# interpreters before 3.11.10 searches them in quadratic time.
_HEADER_ROOM: Final = 16 << 10
# What tarfile and gzip raise on bytes that are no archive, found by fuzzing them.
_UNREADABLE: Final = (
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    ValueError,
    LookupError,
    ArithmeticError,
)
_SPECIAL: Final[Mapping[bytes, str]] = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a fifo",
}


class PackageLimits(msgspec.Struct, frozen=True):
    """Bounds on what a package may unpack to. Sizes are bytes.

    `max_ratio` bounds what comes out by the size of the archive, once that is more than `ratio_free_bytes`.
    """

    max_members: int = 1024
    max_member_bytes: int = 16 << 30
    max_total_bytes: int = 32 << 30
    max_manifest_bytes: int = 16 << 20
    max_ratio: int = 200
    ratio_free_bytes: int = 64 << 20


class LoadedPackage(msgspec.Struct, frozen=True):
    """A model on disk. `directory` holds the model file and the files beside it."""

    manifest: Manifest
    directory: Path
    model_path: Path
    _unpacked: bool = False

    @property
    def warnings(self) -> tuple[str, ...]:
        """What was ignored in the manifest, each with its path."""
        return self.manifest.warnings

    def remove(self) -> None:
        """Delete what was unpacked. A raw model file or a directory of the caller's own stays."""
        if self._unpacked:
            shutil.rmtree(self.directory, ignore_errors=True)


class ManifestFields(TypedDict, total=False):
    """The keys of a manifest that `build_package` takes, in their JSON form (tensors as `encode_tensor` gives)."""

    project_name: str
    framework: str
    version: str
    created_at: str
    metadata: Any
    hardware_requirements: Mapping[str, Any]
    cron_jobs: Sequence[Mapping[str, Any]]


class _Refused(Exception):
    """The archive breaks a rule of this module. The message names the member where there is one."""


# -------------------------------------------------------------------------------------------------- load


def load_model(path: str | Path, *, workdir: str | Path, limits: PackageLimits | None = None) -> LoadedPackage:
    """Load an `.aimod` package, a raw `.onnx` file or a directory that holds a `metadata.json`.

    A raw file gets a manifest named after it. `workdir` and what is raised are as in `load_package`.
    """
    path = Path(path)
    load = _LOADERS.get("directory" if path.is_dir() else path.suffix.lower())
    if load is None:
        raise InvalidPackage([f"expected .aimod, .onnx or a directory with {_MANIFEST}"], source=str(path))
    return load(path, workdir=Path(workdir), limits=limits or PackageLimits())


def load_package(path: str | Path, *, workdir: str | Path, limits: PackageLimits | None = None) -> LoadedPackage:
    """Unpack a package into a new directory under `workdir` and read its manifest.

    Every file keeps its place beside the model file. A failed load leaves nothing in `workdir`; `remove()` of
    the result deletes what a good one left. Raises `InvalidPackage` naming the member at fault or every fault of
    the manifest, and `ModelLoadError` where the file system refuses.
    """
    path, workdir, limits = Path(path), Path(workdir), limits or PackageLimits()
    try:
        with _staging(workdir) as staging:
            _unpack(path, staging, limits)
            manifest = _read_manifest(staging, limits, source=str(path))
            directory = staging.rename(workdir / f"{path.stem[:40]}-{staging.name.removeprefix(_STAGING)}")
    except OSError as error:
        raise ModelLoadError(f"{path}: {error}") from error
    return LoadedPackage(manifest, directory, directory / manifest.model_file, True)


def _load_directory(path: Path, *, workdir: Path, limits: PackageLimits) -> LoadedPackage:
    manifest = _read_manifest(path, limits, source=str(path))
    return LoadedPackage(manifest, path, path / manifest.model_file)


def _load_raw(path: Path, *, workdir: Path, limits: PackageLimits) -> LoadedPackage:
    if not path.is_file():
        raise ModelLoadError(f"{path}: no such file")
    manifest = Manifest(path.stem, "onnx", "1.0.0", "", path.name)
    return LoadedPackage(manifest, path.parent, path)


_LOADERS: Final[Mapping[str, Callable[..., LoadedPackage]]] = {
    ".aimod": load_package,
    ".onnx": _load_raw,
    "directory": _load_directory,
}


@contextmanager
def _staging(workdir: Path) -> Iterator[Path]:
    """A new directory that is gone afterwards, unless it was renamed."""
    workdir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix=_STAGING, dir=workdir))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _read_manifest(directory: Path, limits: PackageLimits, *, source: str) -> Manifest:
    file = directory / _MANIFEST
    if not file.is_file():
        raise InvalidPackage([f"{_MANIFEST}: missing"], source=source)
    if file.stat().st_size > limits.max_manifest_bytes:
        raise InvalidPackage([f"{_MANIFEST}: more than {limits.max_manifest_bytes} bytes"], source=source)
    manifest = parse_manifest(file.read_bytes(), source=source)
    if not (directory / manifest.model_file).is_file():
        raise InvalidPackage([f"model_file: {manifest.model_file!r} is not in the package"], source=source)
    return manifest


# ------------------------------------------------------------------------------------------------ unpack


def _unpack(path: Path, into: Path, limits: PackageLimits) -> None:
    with path.open("rb") as archive:
        try:
            _unpack_members(archive, into, limits)
        except _Refused as error:
            raise InvalidPackage([str(error)], source=str(path)) from error
        except _UNREADABLE as error:
            raise InvalidPackage([f"not a readable tar.gz archive: {error}"], source=str(path)) from error


def _unpack_members(archive: BinaryIO, into: Path, limits: PackageLimits) -> None:
    packed = os.fstat(archive.fileno()).st_size
    budget = min(limits.max_total_bytes, max(limits.ratio_free_bytes, limits.max_ratio * packed))
    stream = _Inflated(archive, budget)
    count = written = 0
    stream.allow(_HEADER_ROOM)
    with tarfile.TarFile(fileobj=stream, tarinfo=_Header, encoding="utf-8") as tar:
        while (member := tar.next()) is not None:
            count += 1
            written += member.size  # beside what the stream counts: the holes of a sparse file are not in it
            if count > limits.max_members:
                raise _Refused(f"more than {limits.max_members} members")
            if not 0 <= member.size <= limits.max_member_bytes:
                raise _Refused(f"{reprlib.repr(member.name)} is too large: {member.size} bytes")
            if written > budget:
                raise _over(budget)
            stream.allow(member.size)
            _place(tar, member, into)
            stream.allow(_HEADER_ROOM)
    stream.drain()


def _place(tar: tarfile.TarFile, member: tarfile.TarInfo, into: Path) -> None:
    name = reprlib.repr(member.name)
    if not (member.isreg() or member.isdir()):
        raise _Refused(
            f"{name} is {_SPECIAL.get(member.type, 'of an unknown type')}; only files and directories may be"
        )
    try:
        target = into / package_path(member.name)
    except ValueError as error:
        raise _Refused(f"{name} {error}") from error
    try:
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            shutil.copyfileobj(cast(IO[bytes], tar.extractfile(member)), file, _CHUNK)
    except (FileExistsError, NotADirectoryError) as error:
        raise _Refused(f"{name} is there twice, or as a file and as a directory") from error


def _over(budget: int) -> _Refused:
    return _Refused(f"unpacks to more than {budget} bytes, the bound for an archive of its size")


class _Header(tarfile.TarInfo):
    """One header. A damaged one is an error; tarfile would silently take it for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf.strip(b"\0"):
                raise tarfile.ReadError(f"damaged header: {error}") from error
            raise


class _Inflated(io.RawIOBase):
    """The archive after gunzip, for tarfile: forward only, and never more than was allowed.

    Whatever lengths and offsets the headers claim, memory, time and disk are bounded by what this lets through:
    `budget` bytes in all, and at most `allow(count)` more at any time.
    """

    def __init__(self, archive: BinaryIO, budget: int) -> None:
        self._source = gzip.GzipFile(fileobj=archive)
        self._budget = budget
        self._position = 0
        self._fence = 0

    def allow(self, count: int) -> None:
        self._fence = self._position + count

    def read(self, size: int = -1, /) -> bytes:
        if not 0 <= size <= self._fence - self._position:
            raise tarfile.ReadError(f"header claims {size} bytes")
        data = self._source.read(size)
        self._position += len(data)
        if self._position > self._budget:
            raise _over(self._budget)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if offset < self._position:
            raise tarfile.ReadError("header points backwards")
        while self._position < offset and self.read(min(_CHUNK, offset - self._position)):
            pass
        return self._position

    def tell(self) -> int:
        return self._position

    def drain(self) -> None:
        """Read to the end, where gzip keeps its checksum."""
        self.allow(_CHUNK)
        while self.read(_CHUNK):
            self.allow(_CHUNK)


# ------------------------------------------------------------------------------------------------- build


def build_package(
    model_file: str | Path,
    output: str | Path,
    /,
    *,
    extra_files: Iterable[str | Path] = (),
    **fields: Unpack[ManifestFields],
) -> Path:
    """Write a package of `model_file` and `extra_files`, all at its top level, and return `output`.

    The same input gives the same bytes; without `created_at` that takes SOURCE_DATE_EPOCH to be set. `fields`
    are checked as a manifest is at load; a `model_file` among them gives way to the file's own name. Raises
    `InvalidPackage` with every fault, before anything is written.
    """
    model, output = Path(model_file), Path(output)
    files = [model, *sorted(map(Path, extra_files), key=lambda file: file.name)]
    document = {
        "project_name": model.stem,
        "framework": "onnx",
        "version": "1.0.0",
        "created_at": fields.get("created_at") or _now(),
        **fields,
        "model_file": model.name,
    }
    encoded = msgspec.json.format(msgspec.json.encode(document))
    faults = [*_file_faults(files, output), *_manifest_faults(encoded)]
    if faults:
        raise InvalidPackage(faults, source=str(output))
    _write(output, encoded, files)
    return output


def _now() -> str:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)
    except (ValueError, OverflowError, OSError):
        raise InvalidPackage([f"SOURCE_DATE_EPOCH: expected seconds since 1970, got {epoch!r}"]) from None
    return moment.isoformat(timespec="seconds")


def _manifest_faults(encoded: bytes) -> Sequence[str]:
    """What is wrong with the manifest; what a reader would ignore is wrong in one that we write."""
    try:
        return parse_manifest(encoded).warnings
    except InvalidPackage as error:
        return error.faults


def _file_faults(files: Sequence[Path], output: Path) -> Iterator[str]:
    if not output.parent.is_dir():
        yield f"{output.parent}: no such directory"
    taken = {_MANIFEST}
    for file in files:
        if not file.is_file():
            yield f"{file}: no such file"
        elif output.exists() and file.samefile(output):
            yield f"{file}: would be overwritten by the package"
        if file.name in taken:
            yield f"{file}: a file of that name is in the package already"
        taken.add(file.name)
        try:
            package_path(file.name)
        except ValueError as error:
            yield f"{reprlib.repr(file.name)} {error}"


def _write(output: Path, manifest: bytes, files: Sequence[Path]) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        with (
            partial.open("wb") as raw,
            gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as packed,
            tarfile.TarFile(fileobj=packed, mode="w", format=tarfile.GNU_FORMAT) as tar,
        ):
            _add(tar, _MANIFEST, len(manifest), io.BytesIO(manifest))
            for file in files:
                with file.open("rb") as content:
                    _add(tar, file.name, os.fstat(content.fileno()).st_size, content)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def _add(tar: tarfile.TarFile, name: str, size: int, content: BinaryIO) -> None:
    header = tarfile.TarInfo(name)  # its defaults are the same everywhere: owner 0, time 0, mode 644
    header.size = size
    tar.addfile(header, content)
