"""One stream for all tabs of a browser: every interleaving of tabs, their worker and the server, in Node.

``kit/sharing`` has the cases, and a model in which tests own the time and the order of all messages. What real browsers
do is in `test_sharing_browser.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from sse_batcher.browser import SCRIPT

from .kit.services import program

pytestmark = pytest.mark.external

FOLDER = Path(__file__).parent / "kit" / "sharing"
CASES = [
    case
    for file in sorted(FOLDER.glob("cases_*.mjs"))
    for case in re.findall(r'^  async "(.*)"\(', file.read_text(), re.MULTILINE)
]
SEEDS = range(1, 41)
"""Each is a walk of 120 steps."""
SECONDS = 50

Found = Mapping[str, str | None]
"""What is wrong with each case or walk, by name. One that did not end is not there."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Found]:
    """Runs cases or walks, with the module as it is served."""
    folder = tmp_path_factory.mktemp("sharing")
    script = folder / "sse-batcher.js"
    script.write_bytes(SCRIPT)
    node = program("node", package="Debian: nodejs")

    def run(*arguments: str) -> Found:
        command = [node, "--no-warnings", "--experimental-vm-modules", "run.mjs", str(script), *arguments]
        with (folder / "output").open("w+") as output:
            process = subprocess.Popen(command, cwd=FOLDER, stdout=output)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            output.seek(0)
            return dict(json.loads(line) for line in output)

    return run


@pytest.fixture(scope="module")
def cases(run: Callable[..., Found]) -> Found:
    return run("cases")


def test_the_cases_are_found() -> None:
    assert len(CASES) >= 30


@pytest.mark.parametrize("case", CASES)
def test_tabs_that_share_a_stream(cases: Found, case: str) -> None:
    assert cases.get(case, "it did not end") is None


def test_each_tab_gets_each_event_once_whatever_happens(run: Callable[..., Found]) -> None:
    assert run("random", *map(str, SEEDS)) == {str(seed): None for seed in SEEDS}
