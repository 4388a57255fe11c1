"""The clients that people use: whether each gets exactly what was sent, however the network cuts it.

What is expected of all is what the standard says. Where a client is known to do otherwise, `reported` and `after_end`
say what it does instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice

import pytest

from sse_batcher.wire import HEARTBEAT

from .kit import reference
from .kit.browser import chromium
from .kit.clients import PYTHON_CLIENTS, Chromium, Client, Collected, JavaScript, Job, Memory, Node
from .kit.reference import END, LARGE, PARTS, SHORT, TYPES, Part, joined, pieces, sliced
from .kit.servers import COMMANDS, Server, running
from .kit.slicer import Answer, Relay, Slicer, slicing
from .kit.sse_parser import ServerEvent, parse
from .kit.waiting import wait_until

SIZES = (1, 2, 3)
FRAMINGS = ("chunked", "plain")

# -- what is expected --------------------------------------------------------------------------------------------------

# The id of an event is the one that its own block has, and "" if it has none. By the standard it would be the last one
# that the stream had. All our blocks have one but an sse_busy for a client that came without.
OWN_IDS = {"sseclient-py", "eventsource3", "eventsource4"}

# These take a last line that has no end for a line, and raise an error if it ends inside a character. JSON of ours is
# ASCII: it never does.
DECODE_THE_LAST_LINE = {"sseclient-py", "requests-sse"}


def reported(client: str, parts: Sequence[Part]) -> list[ServerEvent]:
    """What this client makes of these blocks."""
    events = reference.events(parts)
    if client in OWN_IDS:
        return [part.event for part in parts if part.event]
    if client == "requests-sse":  # takes off all spaces before a line of data, and all line ends after the last
        return [
            event._replace(data=re.sub(r"^ +", "", event.data, flags=re.MULTILINE).rstrip("\n")) for event in events
        ]
    return events


def after_end(client: str, parts: Sequence[Part], at: int) -> tuple[list[ServerEvent], str | None]:
    """What this client reports if the connection ends after `at` bytes, and the next one, if there is one, gives `END`
    alone. And the id with which it returns."""
    received = joined(parts)[:at]
    complete = reported(client, parts)[: len(parse(received))]
    if client == "httpx-sse":
        return complete, None
    if client == "sseclient-py":  # the end of the stream is the end of the block for it
        *_, unfinished = received.split(b"\n\n")
        return [*complete, *parse(unfinished + b"\n\n")], None
    if client == "eventsource2":
        # Forgets only an unfinished line, and not the lines of an unfinished block: its data comes before that of the
        # next event, and an id counts from its own line on.
        lines = received[: received.rfind(b"\n") + 1]
        ids = re.findall(rb"^id: (.*)\n", lines, re.MULTILINE)
        return parse(lines + END.bytes), ids[-1].decode() if ids else None
    return [*complete, *reference.events([END])], (complete[-1].id if complete else None)


def inside_a_character(received: bytes) -> bool:
    return received.decode(errors="ignore").encode() != received


def test_the_parser_that_knows_no_client_of_ours_gets_what_was_put_in() -> None:
    for parts in (SHORT, PARTS, LARGE, [END]):
        assert parse(joined(parts), strict=True) == reference.events(parts)
        assert b"".join(pieces(parts, 2)) == joined(parts)
    assert {part.event is None for part in SHORT} == {True, False}
    assert len(LARGE[-1].bytes) > 70_000


def test_the_id_comes_last_so_that_eventsource2_returns_with_it_too_early_after_one_byte_only() -> None:
    ends = range(len(joined(SHORT)) + 1)
    too_early = [at for at in ends if after_end("eventsource2", SHORT, at)[1] != after_end("node", SHORT, at)[1]]
    assert too_early == [match.end() - 1 for match in re.finditer(b"\n\n", joined(SHORT))]


# -- each client, whatever the pieces ----------------------------------------------------------------------------------


@pytest.fixture(params=PYTHON_CLIENTS)
def client(request: pytest.FixtureRequest) -> Client:
    return PYTHON_CLIENTS[request.param]


def until(events: Iterator[ServerEvent], last: str) -> list[ServerEvent]:
    """The events up to the next one of this type."""
    received = []
    for event in events:
        received.append(event)
        if event.type == last:
            return received
    raise AssertionError(f"the stream ended before {last!r}, after {received}")


def every_cut() -> Iterator[bytes]:
    """`PARTS` again and again, in pieces of one byte more: cut at each byte once, always somewhere else."""
    whole = joined(PARTS)
    return chain(sliced(whole * (len(whole) + 1), len(whole) + 1), [END.bytes])


def every_cut_reported(client: str) -> list[ServerEvent]:
    return [*reported(client, PARTS) * (len(joined(PARTS)) + 1), *reported(client, [END])]


def sliced_answer(path: str, earlier: int) -> Answer | None:
    """`LARGE` in pieces; or `PARTS`, cut everywhere; or a part of `SHORT`, and then `END`."""
    _, kind, framing, number = path.partition("?")[0].split("/")
    chunked = framing == "chunked"
    answers = {
        "pieces": lambda: [Answer(pieces((*LARGE, END), int(number)), chunked)],
        "cuts": lambda: [Answer(every_cut(), chunked)],
        "end": lambda: [Answer([joined(SHORT)[: int(number)]], chunked, complete=False), Answer([END.bytes], chunked)],
    }[kind]()
    return answers[earlier] if earlier < len(answers) else None


@pytest.fixture
def slicer() -> Iterator[Slicer]:
    with slicing(sliced_answer) as slicer:
        yield slicer


def test_a_client_in_python_gets_everything_wherever_it_is_cut(client: Client) -> None:
    assert until(client.parse(Memory(every_cut())), "end") == every_cut_reported(client.name)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_client_in_python_gets_everything_over_http_in_small_pieces(
    client: Client, framing: str, slicer: Slicer
) -> None:
    for size in SIZES:
        with client.connect(f"{slicer.url}/pieces/{framing}/{size}") as events:
            assert until(events, "end") == reported(client.name, [*LARGE, END])


def test_a_client_in_python_drops_what_is_not_complete_and_returns_with_the_last_id(client: Client) -> None:
    for at in range(len(joined(PARTS)) + 1):
        received = joined(PARTS)[:at]
        memory = Memory([received], [END.bytes])
        expected, id = after_end(client.name, PARTS, at)
        events = client.parse(memory)
        if client.name in DECODE_THE_LAST_LINE and inside_a_character(received):
            complete = len(parse(received))
            assert list(islice(events, complete)) == expected[:complete]
            with pytest.raises(UnicodeDecodeError):
                next(events)
        elif client.reconnects:
            assert list(events) == expected
            assert memory.last_event_ids == [None, id, "e-99"]
        else:
            assert list(events) == expected


# Around every line end of `SHORT`, and at every fourth byte.
ENDS = sorted(
    {match.end() + by for match in re.finditer(b"\n", joined(SHORT)) for by in (-1, 0, 1)}
    | set(range(0, len(joined(SHORT)), 4))
)


@pytest.mark.parametrize("name", [name for name, client in PYTHON_CLIENTS.items() if client.reconnects])
def test_a_client_in_python_whose_connection_ends_returns_with_the_last_id(name: str, slicer: Slicer) -> None:
    for count, at in enumerate(ENDS):
        if name in DECODE_THE_LAST_LINE and inside_a_character(joined(SHORT)[:at]):
            continue
        path = f"/end/{FRAMINGS[count % 2]}/{at}"
        expected, id = after_end(name, SHORT, at)
        with PYTHON_CLIENTS[name].connect(slicer.url + path) as events:
            assert list(events) == expected
        assert slicer.last_event_ids.pop(path) == [None, id, "e-99"]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_client_in_python_that_does_not_return_ends_with_the_stream(framing: str, slicer: Slicer) -> None:
    inside_the_item = len(joined(SHORT[:2])) + 20
    for client in PYTHON_CLIENTS.values():
        if not client.reconnects:
            # One that breaks off is an error in requests, so that sseclient-py does not see an end there.
            cut_off = "httpx-sse" if framing == "chunked" else client.name
            with client.connect(f"{slicer.url}/end/{framing}/{inside_the_item}?{client.name}") as events:
                assert list(events) == after_end(cut_off, SHORT, inside_the_item)[0]


@pytest.mark.parametrize(("name", "size"), [("sseclient-py", 128), ("requests-sse", 512), ("ld_eventsource", 10_000)])
def test_a_client_in_python_waits_for_many_bytes_if_the_response_is_not_chunked(name: str, size: int) -> None:
    sent = 0
    received = False

    def beats() -> Iterator[bytes]:
        nonlocal sent
        while not received:
            piece = HEARTBEAT * 50 if sent else SHORT[0].bytes
            sent += len(piece)
            yield piece

    with slicing(lambda path, earlier: None if earlier else Answer(beats(), chunked=False)) as slicer:
        with PYTHON_CLIENTS[name].connect(slicer.url) as events:
            assert next(events).type == "sse_open"
            received = True
            assert sent >= size


# -- JavaScript --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[Node, Chromium])
def javascript(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JavaScript]:
    if request.param is Node:
        yield Node(tmp_path_factory.mktemp("node"))
    else:
        with chromium() as browser:
            yield Chromium(browser)


def job(javascript: JavaScript, urls: Sequence[str], last: str = "end") -> Job:
    return {"urls": urls, "types": TYPES, "last": last, "atOnce": javascript.at_once}


def collected(javascript: JavaScript, slicer: Slicer, paths: Sequence[str]) -> dict[str, Collected]:
    """What each client gets from each path, each with a query of its own."""
    jobs = {name: job(javascript, [f"{slicer.url}{path}?{name}" for path in paths]) for name in javascript.names}
    with javascript.collecting(jobs) as run:
        wait_until(run.is_done, "all clients are done", 50)
        received = run.read()
    return {
        name: {path: received.get(name, {}).get(f"{slicer.url}{path}?{name}", []) for path in paths} for name in jobs
    }


@pytest.mark.external
def test_a_client_in_javascript_gets_everything_in_small_pieces(javascript: JavaScript, slicer: Slicer) -> None:
    paths = [f"/pieces/{framing}/{size}" for framing in FRAMINGS for size in SIZES]
    for name, streams in collected(javascript, slicer, paths).items():
        for path, events in streams.items():
            assert events == reported(name, [*LARGE, END]), (name, path)


@pytest.mark.external
def test_a_client_in_javascript_gets_everything_wherever_it_is_cut(javascript: JavaScript, slicer: Slicer) -> None:
    for name, streams in collected(javascript, slicer, ["/cuts/chunked/0"]).items():
        assert streams == {"/cuts/chunked/0": every_cut_reported(name)}, name


@pytest.mark.external
def test_a_client_in_javascript_drops_what_is_not_complete_and_returns_with_the_last_id(
    javascript: JavaScript, slicer: Slicer
) -> None:
    # Before the first block has come, each returns after a time of its own.
    ends = [at for at in ENDS if at >= len(SHORT[0].bytes)]
    paths = {f"/end/{FRAMINGS[count % 2]}/{at}": at for count, at in enumerate(ends)}
    for name, streams in collected(javascript, slicer, list(paths)).items():
        for path, events in streams.items():
            possible = [after_end(name, SHORT, paths[path])]
            if name == "chromium" and path.startswith("/end/chunked"):
                # What a browser has read and not yet shown when a connection breaks off, it may throw away. Its id is
                # that of the last event that it did show.
                possible += [after_end(name, SHORT, at) for at in range(paths[path])]
            first, id = slicer.last_event_ids[f"{path}?{name}"]
            assert first is None
            assert (events, id) in possible, (name, path)


# -- the same clients and a server of ours -----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gunicorn", "werkzeug", "waitress"])
def shared_server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(COMMANDS[request.param], tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    with shared_server.watched():
        yield shared_server


BURST = (*[("item", n) for n in range(30)], ("hub_state", "ready"), ("item", 30), ("error", "last"))


def assert_burst(received: Sequence[ServerEvent]) -> None:
    assert [event.type for event in received] == ["item_batch"] * 3 + ["hub_state", "item", "error"]
    assert [n for batch in received[:3] for n in batch.json["events"]] == list(range(30))
    assert [event.json for event in received[3:]] == ["ready", 30, "last"]


def test_a_client_gets_everything_in_order_and_nothing_else(server: Server, client: Client) -> None:
    with client.connect(server.url + "/events") as events:
        assert next(events).type == "sse_open"
        server.enqueue(("item", {"text": "one\nline \u2028 \u00e9"}))
        (lone,) = until(events, "item")  # heartbeats pass before it, and are no events
        assert lone.json == {"text": "one\nline \u2028 \u00e9"}

        server.enqueue(*BURST)
        assert_burst(until(events, "error"))


def test_a_client_that_returns_with_the_last_id_has_missed_nothing(server: Server, client: Client) -> None:
    with client.connect(server.url + "/events") as events:
        next(events)
        server.enqueue(("hub_state", 1))
        (event,) = until(events, "hub_state")
        assert event.id
    with client.connect(server.url + "/events", event.id) as events:
        resumed = next(events)
        assert (resumed.type, resumed.id) == ("sse_open", event.id)
        server.enqueue(("hub_state", 2))
        assert next(events).json == 2
    with client.connect(server.url + "/events", event.id) as events:
        assert next(events).id == event.id
        assert next(events).json == 2  # what it has missed; a client that is new would not get it


@pytest.mark.external
@pytest.mark.parametrize("shared_server", ["gunicorn"], indirect=True)
def test_a_client_in_javascript_gets_everything_in_order_and_returns_by_itself(
    server: Server, javascript: JavaScript
) -> None:
    def all_have(event_type: str, times: int = 1) -> Callable[[], bool]:
        def check() -> bool:
            streams = [events for streams in run.read().values() for events in streams.values()]
            counts = [[event.type for event in events].count(event_type) for events in streams]
            return counts == [times] * len(javascript.names)

        return check

    with Relay(server.port) as relay:
        jobs = {name: job(javascript, [relay.url + "/events"]) for name in javascript.names}
        with javascript.collecting(jobs) as run:
            wait_until(all_have("sse_open"), "all have begun")
            server.enqueue(("item", {"text": "one\nline \u2028 \u00e9"}))
            wait_until(all_have("item"), "all have a lone event")
            server.enqueue(*BURST)
            wait_until(all_have("error"), "all have the burst")
            with relay.broken():
                pass
            wait_until(all_have("sse_open", 2), "all have returned")
            with relay.broken():
                batches = server.stats()["batches"]
                server.enqueue(("hub_state", "missed"))
                wait_until(lambda: server.stats()["batches"] > batches, "it is sent")
            wait_until(all_have("hub_state", 2), "all have returned once more, and have what they had missed")
            server.enqueue(("hub_state", "seen"))
            wait_until(all_have("hub_state", 3), "all have what came after that")
            transcripts = run.read()
    for name in javascript.names:
        (events,) = transcripts[name].values()
        first, lone, *burst, resumed, again, missed, last = events
        assert (first.type, lone.type, lone.json) == ("sse_open", "item", {"text": "one\nline \u2028 \u00e9"}), name
        assert_burst(burst)
        assert (resumed.type, resumed.id) == ("sse_open", burst[-1].id), name
        assert (again.type, again.id) == ("sse_open", burst[-1].id), name
        assert (missed.type, missed.json) == ("hub_state", "missed"), name
        assert (last.type, last.json) == ("hub_state", "seen"), name
