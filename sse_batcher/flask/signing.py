"""Signing: tokens that grant a stream, for signed URLs. They are made and checked with the app's `SECRET_KEY`.

Any thread. Nothing here logs a token, or puts one into an error.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NamedTuple

from flask import Flask, abort, request
from itsdangerous import BadData, Signer
from itsdangerous.encoding import base64_decode, base64_encode
from werkzeug.datastructures import WWWAuthenticate

from ..backends.kicks import MAX_TOKEN_SECONDS, MICROSECONDS
from ..errors import BackendError, InvalidEventError, UsageError
from ..event import NotGiven, User, check_channels, check_user
from ..functions import described
from ..manager import SSEManager
from ..manager_state import process_of

TOKEN_PREFIX = "sse1."
DEFAULT_TTL = 43_200
SKEW_SECONDS = 10
"""How far ahead the clock of another host may be: a token that seems to be made later than that is refused."""

_SALT = "sse_batcher.token."
# The payload and the signature. Checked first, since the decoder of itsdangerous ignores foreign characters.
_FORM = re.compile(r"sse1\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)", re.ASCII)


class Grant(NamedTuple):
    """What a valid token grants."""

    channels: tuple[str, ...]
    user: User | None

    def granted(self, asked: tuple[str, ...]) -> tuple[str, ...]:
        """Return the channels of the stream if these are asked for. None asked for: all. Aborts with 403."""
        if not set(asked) <= set(self.channels):
            abort(403)
        return asked or self.channels


def signer_of(app: Flask | None, salt: str) -> Signer | None:
    """Return a signer with the app's present keys, which may change. None if the app has no key, or is gone."""
    if app is None or not app.secret_key:
        return None
    older = app.config.get("SECRET_KEY_FALLBACKS") or ()
    keys: list[Any] = [key for key in ([older] if isinstance(older, (str, bytes)) else older) if key]
    # The last key signs. SHA-256, since some systems refuse SHA-1, the default of itsdangerous.
    return Signer([*keys, app.secret_key], salt=salt, key_derivation="hmac", digest_method=hashlib.sha256)


class Tokens:
    """Makes the tokens of one app, and checks those of its requests. `salt`: apps with other salts refuse them."""

    def __init__(self, app: Flask, manager: SSEManager, salt: str) -> None:
        self._app = weakref.ref(app)
        self._manager = manager
        self._salt = _SALT + salt

    def sign(self, channels: Iterable[str], user: User | NotGiven, ttl: float) -> str:
        """Make a token. See `SSE.sign`."""
        named = None if isinstance(user, NotGiven) else check_user(user)
        names = check_channels(channels, may_be_none=named is not None)
        if isinstance(ttl, bool) or not isinstance(ttl, (int, float)) or not 0 < ttl <= MAX_TOKEN_SECONDS:
            raise UsageError(f"ttl has to be seconds, above 0 and at most {MAX_TOKEN_SECONDS:,}, not {described(ttl)}")
        signer = signer_of(self._app(), self._salt)
        if signer is None:
            raise UsageError("tokens are signed with the app's SECRET_KEY, and there is none: set SECRET_KEY")
        backend = process_of(self._manager).backend
        if named is not None:
            with suppress(BackendError):  # at the worst, the token is refused once Redis is back
                backend.remember_kicks()
        issued = backend.stamp()
        expires = issued + math.ceil(ttl * MICROSECONDS)
        payload = json.dumps([issued, expires, named, names], separators=(",", ":"))
        return signer.sign(TOKEN_PREFIX.encode() + base64_encode(payload)).decode()

    def of_request(self) -> Grant | None:
        """Return what the token of the current request grants. None: it has no token of ours.

        A token that is not valid is answered with 401, and the answer does not say why. Raises `BackendError` if it is
        not known whether the user was kicked, and what the app's `revalidate` raises.
        """
        environ = request.environ
        query = environ.get("QUERY_STRING", "")
        if "token" not in query and "%" not in query and "HTTP_AUTHORIZATION" not in environ:
            return None  # all openings without a token pay for this much
        texts = [text for text in request.args.getlist("token") if text.startswith(TOKEN_PREFIX)]
        parts = environ.get("HTTP_AUTHORIZATION", "").split(None, 1)  # also at a tab, or the cookie would count
        if len(parts) == 2 and parts[0].lower() == "bearer" and parts[1].startswith(TOKEN_PREFIX):
            texts.append(parts[1].strip())
        if not texts:
            return None
        grant = self.check(texts[0]) if len(set(texts)) == 1 else None
        if grant is None or not self._may_open(grant.user):
            abort(401, www_authenticate=WWWAuthenticate("bearer"))
        return grant

    def check(self, token: str) -> Grant | None:
        """Return what this token grants, None if it is not valid: forged, of another app, too old, or of a kicked user.

        May wait for Redis. Raises `BackendError` if it is not known whether the user was kicked.
        """
        payload = self._verified(token)
        content = None if payload is None else _content(payload)
        if content is None:
            return None
        issued, expires, grant = content
        user = grant.user
        backend = process_of(self._manager).backend
        now = backend.stamp()
        if not issued - SKEW_SECONDS * MICROSECONDS <= now < expires:
            return None
        if user is not None and issued <= backend.kicked_until(user):
            return None
        return grant

    def _verified(self, token: str) -> bytes | None:
        """Return the payload of a token that one of the app's keys has signed, as it is in the token."""
        found = _FORM.fullmatch(token)
        signer = signer_of(self._app(), self._salt)
        if found is None or signer is None or not signer.validate(token):
            return None
        # Of several texts that decode to the same signature, one is valid.
        exact = base64_encode(base64_decode(found[2]))
        return found[1].encode() if hmac.compare_digest(exact, found[2].encode()) else None

    def _may_open(self, user: User | None) -> bool:
        """Return whether the app's `revalidate` lets this user have a stream."""
        revalidate = self._manager.revalidate
        if user is None or revalidate is None:
            return True
        answer = revalidate(user)
        if not isinstance(answer, bool):
            raise UsageError(f"revalidate() has to return True or False, not {described(answer)}: use bool(...)")
        return answer


def _content(payload: bytes) -> tuple[int, int, Grant] | None:
    """Return when a token was made, when it expires and what it grants. None if another version has made it."""
    try:
        issued, expires, user, names = json.loads(base64_decode(payload))
        named = None if user is None else check_user(user)
        grant = Grant(check_channels(names, may_be_none=named is not None), named)
    except (BadData, InvalidEventError, TypeError, ValueError, RecursionError):
        return None
    return (issued, expires, grant) if type(issued) is type(expires) is int else None
