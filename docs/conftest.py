"""The programs on the pages run: each ``python`` block in the order of its page, in one namespace for the page.

A block that begins with a comment such as ``# app.py`` is a file. It is written into a folder of its own, and later
blocks can import it. What a page needs but does not show stands in a comment, ``<!-- invisible-code-block: python``.
"""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from sybil import Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from sse_batcher.manager import managers


class ProgramEvaluator(PythonEvaluator):
    """Runs a block, or writes it into the folder of the page if it is a file."""

    def __call__(self, example: Example) -> None:
        name = re.match(r"# (\w+\.py)\n", example.parsed)
        if name:
            Path(example.namespace["folder"], name[1]).write_text(example.parsed)
        else:
            super().__call__(example)


def _loggers() -> list[logging.Logger]:
    """The root logger, and ours."""
    names = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "sse_batcher"]
    return [logging.root, *map(logging.getLogger, names)]


def _begin(namespace: dict[str, Any]) -> None:
    namespace["managers_before"] = managers()
    namespace["logging_before"] = {logger: (logger.level, logger.handlers[:]) for logger in _loggers()}
    namespace["__name__"] = "page"
    namespace["folder"] = tempfile.mkdtemp()
    sys.path.insert(0, namespace["folder"])


def _end(namespace: dict[str, Any]) -> None:
    folder = namespace["folder"]
    for logger in _loggers():
        level, logger.handlers[:] = namespace["logging_before"].get(logger, (logging.NOTSET, []))
        logger.setLevel(level)
    for manager in managers():
        assert manager in namespace["managers_before"] or manager.shutdown()
    sys.path.remove(folder)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None)).startswith(folder):
            del sys.modules[name]
    shutil.rmtree(folder)
    namespace.clear()  # the receivers of signals end with it


pytest_collect_file = Sybil(
    [CodeBlockParser("python", ProgramEvaluator()), SkipParser()], pattern="*.md", setup=_begin, teardown=_end
).pytest()
