"""Hostile and damaged archives: refused by name, within bounds, with nothing left behind."""

from __future__ import annotations

import gzip
import json
import random
import tarfile
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kapsl_scheduler.errors import InvalidPackage
from kapsl_scheduler.packages import PackageLimits, load_package

Write = Callable[[Iterable[Any]], Path]
SMALL = PackageLimits(
    max_members=8,
    max_member_bytes=2 << 20,
    max_total_bytes=3 << 20,
    max_manifest_bytes=64 << 10,
    max_ratio=20,
    ratio_free_bytes=1 << 20,
)
SECRET = "outside.txt"


@pytest.fixture
def refuse(tmp_path: Path, workdir: Path) -> Iterator[Callable[[Path], str]]:
    """Loads what must be refused, and gives the one fault. Nothing outside may have changed in the meantime."""
    (tmp_path / SECRET).write_text("secret")

    def load(path: Path) -> str:
        with pytest.raises(InvalidPackage) as caught:
            load_package(path, workdir=workdir, limits=SMALL)
        assert str(caught.value).startswith(f"{path}: ")
        (fault,) = caught.value.faults
        return fault

    yield load
    assert list(workdir.iterdir()) == []
    assert (tmp_path / SECRET).read_text() == "secret"
    assert {path.name for path in tmp_path.iterdir()} <= {SECRET, "work", "digits.aimod"}


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, target
    return header, b""


def raw_header(name: bytes, size: bytes = b"00000000000\0", kind: bytes = b"0", rest: bytes = b"") -> bytes:
    """A GNU header with any bytes in it, and the right checksum. `rest` is what follows the device numbers."""
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size + b"00000000000\0" + bytes(8) + kind
    block += bytes(100) + b"ustar  \0" + bytes(64) + bytes(16) + rest
    return with_checksum(block.ljust(512, b"\0"))


def with_checksum(block: bytes) -> bytes:
    return block[:148] + b"%06o\0 " % sum(block[:148] + b" " * 8 + block[156:]) + block[156:]


def extended_header(record: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """A pax record, and the file that it is about."""
    return raw_header(b"x", b"%011o\0" % len(record), kind) + record.ljust(512, b"\0") + raw_header(b"a")


def sparse_header(name: bytes, stored: int, size: int, *pieces: tuple[int, int]) -> bytes:
    """A GNU sparse file of `size` bytes, of which only the pieces (offset, length) are stored."""
    table = b"".join(b"%011o\0" % number for piece in pieces for number in piece).ljust(96, b"\0")
    rest = bytes(41) + table + b"\0" + b"%011o\0" % size
    return raw_header(name, b"%011o\0" % stored, tarfile.GNUTYPE_SPARSE, rest)


def gnu_size(size: int) -> bytes:
    return b"\x80" + size.to_bytes(11) if size >= 0 else (256**12 + size).to_bytes(12)


END = bytes(1024)


def over(budget: int) -> str:
    return f"unpacks to more than {budget} bytes, the bound for an archive of its size"


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        (f"../{SECRET}", "leaves the package"),
        (f"a/../../{SECRET}", "leaves the package"),
        (f"..\\{SECRET}", "leaves the package"),
        ("/outside.txt", "is an absolute path"),
        ("C:\\outside.txt", "is an absolute path"),
        ("a\x01b", "has control characters"),
        ("x" * 256, "has a name of more than 255 bytes"),
        ("a/" * 40 + "b", "is longer than 512 bytes or 16 levels"),
    ],
)
def test_names_that_lead_out(name: str, fault: str, good: list[Any], write_package: Write, refuse: Any) -> None:
    assert refuse(write_package([*good, (name, b"evil")])).endswith(f" {fault}")
    directory = special(name, tarfile.DIRTYPE)
    assert refuse(write_package([*good, directory])).endswith(f" {fault}")


@pytest.mark.parametrize(
    ("kind", "target", "fault"),
    [
        (tarfile.SYMTYPE, f"../../{SECRET}", "'extra' is a symbolic link"),
        (tarfile.SYMTYPE, "model.onnx", "'extra' is a symbolic link"),
        (tarfile.LNKTYPE, "model.onnx", "'extra' is a hard link"),
        (tarfile.LNKTYPE, f"../{SECRET}", "'extra' is a hard link"),
        (tarfile.CHRTYPE, "", "'extra' is a character device"),
        (tarfile.BLKTYPE, "", "'extra' is a block device"),
        (tarfile.FIFOTYPE, "", "'extra' is a fifo"),
        (b"V", "", "'extra' is of an unknown type"),
    ],
)
def test_what_is_neither_file_nor_directory(
    kind: bytes, target: str, fault: str, good: list[Any], write_package: Write, refuse: Any
) -> None:
    assert refuse(write_package([special("extra", kind, target), *good])) == (
        f"{fault}; only files and directories may be"
    )


def test_a_file_cannot_be_written_through_a_link(good: list[Any], write_package: Write, refuse: Any) -> None:
    link = special("dir", tarfile.SYMTYPE, "..")
    assert refuse(write_package([link, (f"dir/{SECRET}", b"evil"), *good])).startswith("'dir' is a symbolic link")


@pytest.mark.parametrize(
    "extra",
    [
        [("model.onnx", b"other")],
        [("./model.onnx", b"other")],
        [("metadata.json", b"{}")],
        [("model.onnx/inside", b"")],
        [("model.onnx/deep/inside", b"")],
        [("dir/file", b""), ("dir", b"")],
        [special("model.onnx", tarfile.DIRTYPE)],
        [(".", b"")],
    ],
    ids=[
        "same name",
        "same place",
        "manifest",
        "below a file",
        "deep below a file",
        "file over directory",
        "directory over file",
        "root",
    ],
)
def test_members_that_are_there_twice(extra: list[Any], good: list[Any], write_package: Write, refuse: Any) -> None:
    assert refuse(write_package([*good, *extra])).endswith(" is there twice, or as a file and as a directory")


def test_too_many_members(good: list[Any], write_package: Write, refuse: Any, workdir: Path) -> None:
    filling = [(f"file{index}", b"") for index in range(SMALL.max_members - len(good))]
    package = load_package(write_package([*good, *filling]), workdir=workdir, limits=SMALL)
    package.remove()
    assert refuse(write_package([*good, *filling, ("straw", b"")])) == "more than 8 members"


def test_a_member_too_large(good: list[Any], write_package: Write, refuse: Any) -> None:
    size = SMALL.max_member_bytes + 1
    big = random.Random(0).randbytes(size)
    assert refuse(write_package([*good, ("big", big)])) == f"'big' is too large: {size} bytes"


def test_too_much_in_all(good: list[Any], write_package: Write, refuse: Any) -> None:
    parts = [(f"part{index}", random.Random(index).randbytes(3 << 19)) for index in range(2)]
    assert refuse(write_package([*good, *parts])) == over(SMALL.max_total_bytes)


def test_a_manifest_too_large(good: list[Any], write_package: Write, refuse: Any) -> None:
    manifest = good[0][1].ljust(SMALL.max_manifest_bytes + 1)
    assert refuse(write_package([("metadata.json", manifest), *good[1:]])) == "metadata.json: more than 65536 bytes"


def test_a_bomb_of_zeros(good: list[Any], write_package: Write, refuse: Any) -> None:
    path = write_package([*good, ("bomb", bytes(2 << 20))])
    assert path.stat().st_size * SMALL.max_ratio < SMALL.ratio_free_bytes
    assert refuse(path) == over(SMALL.ratio_free_bytes)


def test_a_bomb_after_the_end_of_the_archive(good: list[Any], write_package: Write, refuse: Any) -> None:
    path = write_package(good)
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(3 << 20)))
    assert refuse(path) == over(SMALL.ratio_free_bytes)


def test_an_honest_sparse_member_loads_with_its_holes(good: list[Any], write_package: Write, workdir: Path) -> None:
    path = write_package(good)
    members = gzip.decompress(path.read_bytes())[: 2 * 512 * len(good)]
    stored = b"head".ljust(512, b".") + b"tail".ljust(512, b".")
    sparse = sparse_header(b"holes", 1024, 100_000, (4096, 512), (65536, 512), (100_000, 0)) + stored
    path.write_bytes(gzip.compress(members + sparse + END))
    package = load_package(path, workdir=workdir, limits=SMALL)
    content = (package.directory / "holes").read_bytes()
    assert len(content) == 100_000
    assert (content[4096:4608], content[65536:66048]) == (stored[:512], stored[512:])
    assert content.count(0) == 100_000 - 1024


def test_a_sparse_bomb_costs_nothing(write_package: Write, refuse: Any) -> None:
    path = write_package([])
    path.write_bytes(gzip.compress(sparse_header(b"bomb", 0, 2 << 20) + END))
    assert refuse(path) == over(SMALL.ratio_free_bytes)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_bomb_in_a_header_is_not_read_into_memory(kind: bytes, write_package: Write, refuse: Any) -> None:
    path = write_package([])
    size = 16 << 20
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(raw_header(b"long", gnu_size(size), kind))
    packed += b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()
    path.write_bytes(packed)
    tracemalloc.start()
    try:
        assert refuse(path) == f"not a readable tar.gz archive: header claims {size} bytes"
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_headers_upon_headers(write_package: Write, refuse: Any) -> None:
    path = write_package([])
    path.write_bytes(gzip.compress(raw_header(b"g", kind=tarfile.XGLTYPE) * 2000 + END))
    assert refuse(path).startswith("not a readable tar.gz archive: ")


@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"Z"])
@pytest.mark.parametrize("size", [-512, -(2**40), 2**62], ids=["one block back", "far back", "huge"])
def test_sizes_that_lie(kind: bytes, size: int, write_package: Write, refuse: Any) -> None:
    path = write_package([])
    path.write_bytes(gzip.compress(raw_header(b"liar", gnu_size(size), kind) + bytes(1024) + END))
    assert str(size) in refuse(path)


def test_a_member_that_overlaps_the_next(write_package: Write, refuse: Any) -> None:
    path = write_package([])
    everywhere = extended_header(b"13 size=1024\n", tarfile.XGLTYPE)
    path.write_bytes(gzip.compress(everywhere + raw_header(b"b") + END))
    assert refuse(path) == "not a readable tar.gz archive: header points backwards"


def test_a_name_that_is_not_utf8(write_package: Write, refuse: Any) -> None:
    path = write_package([])
    path.write_bytes(gzip.compress(raw_header(b"mod\xe9le.onnx") + END))
    assert refuse(path) == "'mod\\udce9le.onnx' is not UTF-8"


def test_a_name_with_a_nul_in_an_extended_header(write_package: Write, refuse: Any) -> None:
    path = write_package([])
    path.write_bytes(gzip.compress(extended_header(b"15 path=a\0evil\n") + END))
    assert refuse(path) == "'a\\x00evil' has control characters"


def test_no_manifest(good: list[Any], write_package: Write, refuse: Any) -> None:
    assert refuse(write_package(good[1:])) == "metadata.json: missing"
    assert refuse(write_package([])) == "metadata.json: missing"
    assert refuse(write_package([special("metadata.json", tarfile.DIRTYPE), *good[1:]])) == "metadata.json: missing"


def test_no_model_file(good: list[Any], write_package: Write, refuse: Any) -> None:
    fault = "model_file: 'model.onnx' is not in the package"
    assert refuse(write_package([good[0], good[2]])) == fault
    assert refuse(write_package([good[0], special("model.onnx", tarfile.DIRTYPE)])) == fault


def test_a_model_file_outside_the_package(good: list[Any], write_package: Write, refuse: Any) -> None:
    manifest = json.dumps({**json.loads(good[0][1]), "model_file": f"../../{SECRET}"}).encode()
    assert refuse(write_package([("metadata.json", manifest)])) == f"model_file: '../../{SECRET}' leaves the package"


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "empty file"),
        (b"PK\x03\x04 a zip file", "Not a gzipped file (b'PK')"),
        (b"\x1f\x8b\x08", "Compressed file ended before the end-of-stream marker was reached"),
        (gzip.compress(b"text, and no archive at all"), "damaged header: "),
        (gzip.compress(b"x" * 2000), "damaged header: "),
    ],
    ids=["empty", "zip", "magic only", "short text", "long text"],
)
def test_what_is_no_archive(data: bytes, fault: str, write_package: Write, refuse: Any) -> None:
    path = write_package([])
    path.write_bytes(data)
    assert refuse(path).startswith(f"not a readable tar.gz archive: {fault}")


def test_a_truncated_archive_is_refused_wherever_it_is_cut(good: list[Any], write_package: Write, refuse: Any) -> None:
    path = write_package([*good, ("noise", random.Random(0).randbytes(1000))])
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        assert refuse(path).startswith("not a readable tar.gz archive: ")


def test_a_damaged_header_is_not_the_end_of_the_archive(good: list[Any], write_package: Write, refuse: Any) -> None:
    path = write_package(good)
    tar = bytearray(gzip.decompress(path.read_bytes()))
    tar[2048 + 148] ^= 1  # the checksum of the last of three members
    path.write_bytes(gzip.compress(tar))
    assert refuse(path).startswith("not a readable tar.gz archive: damaged header: ")
    path.write_bytes(gzip.compress(gzip.decompress(write_package(good).read_bytes())[: 2048 + 100]))
    assert refuse(path).startswith("not a readable tar.gz archive: damaged header: truncated header")


def test_the_checksum_at_the_end_is_looked_at(good: list[Any], write_package: Write, refuse: Any) -> None:
    path = write_package(good)
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    assert refuse(path).startswith("not a readable tar.gz archive: CRC check failed")


def test_damaged_compression_is_refused(good: list[Any], write_package: Write, refuse: Any) -> None:
    path = write_package([*good, ("long", random.Random(0).randbytes(30_000).hex().encode())])
    whole = path.read_bytes()
    faults = []
    for at in range(10, len(whole) - 8, len(whole) // 40):  # between gzip's header and its checksum
        path.write_bytes(whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        faults.append(refuse(path))
    assert any("Error -3 while decompressing data" in fault for fault in faults)


@pytest.mark.parametrize(
    "header",
    [
        sparse_header(b"open", 0, 10)[:482] + b"\1" + sparse_header(b"open", 0, 10)[483:],
        extended_header(b"24 GNU.sparse.map=a,b,c\n"),
        extended_header(b"9" * 30 + b" path=x\n"),
        extended_header(b"0 path=x\n"),
    ],
    ids=["sparse table cut off", "sparse map of words", "endless record", "empty record"],
)
def test_headers_that_trip_tarfile(header: bytes, write_package: Write, refuse: Any) -> None:
    path = write_package([])
    path.write_bytes(gzip.compress(with_checksum(header[:512]) + header[512:]))
    assert refuse(path).startswith("not a readable tar.gz archive: ")


# ------------------------------------------------------------------------------------------------ random


fuzz = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
edits = st.lists(st.tuples(st.integers(0, 2**16), st.binary(max_size=12), st.integers(0, 12)), min_size=1, max_size=4)


def edited(data: bytes, changes: list[tuple[int, bytes, int]]) -> bytes:
    for at, piece, cut in changes:
        at %= len(data) + 1
        data = data[:at] + piece + data[at + cut :]
    return data


def check_whole_or_refused(path: Path, workdir: Path) -> None:
    """Either a whole package or `InvalidPackage`; in both cases nothing else in `workdir`."""
    try:
        package = load_package(path, workdir=workdir, limits=SMALL)
    except InvalidPackage:
        pass
    else:
        assert package.model_path.is_file()
        assert [package.directory] == list(workdir.iterdir())
        package.remove()
    assert not list(workdir.iterdir())


@pytest.mark.slow
@fuzz
@given(data=st.binary(max_size=2000), wrapped=st.booleans())
def test_random_bytes(data: bytes, wrapped: bool, tmp_path: Path, workdir: Path) -> None:
    path = tmp_path / "random.aimod"
    path.write_bytes(gzip.compress(data) if wrapped else data)
    check_whole_or_refused(path, workdir)


@pytest.mark.slow
@fuzz
@given(changes=edits)
def test_a_package_with_changed_bytes(
    changes: list[tuple[int, bytes, int]], good: list[Any], write_package: Write, workdir: Path
) -> None:
    path = write_package(good)
    path.write_bytes(edited(path.read_bytes(), changes))
    check_whole_or_refused(path, workdir)


@pytest.mark.slow
@fuzz
@given(
    kinds=st.lists(st.sampled_from([b"0", b"5", b"1", b"2", b"S", b"x", b"g", b"L", b"K", b"7", b"Z"]), max_size=4),
    sizes=st.lists(st.integers(-(2**70), 2**70) | st.integers(0, 2048), min_size=4, max_size=4),
    bodies=st.lists(
        st.binary(max_size=40) | st.sampled_from([b"20 path=../evil\n", b"11 size=-1\n"]), min_size=4, max_size=4
    ),
    changes=edits | st.just([]),
)
def test_an_archive_of_strange_headers(
    kinds: list[bytes],
    sizes: list[int],
    bodies: list[bytes],
    changes: list[tuple[int, bytes, int]],
    tmp_path: Path,
    workdir: Path,
) -> None:
    tar = b""
    for kind, size, body in zip(kinds, sizes, bodies, strict=False):
        tar += raw_header(b"name", gnu_size(size), kind, rest=body) + body.ljust(512, b"\0")
    path = tmp_path / "strange.aimod"
    path.write_bytes(gzip.compress(edited(tar + END, changes)))
    check_whole_or_refused(path, workdir)
