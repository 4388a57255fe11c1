"""Makes the process that imports this wait for its server on a machine that stands still for some seconds.

A take-over that waits for two seconds in vain is undone. Tests count those that the ways of a server have undone.
"""

from __future__ import annotations

from sse_batcher.transports.detached.takeover import TakeOver

assert TakeOver.__init__.__kwdefaults__ is not None
TakeOver.__init__.__kwdefaults__["timeout"] = 30.0
