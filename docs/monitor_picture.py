"""Makes the picture of the monitor: ``python docs/monitor_picture.py docs/guides/monitor.webp``.

It needs Chromium, and the packages of the group ``test``. The streams and events are made up, but real.
"""

from __future__ import annotations

import io
import random
import shutil
import sys

from flask import Flask
from PIL import Image
from playwright.sync_api import sync_playwright

from sse_batcher import SSE
from sse_batcher.cli import serving
from sse_batcher.manager_state import process_of
from sse_batcher.streams.client import QueueClient
from sse_batcher.streams.opening import StreamRequest

SIZE = {"width": 1180, "height": 800}
USERS = ["ada", "grace", "alan", "edsger", "barbara", "donald", "margaret", "linus"]
TYPES = ["order_changed", "price"]


def open_streams(sse: SSE, count: int) -> list[QueueClient]:
    """Open so many streams, each with its first block handed out."""
    clients = []
    for number in range(count):
        channels = ("default", f"team-{number % 4 + 1}")
        request = StreamRequest(channels, user=USERS[number % len(USERS)], address=f"192.0.2.{number + 10}")
        client = process_of(sse.manager).subscribe(request)
        next(client)
        clients.append(client)
    return clients


def main(path: str, steps: str = "30") -> None:
    """Write the picture, a WebP, to this file. Some events are sent so many times, a second after each other."""
    random.seed(7)
    app = Flask("shop")
    app.config["SECRET_KEY"] = "only for the picture"
    sse = SSE(app)
    sse.allow_monitor(lambda: True)
    sse.allow_kick(lambda: True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with (
        sse.manager,
        serving(app) as (host, port),
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]) as browser,
        browser.new_page(viewport=SIZE, color_scheme="light") as page,
    ):
        slow, *others = open_streams(sse, 24)
        page.goto(f"http://{host}:{port}/events/monitor", wait_until="load")
        for _ in range(int(steps)):
            for number in range(random.randrange(20, 60)):
                channel = random.choice(["default", "team-1"])
                sse.manager.enqueue(random.choice(TYPES), {"id": number, "state": "paid"}, channel=channel)
            sse.manager.flush_all()
            for client in others:
                while client.is_waiting:
                    next(client)
            page.wait_for_timeout(1000)
        png = page.screenshot()
        slow.close()
    Image.open(io.BytesIO(png)).convert("RGB").save(path, quality=80, method=6)


if __name__ == "__main__":
    main(*sys.argv[1:])
