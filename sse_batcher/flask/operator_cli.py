"""The commands of ``flask sse`` for operators: ``publish``, ``tail``, ``stats`` and ``kick``.

Run by the command's own process, which has no streams of its own, and ends afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import click
from flask.cli import AppGroup

from ..backends.redis.backend import RedisBackend
from ..commands.arguments import (
    TOKEN_VARIABLE,
    FiniteRange,
    described_user,
    is_argument,
    request_of,
    request_options,
    tail_options,
    user_of,
)
from ..commands.ending import command
from ..commands.stats import fetch_stats, redis_json, redis_lines, show_stats
from ..commands.tail import Printer, tail_redis, tail_url
from ..commands.terminal import Terminal
from ..errors import InvalidEventError, UsageError
from ..event import BROADCAST, DEFAULT_CHANNEL, NOT_GIVEN, NotGiven, Text, check_channel, check_user
from ..manager import SSEManager
from ..manager_state import process_of
from ..remote.message import Request
from ..remote.url import below, values_in
from .signing import Tokens

PUBLISH_SECONDS = 10.0
TOKEN_SECONDS = 60.0
"""How long a token of ``flask sse tail`` is valid. Each connection gets one of its own."""


def add_operator_commands(
    group: AppGroup, manager: SSEManager, tokens: Tokens, compare_config: Callable[[], None]
) -> None:
    """Add the commands for one app to its group. `compare_config` logs config keys that were set too late."""

    def redis(otherwise: str) -> RedisBackend:
        """Return the backend. Raises `click.ClickException` with these words if it is not Redis."""
        compare_config()
        backend = process_of(manager).backend
        if not isinstance(backend, RedisBackend):
            raise click.ClickException(otherwise)
        return backend

    _add_publish(group, manager, compare_config)
    _add_tail(group, tokens, redis)
    _add_stats(group, redis)
    _add_kick(group, manager, redis)


def _add_publish(group: AppGroup, manager: SSEManager, compare_config: Callable[[], None]) -> None:
    @group.command("publish")
    @click.argument("event_type", metavar="TYPE")
    @click.argument("data", metavar="DATA")
    @click.option(
        "--channel",
        default=DEFAULT_CHANNEL,
        show_default=True,
        help="The channel whose clients get it; * for all clients.",
    )
    @click.option("--text", is_flag=True, help="DATA is text that is sent as it is, not JSON. HTML must be escaped.")
    @command
    def publish(event_type: str, data: str, channel: str, text: bool) -> None:
        """Send an event to the clients of all processes. DATA is JSON, or any text with --text."""
        compare_config()
        if not process_of(manager).reaches_others:
            raise click.ClickException(
                "the backend memory:// reaches only the clients of this process, which has none: set SSE_BACKEND to "
                '"redis://..."'
            )
        try:
            value = Text(data) if text else _json_of(data)
            if channel == BROADCAST:
                manager.broadcast(event_type, value)
            else:
                manager.enqueue(event_type, value, channel=channel)
        except InvalidEventError as error:
            raise click.ClickException(str(error)) from error
        if not manager.shutdown(PUBLISH_SECONDS):
            raise click.ClickException("the backend did not take the event in time")


def _json_of(data: str) -> object:
    """Return the value of an argument that is JSON."""
    try:
        return json.loads(data)
    except json.JSONDecodeError as error:
        what = f"{error}. A string needs its quotes: '\"text\"'; or add --text"
    except RecursionError:
        what = "it is nested too deeply."
    except ValueError as error:  # a whole number with thousands of digits
        what = f"{error}."
    raise click.BadParameter(what, param_hint="DATA")


def _add_tail(group: AppGroup, tokens: Tokens, redis: Callable[[str], RedisBackend]) -> None:
    @group.command("tail")
    @click.argument("url", required=False)
    @tail_options
    @click.option(
        "-n", "--last", type=click.IntRange(0), default=0, help="From Redis: begin with so many entries, of any type."
    )
    @click.option(
        "--user",
        metavar="USER",
        help="With a URL: this user's stream, by a token that is signed. JSON: 7 is a number, '\"7\"' a text.",
    )
    @request_options
    @command
    def tail(
        url: str | None,
        channels: tuple[str, ...],
        types: tuple[str, ...],
        cursor: str,
        full: bool,
        as_json: bool,
        last: int,
        user: str | None,
        headers: tuple[str, ...],
        token: str | None,
    ) -> None:
        """Show events as they come, like tail -f: one line each. Ctrl-C ends it.

        Without URL, it reads what all processes publish from Redis (SSE_BACKEND): all channels and users, or the
        channels you name, with broadcasts. With the URL of the stream, it is a client like any other. It then signs
        a token for itself with the SECRET_KEY, unless you give a --token or a --header, or the URL has a token.
        """
        terminal = Terminal()
        printer = Printer(terminal, as_json=as_json, full=full, types=types)
        if url is not None:
            if last:
                raise click.UsageError("--last is for Redis: a stream over HTTP begins after a cursor (--since)")
            tail_url(_asking(tokens, url, channels, headers, token, user), cursor, printer, terminal)
            return
        if headers or user is not None or is_argument("token"):
            raise click.UsageError("--header, --token and --user need the URL of the stream")
        if last and cursor:
            raise click.UsageError("--last and --since are two places to begin at: leave one of them out")
        for name in channels:
            try:
                check_channel(name)
            except InvalidEventError as error:
                raise click.UsageError(str(error)) from None
        backend = redis(
            "the backend memory:// keeps events in the process that sends them, so this process cannot see them: give "
            "the URL of the stream, or set SSE_BACKEND to redis://..."
        )
        with backend.inspect() as inspection:
            tail_redis(inspection, channels, last, cursor, printer, terminal)


def _asking(
    tokens: Tokens, url: str, channels: Sequence[str], headers: Sequence[str], token: str | None, user: str | None
) -> Callable[[str], Request]:
    """Return a function that makes the request for the stream after a cursor: with a new token if none is given.

    Raises `click.UsageError` if a user is named, and a token, or a header that may stand for one, is given.
    """
    is_given = bool(token or headers or values_in(url, "token"))
    if is_given and user is not None:
        raise click.UsageError(
            f"for --user, this command signs a token: leave out --header, --token, {TOKEN_VARIABLE} and any token in "
            "the URL"
        )
    asked = channels or values_in(url, "channel")
    return lambda after: request_of(url, headers, token if is_given else _sign(tokens, asked, user), channels, after)


def _sign(tokens: Tokens, channels: Sequence[str], user: str | None) -> str | None:
    """Return a token for these channels and this user. None: the app has no `SECRET_KEY`, and no user is named."""
    try:
        if user is not None:
            return tokens.sign(channels, user_of(user), TOKEN_SECONDS)
        return tokens.sign(channels or (DEFAULT_CHANNEL,), NOT_GIVEN, TOKEN_SECONDS)
    except UsageError as error:
        if user is None:
            return None
        raise click.ClickException(str(error)) from None
    except InvalidEventError as error:
        raise click.UsageError(str(error)) from None


def _add_stats(group: AppGroup, redis: Callable[[str], RedisBackend]) -> None:
    @group.command("stats")
    @click.option("--url", help="The URL of the stream: shows the counters of the process that answers there.")
    @request_options
    @click.option("--json", "as_json", is_flag=True, help="Print JSON.")
    @click.option("--watch", metavar="SECONDS", type=FiniteRange(0.1, 86_400), help="Again and again, with changes.")
    @command
    def stats(url: str | None, headers: tuple[str, ...], token: str | None, as_json: bool, watch: float | None) -> None:
        """Show the counters of a running process, or what Redis knows of all processes.

        With --url, it asks one process for its counters, which @sse.allow_stats has to let it see. With several
        processes behind the URL, each time another one may answer. Without --url, it asks Redis (SSE_BACKEND).
        """
        terminal = Terminal()
        if url is not None:
            request = request_of(below(url, "stats"), [*headers, "Accept: application/json"], token)
            show_stats(lambda: fetch_stats(request), url, terminal, as_json, watch or 0.0)
            return
        if headers or watch or is_argument("token"):
            raise click.UsageError("--header, --token and --watch need --url")
        backend = redis(
            "the backend is memory://, so each process only knows its own counters, and this one has no streams: give "
            "the URL of the stream with --url"
        )
        with backend.inspect() as inspection:
            facts = inspection.facts()
        for line in [redis_json(facts)] if as_json else redis_lines(facts):
            terminal.write(line)


def _add_kick(group: AppGroup, manager: SSEManager, redis: Callable[[str], RedisBackend]) -> None:
    @group.command("kick")
    @click.option("--user", metavar="USER", help="The user, as JSON: 7 is a number, '\"7\"' a text, and so is alice.")
    @click.option("--channel", metavar="CHANNEL", help="The channel. With --user: only that user's streams of it.")
    @click.option("--yes", is_flag=True, help="Do not ask.")
    @command
    def kick(user: str | None, channel: str | None, yes: bool) -> None:
        """End the streams of a user, or of a channel, in all processes.

        Browsers come back after a moment, and the app then decides again whether they may have a stream. Signed tokens
        of the user that were made before are refused from now on. See SSE.kick.
        """
        if user is None and channel is None:
            raise click.UsageError("say whose streams end: --user, --channel or both")
        try:
            named_user = NOT_GIVEN if user is None else check_user(user_of(user))
            named_channel = NOT_GIVEN if channel is None else check_channel(channel)
        except InvalidEventError as error:
            raise click.UsageError(str(error)) from None
        if named_channel == BROADCAST:
            raise click.UsageError("'*' is no channel to kick: name one")
        redis(
            "the backend memory:// reaches only the streams of this process, which has none, so nothing would happen: "
            'set SSE_BACKEND to "redis://..."'
        )
        whose = [] if isinstance(named_user, NotGiven) else [f"the user {described_user(named_user)}"]
        whose += [] if channel is None else [f"the channel {json.dumps(channel)}"]
        what = f"all streams of {' in '.join(whose)} in all processes"
        if not yes:
            click.confirm(f"End {what}?", abort=True, err=True)
        manager.kick(user=named_user, channel=named_channel)
        Terminal().write(f"Redis has the kick: {what} end now. How many there are is not known here.")
