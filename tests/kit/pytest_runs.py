"""Runs pytest in a process of its own, with our package and its entry point as if it was installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import sse_batcher

METADATA = "Metadata-Version: 2.1\nName: sse_batcher\nVersion: 0\n"


def run(folder: Path, *command: str, installed: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, with our package and its entry point as if it was installed."""
    if installed:
        about = folder / "site" / "sse_batcher-0.dist-info"
        about.mkdir(parents=True, exist_ok=True)
        (about / "METADATA").write_text(METADATA)
        (about / "RECORD").write_text("sse_batcher/__init__.py,,\nsse_batcher_pytest.py,,\n")
        (about / "entry_points.txt").write_text("[pytest11]\nsse_batcher = sse_batcher_pytest\n")
    source = Path(sse_batcher.__file__).parents[1]
    path = os.pathsep.join([str(folder / "site"), str(source), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-W", "error", *command],
        check=False,
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def run_pytest(folder: Path, test: str, *options: str) -> str:
    """Run pytest with one test module, and return what it prints."""
    (folder / "test_app.py").write_text(test)
    done = run(folder, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *options)
    return done.stdout + done.stderr
