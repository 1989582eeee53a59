"""A real Chromium that looks at the dashboard, and what must hold of every page it sees: no error in its console, no
request to anywhere but the server."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, Request, ViewportSize, async_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(os.environ.get("KAPSL_SCREENSHOTS") or Path(__file__).parents[2] / "build" / "screenshots")
DESKTOP = ViewportSize(width=1280, height=900)
PHONE = ViewportSize(width=360, height=740)
ELSEWHERE = "elsewhere.test"  # a name that leads here, though it is not ours
_ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    f"--host-resolver-rules=MAP {ELSEWHERE} 127.0.0.1",
)
# The console has them too, in words that change from version to version.
_TELL_VIOLATIONS = (
    'addEventListener("securitypolicyviolation", (event) => '
    "console.error(`policy violated: ${event.effectiveDirective} ${event.blockedURI}`));"
)


class Looking:
    """One browser, and what was wrong with the pages that it has seen."""

    def __init__(self, browser: Browser, url: str) -> None:
        self.url = url
        self.errors: list[str] = []
        self.foreign: list[str] = []
        self.asked: list[Request] = []
        self._browser = browser

    async def open(self, path: str = "/", *, phone: bool = False, dark: bool = False) -> Page:
        """A page of a browser that has never been here. `path` may be a whole address."""
        context = await self._browser.new_context(
            viewport=PHONE if phone else DESKTOP,
            has_touch=phone,
            color_scheme="dark" if dark else "light",
            locale="en-GB",
            timezone_id="Europe/Zurich",
        )
        await context.add_init_script(_TELL_VIOLATIONS)
        page = await context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.errors.append(f"{page.url}: {error}"))
        page.on("request", self._asked)
        if path.startswith("/"):
            await self.go(page, path)
        else:
            await page.goto(path)
        return page

    async def go(self, page: Page, path: str) -> None:
        """To another view, as if its address had been typed."""
        await page.goto(self.url + path)
        await page.wait_for_selector("main h1")

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(f"{message.location.get('url')}: {message.text}")

    def _asked(self, request: Request) -> None:
        self.asked.append(request)
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc and not request.url.startswith("data:"):
            self.foreign.append(request.url)


@asynccontextmanager
async def looking(url: str, *, expected: str = "", elsewhere: str = "") -> AsyncIterator[Looking]:
    """A browser for a server; at the end there must have been no request but to it (and to the address `elsewhere`),
    and no error, violations of its policy among them, but those that have the `expected` text in them."""
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        try:
            seen = Looking(browser, url)
            yield seen
            assert [error for error in seen.errors if not expected or expected not in error] == []
            assert [address for address in seen.foreign if not elsewhere or not address.startswith(elsewhere)] == []
        finally:
            await browser.close()


async def picture(page: Page, name: str) -> None:
    """Keeps a screenshot of the whole page for people to look at."""
    await page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)


async def faults_of_access(page: Page) -> list[str]:
    """What axe-core finds on the page."""
    found = (await Axe().run(page)).response["violations"]
    return [f"{fault['id']}: {node['html']} {node['failureSummary']}" for fault in found for node in fault["nodes"]]
