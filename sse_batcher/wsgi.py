"""Plain WSGI: a request in, a stream out.

Runs in the server's thread. Follows PEP 3333, and the WHATWG standard for which answers make a browser come back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs

from .errors import InvalidEventError
from .event import DEFAULT_CHANNEL, check_channels
from .manager import SSEManager
from .transports.attached import AttachedStream
from .wire import HEADERS

_METHODS = "GET, HEAD, OPTIONS"


def stream(
    manager: SSEManager, environ: Mapping[str, Any], channels: Iterable[str] = (DEFAULT_CHANNEL,)
) -> tuple[str, list[tuple[str, str]], Iterable[bytes]]:
    """Answer a WSGI request with the stream of `channels`: ``(status, headers, iterable)``.

    Whether the caller may see these channels is for the app to decide before. GET streams; HEAD and OPTIONS answer
    and end; another method is 405, channels that cannot be are 400. Nothing is held until the iterable is iterated.

    >>> def app(environ, start_response):
    ...     status, headers, body = stream(manager, environ, ["default"])
    ...     start_response(status, headers)
    ...     return body
    """
    method = environ.get("REQUEST_METHOD", "GET")
    if method == "OPTIONS":
        return _text("200 OK", "", ("Allow", _METHODS))
    if method not in {"GET", "HEAD"}:
        return _text("405 Method Not Allowed", f"use one of {_METHODS}\n", ("Allow", _METHODS))
    try:
        names = check_channels(channels)
    except InvalidEventError as error:
        return _text("400 Bad Request", f"{error}\n")
    if method == "HEAD":
        return "200 OK", list(HEADERS), iter(())  # no list: of one, werkzeug would tell the length
    return "200 OK", list(HEADERS), AttachedStream(manager, names, last_event_id(environ))


def last_event_id(environ: Mapping[str, Any]) -> str | None:
    """The cursor that a client comes with: the header, which wins, or the query of a first connect.

    ``lastEventId`` is what polyfills of `EventSource` send, since they cannot set the header.
    """
    header: str = environ.get("HTTP_LAST_EVENT_ID", "")
    if header:
        return header
    query = parse_qs(environ.get("QUERY_STRING", ""))
    for name in ("last_event_id", "lastEventId"):
        if name in query:
            return str(query[name][0])
    return None


def _text(status: str, text: str, *more: tuple[str, str]) -> tuple[str, list[tuple[str, str]], list[bytes]]:
    body = text.encode()
    return status, [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body))), *more], [body]
