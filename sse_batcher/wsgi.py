"""Plain WSGI: a request in, a stream out; or the module for browsers, or an answer to a health check.

Runs in the server's thread. Follows PEP 3333, and the WHATWG standard for which answers make a browser come back.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal
from urllib.parse import unquote_plus

from .browser import SCRIPT, VERSION
from .errors import BackendError, InvalidEventError, UsageError
from .event import DEFAULT_CHANNEL, check_channels, check_user
from .manager import SSEManager
from .manager_state import process_of
from .process_state import ProcessState
from .reasons import BusyReason
from .runtime.log_fields import log_fields
from .streams.opening import StreamRequest
from .transports import open_stream
from .transports.attached import ServedRequest
from .transports.detached.stream import detach_policy
from .transports.health import dead_thread, unready_reason
from .transports.server import ServerInfo, inspect_server
from .wire import GZIP_HEADERS, GZIP_START, HEADERS, stored

_METHODS = "GET, HEAD, OPTIONS"
MAX_ADDRESS = 64
"""How many characters of a client's address are kept."""
_WEIGHT = re.compile(r"(?:q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?))?\Z", re.ASCII)
_REFUSED_HTTP2 = (
    "streams are refused that come over HTTP/2 to gunicorn: it serves the requests of a connection one after another, "
    "so an open stream keeps all other requests of its browser waiting. Leave h2 out of --http-protocols, and have a "
    'proxy such as nginx speak HTTP/2 with browsers and HTTP/1.1 with gunicorn. Or set http2="allow" '
    '(SSE_HTTP2 = "allow")'
)


def stream(
    manager: SSEManager,
    environ: Mapping[str, Any],
    channels: Iterable[str] = (DEFAULT_CHANNEL,),
    *,
    snapshot: Callable[[], Iterable[tuple[str, Any]]] | None = None,
    user: str | int | None = None,
    ticket: int | None = None,
) -> tuple[str, list[tuple[str, str]], Iterable[bytes]]:
    """Answer a WSGI request with the stream of `channels`: ``(status, headers, iterable)``.

    The app decides before this call whether the request may have these channels. The header ``Last-Event-ID`` and the
    query say what the client asks for. GET streams; HEAD and OPTIONS answer and end; another method is 405, invalid
    channels are 400. Nothing is held until the iterable is iterated. If the option `compress` names all channels and
    there is no user, the stream is compressed for a client whose ``Accept-Encoding`` names gzip.

    `channels`
        1 to 100 channels. A stream with a user may have none.
    `snapshot`
        A function that returns the state as ``(event_type, data)`` pairs. It is called here, for a client that is new
        or has missed something, and the stream goes on from that state without a gap.
    `user`
        Whose stream it is, for events of this user, limits, `SSEManager.kick` and `revalidate`: a str or an int. None:
        it belongs to no user.
    `ticket`
        A kick after this call ends the stream, even if it has not begun. If the app takes long to decide, take a ticket
        before that, with `SSEManager.ticket`: then a kick after the ticket does.

    Raises `InvalidEventError` for an invalid user.

    >>> def app(environ, start_response):
    ...     status, headers, body = stream(manager, environ, ["default"])
    ...     start_response(status, headers)
    ...     return body
    """
    name = None if user is None else check_user(user)
    method = environ.get("REQUEST_METHOD", "GET")
    if method not in {"GET", "HEAD"}:
        return _other_method(method)
    try:
        names = check_channels(channels, may_be_none=name is not None)
    except InvalidEventError as error:
        process_of(manager).refusals.add("bad_request")
        return _text("400 Bad Request", f"{error}\n")
    return checked_stream(manager, environ, names, snapshot, name, ticket)


def checked_stream(
    manager: SSEManager,
    environ: Mapping[str, Any],
    channels: tuple[str, ...],
    snapshot: Callable[[], Iterable[tuple[str, Any]]] | None,
    user: str | int | None,
    ticket: int | None,
) -> tuple[str, list[tuple[str, str]], Iterable[bytes]]:
    """As `stream`, for channels and a user that were checked, as the Flask part does before it asks the app."""
    method = environ.get("REQUEST_METHOD", "GET")
    if method not in {"GET", "HEAD"}:
        return _other_method(method)
    process = process_of(manager)
    headers, gzipped = _coding(process, environ, channels, user)
    if method == "HEAD":
        return "200 OK", headers, iter(())  # not a list: werkzeug would send the length of one
    ticket = manager.ticket() if ticket is None else ticket
    cursor, server = last_event_id(environ), inspect_server(environ)
    process.reopen(server.is_stopping)
    batches, poll = _query(environ, "batch") != "0", _query(environ, "poll") == "1"
    # Empty for a UNIX socket. A proxy's header may be behind it, and any client may have sent that.
    address = environ.get("REMOTE_ADDR", "")[:MAX_ADDRESS] or None
    request = StreamRequest(channels, cursor, batches, None, user, ticket, poll, address, gzipped)
    resumes, refusal = False, _refusal(process, server)
    if refusal is None and snapshot is not None:
        try:
            resumes = process.can_resume(request)
            if not resumes:
                request = request._replace(snapshot=manager.snapshot(snapshot))
        except BackendError:
            refusal = "backend"
    if refusal is not None:
        block = process.busy_block(refusal, cursor)
        return "200 OK", headers, [GZIP_START + stored(block) if gzipped else block]
    return "200 OK", headers, open_stream(manager, ServedRequest(request, server, resumes))


def script(environ: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]], list[bytes]]:
    """Answer a WSGI request with the module for browsers, ``sse-batcher.js``: ``(status, headers, body)``.

    Serve it at a path of its own, such as ``/events/sse-batcher.js``. If the query has ``v=`` with the version of this
    process, caches may keep the answer for a year. If it has another version, as in a rolling deploy, they must not
    keep it. Without a version, they must ask each time, and an ``If-None-Match`` with its ETag is answered with 304.
    Pages of other origins may import it. GET and HEAD are answered; another method is 405. Does not block.

    >>> def app(environ, start_response):
    ...     status, headers, body = script(environ)
    ...     start_response(status, headers)
    ...     return body
    """
    method = environ.get("REQUEST_METHOD", "GET")
    if method not in {"GET", "HEAD"}:
        return _other_method(method)
    version = _query(environ, "v")
    headers = [("Access-Control-Allow-Origin", "*"), ("X-Content-Type-Options", "nosniff")]
    if version is not None and version != VERSION:
        headers.append(("Cache-Control", "no-store"))
    else:
        kept = "no-cache" if version is None else "public, max-age=31536000, immutable"
        # Weak: what compresses a response on its way must change a strong one, which then never matches.
        headers += [("Cache-Control", kept), ("ETag", f'W/"{VERSION}"')]
        if _names_version(environ.get("HTTP_IF_NONE_MATCH", "")):
            return "304 Not Modified", headers, []  # without Content-Type, which WSGI forbids there
    headers += [("Content-Type", "text/javascript; charset=utf-8"), ("Content-Length", str(len(SCRIPT)))]
    return "200 OK", headers, [] if method == "HEAD" else [SCRIPT]


def health(
    manager: SSEManager, environ: Mapping[str, Any], check: Literal["live", "ready"] | None = None
) -> tuple[str, list[tuple[str, str]], list[bytes]]:
    """Answer a health check of this process, for a WSGI request: ``(status, headers, body)``.

    The body is a JSON object with a `status`. The status of HTTP is 200 if all is well, and 503 if not:

    `check`
        ``"live"``: 503 ``thread`` if a thread of this library has died and cannot be started again, or has done nothing
        of what was due for 30 seconds; its name is in `thread`. Only a restart helps. ``"ready"``: 503 ``draining`` if
        the process is being shut down or its server is stopping, 503 ``threads`` if open streams hold all of the
        server's threads except one at most, and 200 ``degraded`` if the backend does not answer: new requests are
        welcome, but have to do without it. None, for monitoring: 503 with `SSEManager.unhealthy_reason`.

    Answers GET and HEAD; another method is 405. Never waits, takes no lock and looks at no client, so it costs no more
    with many clients. Raises `UsageError` for another `check`.

    >>> def app(environ, start_response):
    ...     status, headers, body = health(manager, environ, "ready")
    ...     start_response(status, headers)
    ...     return body
    """
    if check not in ("live", "ready", None):
        raise UsageError(f'check is "live", "ready" or None, not {check!r}')
    method = environ.get("REQUEST_METHOD", "GET")
    if method not in {"GET", "HEAD"}:
        return _other_method(method)
    if check == "live":
        thread = dead_thread(manager)
        is_well = thread is None
        answer: dict[str, Any] = {"status": "ok"} if is_well else {"status": "thread", "thread": thread}
    else:
        process, server = process_of(manager), inspect_server(environ)
        process.reopen(server.is_stopping)
        reason = process.unhealthy_reason() if check is None else unready_reason(manager, server)
        is_well = reason is None
        if check == "ready" and is_well and process.unhealthy_reason():
            reason = "degraded"
        answer = {"status": reason or "ok", "backend_answered": round(process.backend_answered, 3)}
    body = json.dumps(answer, separators=(",", ":")).encode() + b"\n"
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Cache-Control", "no-store")]
    return "200 OK" if is_well else "503 Service Unavailable", headers, [] if method == "HEAD" else [body]


def accepts_gzip(accept_encoding: str) -> bool:
    """Return whether a client with this ``Accept-Encoding`` asks for gzip: RFC 9110, 12.5.3.

    It must name gzip, or x-gzip, which is the same; ``*`` alone stands for any coding, and does not ask for this one.
    A weight that is invalid counts as 0. A client that prefers ``identity`` gets that.
    """
    weights: dict[str, float] = {}
    for field in accept_encoding.lower().split(","):
        coding, _, parameter = (part.strip() for part in field.partition(";"))
        weight = _WEIGHT.match(parameter)
        weights[coding.removeprefix("x-")] = float(weight[1] or 1) if weight else 0.0
    gzip = weights.get("gzip", 0.0)
    return gzip > 0 and gzip >= weights.get("identity", 0.0)


def _coding(
    process: ProcessState, environ: Mapping[str, Any], channels: tuple[str, ...], user: str | int | None
) -> tuple[list[tuple[str, str]], bool]:
    """Return the headers of such a stream, and whether it is compressed."""
    if user is not None or not process.compresses(channels):
        return list(HEADERS), False
    gzipped = accepts_gzip(environ.get("HTTP_ACCEPT_ENCODING", ""))
    return [*(GZIP_HEADERS if gzipped else HEADERS), ("Vary", "Accept-Encoding")], gzipped


def _names_version(condition: str) -> bool:
    """Whether an ``If-None-Match`` has the ETag of our version, compared weakly: RFC 9110, 8.8.3.2."""
    tags = [tag.strip().removeprefix("W/") for tag in condition.split(",")]
    return f'"{VERSION}"' in tags or tags == ["*"]


def _refusal(process: ProcessState, server: ServerInfo) -> BusyReason | None:
    """Why a stream of this server cannot be opened now, before anything is done for it."""
    if server.http2 and process.options.http2 == "refuse":
        detach_policy.get().log_once(logging.WARNING, _REFUSED_HTTP2, extra=log_fields("http2_refused"))
        return "http2"
    return None


def last_event_id(environ: Mapping[str, Any]) -> str | None:
    """Return the cursor that a client sends: in the header, which wins, or in the query at its first connect.

    Polyfills of `EventSource` send ``lastEventId``, because they cannot set the header.
    """
    header: str = environ.get("HTTP_LAST_EVENT_ID", "")
    if header:
        return header
    return _query(environ, "last_event_id", "lastEventId")


def _query(environ: Mapping[str, Any], *names: str) -> str | None:
    """Return the value of the first of these names that has one in the query.

    Only that value is decoded: any client may send a long query, and the framework has decoded all of it already.
    """
    query = environ.get("QUERY_STRING", "")
    if not query:
        return None  # usual, and so not worth a look for each name
    query = "&" + query
    values = (query.partition(f"&{name}=")[2].partition("&")[0] for name in names)
    return next((unquote_plus(value) for value in values if value), None)


def _other_method(method: str) -> tuple[str, list[tuple[str, str]], list[bytes]]:
    """Answer a request that is neither GET nor HEAD."""
    if method == "OPTIONS":
        return _text("200 OK", "", ("Allow", _METHODS))
    return _text("405 Method Not Allowed", f"use one of {_METHODS}\n", ("Allow", _METHODS))


def _text(status: str, text: str, *more: tuple[str, str]) -> tuple[str, list[tuple[str, str]], list[bytes]]:
    body = text.encode()
    return status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *more], [body]
