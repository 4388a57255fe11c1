"""The browser's module in Chromium, Firefox and WebKit, against a server that answers exactly what a case asks for.

The cases are in `kit/cases/`, in JavaScript. In each engine a page runs them side by side, in frames. All engines run
at the same time, each for its page, so that the first test waits for what takes the longest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sse_batcher.browser

from .kit import engines as kit
from .kit.engines import ENGINES, Engine, Tab
from .kit.scripted import HOST, ScriptedServer
from .kit.wire_samples import samples

pytestmark = [pytest.mark.external, pytest.mark.timeout(300)]

engines = kit.engines
FOLDER = Path(__file__).parent / "kit" / "cases"


def names_in(file: Path) -> list[str]:
    return re.findall(r'^test\("(.+)", async', file.read_text(), re.MULTILINE)


ALONE = names_in(FOLDER / "cases_alone.js")
"""The cases that measure. Each has its engine for itself, after the others."""
TOGETHER = [name for file in sorted(FOLDER.glob("cases_*.js")) for name in names_in(file) if name not in ALONE]
LANES = 6
"""How many cases run at a time."""
POLICY = {"Content-Security-Policy": "default-src 'none'; script-src 'self'; connect-src 'self'; worker-src 'self'"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedServer]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "sse-batcher.js").write_bytes(sse_batcher.browser.SCRIPT)
    (folder / "samples.json").write_text(json.dumps(samples()))
    with ScriptedServer(FOLDER, folder, ports=1 + LANES, headers={"case.html": POLICY}) as server:
        yield server


Results = dict[str, dict[str, dict[str, Any]]]
"""What came of each case, by engine and name: its error or None, and the seconds that it took."""


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest, engines: dict[str, Engine], server: ScriptedServer) -> Results:
    items = [item.name for item in request.session.items if item.path == request.path]
    origins = [f"http://{HOST}:{port}" for port in server.ports[1:]]
    tabs = {name: engine.open(f"{server.url}/runner.html") for name, engine in engines.items()}

    def begin(tab: Tab, names: list[str], lanes: int) -> None:
        wanted = [name for name in names if any(f"-{name}]" in item for item in items)]
        tab.evaluate(f"run({json.dumps(origins[:lanes])}, {json.dumps(wanted)})")

    for tab in tabs.values():
        begin(tab, TOGETHER, LANES)
    found: Results = {name: tab.evaluate("finished") for name, tab in tabs.items()}
    for name, tab in tabs.items():
        begin(tab, ALONE, 1)
        found[name] |= tab.evaluate("finished")
        tab.close()
    return found


@pytest.mark.parametrize("case", [*TOGETHER, *ALONE])
@pytest.mark.parametrize("engine", ENGINES)
def test_case(results: Results, engine: str, case: str) -> None:
    assert results[engine][case]["error"] is None, results[engine][case]["error"]
