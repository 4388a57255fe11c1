"""What passes for another process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

AsProcess = Callable[[int], AbstractContextManager[None]]
"""The type of the fixture `as_process`: within ``as_process(pid)`` this process has that number."""
