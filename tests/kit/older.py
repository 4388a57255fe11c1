"""The version of sse_batcher before texts and users, from the history of this repository, in a process of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from .repository import ROOT
from .services import missing
from .sse_parser import ServerEvent
from .waiting import TIMEOUT

FIRST_WITH_TEXT = "class Text(str)"
"""A line that the version after it has first."""


def _git(*arguments: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True).stdout


def older_version(folder: Path) -> Path:
    """Put the package of the version before into this folder, and return the folder. Skips if there is no history."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        missing("needs the history of the repository, and git")
    first, *_ = [*_git("log", "--reverse", "--format=%H", f"-S{FIRST_WITH_TEXT}", "--", "sse_batcher").split(), b""]
    parents = _git("rev-list", "--parents", "-1", first.decode()).split()[1:] if first else []
    if not parents:
        missing("needs the whole history of the repository: this is a shallow clone")
    archive = _git("archive", "--format=zip", parents[0].decode(), "sse_batcher")
    with zipfile.ZipFile(io.BytesIO(archive)) as files:
        files.extractall(folder)
    return folder


class OlderProcess:
    """A process with a manager of that version, and streams of it: `open` them, and read them with `until`.

    `options` are those of `BatchOptions`.
    """

    def __init__(self, folder: Path, url: str, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.older_process", url, json.dumps(options)],
            cwd=folder,  # the first place where Python looks for packages
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._news: dict[str, SimpleQueue[ServerEvent]] = {}
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        package = Path(self.call("package"))
        assert package.is_relative_to(folder), f"this is another version: {package}"

    def __enter__(self) -> OlderProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(TIMEOUT)
        finally:
            self._process.kill()
            self._process.wait()
            self._thread.join(TIMEOUT)
            self._process.stdout.close()

    def call(self, command: str, *arguments: Any, **more: Any) -> Any:
        """Have it call a method of its manager, or a command of `older_process`. Returns the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([command, arguments, more]) + "\n")
        self._process.stdin.flush()
        try:
            return self._answers.get(timeout=TIMEOUT)
        except Empty:
            raise AssertionError(f"no answer to {command}") from None

    def open(self, name: str, *channels: str, cursor: str | None = None, user: Any = None) -> ServerEvent:
        """Open a stream under this name, and return its first event."""
        self._news[name] = SimpleQueue()
        self.call("open", name, channels or ("default",), cursor, user)
        return self.until(name, lambda event: True)[0]

    def until(self, name: str, wanted: Callable[[ServerEvent], bool]) -> list[ServerEvent]:
        """Return the events of a stream from where the last call has ended, up to this one, which is in time."""
        got: list[ServerEvent] = []
        deadline = time.monotonic() + TIMEOUT
        while not got or not wanted(got[-1]):
            try:
                got.append(self._news[name].get(timeout=max(0.0, deadline - time.monotonic())))
            except Empty:
                raise AssertionError(f"it did not come: {got}") from None
        return got

    def until_data(self, name: str, data: Any) -> list[ServerEvent]:
        return self.until(name, lambda event: event.json == data)

    def so_far(self, name: str) -> list[ServerEvent]:
        """Return the events of a stream that have come since the last call."""
        return [self._news[name].get_nowait() for _ in range(self._news[name].qsize())]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            name, value = json.loads(line)
            if name is None:
                self._answers.put(value)
            else:
                self._news[name].put(ServerEvent(*value))
