"""Fields of log records: what a line says, as values for programs that read the log.

Pure.
"""

from __future__ import annotations

PREFIX = "sse_"
"""What all names begin with, so that none is an attribute of `logging.LogRecord`, or a field of the app's own."""


def log_fields(code: str, **values: object) -> dict[str, object]:
    """Return the `extra` of a log call: ``sse_code``, and each of these values with the prefix ``sse_`` in its name.

    `code` is the name of the line, which stays when its text changes. The values are made plain: `json.dumps` accepts
    them. None of them may contain a token or a password.

    >>> log.info("stream %d ended: %s", 5, "left", extra=log_fields("stream_ended", client=5, reason="left"))
    """
    return {f"{PREFIX}code": code, **{PREFIX + name: _plain(value) for name, value in values.items()}}


def _plain(value: object) -> object:
    """Return a value as one that JSON has."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    try:
        return str(value)
    except Exception:
        # An error of the app may not even have a text. `logging` survives that in the arguments of a line, so the
        # thread that logs must survive it here.
        return f"<{type(value).__name__}>"
