"""Pictures of the page at `/` while it serves its example load, light and dark.

    python scripts/page_screenshots.py [--model smollm2-135m-instruct] [--output docs/page]

Starts a server of its own, runs the example load once, chats, pauses the engine, starts the load again and steps to the
moment at which a block is copied on write. Writes OUTPUT_light.png and OUTPUT_dark.png. Needs Playwright's Python
package and Chromium: on the PATH, or where TINYLLM_CHROMIUM says.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright
from served import served

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER_ARGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--disable-background-networking")
SIZE = {"width": 1440, "height": 1080}
MAX_NBYTES = 400_000
MAX_STEPS = 60
QUESTION = "Why do cats purr? Answer in three sentences."


def wait_for_status(page: Page, status: str) -> None:
    page.wait_for_selector(f"#status[data-status={status}]")


def step(page: Page) -> None:
    before = int(page.inner_text("#stat-steps").replace(",", ""))
    page.click("#step")
    page.wait_for_selector(f"#stat-steps:text-is('{before + 1:,}')")


def set_the_scene(page: Page) -> None:
    wait_for_status(page, "idle")
    page.click("#example")
    page.wait_for_selector("#example:enabled")
    chat = page.inner_text("#chat-title") == "Chat"
    page.fill("#prompt", QUESTION if chat else "The fox said to the king: if you give me")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".answer:not(.writing)")
    page.click("#pause")
    wait_for_status(page, "paused")
    page.click("#example")
    page.wait_for_selector("#request-rows tr:nth-child(7):has-text('waiting')")
    copied = page.locator("#story li.copy")
    for _ in range(MAX_STEPS):
        before = copied.count()
        step(page)
        if copied.count() > before:
            return
    raise SystemExit("no block was copied")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pictures of the page.")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--num-blocks", type=int, default=240)
    parser.add_argument("--output", default="docs/page")
    args = parser.parse_args()
    path = os.environ.get("TINYLLM_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        raise SystemExit("there is no Chromium on the PATH; TINYLLM_CHROMIUM may name one")
    options = ["--model", args.model, "--num-blocks", str(args.num_blocks)]
    with served(options) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(BROWSER_ARGS))
        # without motion the copies of the last step stay in sight
        page = browser.new_page(viewport=SIZE, reduced_motion="reduce")
        page.set_default_timeout(180_000)
        page.goto(url)
        set_the_scene(page)
        page.mouse.move(2, 2)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.wait_for_timeout(300)  # a frame is drawn
            name = f"{args.output}_{scheme}.png"
            page.screenshot(path=name)
            size = Path(name).stat().st_size
            print(f"{name}: {size:,} bytes")
            if size > MAX_NBYTES:
                raise SystemExit(f"more than {MAX_NBYTES:,} bytes")
        page.click("#resume")
        wait_for_status(page, "idle")
        browser.close()


if __name__ == "__main__":
    main()
