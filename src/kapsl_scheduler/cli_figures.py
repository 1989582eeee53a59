"""Two looks at a server, and what happened between them: rates, latencies, batches. Pure: no clock, no server.

What is not here: looking and showing (`cli_top`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from kapsl_scheduler.runtime.metrics import BOUNDS, counts_of, percentile_of

__all__ = ["ClassFigures", "Look", "ModelFigures", "ServerFigures", "figures"]


class Look(msgspec.Struct, frozen=True):
    """What a server said at a moment (`at`, seconds of any clock): the statistics of its models, and its jobs, None
    where it runs none."""

    at: float
    models: Sequence[Mapping[str, Any]]
    jobs: Sequence[Mapping[str, Any]] | None = None


class ClassFigures(msgspec.Struct, frozen=True):
    """One class of a model: requests queued now; answers a second, and their p50 and p99 in seconds (None without
    answers)."""

    queued: int
    rate: float | None
    p50: float | None
    p99: float | None


class ModelFigures(msgspec.Struct, frozen=True):
    """One version of a model between two looks. `rate` and `failures` are requests a second: answered, and invalid,
    refused, failed, expired or evicted. `batch` is rows a call (None without calls), `busy` the fraction of its slots'
    time that was spent in calls. All of these are None where the first look does not know the model, or it has begun
    anew."""

    name: str
    version: str
    queued: int
    running: int
    slots: int
    max_batch_size: int
    rate: float | None
    failures: float | None
    p50: float | None
    p99: float | None
    batch: float | None
    busy: float | None
    classes: Mapping[str, ClassFigures]


class ServerFigures(msgspec.Struct, frozen=True):
    """All of it, over so many seconds: models by how busy they are, jobs as the server lists them by when they run.
    `jobs` is None where the server runs none."""

    seconds: float
    models: Sequence[ModelFigures]
    jobs: Sequence[Mapping[str, Any]] | None


def figures(before: Look, now: Look) -> ServerFigures:
    """What happened from one look to the other."""
    seconds = now.at - before.at
    known = {(model["name"], model["version"]): model for model in before.models}
    models = [_of_model(known.get((model["name"], model["version"])), model, seconds) for model in now.models]
    models.sort(key=lambda model: (-(model.busy or 0.0), -(model.rate or 0.0), -model.queued, model.name))
    return ServerFigures(seconds, models, None if now.jobs is None else _of_jobs(now.jobs))


def _of_model(before: Mapping[str, Any] | None, now: Mapping[str, Any], seconds: float) -> ModelFigures:
    there = now["scheduler"]
    first = None if before is None else before["scheduler"]
    if first is not None and (seconds <= 0 or first["offered"] > there["offered"] or first["calls"] > there["calls"]):
        first = None  # nothing can be said of no time, and a model that was loaded again counts from the beginning

    def more(key: str) -> float:
        assert first is not None
        return float(there[key] - first[key])

    classes = {}
    all_counts = [0] * (len(BOUNDS) + 1)
    for name, entry in there["classes"].items():
        if first is None:
            classes[name] = ClassFigures(entry["queued"], None, None, None)
            continue
        counts = [0] * (len(BOUNDS) + 1)
        for sign, book in ((1, entry), (-1, first["classes"][name])):
            for place, count in enumerate(counts_of(book["latency_counts"])):
                counts[place] += sign * count
                all_counts[place] += sign * count
        answered = entry["succeeded"] - first["classes"][name]["succeeded"]
        classes[name] = ClassFigures(
            entry["queued"], answered / seconds, percentile_of(counts, 50), percentile_of(counts, 99)
        )
    rate = failures = batch = busy = None
    if first is not None:
        rate = more("succeeded") / seconds
        failures = sum(map(more, ("invalid", "refused", "failed", "expired", "evicted"))) / seconds
        batch = more("rows") / more("calls") if more("calls") else None
        busy = min(1.0, more("busy_time") / (seconds * there["slots"])) if there["slots"] else 0.0
    return ModelFigures(
        name=now["name"],
        version=now["version"],
        queued=there["queued"] + there["waiting"],
        running=there["running"],
        slots=there["slots"],
        max_batch_size=there["max_batch_size"],
        rate=rate,
        failures=failures,
        p50=percentile_of(all_counts, 50),
        p99=percentile_of(all_counts, 99),
        batch=batch,
        busy=busy,
        classes=classes,
    )


def _of_jobs(jobs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    # What fires next comes first behind what runs: times in UTC and ISO 8601 are in the order of their text.
    return sorted(
        jobs, key=lambda job: (not job["running"], job["next_firing"] is None, job["next_firing"] or "", job["id"])
    )
