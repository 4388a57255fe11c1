"""Transports: who drives a stream. `open_stream` makes the one that the manager's options ask for.

Run by the server's thread that serves the request.
"""

from __future__ import annotations

import logging

from ..manager import SSEManager
from .attached import AttachedStream, Request
from .detached.stream import DetachedStream, detach_policy


def open_stream(manager: SSEManager, request: Request) -> AttachedStream:
    """A WSGI iterable for this request, which holds nothing before it is iterated."""
    if manager.transport == "auto":
        return DetachedStream(manager, request)
    detach_policy.get().say(
        logging.INFO, 'streams are attached, and hold a thread of the server each; see transport="auto"'
    )
    return AttachedStream(manager, request)
