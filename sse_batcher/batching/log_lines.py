"""The log lines of an engine. Any thread; takes no lock."""

from __future__ import annotations

import logging

from ..options import TypeRules
from ..runtime.log_fields import log_fields

_log = logging.getLogger("sse_batcher.engine")


def log_sink_failed(error: Exception, events: int) -> None:
    """Log that the sink has failed for a batch of so many events. For the first batch until it works again."""
    _log.error(
        "the sink failed for a batch of %d events, which are lost; further failures are counted, "
        "but not logged until it works again",
        events,
        exc_info=error,
        extra=log_fields("sink_failed", events=events, error=error),
    )


def log_sink_works(events: int) -> None:
    """Log that the sink works again. `events` were lost since the start."""
    _log.info(
        "the sink takes batches again; %d events were lost since the start",
        events,
        extra=log_fields("sink_works", events=events),
    )


def log_replaced(rules: TypeRules) -> None:
    """Log that an event of this type has replaced an older one. For the first one of each type."""
    if rules.dedup_by_default:
        _log.warning(
            "A newer %r event replaced an older one with the same %r within a window, because that field is "
            "the default dedup_key. If this is what you want, set dedup_key=%r (in Flask: SSE_DEDUP_KEY). "
            'To keep both events, set dedup_key=None, or per_type={%r: {"dedup_key": None}}.',
            *(rules.type, rules.dedup_key, rules.dedup_key, rules.type),
            extra=log_fields("event_replaced_by_default", type=rules.type, field=rules.dedup_key),
        )
    else:
        _log.info(
            "A newer %r event replaced an older one with the same key within a window; "
            'per_type={%r: {"dedup_key": None}} keeps both.',
            *(rules.type, rules.type),
            extra=log_fields("event_replaced", type=rules.type),
        )
