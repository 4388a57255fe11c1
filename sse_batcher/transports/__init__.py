"""Transports: how a stream gets to its client. A thread of the server drives it (attached), or the loop (detached).

Runs in the server's thread that serves the request. See "The way of a request" in docs/explanation/architecture.md.
"""

from __future__ import annotations

import logging

from ..manager import SSEManager
from ..manager_state import process_of
from ..runtime.log_fields import log_fields
from .attached import AttachedStream, ServedRequest
from .detached.stream import DetachedStream, detach_policy


def open_stream(manager: SSEManager, request: ServedRequest) -> AttachedStream:
    """Return the WSGI iterable for this request, of the kind that the option `transport` asks for.

    It subscribes when it is iterated, and holds nothing before that.
    """
    process = process_of(manager)
    if not process.has_server:
        return AttachedStream(manager, request)
    if process.options.transport == "auto":
        return DetachedStream(manager, request)
    detach_policy.get().log_once(
        logging.INFO,
        'each stream holds a thread of the server while it is open: transport="attached" asks for it',
        extra=log_fields("streams_hold_threads"),
    )
    return AttachedStream(manager, request)
