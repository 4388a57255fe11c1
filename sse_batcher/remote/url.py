"""URLs of a stream, and of what lies beside it.

Pure.
"""

from __future__ import annotations

from urllib.parse import parse_qsl, urlsplit


def values_in(url: str, name: str) -> list[str]:
    """Return the values of one parameter of a query. What is not a URL has none."""
    try:
        query = urlsplit(url).query
    except ValueError:
        return []
    return [value for each, value in parse_qsl(query, keep_blank_values=True) if each == name]
