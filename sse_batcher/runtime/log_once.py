"""Log lines of which one is enough, such as a warning about the configuration, or of which a few are.

Any thread. Takes no lock.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping


def is_logged(number: int) -> bool:
    """Return whether the failure of this number is logged: 1, 2, 4, 8 ... One that goes on would fill the log."""
    return number & (number - 1) == 0


class LogOnce:
    """Logs each text once, for as long as this object lives.

    Make one for each object or process that a text is about. Texts are compared before their arguments are put in:
    if a text comes again with other arguments, it is not logged. Each text is kept, so a text must not contain anything
    that comes from outside.

    >>> once = LogOnce(logging.getLogger("sse_batcher.manager"))
    >>> once.log(logging.WARNING, "the option %s has no effect here", "http2", extra=log_fields("no_effect"))
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._logged: set[str] = set()

    def log(self, level: int, text: str, *args: object, extra: Mapping[str, object]) -> None:
        """Log this text, unless it was logged before. Arguments are those of `logging.Logger.log`.

        `extra` is what `log_fields.log_fields` returns.

        A harmless race: two threads that log the same text at the same time may both find that it is new, and it is
        logged twice. A lock would have to be safe in signal handlers, in a `__del__` and after a fork; one log line
        more is better.
        """
        if text not in self._logged:
            self._logged.add(text)  # before it is logged: a handler of the log may call the same code again
            self._logger.log(level, text, *args, extra=extra)
