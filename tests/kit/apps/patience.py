"""Makes the process that imports this wait for its server on a machine that stands still for some seconds.

A take-over that waits for two seconds in vain is undone. Tests count those that the ways of a server have undone.
"""

from __future__ import annotations

from sse_batcher.transports.detached import takeover

takeover.WRITE_TIMEOUT_SECONDS = 30.0
