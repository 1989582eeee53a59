"""The routes of jobs in process: what each does, and what it says of what it cannot do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from kapsl_scheduler.errors import StoreError
from kapsl_scheduler.ports import Result
from kapsl_scheduler.stores.memory import MemoryStore
from tests.server.api import Gate, Server, assert_error, serving, serving_jobs, until

NIGHTLY = {"schedule": "0 0 3 * * *", "tz": "Europe/Zurich", "inputs": {"x": [[1, 2]]}, "model": "m"}


def path_of(id: str, rest: str = "") -> str:
    return f"/v2/cron/jobs/{quote(id, safe='')}{rest}"


async def put(server: Server, id: str = "p:night", **changes: Any) -> httpx.Response:
    return await server.client.put(path_of(id), json=NIGHTLY | changes)


async def post(server: Server, rest: str, order: Any = None, id: str = "p:night") -> httpx.Response:
    return await server.client.post(path_of(id, rest), content=b"" if order is None else json.dumps(order))


async def ended(server: Server, number: int) -> dict[str, Any]:
    """The run, when it has ended."""
    while True:
        run: dict[str, Any] = (await server.client.get(f"/v2/cron/runs/{number}")).json()
        if run["ended"] is not None:
            return run
        await asyncio.sleep(0)  # nothing above lets others run


# -------------------------------------------------------------------------------------------------- jobs


async def test_a_job_is_made_shown_replaced_and_removed() -> None:
    async with serving_jobs() as server:
        made = await put(server)
        shown = await server.client.get(path_of("p:night"))
        same = await put(server, id="p:night")
        changed = await server.client.put(path_of("p:night"), json=NIGHTLY | {"id": "p:night", "tz": "UTC"})
        removed = await server.client.delete(path_of("p:night"))
        gone = [
            await server.client.get(path_of("p:night")),
            await server.client.delete(path_of("p:night")),
            *[await post(server, rest, {}) for rest in ("/pause", "/resume", "/trigger")],
            await server.client.get(path_of("p:night", "/preview")),
            await server.client.get(path_of("p:night", "/runs")),
        ]

    assert (made.status_code, same.status_code, changed.status_code) == (201, 200, 200)
    info = made.json()
    assert (info["id"], info["tz"], info["priority"], info["enabled"]) == (
        "p:night",
        "Europe/Zurich",
        "background",
        True,
    )
    assert info["description"] == "At 03:00:00 every day, Europe/Zurich time"
    assert info["next_firing"].endswith("00:00Z")
    assert {key: shown.json()[key] for key in info} == info
    assert shown.json()["definition"] == {"id": "p:night", **NIGHTLY}
    assert changed.json()["tz"] == "UTC"
    assert (removed.status_code, removed.json()) == (200, {"id": "p:night", "removed": True})
    for response in gone:
        assert "p:night" in assert_error(response, 404, "not_found")


async def test_what_another_says_of_a_job_can_be_put_back_as_it_is() -> None:
    async with serving_jobs() as server:
        await put(server, firing={"coalesce": "earliest"}, run={"attempts": 2}, overflow_policy="block", enabled=False)
        before = (await server.client.get(path_of("p:night"))).json()
        again = await server.client.put(path_of("p:night"), json=before["definition"])
        after = (await server.client.get(path_of("p:night"))).json()

    assert again.status_code == 200
    assert after == before
    assert (after["enabled"], after["paused"]) == (False, "not enabled")


@pytest.mark.parametrize("id", ["a:b", "a/b/runs", "50% off", "what?", "ä#1", "a+b", "pause"])
async def test_an_id_of_any_characters_survives_every_route(id: str) -> None:
    async with serving_jobs() as server:
        assert (await put(server, id)).status_code == 201
        assert (await server.client.get(path_of(id))).json()["id"] == id
        assert len((await server.client.get(path_of(id, "/preview?n=2"))).json()["next"]) == 2
        for rest in ("/pause", "/resume"):
            assert (await post(server, rest, {}, id)).json()["id"] == id
        run = (await post(server, "/trigger", {}, id)).json()
        assert run["job"] == id
        runs = (await server.client.get(path_of(id, "/runs"))).json()["runs"]
        assert [listed["number"] for listed in runs] == [run["number"]]
        assert (await server.client.get("/v2/cron/jobs")).json()["jobs"][0]["id"] == id
        assert (await server.client.delete(path_of(id))).status_code == 200


async def test_a_preview_ends_with_the_last_run_that_the_job_has_left() -> None:
    async with serving_jobs() as server:
        await put(server, firing={"max_runs": 2})
        times = (await server.client.get(path_of("p:night", "/preview"))).json()["next"]
        many = (await server.client.get(path_of("p:night", "/preview?n=1000"))).json()["next"]

    assert len(times) == 2
    assert many == times


async def test_jobs_are_listed_page_by_page() -> None:
    ids = [f"job:{number}" for number in range(5)]
    async with serving_jobs() as server:
        for id in reversed(ids):
            await put(server, id)
        whole = (await server.client.get("/v2/cron/jobs")).json()
        first = (await server.client.get("/v2/cron/jobs?limit=3")).json()
        second = (await server.client.get("/v2/cron/jobs", params={"limit": 3, "after": first["next"]})).json()
        exact = (await server.client.get("/v2/cron/jobs?limit=5")).json()

    assert [job["id"] for job in whole["jobs"]] == ids
    assert whole["next"] is None
    assert [job["id"] for job in first["jobs"]] == ids[:3]
    assert first["next"] == ids[2]
    assert ([job["id"] for job in second["jobs"]], second["next"]) == (ids[3:], None)
    assert exact["next"] is None


async def test_a_lone_model_needs_no_name_and_several_do() -> None:
    without = {key: value for key, value in NIGHTLY.items() if key != "model"}
    async with serving_jobs() as server:
        lone = await server.client.put(path_of("a"), json=without)
        await server.registry.load("n", lambda x: x)
        several = await server.client.put(path_of("b"), json=without)

    assert (lone.status_code, lone.json()["model"]) == (201, "m")
    assert "model: expected the name of a model" in assert_error(several, 400, "invalid_job")


# ------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("changes", "faults"),
    [
        ({"id": "other"}, ["id: expected 'p:night', which the path names, or none, got 'other'"]),
        ({"model": "none"}, ["model: model 'none' is not loaded; loaded: 'm'"]),
        ({"package": "m"}, ["package: jobs come with a package when it is loaded, got 'm'"]),
        ({"priority": "urgent"}, ["priority: expected one of latency_critical, throughput, background, got 'urgent'"]),
        ({"schedule": "0 0 0 30 2 *"}, ["schedule: it never fires from now on"]),
        ({"inputs": {"x": [[1, 2, 3]]}}, ["request: input 'x': axis 1 is 3"]),
        ({"inputs": {"z": [[1, 2]]}}, ["request: input 'x' is missing; input 'z' is not one of the model's"]),
        (
            {"callable": "f"},
            ["expected exactly one of input, value, inputs, callable, source, got inputs and callable"],
        ),
        ({"inputs": None, "callable": "f"}, ["request: nothing is bound as 'f'"]),
        (
            {"inputs": None, "source": {"type": "moon"}},
            [
                "source: no source of type 'moon' is known here; "
                "adapters=builtin_adapters makes those that come with kapsl_scheduler"
            ],
        ),
        ({"colour": "blue"}, ["Object contains unknown field `colour`"]),
        ({"firing": {"overlap": "never"}}, ["Invalid enum value 'never' - at `$.firing.overlap`"]),
        (
            {"schedule": "0 61 * * * *", "priority": "urgent", "run": {"attempts": 0}, "model": "none"},
            ["schedule: minute: expected 0 to 59", "priority: ", "attempts: ", "model: "],
        ),
    ],
)
async def test_a_definition_is_refused_with_all_its_faults(changes: dict[str, Any], faults: list[str]) -> None:
    async with serving_jobs() as server:
        fresh = await server.client.put(path_of("p:night"), json=NIGHTLY | changes)
        await put(server)
        replacing = await server.client.put(path_of("p:night"), json=NIGHTLY | changes)
        untouched = (await server.client.get(path_of("p:night"))).json()["definition"]

    for response in (fresh, replacing):
        assert_error(response, 400, "invalid_job")
        found = response.json()["faults"]
        assert len(found) == len(faults)
        for fault, expected in zip(found, faults, strict=True):
            assert expected in fault
    assert untouched == {"id": "p:night", **NIGHTLY}


async def test_a_wrong_schedule_alone_is_shown_to_the_token() -> None:
    async with serving_jobs() as server:
        response = await put(server, schedule="0 0 9 * * FRI-MON")

    assert "day of week" in assert_error(response, 400, "invalid_expression")
    body = response.json()
    assert (body["field"], body["token"], body["position"]) == ("day_of_week", "FRI-MON", 10)
    assert (body["text"], body["hint"]) == ("0 0 9 * * FRI-MON", "write FRI-SAT,SUN-MON")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 2000])
async def test_what_is_no_json_object_is_no_job(body: bytes) -> None:
    async with serving_jobs() as server:
        response = await server.client.put(path_of("a"), content=body)

    assert "the request body: " in assert_error(response, 400, "invalid_input")


async def test_bodies_are_bounded() -> None:
    async with serving_jobs(max_body_bytes=100) as server:
        responses = [
            await server.client.put(path_of("a"), content=b" " * 101),
            *[await server.client.post(path_of("a", rest), content=b" " * 101) for rest in ("/pause", "/trigger")],
        ]

    for response in responses:
        assert_error(response, 413, "resource_exhausted")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/cron/jobs/", 404),
        ("GET", "/v2/cron/jobs/a/nothing", 404),
        ("GET", "/v2/cron/jobs/a/runs/1", 404),
        ("POST", "/v2/cron/jobs/a", 405),
        ("GET", "/v2/cron/jobs/a/pause", 405),
        ("PUT", "/v2/cron/jobs/a/runs", 405),
        ("GET", "/v2/cron/compact", 405),
    ],
)
async def test_what_is_no_route_says_so(method: str, path: str, status: int) -> None:
    async with serving_jobs() as server:
        response = await server.client.request(method, path)

    assert_error(response, status, "not_found" if status == 404 else "method_not_allowed")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v2/cron/jobs?limit=0", "limit: expected an integer from 1 to 1000, got '0'"),
        ("/v2/cron/jobs?limit=1001", "limit: "),
        ("/v2/cron/jobs?offset=1", "no query parameter 'offset', expected one of limit, after"),
        ("/v2/cron/jobs/a?x=1", "no query parameter 'x', expected none"),
        ("/v2/cron/jobs/a/preview?n=0", "n: expected an integer from 1 to 1000, got '0'"),
        ("/v2/cron/jobs/a/preview?n=1001", "n: expected an integer from 1 to 1000, got '1001'"),
        ("/v2/cron/runs?limit=x", "limit: "),
        ("/v2/cron/runs?before=1e3", "before: "),
        ("/v2/cron/runs?state=done", "state: expected one of pending, running, "),
        ("/v2/cron/runs/last", "the run's number: "),
        ("/v2/cron/explain?expression=@daily&n=0", "n: "),
        ("/v2/cron/explain?expression=@daily&after=yesterday", "after: expected a moment as 2026"),
        ("/v2/cron/explain?expression=@daily&after=2026-01-01T00:00:00", "after: expected a moment as 2026"),
    ],
)
async def test_a_query_that_cannot_be_is_refused_with_its_name(path: str, said: str) -> None:
    async with serving_jobs() as server:
        response = await server.client.get(path)

    assert response.status_code == 400
    assert said in response.json()["error"]


@pytest.mark.parametrize(
    ("rest", "order", "said"),
    [
        ("/pause", {"because": "x"}, "`because`"),
        ("/pause", {"reason": 1}, "`$.reason`"),
        ("/resume", {"catch_up": "yes"}, "`$.catch_up`"),
        ("/trigger", {"origin": "schedule"}, "origin: "),
        ("/trigger", {"origin": " "}, "origin: "),
        ("/trigger", {"id": "x"}, "`id`"),
        ("/backfill", {}, "`start`"),
        ("/backfill", {"start": "2026-01-01", "end": "2026-01-02T00:00:00Z"}, "`$.start`"),
        ("/backfill", {"start": "2026-01-01T00:00:00", "end": "2026-01-02T00:00:00Z"}, "backfill.start"),
        ("/backfill", {"start": "2026-01-02T00:00:00Z", "end": "2026-01-02T00:00:00Z"}, "backfill: expected a range"),
        ("/backfill", {"start": "1990-01-01T00:00:00Z", "end": "2026-01-02T00:00:00Z"}, "10000 occurrences"),
        (
            "/backfill",
            {"start": "2026-01-01T00:00:00Z", "end": "2026-01-02T00:00:00Z", "concurrency": 0},
            "`$.concurrency`",
        ),
        (
            "/backfill",
            {"start": "2026-01-01T00:00:00Z", "end": "2026-01-02T00:00:00Z", "concurrency": 10_001},
            "`$.concurrency`",
        ),
    ],
)
async def test_an_order_that_cannot_be_is_refused_with_the_field(rest: str, order: Any, said: str) -> None:
    async with serving_jobs() as server:
        await put(server)
        response = await post(server, rest, order)
        runs = (await server.client.get("/v2/cron/runs")).json()["runs"]

    assert response.status_code == 400
    assert said in response.json()["error"]
    assert runs == []


# -------------------------------------------------------------------------------------------- what it does


async def test_a_job_is_paused_and_resumed_with_a_reason() -> None:
    async with serving_jobs() as server:
        await put(server)
        paused = (await post(server, "/pause", {"reason": "holiday"})).json()
        listed = (await server.client.get(path_of("p:night"))).json()
        resumed = (await post(server, "/resume", {"catch_up": True})).json()
        without_words = (await post(server, "/pause")).json()

    assert (paused["enabled"], paused["paused"], paused["next_firing"]) == (False, "holiday", None)
    assert listed["paused"] == "holiday"
    assert (resumed["enabled"], resumed["paused"]) == (True, "")
    assert without_words["paused"] == "by request"


async def test_a_trigger_runs_once_for_each_origin() -> None:
    async with serving_jobs() as server:
        await put(server)
        first = (await post(server, "/trigger", {"origin": "mine"})).json()
        done = await ended(server, first["number"])
        again = (await post(server, "/trigger", {"origin": "mine"})).json()
        both = await asyncio.gather(*(post(server, "/trigger", {"origin": "twin"}) for _ in range(2)))
        other = (await post(server, "/trigger")).json()

    assert (first["origin"], first["job"], first["count"]) == ("mine", "p:night", 1)
    assert (done["state"], done["requests"], done["rows"], done["error"]) == ("succeeded", 1, 1, "")
    assert again == done
    assert len({response.json()["number"] for response in both}) == 1
    assert other["origin"].startswith("trigger-")


async def test_a_backfill_fires_for_every_time_of_a_range_and_once_for_each_origin() -> None:
    order = {"start": "2026-01-01T02:00:00Z", "end": "2026-01-04T02:00:00Z", "concurrency": 2, "origin": "january"}
    async with serving_jobs() as server:
        await put(server)
        answer = await post(server, "/backfill", order)
        again = await post(server, "/backfill", order)
        runs = (await server.client.get(path_of("p:night", "/runs?origin=january"))).json()["runs"]

    assert answer.json() == {"origin": "january", "runs": 3}
    assert again.json() == {"origin": "january", "runs": 0}
    assert [run["nominal"] for run in runs] == [f"2026-01-0{day}T02:00:00Z" for day in (3, 2, 1)]


async def test_history_is_paged_and_filtered_and_outlives_its_job() -> None:
    async with serving_jobs() as server:
        await put(server)
        await put(server, "other")
        numbers = []
        for origin in ("a", "b", "c"):
            numbers.append((await post(server, "/trigger", {"origin": origin})).json()["number"])
            await ended(server, numbers[-1])
        other = (await post(server, "/trigger", {}, "other")).json()["number"]
        await ended(server, other)
        await server.client.delete(path_of("p:night"))
        get = server.client.get
        first = (await get(path_of("p:night", "/runs?limit=2"))).json()
        second = (await get(path_of("p:night", f"/runs?limit=2&before={first['next']}"))).json()
        everything = (await get("/v2/cron/runs")).json()["runs"]
        succeeded = (await get("/v2/cron/runs?state=failed,succeeded&origin=b")).json()["runs"]
        failed = (await get("/v2/cron/runs?state=failed&state=missed")).json()["runs"]
        missing = await get("/v2/cron/runs/999")

    assert [run["number"] for run in first["runs"]] == numbers[:0:-1]
    assert ([run["number"] for run in second["runs"]], second["next"]) == (numbers[:1], None)
    assert [run["number"] for run in everything] == [other, *reversed(numbers)]
    assert [run["origin"] for run in succeeded] == ["b"]
    assert failed == []
    assert "999" in assert_error(missing, 404, "not_found")


@pytest.mark.parametrize(
    ("cancel", "state"), [("?cancel=true", "cancelled"), ("?cancel=false", "succeeded"), ("", "succeeded")]
)
async def test_removing_a_job_lets_its_run_end_or_cancels_it(cancel: str, state: str) -> None:
    gate = Gate()
    async with serving_jobs(gate) as server:
        await put(server)
        run = (await post(server, "/trigger")).json()
        await gate.entered.wait()
        await server.client.delete(path_of("p:night", cancel))
        gate.open.set()
        assert (await ended(server, run["number"]))["state"] == state
        assert_error(await server.client.delete(path_of("p:night", "?cancel=perhaps")), 400, "invalid_input")


async def test_statistics_count_and_the_history_is_compacted() -> None:
    async with serving_jobs(history_keep=1) as server:
        await put(server)
        for _ in range(3):
            await ended(server, (await post(server, "/trigger")).json()["number"])
        figures = (await server.client.get("/v2/cron/statistics")).json()
        compacted = await server.client.post("/v2/cron/compact")
        left = (await server.client.get("/v2/cron/runs")).json()["runs"]

    assert (figures["jobs"], figures["fired"], figures["running"], figures["store_failing"]) == (1, 3, 0, None)
    assert figures["outcomes"] == [{"state": "succeeded", "reason": "", "count": 3}]
    assert figures["outcomes_by_job"] == {"p:night": figures["outcomes"]}
    assert compacted.json() == {"compacted": True}
    assert len(left) == 1


async def test_an_expression_is_explained() -> None:
    query = {"expression": "0 30 2 * * *", "tz": "Europe/Zurich", "n": "2", "after": "2026-03-28T12:00:00+01:00"}
    async with serving_jobs() as server:
        answer = await server.client.get("/v2/cron/explain", params=query)
        plain = await server.client.get("/v2/cron/explain", params={"expression": "@hourly"})
        over = await server.client.get("/v2/cron/explain", params={"expression": "0 0 0 1 1 * 1999"})
        wrong = await server.client.get("/v2/cron/explain", params={"expression": "0 61 * * * *"})
        nowhere = await server.client.get("/v2/cron/explain", params={"expression": "@daily", "tz": "Europe/Zurch"})

    assert answer.json() == {
        "expression": "0 30 2 * * *",
        "tz": "Europe/Zurich",
        "description": "At 02:30:00 every day, Europe/Zurich time",
        "next": [
            {"utc": "2026-03-29T01:00:00Z", "local": "2026-03-29T03:00:00+02:00"},
            {"utc": "2026-03-30T00:30:00Z", "local": "2026-03-30T02:30:00+02:00"},
        ],
    }
    assert len(plain.json()["next"]) == 5
    assert over.json()["next"] == []
    assert wrong.json()["token"] == "61"
    assert_error(nowhere, 400, "invalid_expression")
    assert nowhere.json()["hint"] == "write Europe/Zurich"


# ----------------------------------------------------------------------------------- closing, failing stores


async def test_while_the_server_closes_jobs_are_shown_and_not_changed() -> None:
    async with serving_jobs() as server:
        await put(server)
        server.api.inference.service.draining = True
        refused = [
            await put(server),
            await put(server, "new"),
            await server.client.delete(path_of("p:night")),
            *[await post(server, rest, {}) for rest in ("/pause", "/resume", "/trigger", "/backfill")],
            await server.client.post("/v2/cron/compact"),
        ]
        paths = ["/v2/cron/jobs", path_of("p:night"), "/v2/cron/runs", "/v2/cron/statistics"]
        shown = [await server.client.get(path) for path in paths]
        await server.cron.close()
        closed = await server.client.get("/v2/cron/runs")

    for response in refused:
        assert "closing" in assert_error(response, 503, "unavailable")
        assert response.headers["retry-after"] == "1"
    assert {response.status_code for response in shown} == {200}
    assert_error(closed, 503, "cron_error")


class FullDisk(MemoryStore):
    """A store that cannot be written to for a while."""

    full = False

    async def commit(self, changes: Sequence[Any]) -> list[Result]:
        if self.full:
            raise StoreError("the disk is full")
        return await super().commit(changes)


async def test_a_store_that_fails_is_told_with_advice_to_come_back() -> None:
    store = FullDisk()
    async with serving_jobs(store=store) as server:
        await put(server)
        store.full = True
        responses = [await put(server, "new"), await put(server, tz="UTC"), await post(server, "/pause")]
        store.full = False
        after = (await server.client.get("/v2/cron/jobs")).json()["jobs"]

    for response in responses:
        assert "disk is full" in assert_error(response, 503, "store_error")
        assert response.headers["retry-after"] == "1"
    assert [(job["id"], job["tz"], job["paused"]) for job in after] == [("p:night", "Europe/Zurich", "")]


async def test_a_server_without_jobs_says_so() -> None:
    async with serving() as server:
        response = await server.client.get("/v2/cron/jobs")

    assert "--no-cron" in assert_error(response, 404, "not_found")


async def test_a_job_of_a_model_that_is_not_there_waits_for_it() -> None:
    async with serving_jobs() as server:
        await put(server)
        await server.registry.unload("m")
        server.cron.look_again()
        waiting = (await server.client.get(path_of("p:night"))).json()
        triggered = await post(server, "/trigger")
        await server.registry.load("m", lambda x: x)
        server.cron.look_again()
        back = (await server.client.get(path_of("p:night"))).json()

    assert "'m' is not loaded" in waiting["waiting_for"]
    assert waiting["next_firing"] is None
    assert "'m' is not loaded" in assert_error(triggered, 400, "invalid_job")
    assert back["waiting_for"] is None
    assert back["next_firing"] is not None


async def test_runs_in_progress_are_shown_as_they_go() -> None:
    gate = Gate()
    async with serving_jobs(gate) as server:
        await put(server)
        run = (await post(server, "/trigger")).json()
        await gate.entered.wait()
        running = (await server.client.get("/v2/cron/runs?state=running")).json()["runs"]
        skipped = (await post(server, "/trigger")).json()
        gate.open.set()
        await until(lambda: server.cron.statistics().running == 0)

    assert [(shown["number"], shown["ended"]) for shown in running] == [(run["number"], None)]
    assert (skipped["state"], skipped["reason"]) == ("skipped", "overlap")
