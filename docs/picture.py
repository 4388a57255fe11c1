"""Makes the moving picture of the README from the demo: ``python docs/picture.py docs/demo.webp``.

It needs Chromium, and the packages of the group ``test``. What the picture shows happens while it is taken.
"""

from __future__ import annotations

import io
import itertools
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import closing

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from sse_batcher.cli import create_demo, serving
from sse_batcher.demo.simulation import Demo

SIZE = {"width": 980, "height": 690}
PRESSED = [("restart", 3.0), ("steady", 3.5)]
"""The buttons, and how many seconds each is watched."""
FRAME_SECONDS = 0.15


def shots(page: Page) -> Iterator[tuple[float, bytes]]:
    """Press the buttons. Yield what is seen, with the seconds since the beginning."""
    start = end = time.monotonic()
    for action, seconds in PRESSED:
        button = page.locator(f"[data-action={action}]")
        button.focus()  # its frame shows what is pressed
        yield time.monotonic() - start, page.screenshot()
        button.click()
        end = max(end, time.monotonic()) + seconds
        while (now := time.monotonic()) < end:
            yield now - start, page.screenshot()
            page.wait_for_timeout(max(0.0, now + FRAME_SECONDS - time.monotonic()) * 1000)


def main(path: str) -> None:
    """Write the picture, a WebP, to this file."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with (
        closing(Demo()) as demo,
        serving(create_demo(demo)) as (host, port),
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
        browser.new_page(viewport=SIZE, color_scheme="light") as page,
    ):
        page.goto(f"http://{host}:{port}", wait_until="load")
        for side in ("batched", "plain"):
            page.wait_for_selector(f"#{side} .state[data-state=open]")
        times, pngs = zip(*shots(page), strict=True)
    first, *others = [Image.open(io.BytesIO(png)).convert("RGB") for png in pngs]
    steps = [round((after - before) * 1000) for before, after in itertools.pairwise(times)]
    durations = [*steps, 1500]
    small = {"lossless": True, "quality": 60, "method": 4, "minimize_size": True}
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0, **small)


if __name__ == "__main__":
    main(sys.argv[1])
