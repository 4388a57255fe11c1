"""Responses: with a stream, for the view of the blueprint and for those of the app; with the module; and refusals.

Request threads, in the view. Everything about the request is settled there. The stream itself runs without a context,
so that it holds no database connection.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from flask import Response, abort, current_app, request
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException
from werkzeug.wrappers import Response as BaseResponse
from werkzeug.wsgi import ClosingIterator

from ..errors import BackendError, InvalidEventError, UsageError
from ..manager import SSEManager
from ..manager_state import process_of
from ..reasons import BusyReason
from ..runtime.log_fields import log_fields
from ..runtime.log_once import LogOnce, is_logged
from ..wire import HEADERS
from ..wsgi import checked_stream, last_event_id, script
from .access import Access
from .cors import Cors

_log = logging.getLogger("sse_batcher.blueprint")


class Responder:
    """Answers requests of one app with streams. `names_backend`: the config has a key `SSE_BACKEND`."""

    def __init__(self, manager: SSEManager, access: Access, cors: Cors, *, names_backend: bool) -> None:
        self._manager = manager
        self._access = access
        self._cors = cors
        self._names_backend = names_backend
        self._once = LogOnce(_log)
        self._failed_snapshots = itertools.count(1)
        self._failed_streams = itertools.count(1)

    def respond(self, channels: tuple[str, ...], user: str | int | None, ticket: int) -> Response:
        """Answer the current request with the stream of these channels, which it may have.

        `ticket`: a kick after it ends the stream, see `SSEManager.ticket`. A snapshot that fails, and any other error,
        is logged and answered with ``sse_busy``; an `HTTPException` passes.
        """
        environ = request.environ
        if environ.get("wsgi.multiprocess") and not self._names_backend:
            self._once.log(
                logging.WARNING,
                "this server runs several processes, and each reaches its own clients only: run one process with "
                'threads, or set SSE_BACKEND ("redis://..." for all of them, "memory://" if that is what you want)',
                extra=log_fields("separate_processes"),
            )
        take = self._access.snapshot(channels, user)
        snapshot = None if take is None else functools.partial(_take_state, take)
        try:
            status, headers, body = checked_stream(self._manager, environ, channels, snapshot, user, ticket)
        # No error status for what may pass: a browser would give up for good.
        except _SnapshotFailedError as failure:
            self._log_snapshot_failure(failure.error, channels)
            return self.busy("snapshot")
        except InvalidEventError as error:  # the channels are checked, so it is the state that cannot be sent
            self._log_snapshot_failure(error, channels)
            return self.busy("snapshot")
        except HTTPException:
            raise
        except Exception as error:
            self._log_failure(error, channels)
            return self.busy("error")
        # Functions that would read a response leave it out if it is to be passed on as it is, as files are.
        response_class = _endless(current_app.response_class)  # type: ignore[arg-type]  # for mypy, a class has no hash
        return response_class(body, status=status, headers=headers, direct_passthrough=True)

    def busy(self, reason: BusyReason) -> Response:
        """Answer the current request with ``sse_busy``: its stream cannot be opened now, and the client comes back."""
        block = process_of(self._manager).busy_block(reason, last_event_id(request.environ))
        return current_app.response_class([block], headers=list(HEADERS))

    def allow_origin(self, response: Response) -> Response:
        """Add the headers that let other origins read this response to the current request."""
        if self._cors.allows_none:
            return response
        headers = self._cors.headers(request.headers.get("Origin"), preflight=request.method == "OPTIONS")
        for name, value in headers:
            if name == "Vary":
                response.vary.add(value)
            else:
                response.headers[name] = value
        return response

    def _log_snapshot_failure(self, error: Exception, channels: tuple[str, ...]) -> None:
        """Log what a snapshot has raised. Seldom, because every open page comes back for it."""
        failures = next(self._failed_snapshots)
        if is_logged(failures):
            _log.error(
                "a snapshot for the channels %r failed; failures so far: %d. Clients get sse_busy and come back",
                channels,
                failures,
                exc_info=error,
                extra=log_fields("snapshot_failed", channels=channels, failures=failures),
            )

    def _log_failure(self, error: Exception, channels: tuple[str, ...]) -> None:
        """Log another error, as seldom."""
        failures = next(self._failed_streams)
        if is_logged(failures):
            _log.error(
                "a stream of the channels %r could not be opened; failures so far: %d. Clients get sse_busy and come "
                "back",
                channels,
                failures,
                exc_info=error,
                extra=log_fields("opening_failed", channels=channels, failures=failures),
            )


class _SnapshotFailedError(Exception):
    """A function of the app for the state has raised this error."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


def _take_state(take: Callable[[], list[tuple[str, object]]]) -> list[tuple[str, object]]:
    """Take the state. Marks the errors of the app's functions, except those that have an answer of their own."""
    try:
        return take()
    except (HTTPException, BackendError):
        raise
    except Exception as error:
        raise _SnapshotFailedError(error) from None


def abort_unless(allowed: bool | None) -> None:
    """Abort with 403 if the current request may not have this, and with 404 if no request may (None)."""
    if not allowed:
        abort(404 if allowed is None else 403)


class _Endless(BaseResponse):
    """A response that can be passed on but not read, since it has no end."""

    def get_app_iter(self, environ: dict[str, Any]) -> Iterable[bytes]:
        """As usual, but functions registered for its end are called. For `direct_passthrough`, Werkzeug calls none."""
        body = super().get_app_iter(environ)
        return ClosingIterator(body, self.close) if body is self.response else body

    def _ensure_sequence(self, mutable: bool = False) -> None:
        """Refuse to read the whole body. Werkzeug would refuse it, too, but would not say why."""
        if not self.is_sequence:
            raise UsageError(
                "this response streams events and has no end, so its body cannot be read: let the function that wants "
                "to, an after_request function or that of an extension, leave out responses with direct_passthrough, "
                "as it must for files"
            )
        super()._ensure_sequence(mutable)


@functools.lru_cache
def _endless(response_class: type[Response]) -> type[Response]:
    """The app's own class of responses, for one that has no end."""
    return type("StreamResponse", (_Endless, response_class), {})


def script_response() -> Response:
    """Answer the current request with the module for browsers."""
    status, headers, body = script(request.environ)
    response_class = _public(current_app.response_class)  # type: ignore[arg-type]  # as above
    return response_class(body, status=status, headers=headers)


class _Public(BaseResponse):
    """A response that is the same for all clients, and that caches may share.

    An app with permanent sessions sends its cookie with each response, and ``Vary: Cookie``. Then no cache could use
    this one twice, or it would give the cookie of one user to others.
    """

    def get_wsgi_headers(self, environ: dict[str, Any]) -> Headers:
        """As usual, without cookies. The session is saved too late for a function that is called after the request."""
        self.vary.discard("cookie")  # in lower case, which Werkzeug needs
        headers = super().get_wsgi_headers(environ)
        headers.remove("Set-Cookie")
        return headers


@functools.lru_cache
def _public(response_class: type[Response]) -> type[Response]:
    """The app's own class of responses, for one that caches may share."""
    return type("PublicResponse", (_Public, response_class), {})
