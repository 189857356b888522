"""A real browser for tests of pages: Debian's Chromium, which has to be there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser, without a window."""
    path = next(filter(None, map(shutil.which, _NAMES)), os.environ.get("CHROMIUM"))
    if not path:
        pytest.fail("the explorer is tested in Chromium: apt-get install -y chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page that was opened, with all that went wrong in it."""

    def __init__(self, browser: Browser, file: Path, **options: Any) -> None:
        self.page: Page = browser.new_page(**options)
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("body[data-ready=yes]", timeout=60_000)

    def text(self, selector: str) -> str:
        """The text of an element."""
        return self.page.inner_text(selector)

    def value_text(self, selector: str = "#chart") -> str:
        """What a slider says to screen readers."""
        return self.page.get_attribute(selector, "aria-valuetext") or ""

    def press(self, key: str, selector: str = "#chart") -> None:
        """Press a key in an element."""
        self.page.press(selector, key)

    def pairs(self, selector: str) -> dict[str, str]:
        """Terms of a list and what they are."""
        names = self.page.locator(f"{selector} dt").all_inner_texts()
        return dict(zip(names, self.page.locator(f"{selector} dd").all_inner_texts(), strict=True))

    def view(self) -> tuple[float, float]:
        """The part of the timeline's axis that is shown."""
        shown = (self.page.get_attribute("#chart", "data-view") or "").split()
        return float(shown[0]), float(shown[1])

    def width(self) -> int:
        """How wide the document is, in pixels."""
        return int(self.page.evaluate("document.documentElement.scrollWidth"))
