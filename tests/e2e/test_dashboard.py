"""The dashboard in a real Chromium, over the real process: what people do with it, that everybody can, and what it does
when the server is gone."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kapsl_scheduler.client import Client
from kapsl_scheduler.demo.run import PACKAGE
from kapsl_scheduler.packages import build_package
from kapsl_scheduler.server.access import Role, made_token
from kapsl_scheduler.types import Priority
from tests.e2e.process import DIGITS, Process, serving

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed (extra dev)")
from tests.e2e.browser import CHROMIUM, ELSEWHERE, faults_of_access, looking, picture  # noqa: E402

Page, expect = playwright.Page, playwright.expect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: apt-get install chromium"),
]

HEARTBEAT = "/jobs/digits%3Aheartbeat"
VIEWS = {
    "models": "/models",
    "model": "/models/digits",
    "jobs": "/jobs",
    "job": HEARTBEAT,
    "runs": "/runs",
    "run": "/runs/1",
    "events": "/events",
    "overview": "/",  # last: its charts have the more to show
}
SEVEN = ((0.3, 0.2), (0.72, 0.2), (0.45, 0.85))
HALF_A_MINUTE = 30_000  # ms; only a failure waits this long


@asynccontextmanager
async def server() -> AsyncIterator[tuple[Process, Client]]:
    """The demo's model with its job, which fires every two seconds, and one that fires at night and is paused."""
    async with serving(PACKAGE, "--store", "memory") as process, Client(process.url) as client:
        night = {"schedule": "0 30 3 * * MON-FRI", "tz": "Europe/Zurich", "model": "digits", "value": [[0] * 64]}
        await client.put_job("night", json.dumps(night).encode())
        yield process, client


async def draw(page: Page, points: tuple[tuple[float, float], ...]) -> None:
    pad = page.locator(".drawing")
    await pad.scroll_into_view_if_needed()
    box = await pad.bounding_box()
    assert box is not None
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    await page.mouse.move(*places[0])
    await page.mouse.down()
    for x, y in places[1:]:
        await page.mouse.move(x, y, steps=8)
    await page.mouse.up()


# -------------------------------------------------------------------------------------------------- flows


async def test_a_digit_is_drawn_and_recognised() -> None:
    async with server() as (process, client), looking(process.url) as browser:
        page = await browser.open()
        await page.get_by_role("table", name="Models").get_by_role("link", name="digits").click()
        await expect(page).to_have_url(process.url + "/models/digits")
        await draw(page, SEVEN)
        await page.get_by_role("combobox", name="Class").select_option(label="throughput")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".guess")).to_have_text("It is a 7")
        figures = await page.locator(".reply dl").inner_text()
        served = await client.stats("digits")

    assert served["scheduler"]["classes"]["throughput"]["succeeded"] == 1
    words = figures.split("\n")
    assert words[words.index("Rows in its batch") + 1] == "1"
    for name in ("In the queue", "In the engine", "There and back"):
        value, unit = words[words.index(name) + 1].split()
        assert float(value) >= 0
        assert unit in ("µs", "ms", "s")


async def test_a_digit_is_drawn_with_keys_alone() -> None:
    async with server() as (process, _), looking(process.url) as browser:
        page = await browser.open("/models/digits")
        await page.locator(".drawing").focus()
        for key in (" ", *("ArrowDown",) * 8, " "):
            await page.keyboard.press(key)
        await page.get_by_role("button", name="Send").focus()
        await page.keyboard.press("Enter")
        await expect(page.locator(".guess")).to_have_text("It is a 1")


async def test_a_request_is_written_by_hand_and_a_wrong_one_says_why() -> None:
    async with server() as (process, _), looking(process.url, expected="400 (Bad Request)") as browser:
        page = await browser.open("/models/digits")
        await page.get_by_text("Write JSON").click()
        await page.get_by_role("button", name="Send").click()
        await expect(page.get_by_label("Answer", exact=True)).to_contain_text('"probabilities"')
        text = page.get_by_label("The request")
        await text.fill((await text.input_value()).replace("[1,64]", "[1,63]"))
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".answer").get_by_role("alert")).to_contain_text("pixels")
        await text.fill("{")
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".answer").get_by_role("alert")).to_contain_text("not JSON")


async def test_a_job_is_paused_resumed_and_run_and_its_run_looked_at() -> None:
    async with server() as (process, client), looking(process.url) as browser:
        page = await browser.open("/jobs")
        await page.get_by_role("button", name="Pause night").click()
        await expect(page.get_by_role("row", name="night")).to_contain_text("paused")
        paused = (await client.job("night"))["enabled"]
        await page.get_by_role("button", name="Resume night").click()
        await expect(page.get_by_role("row", name="night")).to_contain_text("active")
        resumed = (await client.job("night"))["enabled"]

        await page.get_by_role("link", name="night").first.click()
        await expect(page.locator(".explained")).to_contain_text("03:30:00 on Monday through Friday")
        await expect(page.locator(".next li")).to_have_count(5)
        await page.get_by_role("button", name="Run night now").click()
        history = page.get_by_role("table", name="Runs")
        await expect(history.get_by_role("row")).to_have_count(2)
        await expect(history).to_contain_text("succeeded")
        await history.get_by_role("link").first.click()
        number = page.url.rpartition("/")[2]
        await expect(page.locator("h1")).to_have_text(f"Run {number}")
        await expect(page.get_by_role("main")).to_contain_text("succeeded")
        run = await client.get(f"/v2/cron/runs/{number}")

    assert (paused, resumed) == (False, True)
    assert (run["job"], run["state"], run["rows"]) == ("night", "succeeded", 1)


async def test_a_range_of_the_past_is_backfilled() -> None:
    async with server() as (process, client), looking(process.url) as browser:
        page = await browser.open("/jobs/night")
        await page.get_by_text("Backfill: ").click()
        await page.get_by_label("From").fill("2026-01-05T00:00:00")  # a Monday
        await page.get_by_label("To", exact=True).fill("2026-01-12T00:00:00")
        await page.get_by_role("button", name="Backfill", exact=True).click()
        await expect(page.get_by_text("5 runs, asked by")).to_be_visible()
        await expect(page.get_by_role("table", name="Runs").get_by_text("succeeded")).to_have_count(5)
        runs = await client.runs("night")

    assert sorted(run["nominal"] for run in runs) == [f"2026-01-0{day}T02:30:00Z" for day in range(5, 10)]


async def test_events_come_as_they_happen_and_can_be_held() -> None:
    async with server() as (process, client), looking(process.url) as browser:
        page = await browser.open("/events")
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        await client.pause_job("digits:heartbeat", "quiet")
        await client.pause_job("night", "quiet")
        table = page.get_by_role("table", name="Events")
        await expect(table.get_by_role("row", name="night")).to_contain_text("paused")
        await page.get_by_role("button", name="Hold still").click()
        await client.resume_job("night")
        other = await browser.open("/events")
        await client.pause_job("night", "again")
        await expect(other.get_by_role("table", name="Events").get_by_role("row", name="night")).to_have_count(1)
        await expect(table.get_by_text("resumed")).to_have_count(0)
        await page.get_by_role("button", name="Hold still").click()
        await expect(table.get_by_text("resumed")).to_have_count(1)


async def test_the_way_round_by_keyboard() -> None:
    async with server() as (process, _), looking(process.url) as browser:
        page = await browser.open()
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        for _ in range(3):
            await page.keyboard.press("Tab")
        await expect(page.get_by_role("navigation").get_by_role("link", name="Models")).to_be_focused()
        await page.keyboard.press("Enter")
        await expect(page).to_have_url(process.url + "/models")
        await expect(page.get_by_role("heading", name="Models")).to_be_focused()
        assert await page.title() == "Models · kapsl-scheduler"
        await page.go_back()
        await expect(page.get_by_role("heading", name="Overview")).to_be_focused()


# --------------------------------------------------------------------------------------------- adversity


async def test_it_says_that_the_server_is_gone_and_comes_back_by_itself() -> None:
    async with server() as (process, _), looking(process.url, expected="net::ERR_") as browser:
        page = await browser.open()
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        process.send(signal.SIGTERM)
        await process.end()
        await expect(page.get_by_text("no connection")).to_be_visible()
        await expect(page.locator(".banner")).to_contain_text("Trying again")
        port = process.url.rpartition(":")[2]
        async with serving(PACKAGE, "--store", "memory", "--port", port):
            await expect(page.get_by_text("live", exact=True)).to_be_visible(timeout=HALF_A_MINUTE)
            await expect(page.locator(".banner")).to_have_count(0)


async def test_a_server_with_an_open_dashboard_ends_at_once() -> None:
    async with server() as (process, _), looking(process.url, expected="net::ERR_") as browser:
        page = await browser.open()
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        process.send(signal.SIGTERM)
        async with asyncio.timeout(5):  # and not when the ten seconds of the drain have passed
            code, stderr = await process.end()

    assert (code, stderr) == (0, "")


async def test_a_token_is_asked_for_and_what_it_may_not_do_another_may(tmp_path: Path) -> None:
    reader, of_reader = made_token("ann", Role.READER)
    writer, of_writer = made_token("bob", Role.WRITER)
    (tmp_path / "tokens").write_text(f"{of_reader}\n{of_writer}\n")
    options = ("--store", "memory", "--tokens", tmp_path / "tokens")
    async with serving(PACKAGE, *options) as process, looking(process.url, expected="the server responded") as browser:
        page = await browser.open("/jobs")
        dialog = page.get_by_role("dialog")
        await dialog.get_by_label("Token").fill("wrong")
        await dialog.get_by_role("button").click()
        await expect(dialog).to_contain_text("no such token")
        await page.keyboard.press("Escape")  # there is nothing to see without one
        await picture(page, "token-light-desktop")
        await dialog.get_by_label("Token").fill(reader)
        await dialog.get_by_role("button").click()
        await expect(page.get_by_text("live", exact=True)).to_be_visible()
        await page.get_by_role("button", name="Pause digits:heartbeat").click()
        alert = page.get_by_role("alert")
        await expect(alert).to_contain_text("'ann' is a reader, and this takes a writer")
        await picture(page, "forbidden-light-desktop")
        await alert.get_by_role("button", name="Use another token").click()
        await dialog.get_by_role("button", name="Cancel").click()
        await alert.get_by_role("button", name="Use another token").click()
        await dialog.get_by_label("Token").fill(writer)
        await dialog.get_by_role("button", name="Use it").click()
        await page.get_by_role("button", name="Pause digits:heartbeat").click()
        await expect(page.get_by_role("row", name="digits:heartbeat")).to_contain_text("paused")
        kept = await page.evaluate("[Object.values(localStorage), document.cookie]")
        await page.get_by_role("button", name="Forget token").click()
        await expect(dialog).to_be_visible()
        await expect(page.get_by_role("row")).to_have_count(0)
        bearers = {
            path: {await request.header_value("authorization") for request in browser.asked if path in request.url}
            for path in ("/dashboard/live", "/v2/cron/jobs", "/dashboard/static")
        }

    assert kept == [[], ""]
    assert not any("kapsl_" in request.url for request in browser.asked)
    assert bearers["/dashboard/static"] == {None}
    assert f"Bearer {reader}" in bearers["/dashboard/live"]
    assert {f"Bearer {reader}", f"Bearer {writer}"} <= bearers["/v2/cron/jobs"]


async def test_the_browser_is_kept_from_what_is_not_the_servers_own() -> None:
    """And tells: without that, no violation in all the other tests would say nothing."""
    async with server() as (process, _), looking(process.url, expected="olic") as browser:
        page = await browser.open()
        await page.evaluate("""() => {
            const script = document.createElement("script");
            script.textContent = "document.title = 'mine'";
            document.body.append(script);
            document.body.innerHTML += "<img src='data:image/gif;base64,R0lGODlhAQABAAAAACw=' onerror='1'>";
            fetch("http://127.0.0.1:9/").catch(() => {});
        }""")
        await expect(page).not_to_have_title("mine")
        told = {line for line in browser.errors if "policy violated" in line}

    for directive in ("script-src-elem", "img-src", "connect-src"):
        assert any(directive in line for line in told), told
    assert not [request.url for request in browser.asked if ":9/" in request.url]


async def test_pages_from_elsewhere_change_nothing() -> None:
    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<title>Nice</title>")
        writer.close()
        await writer.wait_closed()

    async with server() as (process, client), await asyncio.start_server(page, "127.0.0.1", 0) as other:
        site = f"http://{ELSEWHERE}:{other.sockets[0].getsockname()[1]}"
        ours = f"http://{ELSEWHERE}:{process.url.rpartition(':')[2]}"
        async with looking(process.url, expected="403 (Forbidden)", elsewhere=f"http://{ELSEWHERE}") as browser:
            there = await browser.open(site)
            pausing = f"{process.url}/v2/cron/jobs/night/pause"
            async with there.expect_response(pausing) as answered:
                # What a page may send without asking first: no more than a form could.
                await there.evaluate(f"fetch('{pausing}', {{method: 'POST', mode: 'no-cors', body: '{{}}'}})")
            by_origin = (await answered.value).status
            by_name = await there.goto(ours)
            assert by_name is not None
            enabled = (await client.job("night"))["enabled"]

    assert (by_origin, by_name.status, enabled) == (403, 403, True)


async def test_versions_side_by_side_have_views_of_their_own(tmp_path: Path) -> None:
    packages = [
        build_package(DIGITS, tmp_path / f"{version}.aimod", project_name="digits", version=version)
        for version in ("9", "10")
    ]
    async with (
        serving(*packages, "--store", "memory") as process,
        Client(process.url) as client,
        looking(process.url) as browser,
    ):
        page = await browser.open("/models")
        await expect(page.get_by_role("table", name="Models").get_by_role("row")).to_have_count(3)
        await expect(page.get_by_role("row", name="digits 10, latest")).to_be_visible()
        await page.get_by_role("row", name="digits 9").get_by_role("link").click()
        await expect(page).to_have_url(process.url + "/models/digits/versions/9")
        await draw(page, SEVEN)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".guess")).to_have_text("It is a 7")
        await picture(page, "versions-light-desktop")
        faults = await faults_of_access(page)
        await page.get_by_role("navigation", name="Versions").get_by_role("link", name="10 latest").click()
        await expect(page).to_have_url(process.url + "/models/digits")
        await expect(page.locator(".guess")).to_have_count(0)
        path = "/v2/models/digits/versions/{}/stats"
        answered = [
            (await client.get(path.format(version)))["model_stats"][0]["inference_count"] for version in (9, 10)
        ]

    assert (answered, faults) == ([1, 0], [])


async def test_an_address_that_leads_nowhere_says_so() -> None:
    async with server() as (process, _), looking(process.url, expected="404 (Not Found)") as browser:
        page = await browser.open("/models/%E0")
        await expect(page.get_by_role("heading", name="There is no such view")).to_be_visible()
        await page.get_by_role("main").get_by_role("link", name="Overview").click()
        await page.get_by_role("navigation").get_by_role("link", name="Models").click()
        page = await browser.open("/models/none")
        await expect(page.get_by_role("alert")).to_contain_text("'none' is not loaded; loaded: 'digits'")
        page = await browser.open("/models/digits/versions/7")
        await expect(page.get_by_role("alert")).to_contain_text("version '7'")


async def test_a_server_without_jobs_says_so() -> None:
    async with serving(PACKAGE, "--no-cron") as process, looking(process.url, expected="404 (Not Found)") as browser:
        page = await browser.open("/jobs")
        await expect(page.get_by_role("alert")).to_contain_text("--no-cron")
        page = await browser.open()
        await expect(page.get_by_role("table", name="Models")).to_be_visible()


# ------------------------------------------------------------------------------------------------- looks


@pytest.mark.timeout(180)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
async def test_every_view_is_for_everybody_on_a_desk_and_on_a_phone(dark: bool) -> None:
    async with server() as (process, client), looking(process.url) as browser, busy(client):
        kept = await browser.open()  # while it looks, the server keeps samples: charts have something to show
        await expect(kept.get_by_role("row", name="digits:heartbeat").first).to_be_visible()
        await client.pause_job("night", "holiday")
        faults: dict[str, Any] = {}
        for phone in (False, True):
            page = await browser.open("/jobs", phone=phone, dark=dark)
            for name, path in VIEWS.items():
                title = f"{name}-{'dark' if dark else 'light'}-{'phone' if phone else 'desktop'}"
                await browser.go(page, path)
                faults[title] = await faults_of(page, path, title, thorough=not (phone and dark))

    assert {title: found for title, found in faults.items() if found} == {}


async def faults_of(page: Page, path: str, title: str, *, thorough: bool) -> list[str]:
    """What is wrong with a view, of which a picture is kept."""
    await expect(page.get_by_text("live", exact=True).first).to_be_visible()
    await expect(page.get_by_text("Asking for")).to_have_count(0)
    if path == VIEWS["model"]:
        await draw(page, SEVEN)
        await page.get_by_role("button", name="Send").click()
        await expect(page.locator(".guess")).to_be_visible()
    elif path in (VIEWS["events"], VIEWS["overview"]):
        await expect(page.get_by_role("table", name="Events").get_by_role("row").nth(2)).to_be_visible()
    await picture(page, title)
    faults = await faults_of_access(page) if thorough else []  # colours and layout have been looked at apart
    if await page.evaluate("document.documentElement.scrollWidth > innerWidth"):
        faults.append("it is wider than the window")
    return faults


@asynccontextmanager
async def busy(client: Client) -> AsyncIterator[None]:
    """Live and bulk callers, as long as it is open."""
    rng = np.random.default_rng(7)
    ended = asyncio.Event()

    async def call(rows: int, priority: Priority) -> None:
        pixels = rng.integers(0, 17, (rows, 64)).astype(np.float32)
        while not ended.is_set():
            await client.infer("digits", {"pixels": pixels}, priority=priority)
            await asyncio.sleep(0.04)

    async with asyncio.TaskGroup() as callers:
        for rows, priority in ((1, Priority.LATENCY_CRITICAL), (8, Priority.THROUGHPUT), (3, Priority.THROUGHPUT)):
            callers.create_task(call(rows, priority))
        try:
            yield
        finally:
            ended.set()
