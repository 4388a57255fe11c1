"""URLs: what is added to them, what is looked up in them, and how they are printed.

Pure. What is not changed stays as it was written, since the text of a query may be signed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote_plus, urlencode, urljoin, urlsplit, urlunsplit

PORTS = {"http": 80, "https": 443}
_SAFE_IN_VALUE = "/:?=."  # what is written as it is in a value that has a URL
_TOKEN_INSIDE = re.compile(r"(?i)\b(token=)[^&#]*")


def is_utf8(text: str) -> bool:
    """Return whether a text can be sent. Arguments of a process have lone surrogates for bytes that are not UTF-8."""
    return not re.search("[\ud800-\udfff]", text)


def values_in(url: str, name: str) -> list[str]:
    """Return the values of one parameter of a query. What is not a URL has none."""
    try:
        query = urlsplit(url).query
    except ValueError:
        return []
    return [value for each, value in parse_qsl(query, keep_blank_values=True) if each == name]


def with_query(url: str, query: Mapping[str, str]) -> str:
    """Add parameters to a URL."""
    parts = urlsplit(url)
    both = "&".join(filter(None, [parts.query, urlencode(query)]))
    return urlunsplit(parts._replace(query=both, fragment=""))


def with_channels(url: str, channels: Collection[str]) -> str:
    """Return the URL of the stream of these channels. Without any, that of the ones it names itself."""
    if not channels:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:
        return url  # `make_request` says what is wrong with it
    kept = [part for part in parts.query.split("&") if part and unquote_plus(part.partition("=")[0]) != "channel"]
    return urlunsplit(parts._replace(query="&".join([*kept, urlencode([("channel", name) for name in channels])])))


def below(url: str, path: str) -> str:
    """Return the URL of another route of the site whose stream is at `url`: ``below(url, "health/live")``."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url  # `make_request` says what is wrong with it
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{path}", query="", fragment=""))


def without_token(url: str) -> str:
    """Return a URL that can be printed: ``...`` stands for each token in its query. The rest is as it was.

    A token inside of another parameter is hidden too: redirects to a login page have the whole URL in one.
    """
    before, mark, rest = url.partition("?")
    query, hash, fragment = rest.partition("#")
    return before + mark + "&".join(map(_without_token, query.split("&"))) + hash + fragment


def _without_token(part: str) -> str:
    """Return one parameter of a query, without its value if that is a token."""
    for name, value in parse_qsl(part, keep_blank_values=True):  # which decodes it: a letter may be written as %74
        if name.lower() == "token":
            return "token=..."
        if _TOKEN_INSIDE.search(value):
            hidden = _TOKEN_INSIDE.sub(r"\1...", value)
            return f"{quote(name)}={quote(hidden, safe=_SAFE_IN_VALUE, errors='replace')}"
    return part


def within_site(url: str, location: str) -> str | None:
    """Return the URL of a redirect if it may get the same token and headers, else None.

    That is one of the same origin, or from http to https, each at its usual port. Another port can be another program.
    """
    try:
        place = urljoin(url, location)
        here, there = _origin(url), _origin(place)
    except ValueError:  # what the server names is not a URL
        return None
    plain, secured = (_Origin(scheme, here.host, PORTS[scheme]) for scheme in ("http", "https"))
    return place if there == here or (here, there) == (plain, secured) else None


class _Origin(NamedTuple):
    scheme: str
    host: str | None
    port: int | None


def _origin(url: str) -> _Origin:
    parts = urlsplit(url)
    return _Origin(parts.scheme, parts.hostname, PORTS.get(parts.scheme) if parts.port is None else parts.port)
