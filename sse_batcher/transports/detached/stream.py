"""Detached: a stream that leaves the server's thread after its first block, where that can be.

Run by the server's thread that serves the request. It is an attached stream until its connection is taken over, and
stays one where that fails.
"""

from __future__ import annotations

import importlib
import logging
import select
import weakref
from typing import Any

from ...manager import SSEManager
from ...runtime.process import PerProcess
from ..attached import AttachedStream, BusyError, Request
from ..server import ServerInfo
from .loop import Adoption, loop
from .takeover import LONGEST_PRELUDE, TakeOver

_log = logging.getLogger("sse_batcher.transports")


class DetachedStream(AttachedStream):
    """A WSGI iterable: if all goes well the first block of a stream, and then its end, as far as the server can see."""

    def __init__(self, manager: SSEManager, request: Request) -> None:
        super().__init__(manager, request)
        self._begun = False
        self._detaches = True
        self._takeover: TakeOver | None = None
        self._prelude = b""
        self._kept = b""  # what of the first block the server was not given

    def __next__(self) -> bytes:
        takeover = self._claim()
        if takeover is not None:
            detached = self._detach(takeover)
            self._takeover = None  # not before: `close` gives back what was interrupted
            if detached:
                raise StopIteration
        if self._kept:
            kept, self._kept = self._kept, b""
            return kept
        if self._begun:
            return super().__next__()
        self._begun = True
        self._detaches = detach_policy.get().detaches(self._request.server) and loop.get().can_run()
        block = super().__next__()
        if self._client is None or self._client.farewell is not None or not self._detaches:
            return block
        return self._divert(block)

    def close(self) -> None:
        try:
            takeover = self._claim()
            if takeover is not None:
                takeover.undo()
                self._takeover = None
        finally:
            super().close()

    def _claim(self) -> TakeOver | None:
        """What was begun, to be finished or undone now. Both may be done twice."""
        takeover = self._takeover
        if takeover is not None:
            loop.get().release(takeover)
        return takeover

    def _hold(self) -> None:
        if not self._detaches:
            super()._hold()

    def _divert(self, block: bytes) -> bytes:
        """Begin to take the connection over. Returns what the server is to write."""
        server = self._request.server
        assert server.fd is not None
        try:
            self._takeover = TakeOver(server.fd, server.unsent)
        except OSError as error:
            detach_policy.get().say(logging.WARNING, f"a stream stays attached: {error}")
            return block if self._stay() else self._refuse("threads")
        loop.get().attend(self._takeover)
        # A middleware may drop a response without a close, and answer with something else.
        weakref.finalize(self, self._takeover.drop).atexit = False
        self._prelude, self._kept = block[:LONGEST_PRELUDE], block[LONGEST_PRELUDE:]
        return self._prelude

    def _detach(self, takeover: TakeOver) -> bool:
        client, adopt = self._client, loop.get().adopt
        assert client is not None, "nobody but the server closes a stream that is not watched"
        hub = self._manager._process.get().hub
        taken = takeover.finish(self._prelude, self._kept)
        if taken is None:
            client.counts.undone += 1
            detach_policy.get().say(
                logging.WARNING,
                "streams stay attached: a response was not what was expected (a middleware that changes it or reads it "
                "ahead, or TLS?)",
            )
            if not self._stay():
                client.dismiss("threads")  # its first block is on its way already
            return False
        # At once: only this knows of the connection. If something is raised before the loop has it, it is lost.
        adopt(Adoption(hub, self._manager, client, taken, self._request.server))
        self._client, self._ended = None, True
        if self._finalizer is not None:
            self._finalizer.detach()  # the stream goes on without this
        return True

    def _stay(self) -> bool:
        """Go on attached. False if the server's thread is needed for others."""
        self._detaches = False
        try:
            self._hold()
        except BusyError:
            return False
        return True


class DetachPolicy:
    """Whether streams of this process are detached. Each answer, and why, is said once in the log."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def detaches(self, server: ServerInfo) -> bool:
        refusal = _refusal(server)
        if refusal is not None:
            self.say(logging.WARNING, f"streams stay attached, and hold a thread of the server each: {refusal}")
        elif server.obstacle:
            self.say(logging.INFO, f"a stream stays attached, and holds a thread of the server: {server.obstacle}")
        else:
            text = f"streams are detached from the threads of this {server.name}; {_descriptors()}"
            if server.max_requests:
                text += f". max_requests={server.max_requests} ends all of them each time: leave it out"
            self.say(logging.WARNING if server.max_requests else logging.INFO, text)
            return True
        return False

    def say(self, level: int, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.log(level, "%s", text)


def _refusal(server: ServerInfo) -> str | None:
    """Why no stream of this server can be detached."""
    if not hasattr(select, "epoll"):
        return "there is no epoll (another system than Linux, or gevent)"
    if not server.lets_go or server.fd is None:
        return f"{server.name or 'this server'} does not give plain connections away"
    return None


def _descriptors() -> str:
    resource: Any = importlib.import_module("resource")  # there where there is epoll
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return f"this process may have {most} descriptors (ulimit -n), and each takes one"


detach_policy = PerProcess(DetachPolicy)
"""This process's."""
