"""What commands write: lines on stdout, notices and progress on stderr, colours only on a terminal.

The command's own thread.
"""

from __future__ import annotations

import os
import shutil
import sys
from typing import TextIO

from .text import printable, shortened

_STYLES = {"dim": "2", "bold": "1", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class OutputError(Exception):
    """The output cannot be written, such as to a disk that is full. Its text is a sentence for people."""


def output(file: TextIO | None) -> TextIO:
    """Return `sys.stdout` or `sys.stderr`, or a file for nothing if it is None: the shell can close it (``2>&-``)."""
    return open(os.devnull, "w") if file is None else file


class Terminal:
    """The two outputs of a command. By default, those of the process."""

    def __init__(self, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._out = out or output(sys.stdout)
        self._err = err or output(sys.stderr)
        for file in (self._out, self._err):
            if hasattr(file, "reconfigure"):
                file.reconfigure(errors="backslashreplace")  # for terminals that do not know all characters
        self.is_terminal = self._out.isatty()
        self._has_progress = self._err.isatty()
        self._progress = ""
        no_color = bool(os.environ.get("NO_COLOR"))
        self._colours = self.is_terminal and not no_color
        self._err_colours = self._has_progress and not no_color

    @property
    def width(self) -> int:
        """How many characters a line of the terminal has."""
        return shutil.get_terminal_size().columns

    def styled(self, text: str, style: str) -> str:
        """Return a text for `write` in this style, if stdout shows colours."""
        return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if self._colours else text

    def write(self, line: str) -> None:
        """Write a line on stdout, at once. Raises `BrokenPipeError` if its reader has left, or `OutputError`."""
        self._clear()
        try:
            self._out.write(f"{line}\n")
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise OutputError(f"the output cannot be written: {error.strerror or error}") from error

    def clear_screen(self) -> None:
        """Begin a page of its own on a terminal; elsewhere, do nothing."""
        if self.is_terminal:
            self._out.write("\x1b[H\x1b[2J")

    def notice(self, text: str, style: str = "yellow") -> None:
        """Write a line on stderr. What is not printable is escaped."""
        self._clear()
        line = f"-- {printable(text)}"
        self._err.write(f"\x1b[{_STYLES[style]}m{line}\x1b[0m\n" if self._err_colours else f"{line}\n")
        self._err.flush()

    def progress(self, text: str) -> None:
        """Show how far the command is, on stderr: on a terminal always on the same line."""
        if not self._has_progress:
            self._err.write(f"{text}\n")
        else:
            self._progress = shortened(text, self.width - 1)
            self._err.write(f"\r\x1b[K{self._progress}")
        self._err.flush()

    @property
    def progress_seconds(self) -> float:
        """How often `progress` is useful."""
        return 0.2 if self._has_progress else 5.0

    def _clear(self) -> None:
        if self._progress:
            self._progress = ""
            self._err.write("\r\x1b[K")
            self._err.flush()

    def end(self) -> None:
        """Remove the progress."""
        self._clear()
