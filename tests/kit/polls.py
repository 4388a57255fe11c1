"""Polls: those of a `Site`, attached and detached, and what their answers say.

A module that uses the fixtures gives them names of its own: ``poll = polls.poll``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from sse_batcher.streams.client import QueueClient
from sse_batcher.wire import HEARTBEAT, LAST_CHUNK, chunk

from .site import Site, has_ended, read
from .sse_parser import EventStreamParser, ServerEvent, parse


class Poll:
    """A poll at a `Site`, of either transport."""

    def __init__(self, site: Site, client: QueueClient, transport: str, *, chunked: bool, small: bool) -> None:
        self.site = site
        self.client = client
        self.chunked = chunked
        self.first = next(client)
        self.was_detached = transport == "detached" and client.farewell is None
        self._received = b""
        if self.was_detached:
            unsent = chunk(self.first) if chunked else self.first
            self._theirs = site.hand_over(client, unsent, chunked=chunked, small=small)
            site.loop.run()

    def waits(self) -> bool:
        """Whether it is still open, and has got no more than its first block, and heartbeats."""
        if not self.was_detached:
            return self.client.farewell is None and not self.client.behind
        self._received += read(self._theirs)
        first, heartbeat = (chunk(self.first), chunk(HEARTBEAT)) if self.chunked else (self.first, HEARTBEAT)
        return self._received.replace(heartbeat, b"") == first and not has_ended(self._theirs)

    def bytes(self) -> bytes:
        """All that it gets, to its end, which must have come."""
        if not self.was_detached:
            return self.first + b"".join(to_end(self.client))
        while part := read(self._theirs):
            self._received += part
            self.site.loop.run()
        assert has_ended(self._theirs)
        if not self.chunked:
            return self._received
        assert self._received.endswith(LAST_CHUNK)
        return unchunked(self._received)

    def leave(self) -> None:
        """Hang up, as the client does."""
        if self.was_detached:
            self._theirs.close()
            self.site.loop.run()
        else:
            self.client.close()

    def answer(self) -> list[ServerEvent]:
        """What it gets, to its end, which must have come."""
        return parse(self.bytes(), strict=True)

    def numbers(self) -> list[Any]:
        """The data of the events in its answer."""
        opened, *events = self.answer()
        assert opened.type == "sse_open"
        return [event.json for event in events]


def unchunked(body: bytes) -> bytes:
    """What is in the chunks, of which the last one has come."""
    found = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if not int(size, 16):
            assert body == b"\r\n"
            return found
        found, body = found + body[: int(size, 16)], body[int(size, 16) + 2 :]


MakePoll = Callable[..., Poll]


@pytest.fixture
def site(make_site: Callable[..., Site], request: pytest.FixtureRequest) -> Site:
    """A site, whose options a test may give with `options`."""
    # A short time between heartbeats, so that a poll that should end and does not is found out soon.
    return make_site(**{"heartbeat": 0.5, **getattr(request, "param", {})})


@pytest.fixture(params=["attached", "detached", "detached, chunked"])
def poll(site: Site, request: pytest.FixtureRequest) -> Iterator[MakePoll]:
    """Polls the site, with this transport."""
    transport, _, chunked = request.param.partition(", ")
    clients: list[QueueClient] = []

    def poll(cursor: str | None = None, *channels: str, small: bool = False, **options: Any) -> Poll:
        clients.append(site.delivery.connect(*(channels or ("default",)), cursor=cursor, poll=True, **options))
        return Poll(site, clients[-1], transport, chunked=bool(chunked), small=small)

    yield poll
    for client in clients:
        client.close()
    assert site.delivery.left == []  # polls are not reported


def options(**values: Any) -> pytest.MarkDecorator:
    """Options for the fixture `site` of one test."""
    return pytest.mark.parametrize("site", [values], indirect=True, ids=[",".join(values)])


def types(events: list[ServerEvent]) -> list[str]:
    return [event.type for event in events]


def retry_of(block: bytes) -> int:
    """After how many ms the client comes back."""
    parser = EventStreamParser(strict=True)
    parser.feed(block)
    assert parser.retry is not None
    return parser.retry


def to_end(blocks: Iterable[Any]) -> Iterator[bytes]:
    """The blocks of a poll, which must end, and not go on with a heartbeat."""
    for block in blocks:
        assert block != HEARTBEAT, "it goes on"
        yield block
