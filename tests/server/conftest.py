"""A browser to look at the page with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")  # while Playwright runs, asyncio.run cannot
def browser() -> Iterator[Any]:
    """Headless Chromium, if there is one: on the PATH, or where TINYLLM_CHROMIUM says."""
    api = pytest.importorskip("playwright.sync_api", reason="the page's tests need Playwright: pip install '.[test]'")
    path = os.environ.get("TINYLLM_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("the page's tests need Chromium: on the PATH, or named by TINYLLM_CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGS))
        yield browser
        browser.close()
