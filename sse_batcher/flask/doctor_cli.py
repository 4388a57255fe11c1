"""The command ``flask sse doctor``.

Run by the command's own process, which ends afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
from flask import Flask, current_app
from flask.cli import AppGroup

from ..commands.arguments import is_argument
from ..commands.ending import command
from ..commands.terminal import Terminal
from ..doctor.client import Target
from ..doctor.command import doctor_options, examine_url, print_reports, target_of
from ..doctor.inside import no_token, token_refused
from ..doctor.probes import MAX_LISTEN_SECONDS
from ..errors import ConfigurationError, InvalidEventError, UsageError
from ..event import DEFAULT_CHANNEL, NOT_GIVEN
from ..manager import SSEManager
from ..remote.url import values_in, without_token
from .doctor import examine_app
from .signing import Tokens

TOKEN_SECONDS = 60.0
"""How long the token that it signs for itself is valid after the time of listening."""


def add_doctor(group: AppGroup, manager: SSEManager, tokens: Tokens, compare_config: Callable[[], None]) -> None:
    """Add the command for one app to its group. `compare_config` logs config keys that were set too late."""

    @group.command("doctor")
    @click.argument("url", required=False)
    @doctor_options
    @command
    def doctor(url: str | None, as_json: bool, **arguments: Any) -> None:
        """Find out what is wrong with the streams of this app, and say what to change.

        Without a URL, the app is examined in this process: its config, its Redis, and one request through all of its
        middleware. With the URL of its stream, such as http://localhost:8000/events, the server and the proxies are
        examined, too. Unless you give a --token or a --header, the requests have a token that is signed with the
        SECRET_KEY. The exit status is 1 if there is a fault.
        """
        compare_config()
        if url is None and any(map(is_argument, ("seconds", "origin", "insecure"))):
            raise click.UsageError("--seconds, --origin and --insecure need the URL of the stream")
        terminal = Terminal()
        target = target_of("http://localhost" if url is None else url, **arguments)
        is_given = target.has_token or bool(target.headers)
        signed = None if is_given else _sign_for(target, tokens)
        target = target._replace(token=signed or target.token)
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]  # of a proxy
        terminal.progress("asking the app in this process")
        try:
            with _without_log():
                reports = [examine_app(app, manager, target if url else target._replace(url=""))]
        except ConfigurationError as error:  # the config was changed since `init_app`
            raise click.ClickException(str(error)) from error
        if url:
            report = examine_url(target, terminal)
            codes = {finding.code for finding in report.findings}
            if signed and codes == {"unauthorized"}:
                report = examine_url(target._replace(token=None), terminal)
                report.findings.append(token_refused())
            elif not app.secret_key and not is_given and codes & {"unauthorized", "forbidden"}:
                report.findings.append(no_token())
            reports.append(report)
        shown = without_token(url) if url else None
        click.get_current_context().exit(print_reports(reports, shown, terminal, as_json=as_json))


@contextmanager
def _without_log() -> Iterator[None]:
    """Log nothing of ours: no server serves the request in this process, so lines about it would mislead."""
    logger = logging.getLogger("sse_batcher")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _sign_for(target: Target, tokens: Tokens) -> str | None:
    """Return a token for the channels that a URL asks for, None if the app has no `SECRET_KEY`.

    It is over soon after the examination: it goes to any host that the URL names, also over plain HTTP.
    """
    asked = values_in(target.url, "channel") or [DEFAULT_CHANNEL]
    seconds = MAX_LISTEN_SECONDS if target.seconds is None else target.seconds
    try:
        return tokens.sign(asked, NOT_GIVEN, seconds + TOKEN_SECONDS)
    except (InvalidEventError, UsageError):
        return None
