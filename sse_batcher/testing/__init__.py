"""For tests of apps: what was sent, what a client gets, and a real server.

See docs/guides/testing.md, and "Tests of apps" in docs/explanation/architecture.md. The module `sse_batcher_pytest`
has the fixtures.
"""

from __future__ import annotations

from .records import Recording, Sent, record
from .server import live_server
from .stage import Clock
from .streams import Frame, Stream, StreamRefusedError, open_stream

__all__ = [
    "Clock",
    "Frame",
    "Recording",
    "Sent",
    "Stream",
    "StreamRefusedError",
    "live_server",
    "open_stream",
    "record",
]
