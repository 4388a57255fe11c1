"""The command ``flask sse doctor``.

Run by the command's own process, which ends afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import click
from flask import Flask, current_app
from flask.cli import AppGroup, with_appcontext

from ..commands.arguments import command
from ..commands.terminal import Terminal
from ..doctor.command import doctor_options, examine_url, print_reports, target_of
from ..doctor.inside import token_refused
from ..errors import ConfigurationError, InvalidEventError, UsageError
from ..event import DEFAULT_CHANNEL, NOT_GIVEN
from ..manager import SSEManager
from ..remote.message import without_token
from .doctor import examine_app
from .signing import Tokens

TOKEN_SECONDS = 3_600
"""How long the token that it signs for itself is valid."""


def add_doctor(group: AppGroup, manager: SSEManager, tokens: Tokens, compare_config: Callable[[], None]) -> None:
    """Add the command for one app to its group. `compare_config` logs config keys that were set too late."""

    @group.command("doctor")
    @click.argument("url", required=False)
    @doctor_options
    @with_appcontext
    @command
    def doctor(url: str | None, as_json: bool, **arguments: Any) -> None:
        """Find out what is wrong with the streams of this app, and say what to change.

        Without a URL, the app is examined in this process: its config, its Redis, and one request through all of its
        middleware. With the URL of its stream, such as http://localhost:8000/events, the server and the proxies are
        examined, too. Unless you give a --token or a --header, the requests have a token that is signed with the
        SECRET_KEY. The exit status is 1 if there is a fault.
        """
        compare_config()
        terminal = Terminal()
        target = target_of(url or "http://localhost", **arguments)
        signed = None if target.has_token or target.headers else _sign_for(target.url, tokens)
        target = target._replace(token=signed or target.token)
        app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]  # of a proxy
        terminal.progress("asking the app in this process")
        try:
            reports = [examine_app(app, manager, target if url else target._replace(url=""))]
        except ConfigurationError as error:  # the config was changed since `init_app`
            raise click.ClickException(str(error)) from error
        if url:
            report = examine_url(target, terminal)
            if signed and {finding.code for finding in report.findings} == {"unauthorized"}:
                report = examine_url(target._replace(token=None), terminal)
                report.findings.append(token_refused())
            reports.append(report)
        shown = without_token(url) if url else None
        click.get_current_context().exit(print_reports(reports, shown, terminal, as_json=as_json))


def _sign_for(url: str, tokens: Tokens) -> str | None:
    """Return a token for the channels that a URL asks for, None if the app has no `SECRET_KEY`."""
    asked = parse_qs(urlsplit(url).query).get("channel", [DEFAULT_CHANNEL])
    try:
        return tokens.sign(asked, NOT_GIVEN, TOKEN_SECONDS)
    except (InvalidEventError, UsageError):
        return None
