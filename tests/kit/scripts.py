"""Scripts in a Python process of their own: what may hang or crash cannot take the tests with it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from .repository import ROOT

PRELUDE = """
import ctypes, gc, os, random, signal, threading, time
from sse_batcher import BatchOptions, ClosedError, EventBatcher, SSEManager
from sse_batcher.manager_state import process_of
got = []
def sink(batch):
    got.extend(event.data for event in batch.events)
"""


def run(script: str, python: str = sys.executable, stderr: str = "") -> str:
    """Run a script after the prelude. It must end well and say just this on stderr; returns what it printed."""
    done = subprocess.run(
        [python, "-W", "error", "-W", "ignore:This process", "-c", PRELUDE + textwrap.dedent(script)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, stderr), done.stdout + done.stderr
    return done.stdout
