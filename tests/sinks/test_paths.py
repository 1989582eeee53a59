"""Paths of results: names that cannot lead elsewhere and do not collide."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kapsl_scheduler.core.runs import Firing, compact, run_of
from kapsl_scheduler.errors import Unavailable
from kapsl_scheduler.sinks import JsonLinesSink, ParquetSink
from kapsl_scheduler.sinks.memory import Mark, Remembered
from kapsl_scheduler.sinks.paths import make_folder, naming, path_of
from tests.sinks.answers import firing


def test_the_fields_of_a_run() -> None:
    path = path_of("/out/{job}/{nominal}-{origin}-{attempt}.jsonl", firing(job="a/b", origin="t:1", attempt=2))
    assert path == Path("/out/a%2Fb/20261125T030000Z-t%3A1-2.jsonl")
    assert path_of("out.jsonl", firing()) == Path.cwd() / "out.jsonl"


def test_times_are_in_utc_with_a_fraction_if_they_have_one() -> None:
    tokyo = dt.timezone(dt.timedelta(hours=9))
    assert compact(dt.datetime(2026, 11, 25, 12, tzinfo=tokyo)) == "20261125T030000Z"
    assert compact(dt.datetime(2026, 11, 25, 3, 0, 0, 250, dt.UTC)) == "20261125T030000.000250Z"


@settings(max_examples=30)
@given(st.text(min_size=1, max_size=200), st.text(min_size=1, max_size=200))
def test_a_field_is_one_part_of_a_path_and_differs_where_ids_do(one: str, other: str) -> None:
    paths = [path_of("/out/{job}", firing(job=job)) for job in (one, other)]
    for path in paths:
        assert path.parent == Path("/out")
        assert len(os.fsencode(path.name)) <= 100
        assert path.name not in ("", ".", "..")
    assert (paths[0] == paths[1]) == (one == other)


def test_long_ids_that_begin_alike_differ() -> None:
    paths = {path_of("/{job}", firing(job="x" * 190 + end)) for end in ("a", "b")}
    assert len(paths) == 2


@pytest.mark.parametrize("sink", [JsonLinesSink, ParquetSink])
@pytest.mark.parametrize(
    "template", ["", ".", "..", "out/", "out/..", "{job", "{}", "{0}", "{user}", "{job!r}", "{attempt:03}", "{job.x}"]
)
def test_a_template_that_cannot_be_is_refused(sink: type[JsonLinesSink], template: str) -> None:
    with pytest.raises(ValueError, match="path: "):
        sink(template)


def test_errors_name_the_file() -> None:
    with pytest.raises(OSError, match=r"No space.*x\.jsonl") as caught, naming(Path("x.jsonl")):
        raise OSError(28, "No space left on device")
    assert caught.value.errno == 28
    with pytest.raises(OSError, match=r"damaged.*x\.jsonl"), naming(Path("x.jsonl")):
        raise OSError("damaged")
    with pytest.raises(FileNotFoundError, match="other"), naming(Path("x.jsonl")):
        raise FileNotFoundError(2, "No such file", "other")


def test_folders_are_made_to_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr("kapsl_scheduler.sinks.paths.sync_folder", synced.append)
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    assert synced == [tmp_path / "a", tmp_path]


@pytest.mark.parametrize("sink", [JsonLinesSink, ParquetSink])
def test_two_runs_do_not_write_to_one_file_at_a_time(sink: type[JsonLinesSink], tmp_path: Path) -> None:
    target = sink(str(tmp_path / "out"))
    writer = target.open(firing(), {})
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(Unavailable, match="another run is writing to"):
        target.open(firing(4), {})
    if before:
        assert len(os.listdir("/proc/self/fd")) == before
    writer.close()
    target.open(firing(4), {}).close()


# ----------------------------------------------------------------------------------------------- memory


def test_a_run_finds_its_own_mark_only_when_it_is_resumed() -> None:
    memory = Remembered({}, firing()).reached(7, "/out")
    known = {key: mark for key, mark in memory.items() if mark is not None}
    assert Remembered(known, firing(attempt=2)).mark == Mark(7, "/out")
    assert Remembered(known, firing(attempt=1)).mark is None
    assert Remembered(known, firing(attempt=2, origin="t1")).mark is None
    assert Remembered(known, firing(4, attempt=2)).at == 0


def test_what_another_run_has_added_is_not_taken_away() -> None:
    known: dict[str, str] = {}
    for run, at in ((firing(), 7), (firing(4), 9)):
        known |= {key: mark for key, mark in Remembered(known, run).reached(at, "/out").items() if mark is not None}
    resumed = Remembered(known, firing(attempt=2))
    assert resumed.mark is None
    assert resumed.at == 7


def marks(*runs: tuple[Firing, int, str]) -> dict[str, str]:
    """What is remembered of these, one after another."""
    known: dict[str, str] = {}
    for run, at, path in runs:
        reached = Remembered(known, run).reached(at, path)
        known = {key: mark for key, mark in {**known, **reached}.items() if mark is not None}
    return known


def after(known: dict[str, str], *ended: Firing) -> dict[str, str]:
    """The same once another run, elsewhere, has begun and found that these have ended."""
    run = msgspec.structs.replace(firing(9), ended=frozenset(one.key for one in ended))
    return {key: mark for key, mark in {**known, **Remembered(known, run).reached(0, "/other")}.items() if mark}


def test_what_ended_runs_added_is_safe_from_an_open_one_before_them() -> None:
    first, second, third = firing(3), firing(4), firing(5)
    known = marks((first, 7, "/out"), (second, 9, "/out"), (third, 11, "/out"))
    known = after(known, second, third)
    assert set(known) == {f"sink:{run.key}" for run in (first, third, firing(9))}
    assert Remembered(known, firing(3, attempt=2)).mark is None
    known = after(known, first, third)
    assert set(known) == {f"sink:{firing(9).key}"}


def test_the_key_of_a_run_says_which_it_is() -> None:
    for origin in ("schedule", "backfill-Z:1", ""):
        run = Firing("job", dt.datetime(2026, 11, 25, 3, 0, 0, 250, dt.UTC), origin, 1)
        assert run_of(run.key) == (1795575600000250, origin)
    assert run_of("20261125T030000Z:schedule") == (1795575600000000, "schedule")
    assert run_of("last") is None


def test_memory_that_cannot_be_read_is_none() -> None:
    known = dict.fromkeys(Remembered({}, firing()).reached(1), "{")
    assert Remembered(known, Firing("job", firing().nominal, "schedule", 2)).mark is None
