"""Users with several streams, over real HTTP: managers behind servers of this process, and what each stream gets."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import parse_qs, urlencode

from sse_batcher import BatchOptions, ClientOptions, HistoryOptions, SSEManager, stream
from sse_batcher.cli import serving
from sse_batcher.event import User
from sse_batcher.manager_state import process_of

from .checker import values_of
from .redisserver import cursor_of
from .sse_parser import EventStreamParser, ServerEvent
from .waiting import TIMEOUT, wait_until

Pair = tuple[str, Any]
"""The type and the data of an event."""

HOSTILE = ("7", "('7',)", "(7,)", "[7]", "()", "u:7", "u", "user:7", "None", "7,", "users", '["7"]', "ada", "-1")
"""Names of channels that look like a user, or like what stands for users inside."""


class Tab:
    """The client's side of one stream."""

    def __init__(self, address: tuple[str, int], query: str) -> None:
        self._http = http.client.HTTPConnection(*address, timeout=TIMEOUT)
        self._http.request("GET", f"/?{query}")
        self._response = self._http.getresponse()
        self._parser = EventStreamParser(strict=True)
        self._waiting: list[ServerEvent] = []
        self.events: list[ServerEvent] = []
        """All that have come so far."""

    def take(self) -> ServerEvent:
        """The next event."""
        while not self._waiting:
            data = self._response.read1(65_536)
            assert data, f"the stream has ended after {self.events}"
            self._waiting = self._parser.feed(data)
        self.events.append(self._waiting.pop(0))
        return self.events[-1]

    def until(self, event_type: str) -> list[Pair]:
        """The events up to the next one of this type, each one out of its batch. What we say ourselves: its reason."""
        pairs: list[Pair] = []
        while True:
            event = self.take()
            ours = event.type.startswith("sse_")
            found = [(event.type, event.json.get("reason"))] if ours else values_of(event)
            if event.type == event_type or found[-1][0] == event_type:
                return pairs + found[:-1]
            pairs += found

    def rest(self) -> list[ServerEvent]:
        """All events, to a proper end of the response."""
        data = self._response.read()
        self.events += self._waiting + self._parser.feed(data)
        self._parser.close()
        return self.events

    def ends(self) -> str:
        """The reason of the goodbye, after which the stream has ended."""
        self.until("sse_bye")
        assert self._response.read() == b""
        return str(self.events[-1].json["reason"])

    def close(self) -> None:
        self._response.close()
        self._http.close()


class UserSite:
    """Managers, each behind a server. Several are as several processes, with one Redis."""

    def __init__(self, managers: Sequence[SSEManager], addresses: Sequence[tuple[str, int]], stack: ExitStack) -> None:
        self.managers = managers
        self._addresses = addresses
        self._stack = stack

    def open(self, *channels: str, user: User | None = None, process: int = 0, **query: Any) -> Tab:
        """A stream that has begun."""
        tab = self._ask(channels, user, process, query)
        if tab.take().type != "sse_busy":  # the first block comes before the connection has changed hands
            wait_until(lambda: self._all_have_their_transport(process), "it is attached, or detached, as it has to be")
        return tab

    def poll(self, *channels: str, user: User | None = None, process: int = 0, **query: Any) -> Tab:
        """A stream that ends with its answer."""
        return self._ask(channels, user, process, query | {"poll": 1})

    def _ask(self, channels: Sequence[str], user: User | None, process: int, query: dict[str, Any]) -> Tab:
        asked = [("channel", channel) for channel in channels] + [*query.items()]
        if user is not None:
            asked.append(("user", json.dumps(user)))
        tab = Tab(self._addresses[process], urlencode(asked))
        self._stack.callback(tab.close)
        return tab

    def _all_have_their_transport(self, process: int) -> bool:
        manager = self.managers[process]
        counts = manager.get_stats().clients_by_transport
        is_attached = process_of(manager).options.transport == "attached"
        return (
            counts["attached" if is_attached else "detached"] > 0 == counts["detached" if is_attached else "attached"]
        )

    def send(self, *pairs: Pair, process: int = 0, **to: Any) -> None:
        """Enqueue these as one window: for a channel, for users, or, with neither, for all clients."""
        manager = self.managers[process]
        for event_type, data in pairs:
            if to:
                manager.enqueue(event_type, data, **to)
            else:
                manager.broadcast(event_type, data)
        assert manager.flush_all(TIMEOUT)


@contextmanager
def user_site(
    transport: str,
    batching: BatchOptions | None = None,
    *,
    redis: str | None = None,
    processes: int = 1,
    history: HistoryOptions | None = None,
    **options: Any,
) -> Iterator[UserSite]:
    """A site whose streams are attached, or detached (`transport`). `redis`: its URL; else one process in memory."""
    clients = ClientOptions(transport=transport, heartbeat=1.0, **options)
    batching = batching or BatchOptions(batch_window=10, dedup_key=None)
    with ExitStack() as stack:
        managers, addresses = [], []
        for _ in range(processes):
            manager = SSEManager(batching=batching, clients=clients, history=history, backend=redis or "memory://")
            managers.append(stack.enter_context(manager))
            addresses.append(stack.enter_context(serving(_app_of(manager))))
            if redis is not None:
                manager.subscribe().close()  # it reads from now on
            cursor_of(manager)
        yield UserSite(managers, addresses, stack)


def _app_of(manager: SSEManager) -> Callable[..., Iterable[bytes]]:
    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        query = parse_qs(environ["QUERY_STRING"])
        user = json.loads(query["user"][0]) if "user" in query else None
        status, headers, body = stream(manager, environ, query.get("channel", []), user=user)
        start_response(status, headers)
        return body

    return app
