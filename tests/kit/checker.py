"""The judge of the promise "delivered in order, or replayed, or told", after the manner of Jepsen.

Pure. It knows what was sent, and for each browser all complete blocks of all its connections; it knows nothing of how
the frames came there. Positions are places in the list of what was sent: it looks into ids only at their ``.part``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from sse_batcher import Text
from sse_batcher.event import Audience, User

from .sse_parser import EventStreamParser, ServerEvent


class Facts(NamedTuple):
    """How many frames were sent, and up to which number they may have left the history. All at most."""

    sent: int = 0
    gone: int = 0
    """Of the frames of channels."""
    gone_of_users: int = 0
    """Of the frames for users."""


class Violation(AssertionError):
    """The promise was broken. `kind` says how."""

    def __init__(self, kind: str, what: str) -> None:
        super().__init__(f"{kind}: {what}")
        self.kind = kind


class Sent(NamedTuple):
    """A frame, as it was published: its events are (type, data), and texts a `Text`. One that is `lost` never came."""

    id: str
    audience: Audience
    events: tuple[tuple[str, Any], ...]
    lost: bool = False
    join: str | None = None
    """What comes between its texts, if several are sent as one event."""


class Got(NamedTuple):
    """A complete block, and the facts right after it was taken."""

    event: ServerEvent
    facts: Facts


@dataclass
class Connection:
    """One request and what came back."""

    channels: tuple[str, ...]
    asked: str | None = None
    batches: bool = True
    user: User | None = None
    poll: bool = False
    got: list[Got] = field(default_factory=list)
    drained: int | None = None
    """It had taken everything that there was when so many frames had been sent."""
    answered: bool = False
    """The server has ended it in good order, and not because the test wanted it."""


class Browser:
    """What a browser keeps: the cursor that it was given last, in a block that was complete."""

    def __init__(self, channels: tuple[str, ...], facts: Callable[[], Facts], user: User | None = None) -> None:
        self.channels = channels
        self.user = user
        self.last_id: str | None = None
        self.life: list[Connection] = []
        self._facts = facts
        self._parser = EventStreamParser(strict=True)

    def connect(self, cursor: str | None = None, *, batches: bool = True, poll: bool = False) -> str | None:
        """Begin a connection, and return the ``Last-Event-ID`` to send: the last one, or `cursor`."""
        asked = self.last_id if cursor is None else cursor
        self.life.append(Connection(self.channels, asked, batches, self.user, poll))
        self._parser = EventStreamParser(strict=True)
        return asked

    def feed(self, data: bytes) -> list[ServerEvent]:
        events = self._parser.feed(data)
        for event in events:
            self.life[-1].got.append(Got(event, self._facts()))
            self.last_id = event.id or self.last_id
        return events


def judge(start: str, sent: Sequence[Sent], life: Iterable[Connection]) -> Counter[str]:
    """Count the blocks of one browser's life by type, or raise `Violation`. `start` is the id before all frames."""
    ids = {start: 0} | {frame.id: number for number, frame in enumerate(sent, 1)}
    known: set[str] = set()
    counts: Counter[str] = Counter()
    for connection in life:
        asked = connection.asked
        if asked is not None and asked not in known and asked.partition(".")[0] in ids:
            raise Violation("cursor", f"{asked} was in no complete block that this browser got")
        _Trial(sent, ids, connection).hold()
        for got in connection.got:
            known.add(got.event.id)
            counts[got.event.type] += 1
    return counts


def judge_publishing(published: Iterable[tuple[Audience, str, Sequence[Any]]], sent: Iterable[Sent]) -> None:
    """Whether for each (audience, type) of each publisher all its events are in the frames, once and in order.

    `published` has these and the data, each of which is unlike any other.
    """
    lanes: dict[tuple[Audience, str], list[Any]] = {}
    for frame in sent:
        for event_type, data in frame.events:
            lanes.setdefault((frame.audience, event_type), []).append(data)
    for audience, event_type, expected in published:
        came = [data for data in lanes.get((audience, event_type), []) if data in expected]
        if came != list(expected):
            raise Violation("publishing", f"{event_type!r} for {audience!r}: {expected} went in, {came} came out")


class _Trial:
    """One connection. `_place` and `_part` are where the browser stands: so many frames, so many events of the next."""

    def __init__(self, sent: Sequence[Sent], ids: dict[str, int], connection: Connection) -> None:
        self._sent = sent
        self._ids = ids
        self._connection = connection
        self._place = 0
        self._part = 0

    def hold(self) -> None:
        connection = self._connection
        ended = False
        for number, got in enumerate(connection.got):
            if ended:
                self._fail("content", got, "after the end")
            name = got.event.type
            if (number == 0) != (name in {"sse_open", "sse_gap", "sse_busy"}) and name != "sse_gap":
                self._fail("content", got, "the first block, and no other, opens a stream")
            if name == "sse_gap":
                self._gap(got, first=number == 0)
            elif name == "sse_open":
                self._open(got)
            elif name in {"sse_bye", "sse_busy"}:
                ended = True
                if name == "sse_bye" and connection.poll:
                    self._fail("poll", got, "a poll ends without a goodbye")
                if name == "sse_bye" and not self._is_here(self._stand(got)):
                    self._fail("cursor", got, "a goodbye says where the client stands")
            else:
                self._event(got)
            # A poll without a usable cursor, and one that has missed something, ends at once.
            ended = ended or (connection.poll and (name == "sse_gap" or connection.asked is None))
        if connection.poll and connection.answered and len(connection.got) < 2 and not ended:
            raise Violation("poll", f"it ended without an answer: {connection}")
        if connection.drained is not None and connection.got:
            rest = self._next(connection.drained)
            if rest is not None:
                raise Violation("loss", f"{self._sent[rest - 1]} never came to {connection}")

    def _open(self, got: Got) -> None:
        stand = self._stand(got)
        asked = self._connection.asked
        if asked is not None and got.event.id != asked:
            frame, _, part = asked.partition(".")
            if frame in self._ids:
                self._place, self._part = self._before(self._ids[frame], int(part or 0))
            if frame not in self._ids or not self._is_here(stand):
                self._fail("cursor", got, f"it came with {asked}, and goes on elsewhere")
        self._place, self._part = stand
        if self._place > got.facts.sent:
            self._fail("cursor", got, "nothing that is so new was ever sent")

    def _gap(self, got: Got, *, first: bool) -> None:
        place, part = self._stand(got)
        asked = self._connection.asked
        if first:
            if asked is None:
                self._fail("false gap", got, "it began again")
            frame, _, asked_part = asked.partition(".")
            if frame not in self._ids:
                self._place, self._part = place, part  # a cursor of another history, or none at all
                return
            self._place, self._part = self._before(self._ids[frame], int(asked_part or 0))
        if (place, part) < (self._place, self._part):
            self._fail("cursor", got, "it goes back")
        if part or place > got.facts.sent:
            self._fail("cursor", got, "after a gap a client stands at the head")
        missed = (
            self._sent[number - 1].lost or self._may_be_gone(number, got.facts)
            for number in range(self._place + 1, got.facts.sent + 1)
            if self._asked_for(number)
        )
        if not any(missed):
            self._fail("false gap", got, "all that it had not got was in the history")
        self._place, self._part = place, part

    def _event(self, got: Got) -> None:
        id, _, part = got.event.id.partition(".")
        number = self._ids.get(id)
        if number is None:
            self._fail("content", got, "there is no such frame")
        if not self._asked_for(number):
            self._fail("audience", got, f"for {self._sent[number - 1].audience!r}")
        upto = int(part) if part else len(self._sent[number - 1].events)
        if number <= self._place:
            self._fail("duplicate", got, "the browser stands behind it")
        following = self._next(len(self._sent))
        if number != following:
            assert following is not None, "it is one of those that may come"
            kind = "order" if self._comes_later(following) else "loss"
            self._fail(kind, got, f"{self._sent[following - 1]} was next")
        begin = self._part
        frame = self._sent[number - 1]
        events = frame.events
        due = list(events[begin : begin + 1] if begin or not self._connection.batches else events)
        if upto != begin + len(due):
            self._fail("loss" if upto > begin else "duplicate", got, f"{begin} events of this frame had come")
        if len(due) > 1 and frame.join is not None:
            due = [(due[0][0], Text(frame.join.join(text for _, text in due)))]
        if _with_kinds(values_of(got.event)) != _with_kinds(due):
            self._fail("content", got, f"sent were {due}")
        self._place, self._part = (number, 0) if upto == len(events) else (number - 1, upto)

    def _is_here(self, stand: tuple[int, int]) -> bool:
        """Whether the browser stands there, or there is nothing for it in between."""
        due = self._next(stand[0])
        return stand == (self._place, self._part) or (stand[0] > self._place and not self._part and due is None)

    def _comes_later(self, number: int) -> bool:
        return any(got.event.id.partition(".")[0] == self._sent[number - 1].id for got in self._connection.got)

    def _next(self, sent: int) -> int | None:
        """The frame that is due, of the first so many."""
        return next((number for number in range(self._place + 1, sent + 1) if self._asked_for(number)), None)

    def _asked_for(self, number: int) -> bool:
        audience, connection = self._sent[number - 1].audience, self._connection
        if isinstance(audience, str):
            return audience in (*connection.channels, "*")
        return connection.user is not None and any(_is_same(user, connection.user) for user in audience)

    def _may_be_gone(self, number: int, facts: Facts) -> bool:
        is_of_channel = isinstance(self._sent[number - 1].audience, str)
        return number <= (facts.gone if is_of_channel else facts.gone_of_users)

    def _stand(self, got: Got) -> tuple[int, int]:
        frame, _, part = got.event.id.partition(".")
        if frame not in self._ids:
            self._fail("cursor", got, "no frame has this id")
        return self._before(self._ids[frame], int(part or 0))

    @staticmethod
    def _before(number: int, part: int) -> tuple[int, int]:
        return (number - 1, part) if part else (number, 0)

    def _fail(self, kind: str, got: Got, why: str) -> NoReturn:
        raise Violation(kind, f"{got}, {why}; it is one of {self._connection}")


def values_of(event: ServerEvent) -> list[tuple[str, Any]]:
    """The events of a block, as (type, data). Several texts are one. What is no JSON is a text."""
    if event.type == "mixed_batch":
        return [(value["type"], Text(value["text"]) if "text" in value else value["data"]) for value in _events(event)]
    if event.type.endswith("_batch"):
        return [(event.type.removesuffix("_batch"), value) for value in _events(event)]
    try:
        return [(event.type, event.json)]
    except ValueError:
        return [(event.type, Text(event.data))]


def _with_kinds(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any, bool]]:
    """The same, and whether each is a text: one that equals a string of JSON is another thing."""
    return [(event_type, data, isinstance(data, Text)) for event_type, data in pairs]


def _is_same(one: User, other: User) -> bool:
    return type(one) is type(other) and one == other


def _events(batch: ServerEvent) -> list[Any]:
    events: list[Any] = batch.json["events"]
    return events
