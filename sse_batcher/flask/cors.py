"""CORS: which other origins may read the stream. None, unless the app names some.

Pure. Follows https://fetch.spec.whatwg.org/#http-cors-protocol
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..errors import ConfigurationError

ANY = "*"
_ORIGIN = re.compile(r"https?://[a-z0-9.\-\[\]:]+\Z|[a-z][a-z0-9+.\-]*://[a-z0-9.\-]+\Z")
_PREFLIGHT = (
    ("Access-Control-Allow-Methods", "GET"),
    ("Access-Control-Allow-Headers", "Authorization, Cache-Control, Last-Event-ID"),
    ("Access-Control-Max-Age", "600"),
)
_READABLE = ("Access-Control-Expose-Headers", "Retry-After")  # the module for browsers waits as long as it says


class Cors:
    """An allow-list of origins, such as ``https://example.com``; or ``*``: any origin, without credentials."""

    def __init__(self, origins: str | Iterable[str] = ()) -> None:
        if not isinstance(origins, (str, list, tuple, set, frozenset)):
            raise _refused(origins)
        self._origins = frozenset([origins] if isinstance(origins, str) else origins)
        for origin in self._origins:
            if not isinstance(origin, str) or (origin != ANY and not _ORIGIN.match(origin)):
                raise _refused(origin)
        if ANY in self._origins and len(self._origins) > 1:
            raise ConfigurationError(
                "cors_origins is either '*', for any origin and without cookies, or a list of origins, with cookies",
                option="cors_origins",
            )

    @property
    def allows_none(self) -> bool:
        """Whether no other origin may read the stream: then there are no headers."""
        return not self._origins

    def headers(self, origin: str | None, *, preflight: bool = False) -> list[tuple[str, str]]:
        """Return the headers of the response to a request with this ``Origin``. `preflight`: that is OPTIONS."""
        if not self._origins:
            return []
        more = _PREFLIGHT if preflight else (_READABLE,)
        if ANY in self._origins:
            return [("Access-Control-Allow-Origin", ANY), *more]
        vary = ("Vary", "Origin")  # in any case: a cache must not give one origin what was meant for another
        if origin is None or origin not in self._origins:
            return [vary]
        allowed = [("Access-Control-Allow-Origin", origin), ("Access-Control-Allow-Credentials", "true")]
        return [vary, *allowed, *more]


def _refused(origin: object) -> ConfigurationError:
    return ConfigurationError(
        f"cors_origins must be origins such as 'https://example.com', in lower case and without a path, or '*', "
        f"not {origin!r}",
        option="cors_origins",
    )
