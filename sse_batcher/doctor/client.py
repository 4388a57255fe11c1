"""The requests of the doctor: one place that knows the URL, the headers and the token of what is examined.

Any thread. Waits for the network, never longer than the caller says.
"""

from __future__ import annotations

import math
import ssl
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from ..parser import Block, Comment
from ..remote.message import Head, RemoteError, Request, json_object, make_request
from ..remote.stream import RemoteStream, connect
from ..remote.url import below, values_in, with_query, without_token
from .facts import Answer, Check, FirstBlock

ANY_CODING = ("Accept-Encoding", "gzip, deflate, br, zstd")
"""What browsers send over HTTPS. `remote` sends ``identity``."""


class Target(NamedTuple):
    """What is examined, and how."""

    url: str
    headers: tuple[tuple[str, str], ...] = ()
    token: str | None = None
    origin: str | None = None
    seconds: float | None = None
    """How long to listen. None: long enough for a heartbeat."""
    is_insecure: bool = False
    """Whether any certificate is accepted."""

    @property
    def has_token(self) -> bool:
        """Whether a token is sent, also in the query of the URL."""
        return self.token is not None or bool(values_in(self.url, "token"))


class Client:
    """Sends requests to the target. `patience`: the seconds that each answer, and each first block, may take."""

    def __init__(self, target: Target, patience: float) -> None:
        self._target = target
        self.patience = patience
        self._context = self.new_context()

    def new_context(self) -> ssl.SSLContext:
        """Return a context for TLS that no other connection shares."""
        context = ssl.create_default_context()
        if self._target.is_insecure:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return context

    def open(
        self,
        *headers: tuple[str, str],
        url: str | None = None,
        query: Mapping[str, str] | None = None,
        cursor: str = "",
        method: str = "GET",
    ) -> RemoteStream:
        """Send a request for the stream, or for another `url` of the same site. Raises `RemoteError`."""
        address = with_query(url or self._target.url, query or {})
        request = self.request(*headers, url=address, cursor=cursor, method=method)
        return connect(request, self.patience, self._context)

    def request(
        self, *headers: tuple[str, str], url: str | None = None, cursor: str = "", method: str = "GET"
    ) -> Request:
        """Make a request for the stream, or for another `url` of the same site, without sending it."""
        target = self._target
        more = [*target.headers, *([("Origin", target.origin)] if target.origin else []), *headers]
        return make_request(url or target.url, headers=more, token=target.token, cursor=cursor, method=method)

    def first_block(self, stream: RemoteStream, rest: list[Block | Comment] | None = None) -> FirstBlock | None:
        """Wait for the first block. None: it does not come in time, or the response has ended before.

        `rest` gets what came together with it.
        """
        deadline = time.monotonic() + self.patience
        while (piece := stream.read(deadline - time.monotonic())) is not None:
            for index, item in enumerate(piece.items):
                if isinstance(item, Block):
                    if rest is not None:
                        rest += piece.items[index + 1 :]
                    after = piece.at - stream.answered
                    return FirstBlock(type=item.type, data=plain_object(item.data), cursor=item.id, after=after)
            if time.monotonic() >= deadline:
                break
        return None

    def first_of(self, **options: Any) -> FirstBlock | None:
        """Open a stream as `open` does, and close it after its first block. None: there is none."""
        with suppress(RemoteError), self.open(**options) as stream:
            return self.first_block(stream) if stream.is_stream else None
        return None

    def poll(self) -> Check | None:
        """Ask for a stream that ends at once. None: there is no answer in time."""
        began = time.monotonic()
        with suppress(RemoteError), self.open(query={"poll": "1"}) as stream:
            first = self.first_block(stream) if stream.is_stream else None
            word = f"{first.type} {first.reason}".strip() if first else ""
            return _check(stream, word, began)
        return None

    def health(self, name: str) -> Check | None:
        """Ask a health check of the site: `name` is its path below that of the stream. None: no answer in time."""
        return self.health_at(below(self._target.url, name))

    def health_at(self, url: str) -> Check | None:
        """Ask a health check at this URL. A connection that breaks, as in a restart, is tried once more."""
        began = time.monotonic()
        for _ in range(2):
            try:
                with self.open(("Accept", "application/json"), url=url) as response:
                    answer = plain_object(response.read_rest(self.patience, 10_000).decode(errors="replace"))
                    word = str(answer.get("status", ""))
                    return _check(response, word, began)
            except RemoteError as error:
                if is_timeout(error):
                    break
        return None


def is_timeout(error: RemoteError) -> bool:
    """Return whether a server has taken a connection, and has not answered in time."""
    return error.stage == "answer" and isinstance(error.__cause__, TimeoutError)


def answer_of(stream: RemoteStream) -> Answer:
    """Return what the head of a response says."""
    return Answer(
        status=stream.head.status,
        version=stream.head.version,
        headers=_headers(stream.head),
        after=stream.answered - stream.began,
    )


def _check(response: RemoteStream, word: str, began: float) -> Check:
    marks = {name: value for name, value in _headers(response.head).items() if name in {"server", "via", "cf-ray"}}
    return Check(status=response.head.status, word=word, headers=marks, after=time.monotonic() - began)


def _headers(head: Head) -> dict[str, str]:
    names: Iterable[str] = dict.fromkeys(name.lower() for name in head.headers)
    return printable_headers((name, ", ".join(map(str, head.headers.get_all(name, ())))) for name in names)


def printable_headers(headers: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return headers by their names in lower case, without what is secret: facts may be printed.

    Cookies are left out. A redirect that keeps the query has the token in its URL.
    """
    return {name.lower(): without_token(value) for name, value in headers if name.lower() != "set-cookie"}


def plain_object(text: str) -> dict[str, Any]:
    """Return the plain members of a JSON object: texts, numbers, truth values, null, and lists of them.

    Anything else is left out, so that what a server sends can be printed as JSON again: what is nested deeply cannot,
    nor can infinity. An empty object stands for text that is not one.
    """
    return {name: each for name, each in json_object(text).items() if _is_plain(each) or _is_plain_list(each)}


def _is_plain(value: object) -> bool:
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, str | int)


def _is_plain_list(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_plain, value))
