"""A real Chromium on our pages, driven by playwright, with a journal of its requests and complaints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, Request, expect, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")  # Debian's
NO_CHROMIUM = "no Chromium: Ubuntu's is a snap; `.venv/bin/playwright install --with-deps chromium` fetches another"
PHONE = {"width": 360, "height": 780}
DESKTOP = {"width": 1280, "height": 900}
HANG_MILLISECONDS = 180_000
expect.set_options(timeout=HANG_MILLISECONDS)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Debian's browser, else playwright's own, without a window; skip the test where there is neither.

    Its sandbox is off, which a container's root cannot have.
    """
    with sync_playwright() as playwright:
        executable = CHROMIUM if CHROMIUM.exists() else Path(playwright.chromium.executable_path)
        if not executable.exists():
            pytest.skip(NO_CHROMIUM)
        # One process for all pages, which are all ours: to change it takes a fifth of what a page costs.
        shared = ["--renderer-process-limit=1", "--disable-site-isolation-trials"]
        options = ["--no-sandbox", "--disable-gpu", *shared]
        browser = playwright.chromium.launch(executable_path=executable, args=options)
        try:
            yield browser
        finally:
            browser.close()


class PageSession:
    """One page in a context of its own. `complaints` are console errors and uncaught exceptions, `requested` URLs."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self._context = browser.new_context(**{"viewport": DESKTOP} | options)
        self._context.set_default_timeout(HANG_MILLISECONDS)
        self.page: Page = self._context.new_page()
        self.complaints: list[str] = []
        self.requested: list[str] = []
        self.page.on("console", self._hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._note)

    def __enter__(self) -> "PageSession":
        return self

    def __exit__(self, *_: object) -> None:
        self._context.close()

    @property
    def origins(self) -> set[str]:
        return {f"{parts.scheme}://{parts.netloc}/" for parts in map(urlsplit, self.requested)}

    @property
    def text(self) -> str:
        """All that can be read on the page, opened or not."""
        return str(self.page.evaluate("document.body.textContent"))

    def scrolls_sideways(self) -> bool:
        return bool(self.page.evaluate("document.documentElement.scrollWidth > window.innerWidth"))

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _note(self, request: Request) -> None:
        self.requested.append(request.url)
