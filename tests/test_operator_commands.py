"""`flask sse tail`, `stats` and `kick`: from Redis, and from a running process."""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click.testing
import pytest
from flask import Flask, request

from sse_batcher import SSE, BackendError, Batch, Event, SSEManager, Text
from sse_batcher.backends.redis.inspection import Inspection, News
from sse_batcher.commands import stats as commands_stats
from sse_batcher.commands.stats import table
from sse_batcher.commands.tail import Printer, tail_redis
from sse_batcher.commands.terminal import Terminal
from sse_batcher.manager_state import process_of
from sse_batcher.stats import ManagerStats
from sse_batcher.testing import live_server

from .kit.commands import environment, interrupt, started
from .kit.redisserver import RedisServer, be_patient, cursor_of, redis_fixture
from .kit.scripted_server import scripted_server, sending
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external
server = redis_fixture()


def invoke(app: Flask, *arguments: str, **options: Any) -> click.testing.Result:
    return app.test_cli_runner().invoke(args=["sse", *arguments], **options)


@pytest.fixture
def make_app() -> Iterator[Any]:
    managers = []

    def make(backend: str | None = None, **config: Any) -> tuple[Flask, SSE]:
        app = Flask("shop")
        app.config.update(config)
        if backend is not None:
            app.config["SSE_BACKEND"] = backend
        sse = SSE(app)
        with app.app_context():
            managers.append(sse.manager)
        return app, sse

    yield make
    for manager in managers:
        assert manager.shutdown(TIMEOUT)


# -- without Redis -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tail"], "keeps events in the process that sends them"),
        (["stats"], "this one has no streams: give the URL of the stream with --url"),
        (["kick", "--user", "7", "--yes"], "nothing would happen: set SSE_BACKEND"),
    ],
)
def test_without_redis_each_says_why_it_cannot(make_app: Any, arguments: list[str], said: str) -> None:
    app, _ = make_app()
    result = invoke(app, *arguments)
    assert result.exit_code == 1
    assert said in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kick"], "--user, --channel or both"),
        (["kick", "--user", ""], "1 to 256 characters"),
        (["kick", "--channel", ""], "1 to 128 characters"),
        (["kick", "--channel", "*"], "no channel to kick"),
        (["tail", "http://x", "--last", "1"], "--last is for Redis"),
        (["tail", "--user", "7"], "need the URL"),
        (["tail", "http://x", "--user", ""], "1 to 256 characters"),
        (["tail", "http://x", "--user", "7", "--header", "A: b"], "for --user, this command signs a token"),
        (["tail", "http://x", "--user", "7", "--token", "t"], "for --user, this command signs a token"),
        (["tail", "http://x?token=t", "--user", "7"], "for --user, this command signs a token"),
        (["tail", "http://x", "--token", ""], "it is empty"),
        (["tail", "http://x", "--since", ""], "it is empty"),
        (["tail", "http://x", "--header", "Last-event-ID: x"], "cannot be used for Last-event-ID: use --since"),
        (["tail", "http://x", "--token", "t", "--header", "authorization: t"], "--token is the header authorization"),
        (["tail", "http://x", "--type", "order_batch"], "no event has the type 'order_batch'. Batches are unpacked"),
        (["tail", "--type", "sse_gap"], "no event has the type 'sse_gap'"),
        (["tail", "--last", "1", "--since", "x"], "two places to begin at"),
        (["tail", "--channel", ""], "1 to 128 characters"),
        (["doctor", ""], "is not a URL"),
        (["doctor", "--seconds", "1"], "need the URL"),
        (["doctor", "--origin", "http://y"], "need the URL"),
        (["doctor", "--insecure"], "need the URL"),
        (["doctor", "http://x", "--seconds", "nan"], "Invalid value for '--seconds'"),
        (["doctor", "--token", ""], "it is empty"),
        (["doctor", "http://x", "--origin", ""], "it is empty"),
        (["doctor", "http://x", "--origin", "http://y", "--header", "Origin: z"], "--origin says it"),
        (["doctor", "http://x", "--header", "Last-Event-ID: x"], "the doctor sends cursors of its own"),
        (["stats", "--watch", "1"], "need --url"),
        (["stats", "--url", "x"], "is not a URL"),
        (["stats", "--url", "http://[::1/"], "is not a URL"),
        (["stats", "--url", "http://x", "--watch", "nan"], "Invalid value for '--watch'"),
        (["stats", "--url", "http://x", "--watch", "1e300"], "Invalid value for '--watch'"),
    ],
)
def test_wrong_arguments_are_status_2(make_app: Any, arguments: list[str], said: str) -> None:
    app, _ = make_app("redis://127.0.0.1:1", SECRET_KEY="x")
    result = invoke(app, *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert "[y/N]" not in result.output  # it asks nothing before


def test_a_token_of_the_environment_is_no_argument(make_app: Any) -> None:
    app, _ = make_app()
    for arguments in (["tail"], ["stats"]):
        result = invoke(app, *arguments, env={"SSE_TOKEN": "t"})
        assert result.exit_code == 1  # it asks for a URL, or for Redis
        result = invoke(app, *arguments, "--token", "t")
        assert result.exit_code == 2


def test_a_backend_that_was_set_too_late_is_an_error(caplog: pytest.LogCaptureFixture, make_app: Any) -> None:
    for arguments in (["tail"], ["stats"], ["kick", "--user", "7"]):
        app, _ = make_app()
        app.config["SSE_BACKEND"] = "redis://127.0.0.1:1"
        caplog.clear()
        assert invoke(app, *arguments).exit_code == 1
        assert "the config key SSE_BACKEND was set after SSE(app)" in caplog.text


def test_redis_away_is_said_in_a_line(make_app: Any) -> None:
    app, _ = make_app("redis://127.0.0.1:1")
    for arguments in (["tail"], ["stats"], ["kick", "--user", "7", "--yes"]):
        result = invoke(app, *arguments)
        assert result.exit_code == 1
        assert re.search(r"Error: .*Redis.*refused", result.output)
        assert "Traceback" not in result.output


# -- what Redis knows --------------------------------------------------------------------------------------------------


@pytest.fixture
def manager(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[SSEManager]:
    be_patient(monkeypatch)
    with SSEManager(backend=server.url) as manager:
        cursor_of(manager)  # the epoch has begun
        yield manager


@pytest.fixture
def inspection(manager: SSEManager) -> Iterator[Inspection]:
    backend: Any = process_of(manager).backend
    with backend.inspect() as inspection:
        yield inspection


def send(manager: SSEManager, *numbers: int, **options: Any) -> None:
    for number in numbers:
        manager.enqueue("order", number, **options)
        assert manager.flush_all(TIMEOUT)


def content(news: News) -> Any:
    return news.content if isinstance(news.content, str) else news.content.events[0].data


@external
def test_it_follows_all_channels_and_users(manager: SSEManager, inspection: Inspection) -> None:
    send(manager, 1, 2)
    following = inspection.follow(1, "")
    send(manager, 3, channel="team")
    send(manager, 4, user=[7, "7"])
    manager.broadcast("order", Text("5"))
    manager.flush_all()
    manager.kick(user=7, channel="team")
    found = [next(following) for _ in range(5)]
    assert [content(news) for news in found] == [2, 3, 4, "5", 'kicked: the user 7 in the channel "team"']
    batches: list[Any] = [news.content for news in found[:4]]
    assert [(batch.channel, batch.users) for batch in batches] == [
        ("default", ()),
        ("team", ()),
        (None, (7, "7")),
        ("*", ()),
    ]
    assert abs(found[0].time - time.time()) < 10


@external
def test_it_begins_with_what_comes_or_after_a_cursor(manager: SSEManager, inspection: Inspection) -> None:
    send(manager, 1)
    begun = next(inspection.follow(1, ""))
    following = inspection.follow(0, begun.cursor)
    send(manager, 2)
    assert content(next(following)) == 2
    assert content(next(inspection.follow(0, f"{begun.cursor}-1"))) == 2
    assert content(next(inspection.follow(0, f"{begun.cursor}.1"))) == 1  # of that batch, a part was read
    everything = inspection.follow(1_000, "")
    assert [content(next(everything)) for _ in range(2)] == [1, 2]


@external
def test_a_cursor_that_reaches_nothing_is_a_gap(manager: SSEManager, inspection: Inspection) -> None:
    send(manager, 1)
    epoch = manager.cursor().partition("-")[0]
    for cursor in ("00000000-1-0", "x", "..", f"{epoch}-1-2-3", f"{epoch}-1-{2**64}", f"{epoch}-1-{'9' * 5_000}"):
        assert "another history, or has another form" in content(next(inspection.follow(0, cursor)))
    assert "no longer has all" in content(next(inspection.follow(0, f"{epoch}-1-0")))


@external
def test_another_epoch_is_said_before_the_stream_is_read_again(
    manager: SSEManager, inspection: Inspection, server: RedisServer
) -> None:
    send(manager, 1)
    following = inspection.follow(1, "")
    assert content(next(following)) == 1
    server.client.set("sse_batcher:epoch", "12345678")
    assert "may be missing, or come again" in content(next(following))
    assert content(next(following)) == 1


@external
def test_foreign_and_unreadable_entries_are_said(
    manager: SSEManager, inspection: Inspection, server: RedisServer
) -> None:
    following = inspection.follow(0, "")
    send(manager, 1)
    assert content(next(following)) == 1
    server.client.xadd("sse_batcher:stream", {"a": "b"})
    assert "was not written by sse_batcher" in content(next(following))
    server.client.xadd("sse_batcher:stream", {"v": "9", "p": "0" * 16, "n": "1"})
    assert "an entry cannot be read (ValueError" in content(next(following))


@external
def test_an_outage_is_waited_out(manager: SSEManager, inspection: Inspection, server: RedisServer) -> None:
    following = inspection.follow(0, "")
    send(manager, 1)
    assert content(next(following)) == 1
    server.kill()
    assert content(next(following)).startswith("Redis does not answer, and is asked again and again: ")
    server.start()
    assert content(next(following)) == "Redis answers again"
    server.client.set("sse_batcher:epoch", "ffffffff")
    assert "events may be missing" in content(next(following))
    assert content(next(following)) == 1  # all that is there now may be new


@external
def test_a_reader_that_was_too_slow_is_warned(manager: SSEManager, inspection: Inspection, server: RedisServer) -> None:
    following = inspection.follow(0, "")
    send(manager, 1)
    assert content(next(following)) == 1
    send(manager, 2, 3)
    server.client.xtrim("sse_batcher:stream", maxlen=1, approximate=False)
    assert [content(next(following)) for _ in range(2)] == ["this command was too slow: events may be missing", 3]


@external
def test_facts_are_those_of_redis(manager: SSEManager, inspection: Inspection, server: RedisServer) -> None:
    send(manager, 1, 2)
    manager.kick(user=7)
    manager.kick(user="7")
    facts = inspection.facts()
    assert (facts.entries, facts.kicked_users) == (5, 2)  # with the beginning of the epoch, and the kicks
    wait_until(lambda: inspection.facts().processes == 1, "the manager reads")
    assert facts.memory_bytes == server.client.memory_usage("sse_batcher:stream")
    assert facts.epoch == manager.cursor().partition("-")[0]
    assert facts.oldest_age is not None
    assert facts.newest_age is not None
    assert 0 <= facts.newest_age <= facts.oldest_age < 20
    # A user without these rights still learns the rest.
    server.client.execute_command("ACL", "SETUSER", "default", "-memory", "-zcard", "-zcount")
    facts = inspection.facts()
    assert (facts.entries, facts.memory_bytes, facts.processes, facts.kicked_users) == (5, None, None, None)
    server.kill()
    with pytest.raises(BackendError, match="reading from Redis failed"):
        inspection.facts()


@external
def test_stats_of_redis_as_a_table_and_for_programs(make_app: Any, server: RedisServer) -> None:
    app, _ = make_app(server.url)
    result = invoke(app, "stats")
    assert result.exit_code == 0
    assert result.output.startswith("Redis, for all processes")
    assert re.search(r"newest entry +none\n", result.output)
    assert json.loads(invoke(app, "stats", "--json").output)["entries"] == 0


@external
def test_tail_as_a_process(manager: SSEManager, server: RedisServer, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        f"from flask import Flask\nfrom sse_batcher import SSE\napp = Flask('app')\n"
        f"app.config['SSE_BACKEND'] = {server.url!r}\nSSE(app)\n"
    )
    send(manager, 1, 2)
    send(manager, 3, channel="team")
    send(manager, 4, user="u\x1b[0m")
    arguments = ("-m", "flask", "--app", "app", "sse", "tail", "-n", "4")
    with started(*arguments, folder=tmp_path, environ=environment()) as process:
        assert process.stdout
        lines = [re.sub(r"^\S+", "TIME", process.stdout.readline()) for _ in range(4)]
        status, _, err = interrupt(process)
    assert lines == [
        "TIME  default  order      1 B  1\n",
        "TIME  default  order      1 B  2\n",
        "TIME  team  order      1 B  3\n",
        'TIME  user "u\\u001b[0m"  order      1 B  4\n',
    ]
    assert (status, "Traceback" in err) == (130, False)
    assert "-- to go on here: --since " in err
    more = ("--json", "--channel", "team")
    with started(*arguments, *more, folder=tmp_path, environ=environment()) as process:
        assert process.stdout
        said = json.loads(process.stdout.readline())
        assert (said["channel"], said["type"], said["data"]) == ("team", "order", 3)
        interrupt(process)


def test_a_channel_is_shown_with_the_broadcasts_that_its_clients_get() -> None:
    batches = [Batch(audience, "a", (Event("a", audience, "1"),), "manual", 0) for audience in ("x", "y", "*", (7,))]

    class Ended(Inspection):
        def __init__(self) -> None:
            pass

        def follow(self, last: int, cursor: str) -> Iterator[News]:
            assert (last, cursor) == (5, "e-1-0")
            yield from (News(batch, 2e16, f"e-2-{place}") for place, batch in enumerate(batches))
            raise KeyboardInterrupt

    out, err = io.StringIO(), io.StringIO()
    terminal = Terminal(out, err)
    printer = Printer(terminal, as_json=True, full=False, types=())
    with pytest.raises(KeyboardInterrupt):
        tail_redis(Ended(), ["x"], 5, "e-1-0", printer, terminal)
    assert [json.loads(line)["channel"] for line in out.getvalue().splitlines()] == ["x", "*"]
    assert err.getvalue() == "-- to go on here: --since e-2-3\n"


# -- kicks -------------------------------------------------------------------------------------------------------------


@external
def test_a_kick_ends_the_streams_of_other_processes(manager: SSEManager, server: RedisServer, make_app: Any) -> None:
    users = {"7": 7, '"7"': "7", "alice": "alice"}
    clients = {argument: manager.subscribe(user=user) for argument, user in users.items()}
    app, _ = make_app(server.url)
    for argument, described in [("7", "7 (a number)"), ('"7"', '"7" (a text)'), ("alice", '"alice" (a text)')]:
        assert manager.get_stats().clients == len(clients)
        result = invoke(app, "kick", "--user", argument, "--yes")
        assert result.exit_code == 0, result.output
        assert f"all streams of the user {described}" in result.output
        assert b'{"reason":"kicked"}' in b"".join(clients.pop(argument))  # which has ended


@external
def test_a_kick_asks_first(server: RedisServer, make_app: Any) -> None:
    app, _ = make_app(server.url)
    for answer in ("n\n", ""):
        result = invoke(app, "kick", "--channel", "team", input=answer)
        assert result.exit_code == 1
        assert 'End all streams of the channel "team" in all processes? [y/N]' in result.output
    assert server.client.xlen("sse_batcher:stream") == 0
    assert invoke(app, "kick", "--channel", "team", input="y\n").exit_code == 0
    assert server.client.xlen("sse_batcher:stream") == 1


# -- of a running process ----------------------------------------------------------------------------------------------


@pytest.fixture
def site(make_app: Any) -> Iterator[Any]:
    app, sse = make_app(SECRET_KEY="x")
    sse.authorize(lambda channels: ())  # only with a token
    with live_server(app) as url:
        yield app, sse, f"{url}/events"


def test_stats_of_a_process(site: Any) -> None:
    app, sse, url = site
    result = invoke(app, "stats", "--url", url)
    assert (result.exit_code, "the app has no @sse.allow_stats" in result.output) == (1, True)
    sse.allow_stats(lambda: request.headers.get("Authorization") == "Bearer t")
    result = invoke(app, "stats", "--url", url)
    assert (result.exit_code, "does not let this request see them" in result.output) == (1, True)
    result = invoke(app, "stats", "--url", f"{url}?channel=a&token=secret", "--token", "t")
    assert result.exit_code == 0, result.output
    assert "/events?channel=a&token=...: " in result.output
    assert "secret" not in result.output
    assert re.match(r"One process of \S+/events\S*: the one that has answered. \d\d:\d\d:\d\d\n", result.output)
    assert re.search(r"\n  clients +0\n", result.output)
    said = json.loads(invoke(app, "stats", "--url", url, "--token", "t", "--json").output)
    assert said["enqueued"] == 0


def test_counters_are_watched(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app, sse, url = site
    sse.allow_stats(lambda: True)
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            raise KeyboardInterrupt
        for number in range(5):
            sse.enqueue("order", number)

    monkeypatch.setattr(commands_stats.time, "sleep", wait)
    result = invoke(app, "stats", "--url", url, "--watch", "0.5")
    assert (result.exit_code, waits) == (130, [0.5, 0.5])
    assert re.findall(r"\n  enqueued +(.*)\n", result.output) == ["0", "5  +5"]


def test_a_page_that_is_no_counters(site: Any) -> None:
    app, _, url = site
    result = invoke(app, "stats", "--url", f"{url}/health?x=")
    assert (result.exit_code, "is answered with 404" in result.output) == (1, True)


HUGE = "9" * 400


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (f'{{"bytes":{HUGE}}}', r"  bytes +9{199}\u2026"),
        (f'{{"enqueued":{HUGE}}}', r"  enqueued +9{199}\u2026"),
        ('{"enqueued":12345678901234567890}', r"  enqueued +12,345,678,901,234,567,890"),
        (f'{{"times":{{"buckets":{{"1":1}},"sum":{HUGE}}}}}', r"  times +0"),
        ('{"times":{"buckets":{"1":1e-7},"sum":1e308}}', r"  times +1e-07  mean inf days"),
        ('{"oldest_stream":NaN,"clients_by_channel":{"a":-Infinity,"b":1e999,"c":1}}', r"    c +1"),
        (f'{{"clients_by_channel":{{"{"x" * 100_000}":1}}}}', r"    x{199}\u2026 +1"),
        (f'{{"a":{"[" * 900}{"]" * 900}}}', r"  a +\[+\u2026"),
    ],
)
def test_counters_of_a_hostile_server(make_app: Any, body: str, line: str) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    app, _ = make_app()
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body.encode())
    with scripted_server(sending(answer), sending(answer)) as scripted:
        shown = invoke(app, "stats", "--url", scripted.url)
        for_programs = invoke(app, "stats", "--url", scripted.url, "--json")
    assert (shown.exit_code, for_programs.exit_code) == (0, 0)
    assert re.search(f"^{line}$", shown.output, re.MULTILINE)
    assert max(map(len, shown.output.splitlines())) < 300
    assert isinstance(json.loads(for_programs.output, parse_constant=refuse), dict)


def test_counters_that_are_nested_too_deeply_are_none(make_app: Any) -> None:
    app, _ = make_app()
    for depth in range(930, 1_000):
        body = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
        for more in ([], ["--json"]):
            with scripted_server(sending(b"HTTP/1.1 200 OK\r\n\r\n" + body)) as scripted:
                result = invoke(app, "stats", "--url", scripted.url, *more)
            assert result.exit_code == 0 or "does not answer with the counters" in result.output


def test_the_table_shows_changes_and_the_largest_names() -> None:
    before = ManagerStats(enqueued=1, clients_by_channel={"a": 1}).as_dict()
    by_channel = {f"c{n}\x1b": n for n in range(13)} | {"a": 3}
    now = ManagerStats(
        enqueued=1_500, bytes=2_000, saved_bytes=-5, oldest_stream=7_300.0, clients_by_channel=by_channel
    )
    times = {"buckets": {"0.5": 2, "+Inf": 1}, "sum": 6.0}
    lines = list(table({**now.as_dict(), "later": 5, "words": "x\x1b", "none": {}, "times": times}, before))
    assert lines[0].split() == ["enqueued", "1,500", "+1,499"]
    text = "\n".join(lines)
    assert re.search(r"\n  bytes +2.0 kB  \+2,000\n", text)
    assert re.search(r"\n  saved bytes +-5 B  -5\n", text)
    assert re.search(r"\n  oldest stream +2 h\n", text)
    assert re.search(r"\n  clients by channel\n    c12\\x1b +12  \+12\n", text)
    assert re.search(r"\n    a +3  \+2\n", text)
    assert re.search(r"\n    3 more +6\n", text)
    assert "    c0" not in text
    assert re.search(r"\n  by reason +0\n", text)
    assert list(table({"a": {"b": 0, "c": 0}}, {"a": {"b": 1}})) == ["  a", f"    {'b':<22}{0:>14}  -1"]
    assert re.search(r"\n  later +5  \+5\n  none +0\n  times +3  mean 2.0 s\n  words +x\\x1b$", text)


def test_counters_of_another_form_are_no_error() -> None:
    odd = {"a": None, "b": [1], "c": True, "d": {"e": "f"}, "g": {"buckets": {"h": "i"}, "sum": 1}, "j": {"buckets": 1}}
    assert list(table(odd, {"d": 1, "g": 2}))


def test_tail_signs_a_token_for_itself(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    app, sse, url = site
    shown = []

    def write(terminal: Terminal, line: str) -> None:
        shown.append(line)
        raise KeyboardInterrupt

    def notice(terminal: Terminal, text: str, style: str = "") -> None:
        if text.startswith("open"):
            shown.append(text)
            sse.enqueue("order", 1, user="7")

    monkeypatch.setattr(Terminal, "write", write)
    monkeypatch.setattr(Terminal, "notice", notice)
    result = invoke(app, "tail", url, "--user", '"7"', "--channel", "a")
    assert result.exit_code == 130
    assert shown[0] == "open: a"
    assert shown[1].endswith("order      1 B  1")
    result = invoke(app, "tail", url, "--header", "Cookie: a=b")  # then it signs nothing
    assert (result.exit_code, "403" in result.output) == (1, True)
    app.config["SECRET_KEY"] = None
    assert invoke(app, "tail", url).exit_code == 1
    assert len(shown) == 2


def test_tail_shows_the_stream_that_its_arguments_name(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that the command signs neither contradicts the URL nor leaves the user out."""
    app, sse, url = site
    opened = []

    def notice(terminal: Terminal, text: str, style: str = "") -> None:
        if text.startswith("open"):
            opened.append(text)
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "notice", notice)
    with app.app_context():
        token = sse.sign(channels=("b",), ttl=60)
    for address, *more in ([f"{url}?channel=a"], [f"{url}?token={token}"], [f"{url}?channel=a", "--channel=c"]):
        result = invoke(app, "tail", address, *more)
        assert result.exit_code == 130, result.output
    assert opened == ["open: a", "open: b", "open: c"]
    result = invoke(app, "tail", url, "--user", "7", env={"SSE_TOKEN": token})
    assert (result.exit_code, "leave out --header, --token, SSE_TOKEN" in result.output) == (2, True)
    app.config["SECRET_KEY"] = None
    result = invoke(app, "tail", url, "--user", "7")
    assert (result.exit_code, "the app's SECRET_KEY, and there is none" in result.output) == (1, True)
    assert len(opened) == 3
