"""Texts that commands show: without what a terminal would obey, and sizes and times in few characters.

Pure.
"""

from __future__ import annotations

import re
import unicodedata

_PERHAPS_UNSAFE = re.compile("[^ -~]")
LARGEST = 10**30
"""A larger number of bytes is shown as this one. Python has whole numbers that no float can be."""


def printable(text: str) -> str:
    """Return a text with everything escaped that a terminal would obey, or would not show. It has no line end.

    These are control characters, those that change the direction of text, invisible ones, lone surrogates, and
    characters that have no meaning (yet). Spaces of all kinds stay.
    """
    return text if text.isprintable() else _PERHAPS_UNSAFE.sub(_shown, text)


def _shown(found: re.Match[str]) -> str:
    character = found[0]
    is_safe = character.isprintable() or unicodedata.category(character) == "Zs"
    return character if is_safe else character.encode("unicode_escape").decode()


def shortened(text: str, width: int) -> str:
    """Return a text of at most so many characters, with an ellipsis if something was left out."""
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


def size(count: float) -> str:
    """Return a number of bytes in few characters, such as ``27 B`` or ``1.2 kB``."""
    value, unit = float(min(count, LARGEST)), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1_000:
            break
        value, unit = value / 1_000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def duration(seconds: float) -> str:
    """Return a time in few characters, such as ``4 ms``, ``1.5 s``, ``12 s``, ``5 min`` or ``3 h``."""
    if 0 < seconds < 1:
        return f"{seconds * 1_000:.3g} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    for unit, length, most in (("s", 1, 120), ("min", 60, 120), ("h", 3_600, 48)):
        if seconds < length * most:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86_400:.0f} days"
