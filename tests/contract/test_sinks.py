"""One contract for every sink: files of JSON lines, Parquet, a webhook with a real server behind it, a function."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import stamina
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kapsl_scheduler.ports import Sink, SinkWriter
from kapsl_scheduler.sinks import JsonLinesSink, ParquetSink, WebhookSink
from tests.sinks.answers import answers, firing, keys, lines_of, receiver, remember, rows_of


@dataclass(frozen=True)
class Place:
    """A sink, and the keys that have arrived where its results go: with all repeats, or as a reader takes them who
    drops what has come before. `exact`: a resumed run leaves no repeats at all."""

    sink: Sink
    arrived: Callable[[], list[str]]
    once: Callable[[], list[str]]
    exact: bool = True
    clear: Callable[[], None] = lambda: None


def files(sink: Sink, folder: Path, read: Callable[[Path], list[dict[str, Any]]]) -> Place:
    def arrived() -> list[str]:
        return [row["key"] for row in read(folder)]

    def clear() -> None:
        for path in folder.iterdir():
            path.unlink()

    folder.mkdir()
    return Place(sink, arrived, arrived, clear=clear)


def json_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for path in sorted(folder.glob("*.jsonl")) for line in lines_of(path)]


@pytest.fixture(params=["jsonl", "jsonl by attempt", "parquet", "parquet by attempt", "webhook"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "out"
    match request.param:
        case "jsonl":
            yield files(JsonLinesSink(str(folder / "{job}.jsonl")), folder, json_lines)
        case "jsonl by attempt":
            yield files(JsonLinesSink(str(folder / "{nominal}-{attempt}.jsonl")), folder, json_lines)
        case "parquet":
            yield files(ParquetSink(str(folder / "{job}.parquet")), folder, rows_of)
        case "parquet by attempt":
            yield files(ParquetSink(str(folder / "{nominal}-{attempt}")), folder, rows_of)
        case _:
            with receiver() as server, stamina.set_testing(True, attempts=3, cap=True):
                yield Place(
                    WebhookSink(server.url, batch=4),
                    lambda: [item["key"] for post in server.posts for item in post.body["items"]],
                    lambda: list(dict.fromkeys(item["key"] for post in server.unique() for item in post.body["items"])),
                    exact=False,
                    clear=server.posts.clear,
                )


def test_it_satisfies_the_port(place: Place) -> None:
    assert isinstance(place.sink, Sink)
    if isinstance(place.sink, msgspec.Struct):
        kind: Any = type(place.sink)
        assert msgspec.json.decode(msgspec.json.encode(place.sink), type=kind) == place.sink


def test_results_arrive_in_order(place: Place) -> None:
    items = answers(30)
    writer = place.sink.open(firing(), {})
    writer.flush()
    writer.write(items[:7])
    writer.flush()
    writer.write([])
    for item in items[7:]:
        writer.write([item])
    writer.flush()
    assert place.arrived() == keys(items)
    writer.close()
    assert place.arrived() == keys(items)


def test_flushing_twice_does_nothing_more(place: Place) -> None:
    writer = place.sink.open(firing(), {})
    writer.write(answers(3))
    marks = dict(writer.flush())
    again = dict(writer.flush())
    assert again == marks
    assert all(key.startswith("sink:") for key in marks)
    writer.close()
    writer.close()
    assert place.arrived() == keys(answers(3))


def test_another_run_adds_to_what_is_there(place: Place) -> None:
    memory: dict[str, str] = {"source:a": "not the sink's"}
    for hour in (3, 4):
        writer = place.sink.open(firing(hour), memory)
        remember(memory, writer.flush())
        writer.write(answers(5, start=hour * 10))
        remember(memory, writer.flush())
        writer.close()
    assert place.arrived() == [*keys(answers(5, start=30)), *keys(answers(5, start=40))]
    assert memory["source:a"] == "not the sink's"


def test_what_was_not_flushed_is_taken_back_when_a_run_fails(place: Place) -> None:
    writer = place.sink.open(firing(), {})
    writer.write(answers(5))
    writer.flush()
    writer.write(answers(3, start=5))
    writer.close()
    if place.exact:
        assert place.arrived() == keys(answers(5))


def test_runs_that_have_ended_are_forgotten_and_no_others(place: Place) -> None:
    """However many there are: each of the others may still be resumed."""
    runs = [f"20200101T{number:06}Z:schedule" for number in range(300)]
    memory = {f"sink:{run}": '{"at":1}' for run in runs}
    writer = place.sink.open(msgspec.structs.replace(firing(), ended=frozenset(runs[:100])), memory)
    remember(memory, writer.flush())
    writer.close()
    assert memory.keys() == {f"sink:{run}" for run in (*runs[100:], firing().key)}


def abandon(writer: SinkWriter) -> None:
    """Leave a writer as a crash would: nothing is cleaned up, and the system lets go of what the process held."""
    descriptor = getattr(writer, "_descriptor", None)
    if descriptor is not None:
        os.close(descriptor)
    parts: Any = getattr(writer, "_parts", None)
    if parts is not None:
        os.close(parts._lock)
        table: Any = getattr(writer, "_table", None)
        if table is not None:
            table.is_open = False
        file: Any = getattr(writer, "_file", None)
        if file is not None:
            file.close()


STEP = st.sampled_from(["write", "write", "flush", "flush unheard", "crash"])


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=40)
@given(steps=st.lists(STEP, max_size=14), sizes=st.randoms(use_true_random=False))
def test_a_run_that_crashes_and_is_resumed_leaves_each_result_once(place: Place, steps: list[str], sizes: Any) -> None:
    """`flush unheard`: results are in safety, but the process dies before the store hears of it."""
    place.clear()
    memory: dict[str, str] = {}
    total = 40
    attempt, done, sent = 1, 0, 0  # remembered, and written
    writer = place.sink.open(firing(), memory)
    remember(memory, writer.flush())
    for step in [*steps, "finish"]:
        if step == "write":
            count = sizes.randint(1, 9)
            writer.write(answers(min(count, total - sent), start=sent))
            sent = min(total, sent + count)
        elif step == "flush":
            remember(memory, writer.flush())
            done = sent
        elif step == "finish":
            writer.write(answers(total - sent, start=sent))
            remember(memory, writer.flush())
            writer.close()
        else:
            if step == "flush unheard":
                writer.flush()
            abandon(writer)
            attempt += 1
            sent = done
            writer = place.sink.open(firing(attempt=attempt), dict(memory))
            remember(memory, writer.flush())
    assert place.once() == keys(answers(total))
    if place.exact:
        assert place.arrived() == keys(answers(total))
