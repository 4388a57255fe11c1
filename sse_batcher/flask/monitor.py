"""The routes of the monitor: its page, the page's data, and kicks from the page.

Request threads. Each request asks the app whether it may see the monitor. A kick must also come from the page: by its
``Sec-Fetch-Site`` or ``Origin``, and with a token that the page's data brought.
"""

from __future__ import annotations

import json
import logging
import time
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

from flask import Flask, Response, abort, current_app, request
from itsdangerous import BadSignature

from ..errors import BackendError, InvalidEventError
from ..event import User, check_user
from ..manager import SSEManager
from ..manager_state import process_of
from ..monitor import PAGE, page_files
from ..monitor.overview import Monitor
from ..runtime.log_fields import log_fields
from ..transports.server import inspect_server
from ..transports.sockets import end_connection
from .access import Access
from .response import abort_unless
from .signing import SKEW_SECONDS, signer_of

_log = logging.getLogger("sse_batcher.monitor")

TOKEN_SECONDS = 600
"""How long a token of the page is valid. Its data bring a new one each time."""
MAX_BODY = 8_192
"""How many bytes a kick may have. A user has at most 256 characters."""
MAX_SEARCH = 200
"""How many characters a text may have that streams are searched for."""

HEADERS = (
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    ("X-Frame-Options", "DENY"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "same-origin"),  # no-referrer would make some browsers send a kick with the origin "null"
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cache-Control", "no-store"),
)
"""On each answer of these routes, also on errors."""


class MonitorViews:
    """The views of one app. `salt`: apps with other salts refuse the tokens of the page."""

    def __init__(self, app: Flask, manager: SSEManager, access: Access, monitor: Monitor, salt: str) -> None:
        self._manager = manager
        self._access = access
        self._monitor = monitor
        self._tokens = PageTokens(app, salt)

    def monitor(self) -> Response:
        """The page of the monitor, if `allow_monitor` lets this request see it."""
        return self._file(PAGE)

    def monitor_file(self, name: str) -> Response:
        """The files of that page."""
        return self._file(name)

    def monitor_data(self) -> Response:
        """What that page shows, as JSON.

        ``?search=`` is a text that streams must have, and ``?process=`` the process that the page shows.
        """
        self._check_access()
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
            abort(403, "only the page of the monitor, and no page of another site, may ask for this")
        query = request.args
        process = query.get("process", "")
        if process and not self._monitor.is_here(process):
            return self._answer_with_other_process()
        answer = self._monitor.look(query.get("search", "")[:MAX_SEARCH])
        may_kick = bool(self._access.may_kick())
        token = self._tokens.make() if may_kick else None
        kick, several = {"allowed": may_kick, "token": token}, bool(request.environ.get("wsgi.multiprocess"))
        return _json(answer | {"kick": kick, "several": several})

    def monitor_kick(self) -> Response:
        """Ends the streams of a user, for that page, if `allow_kick` lets this request do it."""
        self._check_access()
        body = self._read_kick()
        abort_unless(self._access.may_kick())
        user, is_shared = _named_user(body), process_of(self._manager).reaches_others
        if not is_shared and not self._monitor.is_here(str(body.get("process"))):
            return self._answer_with_other_process()
        try:
            ended, error = self._manager.kick(user=user), None
        except BackendError as failure:
            ended, error = None, str(failure)
        address = request.remote_addr
        _log.info(
            "the user %r was kicked in the monitor, by a request from %s",
            user,
            address,
            extra=log_fields("kicked_in_monitor", user=user, address=address),
        )
        response = _json({"ended": ended, "everywhere": is_shared, "error": error})
        response.status_code = 200 if error is None else 503
        return response

    def _answer_with_other_process(self) -> Response:
        """Answer a page that shows another process, which asks again until that one answers."""
        end_connection(inspect_server(request.environ))  # or it would be the same process again
        return _json(self._monitor.this_process())

    def secure(self, response: Response) -> Response:
        """Add the headers that keep the page, its data and errors from other pages and from caches."""
        response.headers.update(HEADERS)
        return response

    def _check_access(self) -> None:
        """Abort unless the current request may see the monitor."""
        abort_unless(self._access.shows_monitor())

    def _file(self, name: str) -> Response:
        self._check_access()
        file = page_files().get(name)
        if file is None:
            abort(404)
        return current_app.response_class(file.content, content_type=file.type)

    def _read_kick(self) -> dict[str, Any]:
        """Return the JSON object of a kick that the page has sent. Aborts for everything else."""
        if not _is_from_here():
            _refuse(
                "a kick has to come from the page of the monitor. The app takes its own address for "
                f"{_own_origin()}, and the browser has sent the origin {request.headers.get('Origin')}. Let each proxy "
                "pass on the Host with its port, and the scheme"
            )
        if request.mimetype != "application/json":
            abort(415, "a kick is sent as application/json")
        if request.content_length is None:
            abort(411)
        if request.content_length > MAX_BODY:
            abort(413)
        try:
            body = json.loads(request.get_data())
        except (ValueError, RecursionError):
            abort(400, "a kick is a JSON object")
        if not isinstance(body, dict):
            abort(400, "a kick is a JSON object")
        if not self._tokens.check(body.get("token")):
            _refuse("the token of the page is missing or too old, or another app has made it: load the page again")
        return body


class PageTokens:
    """Makes the tokens of the page, and checks them. They are signed with the app's `SECRET_KEY`.

    `clock` returns seconds since 1970.
    """

    def __init__(self, app: Flask, salt: str, clock: Callable[[], float] = time.time) -> None:
        self._app = weakref.ref(app)
        self._salt = f"sse_batcher.monitor.{salt}"
        self._clock = clock

    def make(self) -> str | None:
        """Return a token, None if the app has no `SECRET_KEY`."""
        signer = signer_of(self._app(), self._salt)
        return None if signer is None else signer.sign(str(int(self._clock()))).decode()

    def check(self, token: object) -> bool:
        """Return whether this app has made the token, a short time ago."""
        signer = signer_of(self._app(), self._salt)
        if signer is None or not isinstance(token, str):
            return False
        try:
            made = int(signer.unsign(token.encode()))
        except (BadSignature, ValueError):
            return False
        return -SKEW_SECONDS <= self._clock() - made <= TOKEN_SECONDS


def _is_from_here() -> bool:
    """Return whether a page of this origin has sent the current request, as its browser says.

    A page cannot set either header. Browsers send ``Sec-Fetch-Site`` over HTTPS and to localhost; for other addresses,
    and in old browsers, there is only the ``Origin``.
    """
    site = request.headers.get("Sec-Fetch-Site")
    return request.headers.get("Origin") == _own_origin() if site is None else site == "same-origin"


def _own_origin() -> str:
    return f"{request.scheme}://{request.host.lower()}"


def _named_user(body: dict[str, Any]) -> User:
    """Return the user of a kick. They are JSON in a string, since a browser knows no large whole numbers."""
    text = body.get("user")
    try:
        if isinstance(text, str):
            return check_user(json.loads(text))
    except (ValueError, RecursionError, InvalidEventError):
        pass
    return abort(400, "user has to be a string with the JSON of a user")


def _refuse(error: str) -> NoReturn:
    """Abort with 403 and words that the page shows."""
    response = _json({"error": error})
    response.status_code = 403
    abort(response)


def _json(content: dict[str, Any]) -> Response:
    return current_app.response_class(json.dumps(content, separators=(",", ":")), mimetype="application/json")
