"""The pytest plugin, in runs of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sse_batcher import SSEManager
from sse_batcher.testing import Clock, Recording

from .kit.pytest_runs import run, run_pytest
from .kit.repository import ROOT

PASSING = """
from sse_batcher import SSEManager

manager = SSEManager()

def test_events(sse_events):
    manager.enqueue("order", 7)
    sse_events.assert_sent("order", 7)

def test_no_events_of_the_test_before(sse_events):
    assert list(sse_events) == []

def test_streams(sse_events, sse_clock, sse_stream):
    stream = sse_stream(manager)
    manager.enqueue("order", 7)
    assert stream.events() == []
    sse_clock.advance(0.1)
    assert stream.events() == [("order", 7)]
    sse_events.assert_sent("order", 7)

def test_streams_are_closed(sse_clock):
    assert manager.get_stats().clients == 0
"""
FAILING = """
from sse_batcher import SSEManager

def test_it(sse_events):
    manager = SSEManager()
    manager.enqueue("order", 8)
    sse_events.assert_sent("order", 7)

def test_that(sse_events):
    SSEManager().enqueue("order", 8)
    sse_events.assert_not_sent("order")
"""
UNITTEST = """
import unittest
from sse_batcher import SSEManager
from sse_batcher.testing import open_stream, record

class Test(unittest.TestCase):
    def test_it(self):
        manager = SSEManager()
        with record() as sent, open_stream(manager) as stream:
            manager.enqueue("order", 7)
            sent.clock.advance(0.1)
            sent.assert_sent("order", 7)
            self.assertEqual(stream.events(), [("order", 7)])

if __name__ == "__main__":
    unittest.main()
"""


def test_the_fixtures_are_there(tmp_path: Path) -> None:
    assert "4 passed" in run_pytest(tmp_path, PASSING)


def test_pyproject_names_the_entry_point() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert '[project.entry-points.pytest11]\nsse_batcher = "sse_batcher_pytest"\n' in text
    assert 'py-modules = ["sse_batcher_pytest"]' in text


def test_a_failed_assertion_points_at_the_test(tmp_path: Path) -> None:
    printed = run_pytest(tmp_path, FAILING)
    assert "2 failed" in printed
    assert '>       sse_events.assert_not_sent("order")' in printed
    assert '>       sse_events.assert_sent("order", 7)' in printed
    assert "<'order' to the channel 'default': 8>" in printed
    assert "records.py" not in printed  # the traceback ends in the test


def test_the_plugin_can_be_switched_off(tmp_path: Path) -> None:
    printed = run_pytest(tmp_path, FAILING, "-p", "no:sse_batcher")
    assert "fixture 'sse_events' not found" in printed


def test_a_test_of_unittest_needs_no_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_app.py").write_text(UNITTEST)
    done = run(tmp_path, "test_app.py")
    assert done.stderr.endswith("OK\n"), done.stderr
    assert "1 passed" in run_pytest(tmp_path, UNITTEST)


def test_a_run_that_uses_no_fixture_does_not_import_the_package(tmp_path: Path) -> None:
    """So the plugin costs such a run less than 5 ms."""
    other = "import sys\n\ndef test_it():\n    assert 'sse_batcher_pytest' in sys.modules\n"
    assert "1 passed" in run_pytest(tmp_path, f"{other}    assert 'sse_batcher' not in sys.modules\n")
    costs = []
    for _ in range(3):
        done = run(tmp_path, "-X", "importtime", "-c", "import pytest, sse_batcher_pytest")
        found = re.search(r"(\d+) \| +sse_batcher_pytest$", done.stderr, flags=re.M)
        assert found is not None, done.stderr
        costs.append(int(found[1]))
    assert min(costs) < 5_000


def test_only_the_plugin_imports_pytest(tmp_path: Path) -> None:
    done = run(
        tmp_path, "-c", "import sse_batcher.testing, sys; print({'pytest', 'flask', 'werkzeug'} & {*sys.modules})"
    )
    assert done.stdout == "set()\n", done.stderr


def test_parallel_runs_have_a_stage_each(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    assert "4 passed" in run_pytest(tmp_path, PASSING, "-n", "2")


# -- the fixtures, in this run -----------------------------------------------------------------------------------------


def test_the_fixtures_share_one_time(sse_events: Recording, sse_clock: Clock) -> None:
    manager = SSEManager()
    manager.enqueue("order", 7)
    assert sse_events.clock is sse_clock
    sse_clock.advance(1)
    assert manager.get_stats().batches == 1
    assert repr(sse_clock) == "<Clock: 1 s>"
