"""`tail`: one line for each event, as it comes.

The command's own thread. What is shown comes from outside, so all of it is escaped.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple

from ..backends.redis.inspection import Inspection
from ..event import BATCH_SUFFIX, BROADCAST, MIXED, Batch, User
from ..parser import Block
from ..remote.follow import Follower
from ..remote.message import Request
from .terminal import Terminal
from .text import printable, shortened, size

LATEST_SECONDS = 2.5e11
"""In the year 9892: a later time is shown as this one."""


class Shown(NamedTuple):
    """One event, as `tail` shows it."""

    time: float
    """When it came, or was published: seconds since 1970."""
    type: str
    body: str
    """Its JSON, or its text."""
    is_text: bool
    cursor: str
    """The id after its batch; empty if it has none."""
    channel: str | None = None
    users: tuple[User, ...] | None = None
    """Of these two, what is known. Over HTTP, neither is."""

    @property
    def size(self) -> int:
        """The bytes of its data."""
        return len(self.body.encode(errors="surrogatepass"))


def unpack(at: float, block: Block) -> Iterator[Shown]:
    """Yield the events of a block that came over HTTP.

    A block does not say whether its data are JSON or text: what cannot be read as JSON is text.
    """
    cursor = block.id if block.has_id else ""
    batch = _parse(block.data) if block.type.endswith(BATCH_SUFFIX) else None
    events = batch.get("events") if isinstance(batch, dict) else None
    if isinstance(events, list):
        try:
            yield from list(_unpacked(at, block.type.removesuffix(BATCH_SUFFIX), events, cursor))
            return
        except RecursionError:
            pass  # Python reads JSON a little deeper than it writes it
    yield Shown(at, block.type, block.data, _parse(block.data) is _NO_JSON, cursor)


def _unpacked(at: float, name: str, events: list[Any], cursor: str) -> Iterator[Shown]:
    for event in events:
        if name != MIXED:
            yield Shown(at, name, _json(event), False, cursor)
        elif isinstance(event, dict) and isinstance(event.get("text"), str):
            yield Shown(at, _type(event), event["text"], True, cursor)
        elif isinstance(event, dict):
            yield Shown(at, _type(event), _json(event.get("data")), False, cursor)


def unpack_batch(batch: Batch, at: float, cursor: str) -> Iterator[Shown]:
    """Yield the events of a batch that was read from Redis."""
    for event in batch.events:
        yield Shown(at, event.type, event.body, event.is_text, cursor, batch.channel, batch.users or None)


class Printer:
    """Prints events, if they have one of these types. No types: all. `full`: contents are not shortened."""

    def __init__(self, terminal: Terminal, *, as_json: bool, full: bool, types: Iterable[str]) -> None:
        self._terminal = terminal
        self._as_json = as_json
        self._full = full
        self._types = frozenset(types)

    def print(self, event: Shown) -> None:
        if not self._types or event.type in self._types:
            self._terminal.write(self._object(event) if self._as_json else self._line(event))

    def _line(self, event: Shown) -> str:
        styled, terminal = self._terminal.styled, self._terminal
        moment = _local(event.time).strftime("%H:%M:%S.%f")[:-3]
        audience = printable(_audience(event))
        name, count = printable(event.type), f"{size(event.size):>7}"
        begin = f"{moment}  {f'{audience}  ' if audience else ''}{name}  {count}  "
        content = printable(event.body)
        if terminal.is_terminal and not self._full:
            content = shortened(content, max(20, terminal.width - len(begin)))
        head = f"{styled(audience, 'green')}  " if audience else ""
        return f"{styled(moment, 'dim')}  {head}{styled(name, 'cyan')}  {styled(count, 'dim')}  {content}"

    @staticmethod
    def _object(event: Shown) -> str:
        said: dict[str, Any] = {
            "time": _local(event.time).astimezone().isoformat(timespec="milliseconds"),
            "type": event.type,
            "cursor": event.cursor,
            "size": event.size,
        }
        if event.channel is not None:
            said["channel"] = event.channel
        if event.users is not None:
            said["users"] = event.users
        value = _NO_JSON if event.is_text else _parse(event.body)
        # The result is ASCII, so nothing in it can reach a terminal as a control character.
        if value is not _NO_JSON:
            try:
                return json.dumps({**said, "data": value}, allow_nan=False)
            except (ValueError, RecursionError):
                pass  # NaN, which JSON does not have, or very deep: Python reads a little deeper than it writes
        return json.dumps({**said, "text": event.body})


def tail_url(ask: Callable[[str], Request], cursor: str, printer: Printer, terminal: Terminal) -> None:
    """Print the events of a stream until Ctrl-C, which raises `KeyboardInterrupt`. Raises `RemoteError`."""
    follower = Follower(ask, terminal.notice, cursor)
    reached, is_printing = cursor, False
    try:
        for at, block in follower.events():
            is_printing = True
            for event in unpack(at, block):
                printer.print(event)
            reached, is_printing = follower.cursor, False
    finally:
        # In the middle of a batch, go on before it: events may come twice, but none is missing.
        _say_cursor(terminal, reached if is_printing else follower.cursor)


def tail_redis(
    inspection: Inspection,
    channels: Iterable[str],
    last: int,
    cursor: str,
    printer: Printer,
    terminal: Terminal,
) -> None:
    """Print the events of all processes until Ctrl-C: all, or those of these channels and broadcasts.

    Begins with the newest `last` entries, or after the cursor. Raises `BackendError`.
    """
    wanted = frozenset(channels)
    reached = cursor
    try:
        for news in inspection.follow(last, cursor):
            if isinstance(news.content, str):
                terminal.notice(news.content)
            elif not wanted or news.content.channel in wanted | {BROADCAST}:
                for event in unpack_batch(news.content, news.time, news.cursor):
                    printer.print(event)
            reached = news.cursor or reached
    finally:
        _say_cursor(terminal, reached)


def _local(seconds: float) -> datetime:
    """Return a time of this place. An entry of Redis may have any time, also one that no calendar has."""
    return datetime.fromtimestamp(min(seconds, LATEST_SECONDS))


def _say_cursor(terminal: Terminal, cursor: str) -> None:
    if cursor:
        terminal.notice(f"to go on here: --since {shlex.quote(cursor)}", "dim")  # it comes from the server


def _audience(event: Shown) -> str:
    if event.users is None:
        return event.channel or ""
    names = [json.dumps(user, ensure_ascii=False) for user in event.users[:3]]
    more = len(event.users) - len(names)
    return f"user {', '.join(names)}{f' and {more} more' if more else ''}"


class _NoJSON:
    """What `_parse` returns for a text that is not JSON; None is the meaning of ``null``."""


_NO_JSON = _NoJSON()


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _NO_JSON


def _type(event: dict[str, Any]) -> str:
    """Return the type of an event out of a ``mixed_batch``; also of one that has another form."""
    return str(event.get("type"))


def _json(value: Any) -> str:
    """Return the JSON of a value out of a batch, as the server has written it."""
    return json.dumps(value, separators=(",", ":"))
