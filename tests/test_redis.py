"""Many processes, one Redis stream: what each of them delivers, with a real redis-server."""

from __future__ import annotations

import gc
import re
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from redis.sentinel import Sentinel, SentinelManagedConnection, SentinelManagedSSLConnection

from sse_batcher import (
    SSE,
    BackendError,
    BatchOptions,
    ConfigurationError,
    SSEManager,
    stream,
)
from sse_batcher.backends import open_backend
from sse_batcher.backends.redis import open_redis
from sse_batcher.backends.redis.backend import RedisBackend
from sse_batcher.backends.redis.connections import connector

from .kit.redisserver import RedisServer, cursor_of, redis_fixture, redis_server, sentinel_of
from .kit.sse_parser import parse
from .kit.viewers import Make, Viewer, flat, managers_fixture, send
from .kit.waiting import TIMEOUT, wait_until

external = pytest.mark.external

# -- what may be given -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "backend",
    ["http://localhost", "redis:", "", None, 7, "redis://localhost:port", "redis+sentinel://localhost:26379", "memory"]
    + [f"{scheme}://localhost/0?prefx=shop" for scheme in ("redis", "rediss", "redis+sentinel", "unix")],
)
def test_an_invalid_backend_is_refused(backend: Any) -> None:
    with pytest.raises(ConfigurationError):
        SSEManager(backend=backend)


@pytest.mark.parametrize(
    "backend",
    [
        "redis://ada:secret@localhost:port/0",
        "reddis://ada:secret@localhost",
        "redis:/ada:secret@localhost",
        "ada:secret@localhost",
        "redis://ada:s@secret@localhost:port",
        "redis://:secret/x@localhost",
        "redis://:x/secret@localhost",
        "redis://:secret#x@localhost",
        "redis://:secret?x@localhost",
        "redis://:[secret]@localhost",
        "redis://:secret\u2100@localhost",  # a character that urlsplit refuses
        "redis+sentinel://:secret/x@localhost/master",
        "redis://localhost?password=secret&prefx=shop",
        "redis://localhost?password=x@secret&prefx=shop",
        b"redis://:secret@localhost",
        {"url": "redis://:secret@localhost"},
    ],
)
def test_an_error_shows_no_password(backend: Any) -> None:
    for make in (lambda: SSEManager(backend=backend), lambda: open_redis(backend, 100)):
        with pytest.raises(ConfigurationError) as caught:
            make()
        # With its causes, as a log shows it.
        shown = traceback.TracebackException.from_exception(caught.value, lookup_lines=False)
        while shown is not None:
            assert "secret" not in str(shown)
            shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)


@pytest.mark.parametrize(
    ("backend", "shown"),
    [
        ("reddis://ada:secret@shop.example/1", "reddis://...@shop.example/1"),
        ("http://localhost", "http://localhost"),
        ("redis://ada:secret@shop.example:port", "redis://...@shop.example:port"),
        ("redis://shop.example/0?prefx=shop", "redis://shop.example/0?prefx=..."),
    ],
)
def test_an_error_shows_where_the_backend_was_expected(backend: str, shown: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(shown)):
        SSEManager(backend=backend)


def test_without_the_package_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'sse_batcher\[redis\]'"):
        SSEManager(backend="redis://localhost")


@pytest.mark.parametrize(
    "url",
    [
        "redis://ada:secret@localhost:6380/3",
        "rediss://localhost",
        "unix:///tmp/redis.sock",
        "redis+sentinel://:secret@one:26379,two/mymaster/2",
        "redis://localhost/0?prefix=shop",
    ],
)
def test_a_url_is_enough_and_nothing_is_connected_to_before_it_is_used(url: str) -> None:
    backend = open_backend(url, 100)
    assert isinstance(backend, RedisBackend)
    connect, prefix = connector(url)
    assert prefix == ("shop" if "shop" in url else "sse_batcher")
    settings = connect().connection_pool.connection_kwargs
    assert settings["socket_timeout"] == 5.0
    assert settings["decode_responses"] is False
    assert settings.get("password") == ("secret" if "secret" in url else None)


@pytest.mark.parametrize("is_url", [True, False])
@pytest.mark.parametrize("tls", [True, False])
def test_a_sentinels_connections_have_tls_if_it_is_asked_for(tls: bool, is_url: bool) -> None:
    """Without TLS, the password would go out in plain text."""
    backend: Any = f"redis+sentinel://:secret@one/mymaster{'?ssl=true' if tls else ''}"
    if not is_url:
        backend = Sentinel([("one", 26379)]).master_for("mymaster", ssl=tls, password="secret", check_connection=True)
    pool = connector(backend)[0]().connection_pool
    assert type(pool.make_connection()) is (SentinelManagedSSLConnection if tls else SentinelManagedConnection)
    assert pool.check_connection is not is_url


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("health_check_interval=30", 30),
        ("socket_keepalive=false", False),
        ("socket_keepalive=yes", True),
        ("client_name=50%25", "50%"),
        ("db=3", 3),
    ],
)
@pytest.mark.parametrize("url", ["redis://one", "redis+sentinel://one/mymaster"])
def test_the_options_of_a_url_have_their_types(url: str, option: str, value: object) -> None:
    settings = connector(f"{url}?{option}")[0]().connection_pool.connection_kwargs
    assert settings[option.partition("=")[0]] == value


def test_true_and_false_are_no_strings_in_a_sentinels_url() -> None:
    pool = connector("redis+sentinel://one/mymaster?ssl=false&check_connection=no&max_connections=3")[
        0
    ]().connection_pool
    assert type(pool.make_connection()) is SentinelManagedConnection
    assert pool.check_connection is False


@pytest.mark.parametrize("url", ["redis://:secret@one", "redis+sentinel://:secret@one/mymaster"])
@pytest.mark.parametrize("option", ["max_connections=many", "max_connections=-1", "health_check_interval=x", "foo=1"])
def test_an_error_names_the_option_that_is_invalid(url: str, option: str) -> None:
    with pytest.raises(ConfigurationError, match=f"is not valid: .*{option.partition('=')[0]}"):
        connector(f"{url}?{option}")


# -- one stream, many managers -----------------------------------------------------------------------------------------


server = redis_fixture()


make = managers_fixture()


@external
def test_an_event_of_one_process_reaches_the_clients_of_all(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as at_one, Viewer(two) as at_two, Viewer(two, "other") as other:
        send(one, *range(10))
        assert one.flush_all(TIMEOUT)
        send(two, *range(10, 20))
        two.broadcast("hub_state", "end")
        for viewer in (at_one, at_two):
            assert flat(viewer.until_type("hub_state")) == [*range(20), "end"]
        assert flat(other.until_type("hub_state")) == ["end"]
    assert [event.id for event in at_one.events] == [event.id for event in at_two.events]  # one order, and one name


@external
def test_a_client_that_returns_to_another_process_has_missed_nothing(server: RedisServer, make: Make) -> None:
    one = make(server.url)
    with Viewer(one) as viewer:
        send(one, 1)
        viewer.numbers(1)
        cursor = viewer.events[-1].id
    send(one, 2, 3)
    assert one.flush_all(TIMEOUT)
    two = make(server.url)
    with Viewer(two, cursor=cursor) as viewer:
        assert viewer.events[0].type == "sse_open"
        assert viewer.numbers(3) == [2, 3]


@external
def test_a_cursor_that_is_newer_than_what_this_process_has_read_is_waited_for(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    with Viewer(one) as viewer, Viewer(two):
        for number in range(50):
            send(one, number)
            viewer.numbers(number)
            with Viewer(two, cursor=viewer.events[-1].id) as other:
                assert other.events[0].type == "sse_open"


@external
@pytest.mark.parametrize(
    ("cursor", "reason"),
    [
        ("{epoch}-99999999999999-0", "malformed"),
        ("00000000-1-0", "epoch"),
        ("{epoch}-1", "malformed"),
        ("{epoch}-1-99999999999999999999", "malformed"),
        ("x" * 10_000, "malformed"),
    ],
)
def test_a_cursor_that_cannot_be_used_is_a_gap(server: RedisServer, make: Make, cursor: str, reason: str) -> None:
    manager = make(server.url)
    epoch = cursor_of(manager).partition("-")[0]
    with Viewer(manager, cursor=cursor.format(epoch=epoch)) as viewer:
        assert flat(viewer.events[:1]) == [reason]


@external
def test_a_kick_reaches_every_process(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    client = two.subscribe(user="ada")
    next(client)
    with Viewer(two) as other:
        one.kick(user="ada")
        [bye] = [event for block in client if block != b":\n" for event in parse(block)]
        assert bye.json == {"reason": "kicked"}
        send(one, 1)
        other.numbers(1)
    with pytest.raises(ValueError, match="a user is a str or an int"):
        one.kick(user=("a", 1))


@external
def test_a_kick_counts_the_streams_of_this_process(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    streams = [manager.subscribe(user="ada") for manager in (one, one, two)]
    assert one.kick(user="ada") == 2
    for client in streams:
        assert b'"kicked"' in b"".join(client)


@external
def test_a_kick_of_another_process_counts_for_a_stream_that_opens(server: RedisServer, make: Make) -> None:
    one, two = make(server.url), make(server.url)
    _, _, body = stream(two, {"REQUEST_METHOD": "GET"}, user="ada", snapshot=lambda: [("state", "secret")])
    before = two.ticket()
    one.kick(user="ada")
    wait_until(lambda: two.ticket() > before, "the kick has arrived")
    assert [event.type for event in parse(b"".join(body), strict=True)] == ["sse_open", "sse_bye"]


@external
def test_the_first_stream_of_a_process_is_not_ended_by_an_old_kick(server: RedisServer, make: Make) -> None:
    make(server.url).kick(user="ada")
    _, _, body = stream(make(server.url), {"REQUEST_METHOD": "GET"}, user="ada")
    blocks = iter(body)
    assert b"event: sse_bye" not in next(blocks)
    assert next(blocks) == b":\n"
    body.close()  # type: ignore[attr-defined]


@external
def test_a_kick_that_reaches_no_other_process_ends_the_streams_of_this_one(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    client = manager.subscribe(user="ada")
    server.config("maxmemory", 1)
    with pytest.raises(BackendError, match="did not take the kick"):
        manager.kick(user="ada")
    assert b'"kicked"' in b"".join(client)
    server.config("maxmemory", 0)


@external
def test_a_dropped_manager_ends_its_reader_without_the_garbage_collector(server: RedisServer) -> None:
    manager = SSEManager(backend=server.url)
    client = manager.subscribe()
    next(client)
    [reader] = [thread for thread in threading.enumerate() if thread.name == "sse_batcher-redis"]
    client.close()
    gc.disable()
    try:
        del client, manager
        reader.join(TIMEOUT)
    finally:
        gc.enable()
    assert not reader.is_alive()


@external
def test_a_process_that_only_publishes_reads_nothing(server: RedisServer, make: Make) -> None:
    manager = make(server.url)
    send(manager, 1)
    assert manager.flush_all(TIMEOUT)
    assert "sse_batcher-redis" not in {thread.name for thread in threading.enumerate()}
    assert server.client.xlen("sse_batcher:stream") == 1


@external
def test_an_old_kick_does_not_end_the_first_stream_of_a_process(server: RedisServer, make: Make) -> None:
    old, new = make(server.url), make(server.url)
    old.kick(user="ada")
    client = new.subscribe(user="ada")
    assert b"sse_bye" not in next(client)
    assert next(client) == b":\n"


@external
def test_two_prefixes_are_two_worlds(server: RedisServer, make: Make) -> None:
    ours, theirs = make(server.url + "?prefix=ours"), make(server.url + "?prefix=theirs")
    with Viewer(ours) as viewer:
        send(theirs, 1)
        assert theirs.flush_all(TIMEOUT)
        send(ours, 2)
        assert viewer.numbers(2) == [2]


@external
def test_a_ready_client_is_taken_and_its_settings_made_ours(server: RedisServer, make: Make) -> None:
    import redis

    client = redis.Redis(host="127.0.0.1", port=server.port, decode_responses=True)
    manager = make(client)
    with Viewer(manager) as viewer:
        send(manager, 1)
        assert viewer.numbers(1) == [1]


@external
def test_a_password_and_tls_are_in_the_url(make: Make, tmp_path: Path) -> None:
    with redis_server(tmp_path, tls=True) as server:
        server.config("requirepass", "secret")
        manager = make(server.url.replace("//", "//:secret@"))
        with Viewer(manager) as viewer:
            send(manager, 1)
            assert viewer.numbers(1) == [1]


@external
def test_a_sentinel_says_where_redis_is(server: RedisServer, make: Make, tmp_path: Path) -> None:
    with sentinel_of(server, tmp_path) as port:
        manager = make(f"redis+sentinel://127.0.0.1:{port}/shop/0")
        with Viewer(manager) as viewer:
            send(manager, 1)
            assert viewer.numbers(1) == [1]


@external
def test_a_sentinel_says_where_a_redis_with_tls_is(make: Make, tmp_path: Path) -> None:
    with redis_server(tmp_path, tls=True) as server, sentinel_of(server, tmp_path) as port:
        options = server.url.partition("?")[2]
        manager = make(f"redis+sentinel://127.0.0.1:{port}/shop/0?ssl=true&{options}")
        with Viewer(manager) as viewer:
            send(manager, 1)
            assert viewer.numbers(1) == [1]


@external
def test_own_clients_get_what_is_pending_before_the_end(server: RedisServer, make: Make) -> None:
    manager = make(server.url, BatchOptions(batch_window=10))
    with Viewer(manager) as viewer:
        send(manager, 1, 2)
        assert manager.shutdown(TIMEOUT)
        assert flat(viewer.until_type("sse_bye")) == [1, 2, "shutdown"]


# -- from the command line ---------------------------------------------------------------------------------------------


@external
def test_an_event_can_be_sent_from_the_command_line(server: RedisServer, make: Make) -> None:
    app = Flask("shop")
    app.config["SSE_BACKEND"] = server.url
    SSE(app)
    manager = make(server.url)
    with Viewer(manager, "default", "team") as viewer:
        for arguments in (
            ["order", '{"id": 1}'],
            ["order", "2", "--channel", "team"],
            ["line", "<b>2</b>", "--text"],
            ["order", '"all"', "--channel", "*"],
        ):
            result = app.test_cli_runner().invoke(args=["sse", "publish", *arguments])
            assert (result.exit_code, result.output) == (0, "")
            app = Flask("shop")  # each command is a process of its own
            app.config["SSE_BACKEND"] = server.url
            SSE(app)
        sent = viewer.until(lambda event: event.data == '"all"')
    assert [event.data for event in sent if not event.type.startswith("sse_")] == ['{"id":1}', "2", "<b>2</b>", '"all"']


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["t", "{"], "A string needs its quotes"),
        (["t", "[" * 1_000_000], "Invalid value for DATA: it is nested too deeply"),
        (["t", "9" * 5_000], "Invalid value for DATA: Exceeds the limit"),
        (["sse_bye", "1"], "is reserved"),
        (["t", "1", "--channel", ""], "the channel must have 1 to 128 characters"),
    ],
)
def test_a_mistake_on_the_command_line_is_explained(arguments: list[str], said: str) -> None:
    app = Flask("shop")
    app.config["SSE_BACKEND"] = "redis://localhost:1"
    sse = SSE(app)
    result = app.test_cli_runner().invoke(args=["sse", "publish", *arguments])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code != 0
    assert said in result.output
    with app.app_context():
        assert sse.manager.shutdown(TIMEOUT)


def test_a_backend_that_was_set_too_late_is_an_error_on_the_command_line(caplog: pytest.LogCaptureFixture) -> None:
    app = Flask("shop")
    SSE(app)
    app.config["SSE_BACKEND"] = "redis://localhost:1"
    assert app.test_cli_runner().invoke(args=["sse", "publish", "t", "1"]).exit_code != 0
    assert "the config key SSE_BACKEND was set after SSE(app)" in caplog.text


def test_the_command_line_needs_a_backend_that_other_processes_share() -> None:
    app = Flask("shop")
    SSE(app)
    result = app.test_cli_runner().invoke(args=["sse", "publish", "t", "1"])
    assert result.exit_code != 0
    assert 'set SSE_BACKEND to "redis://..."' in result.output
