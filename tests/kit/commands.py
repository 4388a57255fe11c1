"""The commands of ``python -m sse_batcher`` and ``flask sse`` as processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .repository import ROOT
from .waiting import TIMEOUT


def environment(**more: str) -> dict[str, str]:
    """Of a command: ours, without what changes its output."""
    ours = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS"}}
    return {**ours, "PYTHONPATH": str(ROOT), **more}


@contextmanager
def started(
    *arguments: str, folder: Path | None = None, environ: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run Python with these arguments, such as ``-m sse_batcher tail URL``; kill it at the end if it still runs."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environ or environment(),
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def interrupt(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Press Ctrl-C. Return the exit status, and what it has printed since on stdout and stderr."""
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT)
    return process.returncode, out, err
