"""Reasons: why a window closed, why a stream has a gap, is refused, or ends. The words that go over the wire.

Pure. Each kind is one `Literal`; `typing.get_args` lists its values.
"""

from __future__ import annotations

from typing import Literal

BatchReason = Literal["time_window", "size_limit", "leading", "critical", "kind", "manual", "shutdown"]
"""Why a window closed. The ``reason`` of a batch.

- ``time_window``: its time was over.
- ``size_limit``: it had as many events, or as many bytes, as a batch may have.
- ``leading``: the option `leading` sends the first event after a pause at once.
- ``critical``: an event of a critical type came, which waits for no window.
- ``kind``: a text came after JSON of the same type, or JSON after texts.
- ``manual``: `flush_all` was called.
- ``shutdown``: the batcher was shut down.
"""

GapReason = Literal["epoch", "malformed", "too_old", "overflow", "publish_failed"]
"""Why a client may have missed events. The ``reason`` of ``sse_gap``.

- ``epoch``: its cursor is of another history: the server was restarted, or Redis has lost its data.
- ``malformed``: its cursor does not have the form of a cursor, or names a position that the history has not reached.
- ``too_old``: it was away for longer than the history reaches back.
- ``overflow``: the client, or this process, read so slowly that the history went on without it.
- ``publish_failed``: a batch could not be delivered, or not be read here.
"""

BusyReason = Literal["limit", "threads", "http2", "snapshot", "backend", "draining", "error"]
"""Why a stream cannot be opened now. The ``reason`` of ``sse_busy``.

- ``limit``: as many streams are open as the options, or the file descriptors, allow.
- ``threads``: the server needs its threads for other requests.
- ``http2``: over HTTP/2 that the server itself speaks, a stream would block its browser's other requests.
- ``snapshot``: the app's function for the state has raised an error.
- ``backend``: the backend does not answer, so that it is not known where the stream would begin, or whether the user of
  a token was kicked.
- ``draining``: this process is about to end.
- ``error``: another error, which is in the log.
"""

RefusalReason = Literal[BusyReason, "bad_request", "unauthorized", "forbidden", "other"]
"""Why a request got no stream. Those of ``sse_busy``, after which the client comes back, and four error statuses, after
which an ``EventSource`` gives up.

- ``bad_request``: 400, the channels were invalid.
- ``unauthorized``: 401, a token was not valid, or the app has answered so.
- ``forbidden``: 403, the request may have none of the channels.
- ``other``: another status. The app has redirected the request, for example to its login page, or has raised an error.
"""

ByeReason = Literal["shutdown", "lease", "kicked", "revoked", "buffered", "threads"]
"""Why the server ends a stream. The ``reason`` of ``sse_bye``.

- ``shutdown``: the manager was shut down, or the server is stopping.
- ``lease``: the stream has reached its `max_stream_age`.
- ``kicked``: `kick` was called for its user, or for a channel of it.
- ``revoked``: `revalidate` has answered False for its user.
- ``buffered``: something on the way to the client holds the stream back.
- ``threads``: it could not be detached, and the server needs its thread for other requests.
"""

EndReason = Literal[ByeReason, "left", "polled"]
"""Why a stream has ended. Those of ``sse_bye``, and two without one.

- ``left``: the client closed the connection, or does not answer.
- ``polled``: a poll has its answer.
"""
