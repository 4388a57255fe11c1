"""Detached streams, from the server's side: a stream that leaves the server's thread after its first block.

Runs in the server's thread that serves the request. The stream is an attached stream until its connection is taken
over, and stays one if that is not possible.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Mapping

from ...manager import SSEManager
from ...manager_state import process_of
from ...runtime.dropped import Dropped
from ...runtime.log_fields import log_fields
from ...runtime.log_once import LogOnce
from ...runtime.process import PerProcess
from ..attached import AttachedStream, BusyError, ServedRequest
from ..descriptors import descriptor_limit
from ..server import ServerInfo
from .loop import Adoption, loop
from .takeover import MAX_PRELUDE_BYTES, TakeOver

_log = logging.getLogger("sse_batcher.transports")

NEEDS_THREADS = (
    ". When they hold all of its threads, no other request is served: give it more than you expect streams, and set "
    "max_clients (SSE_MAX_CLIENTS) below their number"
)
"""What is added to the log line if it is unknown how many threads the server has."""


class DetachedStream(AttachedStream):
    """A WSGI iterable. If the stream can be detached, the server sees the first block and then the end of the body.

    In the first step, the first block is handed to the server, whose connection is diverted to us by then. When the
    server asks for more, it has written the head and the block, and the stream goes on in the loop.
    """

    def __init__(self, manager: SSEManager, request: ServedRequest) -> None:
        super().__init__(manager, request)
        self._begun = False
        self._detaches = True
        self._takeover: TakeOver | None = None
        self._diverted: Dropped | None = None  # until the take-over is over
        self._prelude = b""
        self._kept = b""  # the part of the first block that the server was not given

    def __next__(self) -> bytes:
        takeover = self._claim()
        if takeover is not None:
            detached = self._detach(takeover)
            self._forget_takeover()  # only now: if this was interrupted, `close` gives the connection back
            if detached:
                raise StopIteration
        if self._kept:
            kept, self._kept = self._kept, b""
            return kept
        if self._begun:
            return super().__next__()
        self._begun = True
        self._detaches = _can_detach(self._request.server)
        block = super().__next__()
        if self._client is None or self._client.farewell is not None or not self._detaches:
            return block
        return self._divert(block)

    def close(self) -> None:
        try:
            takeover = self._claim()
            if takeover is not None:
                takeover.undo()
                self._forget_takeover()
        finally:
            super().close()

    def _claim(self) -> TakeOver | None:
        """Return the take-over that was begun, for this thread to finish or undo; None if there is none. Idempotent."""
        takeover = self._takeover
        if takeover is not None:
            loop.get().release(takeover)
        return takeover

    def _forget_takeover(self) -> None:
        """Call this when the take-over was finished or undone."""
        self._takeover = None
        if self._diverted is not None:
            self._diverted.cancel()

    def _hold(self) -> None:
        if not self._detaches:
            super()._hold()

    def _divert(self, block: bytes) -> bytes:
        """Begin to take the connection over. Returns the bytes that the server has to write."""
        server = self._request.server
        assert server.fd is not None
        try:
            self._takeover = TakeOver(server.fd, server.unsent)
        except OSError as error:
            detach_policy.get().warn_of_error(error)
            return block if self._stay() else self._refuse("threads")
        loop.get().attend(self._takeover)
        # A middleware may drop this response without closing it, and answer with another one.
        self._diverted = Dropped(self, self._takeover.drop)
        self._prelude, self._kept = block[:MAX_PRELUDE_BYTES], block[MAX_PRELUDE_BYTES:]
        return self._prelude

    def _detach(self, takeover: TakeOver) -> bool:
        """Finish the take-over and hand the stream to the loop. Returns False if the stream stays attached."""
        client, adopt = self._client, loop.get().adopt
        assert client is not None, "only the server closes a stream that is not watched"
        hub = process_of(self._manager).hub
        taken = takeover.finish(self._prelude, self._kept)
        if taken is None:
            client.counts.undone += 1
            detach_policy.get().log_once(
                logging.WARNING,
                "streams stay attached: the server has not written the expected response. Possible reasons are a "
                "middleware that changes the response or reads it ahead, and TLS",
                extra=log_fields("takeover_undone"),
            )
            if not self._stay():
                client.dismiss("threads")  # an sse_busy is too late: the first block is on its way already
            return False
        # At once: only this frame knows the connection, which stays open forever if something is raised before
        # `adopt`.
        adopt(Adoption(hub, self._manager, client, taken, self._request.server))
        self._client, self._ended = None, True
        if self._dropped is not None:
            self._dropped.cancel()  # the stream outlives this object
        return True

    def _stay(self) -> bool:
        """Go on as an attached stream. Returns False if the server needs its threads for other requests."""
        self._detaches = False
        try:
            self._hold()
        except BusyError:
            return False
        return True


class DetachPolicy:
    """Decides whether the streams of this process are detached, and logs each answer with its reason, once.

    Any thread. Takes no lock.
    """

    def __init__(self) -> None:
        self._log_once = LogOnce(_log)
        self._told: tuple[str, int | None] | None = None  # of which server it was logged that streams are detached

    def detaches(self, server: ServerInfo) -> bool:
        """Return whether the stream of this request can be detached. A `TakeOver` may still find that it cannot."""
        refusal = _refusal(server)
        if refusal is not None:
            # Mostly, no warning: this costs nothing until threads get scarce, and then the watcher refuses streams, and
            # warns. It cannot if it does not know how many threads there are.
            held = "greenlet" if _has_greenlets(server) else "thread"
            advice = NEEDS_THREADS if _may_run_out_of_threads(server) else ""
            self.log_once(
                logging.WARNING if advice else logging.INFO,
                f"streams stay attached, and hold a {held} of the server each: {refusal}{advice}",
                extra=log_fields("streams_stay_attached", obstacle=refusal),
            )
            return False
        if server.obstacle:
            self.log_once(
                logging.INFO,
                f"a stream stays attached, and holds a thread of the server: {server.obstacle}",
                extra=log_fields("stream_stays_attached", obstacle=server.obstacle),
            )
            return False
        if self._told == (server.name, server.max_requests):
            return True  # not even the text is made again
        self._told = server.name, server.max_requests
        text = f"streams are detached from the threads of this {server.name}"
        limit = descriptor_limit()
        if limit is not None:
            text += f"; this process may have {limit} file descriptors (ulimit -n), and each detached stream takes one"
        if server.max_requests:
            text += f". max_requests={server.max_requests} ends all streams each time it is reached: leave it out"
        self.log_once(
            logging.WARNING if server.max_requests else logging.INFO,
            text,
            extra=log_fields("streams_detached", server=server.name, limit=limit, max_requests=server.max_requests),
        )
        return True

    def warn_of_error(self, error: OSError) -> None:
        """Log once that the system did not let a stream be detached."""
        self.log_once(
            logging.WARNING, "a stream stays attached: %s", error, extra=log_fields("takeover_failed", error=error)
        )

    def log_once(self, level: int, text: str, *args: object, extra: Mapping[str, object]) -> None:
        """Log this text, unless it was logged before. See `LogOnce.log`."""
        self._log_once.log(level, text, *args, extra=extra)


def _can_detach(server: ServerInfo) -> bool:
    """Return whether the stream of this request can be detached, as `DetachPolicy.detaches`, and the loop can run."""
    policy = detach_policy.get()
    try:
        return policy.detaches(server) and loop.get().can_run()
    except OSError as error:  # there are no file descriptors left for the first stream's loop
        policy.warn_of_error(error)
        return False


def _refusal(server: ServerInfo) -> str | None:
    """Return why no stream of this server can be detached; None if streams can."""
    if _has_greenlets(server):
        return f"{server.name} does not serve requests in threads"
    if not hasattr(select, "epoll"):
        return "there is no epoll (another system than Linux, or gevent)"
    if not server.lets_go or server.fd is None:
        return f"{server.name or 'this server'} does not give plain connections away"
    return None


def _has_greenlets(server: ServerInfo) -> bool:
    return server.name in {"gunicorn gevent", "gunicorn eventlet"}


def _may_run_out_of_threads(server: ServerInfo) -> bool:
    """Return whether this is a server whose threads may be few, and are not known. Without epoll, it may be gevent."""
    return server.name in {"", "mod_wsgi"} and hasattr(select, "epoll")


detach_policy = PerProcess(DetachPolicy)
"""The policy of this process."""
