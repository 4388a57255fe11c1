"""Health: whether this process has to be restarted, and whether it should get new requests.

Any thread. Takes no lock and looks at no client, so it stays cheap with many clients.
"""

from __future__ import annotations

from ..manager import SSEManager
from ..manager_state import process_of
from ..runtime.worker import failed_thread
from .detached.loop import loop
from .server import ServerInfo
from .watcher import watcher

STALLED_SECONDS = 30.0
"""How long a thread of this library may do nothing of what is due, in seconds, before the process has to be restarted.
A thread that waits for Redis is no such thread."""


def dead_thread(manager: SSEManager) -> str | None:
    """Return the name of a thread of this library that does not work, None if all do. Then a restart is what helps.

    Threads of all managers count: one that has died and cannot be started again, and one that has sent no event, or
    checked no stream, for `STALLED_SECONDS`. A thread that has died is started here, if that is possible.
    """
    failed = failed_thread()
    if failed is not None:
        return failed
    driving, watching = loop.existing(), watcher.existing()
    if driving is not None and driving.stalled_for > STALLED_SECONDS:
        return "sse_batcher-loop"
    if watching is not None and watching.stalled_for > STALLED_SECONDS:
        return "sse_batcher-watcher"
    process = process_of(manager)
    # In memory, delivery waits for nothing. With Redis, it waits as long as Redis is away.
    if not process.reaches_others and process.batcher.publishing_for > STALLED_SECONDS:
        return "sse_batcher"
    return None


def unready_reason(manager: SSEManager, server: ServerInfo) -> str | None:
    """Return why this process should get no new requests now, None if it should.

    ``draining``: it is being shut down, or `server` is stopping. ``threads``: open streams hold all of the server's
    threads, except one at most; never if it is not known how many it has. That Redis is away is no reason.
    """
    if server.is_stopping() or process_of(manager).unhealthy_reason() == "draining":
        return "draining"
    watching = watcher.existing()
    return "threads" if watching is not None and watching.leaves_no_thread else None
