"""The recipes of `docs/guides/frameworks.md` and the page of `browser.md`: built with Vite, opened in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page

from .kit.browser import browser_fixture
from .kit.repository import DOCS, ROOT
from .kit.servers import GTHREAD, HOST, Server, running
from .kit.services import npm_install, program
from .kit.waiting import wait_until

pytestmark = [pytest.mark.external, pytest.mark.timeout(120)]

DOCUMENT = "".join((DOCS / "guides" / f"{name}.md").read_text() for name in ("browser", "frameworks"))
PACKAGES = Path(__file__).parent / "kit" / "recipes" / "package.json"

FOLDERS = {
    "React": "react",
    "Vue": "vue",
    "Svelte": "svelte",
    "TypeScript": "typescript",
    "One connection for all tabs, with a bundler": "shared",
}
"""Where the files of a section go. Those of other sections go into the folder of the whole."""

MAINS = {
    "react/main.jsx": """
        import { StrictMode } from "react";
        import { createRoot } from "react-dom/client";
        import { Orders } from "./Orders.jsx";
        const root = createRoot(document.getElementById("app"));
        root.render(<StrictMode><Orders /></StrictMode>);
        window.leave = () => root.unmount();
    """,
    "vue/main.js": """
        import { createApp } from "vue";
        import Orders from "./Orders.vue";
        const app = createApp(Orders);
        app.mount("#app");
        window.leave = () => app.unmount();
    """,
    "svelte/main.js": """
        import { mount, unmount } from "svelte";
        import Orders from "./Orders.svelte";
        const orders = mount(Orders, { target: document.getElementById("app") });
        window.leave = () => unmount(orders);
    """,
    "shared/main.js": """
        import { open } from "./shared.js";
        const events = open("7");
        events.on("orders", (list) => { document.title = "has " + list.length; });
        events.on("order", ({ state }) => { document.title = state; });
        window.leave = () => events.close();
    """,
}
"""What every program with this framework begins with."""

BUILD = """
    import { svelte } from "@sveltejs/vite-plugin-svelte";
    import react from "@vitejs/plugin-react";
    import vue from "@vitejs/plugin-vue";
    import { defineConfig } from "vite";
    const input = ["react", "vue", "svelte", "shared"].map((name) => name + ".html");
    export default defineConfig({ plugins: [react(), vue(), svelte()], build: { rollupOptions: { input } } });
"""

WHOLE = """
    from flask import render_template
    from app import app, sse
    ICON = '<link rel="icon" href="data:,">'
    sse.allow_stats(lambda: True)
    app.get("/plain.html")(lambda: ICON + render_template("orders.html"))
"""


def recipes() -> dict[str, str]:
    """The text of each file of the document, by its path. A block without a name is tested in test_docs_pages.py."""
    files = {}
    for section in re.split(r"^## ", DOCUMENT, flags=re.M):
        folder = FOLDERS.get(section.partition("\n")[0], ".")
        for text in re.findall(r"^```\w+\n(.*?)^```$", section, flags=re.M | re.S):
            name = re.match(r"(?:#|//|<!--) ([\w.-]+\.\w+)(?: -->)?\n", text)
            if name:
                path = f"templates/{name[1]}" if folder == "." and name[1].endswith(".html") else f"{folder}/{name[1]}"
                files[path] = text
    return files


def write(folder: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(re.sub(r"^\n? {4}", "", text, flags=re.M) if text[:1] == "\n" else text)


def run(folder: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # the `sse_batcher` that is tested
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def node(folder: Path, file: str) -> tuple[str, str]:
    """The beginning of a command that runs a file of a package."""
    return program("node", package="Debian: nodejs"), str(folder / "node_modules" / file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files of the recipes, and the packages that they import."""
    folder = tmp_path_factory.mktemp("recipes")
    shutil.copy(PACKAGES, folder)
    npm_install(folder)
    files = recipes()
    write(folder, files | MAINS | {"build.config.js": BUILD, "whole.py": WHOLE})
    for path in MAINS:
        page = f'<!doctype html><link rel="icon" href="data:,"><div id="app"></div><script type="module" src="/{path}">'
        (folder / path).parent.with_suffix(".html").write_text(page + "</script>")
    for name in FOLDERS.values():
        run(folder, sys.executable, "-m", "flask", "--app=app", "sse", "client", name)
    return folder


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[Server]:
    """The app, which serves the pages that were built, too."""
    run(folder, *node(folder, "vite/bin/vite.js"), "build", "--config=build.config.js")
    with running((*GTHREAD[:-1], "whole:app"), folder) as site:
        yield site


browser = browser_fixture()


@contextmanager
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """A page that has nothing to complain of."""
    complaints: list[str] = []
    with browser.new_page() as page:
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(url, wait_until="load")
        yield page
        assert complaints == []


def has_streams(site: Server, count: int) -> bool:
    stats: dict[str, Any] = json.loads(site.request("GET", "/events/stats"))
    return bool(stats["clients"] == count)


@pytest.mark.parametrize("name", ["plain", "react", "vue", "svelte"])
def test_a_page_shows_the_state_and_each_change(site: Server, browser: Browser, name: str) -> None:
    for number in (1, 2):
        site.request("POST", f"/orders/{number}/new")
    with opened(browser, f"{site.url}/{name}.html") as page:
        page.wait_for_selector("li:text-is('2: new')")
        site.request("POST", "/orders/2/<b>sent")
        page.wait_for_selector("li:text-is('2: <b>sent')")
        assert page.locator("li").all_text_contents() == ["1: new", "2: <b>sent"]
        if name == "plain":
            assert page.text_content("#state") == ""
        else:
            page.evaluate("leave()")
            wait_until(lambda: has_streams(site, 0), "the stream ends with its component")
            assert page.locator("li").count() == 0


def test_strict_mode_leaves_one_stream(folder: Path, site: Server, browser: Browser) -> None:
    config = folder / "vite.config.js"
    config.write_text(config.read_text().replace("127.0.0.1:5000", f"{HOST}:{site.port}"))
    command = (*node(folder, "vite/bin/vite.js"), f"--host={HOST}", "--strictPort", "--port={port}")
    run_it = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    with running(("-c", run_it, *command), folder) as vite, opened(browser, f"{vite.url}/react.html") as page:
        page.wait_for_selector("li")
        wait_until(lambda: has_streams(site, 1), "one stream is left")
        site.request("POST", "/orders/1/packed")
        page.wait_for_selector("li:text-is('1: packed')")
        assert has_streams(site, 1)


def test_tabs_share_one_stream_by_a_worker_that_vite_has_copied(site: Server, browser: Browser) -> None:
    with browser.new_context() as context:
        pages = [context.new_page() for _ in range(3)]
        for page in pages:
            page.goto(f"{site.url}/shared.html", wait_until="load")
            page.wait_for_function("document.title === 'has 2'")
        wait_until(lambda: has_streams(site, 1), "there is one stream")
        site.request("POST", "/orders/1/shared")
        for page in pages:
            page.wait_for_function("document.title === 'shared'")
        assert has_streams(site, 1)


def test_the_types_are_those_that_the_recipe_says(folder: Path) -> None:
    options = ["--strict", "--noEmit", "--module", "esnext", "--moduleResolution", "bundler", "--target", "es2022"]
    run(folder, *node(folder, "typescript/bin/tsc"), *options, "typescript/orders.ts")
