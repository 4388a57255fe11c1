"""The ids of test parameters."""

from __future__ import annotations

import re


def steady(value: object) -> str:
    """Return what an object looks like, the same in every process: pytest-xdist compares what its workers collect."""
    text = f"{{{', '.join(map(repr, sorted(value)))}}}" if isinstance(value, set) else repr(value)
    return re.sub(" at 0x[0-9a-f]+", "", text)
