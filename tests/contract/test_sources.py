"""One contract for every source: each format of a folder."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler.errors import InvalidInput
from kapsl_scheduler.ports import Source, SourceItem
from kapsl_scheduler.sources import FolderSource
from tests.sources.files import FORMATS, WIDTH, Format, firing, remember


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def form(request: pytest.FixtureRequest) -> Format:
    return request.param


def numbers(form: Format, count: int = 10, start: int = 0) -> Any:
    """Rows that differ from one another; one where a file is a row."""
    count = 1 if form.alone else count
    return (np.arange(count * WIDTH).reshape(count, WIDTH) + start).astype(np.float32)


def fill(folder: Path, form: Format, *names: str) -> list[tuple[str, Any]]:
    """Files of these names; keys and rows in the order in which they are to come."""
    expected = []
    for place, name in enumerate(names):
        rows = numbers(form, start=place * 40)
        path = folder / f"{name}{form.suffix}"
        path.parent.mkdir(exist_ok=True)
        form.write(path, rows)
        expected += [(form.key(f"{name}{form.suffix}", row), values) for row, values in enumerate(rows)]
    return expected


def read(source: FolderSource, memory: dict[str, str] | None = None) -> list[SourceItem]:
    return list(source.items(firing(), memory or {}))


def assert_same(items: list[SourceItem], expected: list[tuple[str, Any]]) -> None:
    assert [item.key for item in items] == [key for key, _ in expected]
    for item, (_, values) in zip(items, expected, strict=True):
        assert item.error is None
        np.testing.assert_array_equal(item.request, [values])
        assert item.request.dtype == values.dtype


def test_it_satisfies_the_port_and_can_be_stored(form: Format, tmp_path: Path) -> None:
    source = form.source(tmp_path, rows=2)
    assert isinstance(source, Source)
    stored = msgspec.json.encode(source)
    assert msgspec.json.decode(stored)["type"] == "folder"
    assert msgspec.json.decode(stored, type=FolderSource) == source


def test_requests_come_by_path_then_by_row(form: Format, tmp_path: Path) -> None:
    expected = fill(tmp_path, form, "a", "a1", "b")
    items = read(form.source(tmp_path))
    assert_same(items, expected)
    progress = [item.progress for item in items]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0


def test_several_rows_make_one_request_of_one_file(form: Format, tmp_path: Path) -> None:
    fill(tmp_path, form, "a", "b")
    items = read(form.source(tmp_path, rows=4))
    spans = [(0, 0)] if form.alone else [(0, 3), (4, 7), (8, 9)]
    assert [item.key for item in items] == [
        form.key(f"{name}{form.suffix}", first, last) for name in "ab" for first, last in spans
    ]
    together = np.concatenate([item.request for item in items])
    np.testing.assert_array_equal(together, np.concatenate([numbers(form), numbers(form, start=40)]))


def test_what_was_delivered_does_not_come_again(form: Format, tmp_path: Path) -> None:
    fill(tmp_path, form, "a", "b")
    source = form.source(tmp_path)
    memory = remember({}, read(source))
    assert read(source, memory) == []

    expected = fill(tmp_path, form, "c")
    assert_same(read(source, memory), expected)


@pytest.mark.parametrize("rows", [1, 3])
def test_after_any_prefix_exactly_the_rest_comes(form: Format, tmp_path: Path, rows: int) -> None:
    fill(tmp_path, form, "a", "b")
    source = form.source(tmp_path, rows=rows)
    items = read(source)
    for done in range(len(items) + 1):
        rest = read(source, remember({}, items[:done]))
        assert [item.key for item in rest] == [item.key for item in items[done:]]
        for item, original in zip(rest, items[done:], strict=True):
            np.testing.assert_array_equal(item.request, original.request)
            assert item.marks == original.marks


def test_a_file_that_was_changed_comes_anew(form: Format, tmp_path: Path) -> None:
    expected = fill(tmp_path, form, "a", "b")
    source = form.source(tmp_path)
    items = read(source)
    os.utime(tmp_path / f"a{form.suffix}", ns=(1, 1))
    halfway = remember({}, items[: len(numbers(form)) // 2])
    assert_same(read(source, halfway), expected)
    whole = remember({}, items)
    assert_same(read(source, whole), [each for each in expected if each[0].startswith("a")])


def test_a_file_that_is_gone_is_forgotten(form: Format, tmp_path: Path) -> None:
    fill(tmp_path, form, "a", "b")
    source = form.source(tmp_path)
    memory = remember({"sink:x": "not the source's"}, read(source))
    (tmp_path / f"a{form.suffix}").unlink()
    fill(tmp_path, form, "c")
    memory = remember(memory, read(source, memory))
    assert sorted(memory) == ["sink:x", f"source:b{form.suffix}", f"source:c{form.suffix}"]


def test_a_file_that_goes_while_others_are_read_is_passed_over(form: Format, tmp_path: Path) -> None:
    expected = fill(tmp_path, form, "a", "b", "c")
    items = form.source(tmp_path).items(firing(), {})
    first = next(items)
    (tmp_path / f"b{form.suffix}").unlink()
    assert_same([first, *items], [each for each in expected if not each[0].startswith("b")])


def test_every_firing_reads_all_where_that_is_asked_for(form: Format, tmp_path: Path) -> None:
    expected = fill(tmp_path, form, "a", "b")
    source = form.source(tmp_path, again="always")
    items = read(source)
    assert_same(items, expected)
    assert_same(list(source.items(firing(hour=4), remember({}, items))), expected)
    resumed = source.items(firing(attempt=2), remember({}, items[:1]))
    assert_same(list(resumed), expected[1:])


def test_a_bad_row_is_an_error_in_its_place(form: Format, tmp_path: Path) -> None:
    if form.alone:
        pytest.skip("a row of its own is a file")
    rows = numbers(form).astype(np.int64)
    rows[3, 1] = rows[7, 2] = 300
    form.write(tmp_path / f"a{form.suffix}", rows)
    source = form.source(tmp_path, dtype="uint8", rows=4)
    items = read(source)
    name = f"a{form.suffix}"
    spans = [(0, 2), (3, 3), (4, 6), (7, 7), (8, 9)]
    assert [item.key for item in items] == [form.key(name, *span) for span in spans]
    assert [item.error is None for item in items] == [True, False, True, False, True]
    error = items[1].error
    assert isinstance(error, InvalidInput)
    assert str(error).startswith(items[1].key)
    assert "300" in str(error)
    assert "uint8" in str(error)
    assert items[1].request is None
    for done in range(len(items) + 1):
        rest = read(source, remember({}, items[:done]))
        assert [item.key for item in rest] == [item.key for item in items[done:]]


@pytest.mark.parametrize("content", [b"\x00\xff garbage \x01" * 9, None], ids=["garbage", "cut off"])
def test_a_bad_file_is_an_error_once_and_the_next_file_is_read(
    form: Format, tmp_path: Path, content: bytes | None
) -> None:
    fill(tmp_path, form, "a")
    path = tmp_path / f"a{form.suffix}"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    expected = fill(tmp_path, form, "b")
    source = form.source(tmp_path)
    items = read(source)
    bad = [item for item in items if item.error is not None]
    assert bad or form.suffix in (".csv", ".jsonl")  # a line that is shorter may be right all the same
    for item in bad:
        assert isinstance(item.error, InvalidInput)
        assert str(item.error).startswith(f"a{form.suffix}")
    assert_same(items[-len(expected) :], expected)
    memory = remember({}, items)
    assert read(source, memory) == []

    expected = fill(tmp_path, form, "a")
    assert_same(read(source, memory), expected)


def test_an_empty_file_does_no_harm(form: Format, tmp_path: Path) -> None:
    (tmp_path / f"a{form.suffix}").touch()
    expected = fill(tmp_path, form, "b")
    items = read(form.source(tmp_path))
    assert_same([item for item in items if item.error is None], expected)


def test_a_file_that_shrinks_while_it_is_read_does_no_harm(form: Format, tmp_path: Path) -> None:
    expected = fill(tmp_path, form, "a", "b")
    source = form.source(tmp_path)
    items = source.items(firing(), {})
    got = [next(items)]
    if not form.alone:
        os.truncate(tmp_path / f"a{form.suffix}", 1)
    got += items
    assert_same([item for item in got if item.key.startswith("b")], [e for e in expected if e[0].startswith("b")])


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts open files in /proc")
def test_closing_the_iterator_closes_the_file(form: Format, tmp_path: Path) -> None:
    fill(tmp_path, form, "a", "b")
    before = open_files()
    items: Any = form.source(tmp_path).items(firing(), {})
    next(items)
    items.close()
    assert open_files() == before


def test_a_folder_that_is_not_there_is_an_error_at_once(form: Format, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is none at"):
        form.source(tmp_path / "no").items(firing(), {})


@pytest.mark.slow
def test_memory_is_bounded(form: Format, tmp_path: Path) -> None:
    if form.alone:
        pytest.skip("an image is decoded whole")
    rows = np.random.default_rng(1).random((12_000, 40))
    form.write(tmp_path / f"a{form.suffix}", rows)
    size = (tmp_path / f"a{form.suffix}").stat().st_size
    assert size > 3 << 20
    source = form.source(tmp_path)
    tracemalloc.start()
    try:
        count = sum(1 for _ in source.items(firing(), {}))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == len(rows)
    assert peak < 2.5 * 2**20


# ------------------------------------------------------------------------------- whatever happens between


@dataclass
class World:
    """A folder, what a store remembers, and a plain account of what was delivered of each file as it is now."""

    folder: Path
    form: Format
    memory: dict[str, str] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)
    clock: int = 1_000

    def put(self, name: str, rows: int) -> None:
        self.clock += 1
        self.files[name] = numbers(self.form, rows, start=self.clock)
        self.delivered[name] = 0
        path = self.folder / f"{name}{self.form.suffix}"
        self.form.write(path, self.files[name])
        os.utime(path, ns=(self.clock, self.clock))

    def remove(self, name: str) -> None:
        if self.files.pop(name, None) is not None:
            (self.folder / f"{name}{self.form.suffix}").unlink()

    def due(self) -> Iterator[tuple[str, int]]:
        """What is to come: file and row."""
        for name in sorted(self.files):
            for row in range(self.delivered[name], len(self.files[name])):
                yield name, row

    def fire(self, stored: int, lost: int) -> None:
        """A firing that delivers so many items for good, and some whose delivery the store has not heard of."""
        due = [*self.due()]
        items = self.form.source(self.folder).items(firing(), dict(self.memory))
        for count, (name, row) in enumerate(due[: stored + lost]):
            item = next(items)
            assert item.key == self.form.key(f"{name}{self.form.suffix}", row)
            np.testing.assert_array_equal(item.request, self.files[name][row : row + 1])
            if count < stored:
                remember(self.memory, [item])
                self.delivered[name] = row + 1
        if len(due) <= stored + lost:
            assert next(items, None) is None


NAMES = st.sampled_from("abcd")
STEPS = st.one_of(
    st.tuples(st.just("put"), NAMES, st.integers(1, 6)),
    st.tuples(st.just("remove"), NAMES),
    st.tuples(st.just("fire"), st.integers(0, 8), st.integers(0, 3)),
)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["JSON lines", "CSV", "npy", "npz", "Parquet, a list"])
def test_each_row_of_each_version_is_delivered_once_in_order(
    kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    @given(steps=st.lists(STEPS, max_size=12))
    def run(steps: list[tuple[Any, ...]]) -> None:
        folder = tmp_path_factory.mktemp("world")
        world = World(folder, FORMATS[kind])
        for step, *arguments in steps:
            getattr(world, step)(*arguments)
        world.fire(1_000, 0)
        shutil.rmtree(folder)

    run()
