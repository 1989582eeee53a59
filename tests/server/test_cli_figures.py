"""What happened between two looks at a server, from what it said each time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kapsl_scheduler import BatchPolicy, Priority, Scheduler
from kapsl_scheduler.cli_figures import Look, figures
from kapsl_scheduler.engines import CallableEngine
from kapsl_scheduler.runtime.metrics import Histogram, by_bound

CLASSES = ("latency_critical", "throughput", "background")
COUNTS = ("offered", "invalid", "refused", "failed", "expired", "evicted", "succeeded", "calls", "rows", "queued")


def model(
    name: str = "m", latencies: Mapping[str, Sequence[float]] | None = None, queued: int = 0, **counts: float
) -> Mapping[str, Any]:
    """A model's statistics as JSON has them, with answers that took so long in each class."""
    classes = {}
    for each in CLASSES:
        histogram = Histogram()
        for seconds in (latencies or {}).get(each, ()):
            histogram.extend([0.0], seconds)
        counted = {str(bound): count for bound, count in by_bound(histogram.counts).items()}
        classes[each] = {"queued": queued, "succeeded": histogram.count, "latency_counts": counted}
    answered = sum(int(entry["succeeded"]) for entry in classes.values())
    numbers = dict.fromkeys(COUNTS, 0) | {"succeeded": answered, "queued": queued} | counts
    rest = {"waiting": 0, "running": 0, "slots": 2, "max_batch_size": 32, "busy_time": 0.0}
    return {"name": name, "version": "1", "scheduler": rest | numbers | {"classes": classes}}


def test_rates_batches_and_busy_time_are_those_of_the_time_between() -> None:
    before = Look(10.0, [model(calls=4, rows=8, busy_time=1.0, offered=9, failed=1)])
    now = Look(
        12.0,
        [model(latencies={"throughput": [0.1] * 6}, calls=6, rows=18, busy_time=2.0, offered=20, failed=2, refused=3)],
    )

    found = figures(before, now)

    (one,) = found.models
    assert found.seconds == 2.0
    assert (one.rate, one.failures, one.batch, one.busy) == (3.0, 2.0, 5.0, 0.25)
    assert (one.classes["throughput"].rate, one.classes["background"].rate) == (3.0, 0.0)
    assert found.jobs is None


@given(
    st.lists(st.floats(1e-5, 60), max_size=30),
    st.lists(st.floats(1e-5, 60), min_size=1, max_size=30),
    st.sampled_from(CLASSES),
)
def test_latencies_are_those_of_the_answers_between(old: list[float], new: list[float], kind: str) -> None:
    (one,) = figures(Look(0.0, [model(latencies={kind: old})]), Look(1.0, [model(latencies={kind: old + new})])).models

    alone = Histogram()
    for seconds in new:
        alone.extend([0.0], seconds)
    assert (one.p50, one.p99) == (alone.percentile(50), alone.percentile(99))
    assert (one.classes[kind].p50, one.classes[kind].p99) == (one.p50, one.p99)


def test_nothing_between_has_no_latency_and_no_batch() -> None:
    look = model(latencies={"background": [0.5]}, calls=3, rows=3)
    (one,) = figures(Look(0.0, [look]), Look(1.0, [look])).models

    assert (one.rate, one.p50, one.p99, one.batch, one.busy) == (0.0, None, None, None, 0.0)


@pytest.mark.parametrize(
    ("before", "at"),
    [([], 0.0), ([model(offered=50)], 0.0), ([model(calls=50)], 0.0), ([model()], 1.0)],
)
def test_a_model_that_is_new_or_began_anew_has_no_rates_yet(before: list[Mapping[str, Any]], at: float) -> None:
    (one,) = figures(Look(at, before), Look(1.0, [model(queued=4, offered=2, calls=1)])).models

    assert (one.queued, one.classes["throughput"].queued) == (4, 4)
    assert (one.rate, one.failures, one.batch, one.busy, one.p50) == (None,) * 5
    assert one.classes["throughput"].rate is None


def test_the_busiest_model_comes_first_then_the_one_with_most_requests() -> None:
    names = ("idle", "asked", "busy", "also")
    now = [
        model("idle"),
        model("asked", latencies={"throughput": [1.0]}),
        model("busy", busy_time=0.5),
        model("also", queued=3),
    ]
    found = figures(Look(0.0, [model(name) for name in names]), Look(1.0, now))

    assert [one.name for one in found.models] == ["busy", "asked", "also", "idle"]


def test_jobs_that_run_come_first_then_those_that_fire_next() -> None:
    jobs = [
        {"id": id, "running": running, "next_firing": then}
        for id, running, then in (
            ("never", 0, None),
            ("later", 0, "2026-01-02T00:00:00Z"),
            ("runs", 1, None),
            ("soon", 0, "2026-01-01T00:00:00Z"),
        )
    ]
    found = figures(Look(0.0, []), Look(1.0, [], jobs))

    assert found.jobs is not None
    assert [job["id"] for job in found.jobs] == ["runs", "soon", "later", "never"]


async def test_what_a_scheduler_says_has_all_that_is_read() -> None:
    engine = CallableEngine(lambda x: x, inputs={"x": ("float32", (None, 2))}, outputs={"y": ("float32", (None, 2))})
    async with Scheduler([engine], batch=BatchPolicy(max_batch_size=4)) as scheduler:

        def look(at: float) -> Look:
            said = msgspec.json.decode(msgspec.json.encode(scheduler.statistics()))
            return Look(at, [{"name": "m", "version": "1", "scheduler": said}])

        before = look(0.0)
        for _ in range(8):
            await scheduler.infer([[1.0, 2.0]], priority=Priority.THROUGHPUT)
        (one,) = figures(before, look(2.0)).models

    assert one.rate == one.classes["throughput"].rate == 4.0
    assert one.batch == 1.0
    assert one.p50 is not None
    assert 0 < one.p50 < 1
