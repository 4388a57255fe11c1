"""The arguments that commands share: types, options, and the request and the user that they stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from ..errors import InvalidEventError
from ..event import User, check_type
from ..remote.message import RemoteError, Request, make_request, parse_header
from ..remote.url import is_utf8, with_channels

TOKEN_VARIABLE = "SSE_TOKEN"
"""The environment variable with the token: all users of a machine can see the arguments of a process."""

F = TypeVar("F", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """A range of numbers without ``nan`` and ``inf``, which Python reads as numbers too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number that can be used here.", param, ctx)
        return number


def not_empty(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse an empty text as the value of an option. For ``callback``.

    It mostly comes from a variable of the shell that is not set. It would count as if the option had not been given.
    """
    if value == "" and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
        raise click.BadParameter("it is empty.")
    return value


def _types(context: click.Context, parameter: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse types that no event has: with them, nothing would ever be shown."""
    for name in names:
        try:
            check_type(name)
        except InvalidEventError:
            raise click.BadParameter(
                f"no event has the type {name!r}. Batches are unpacked: name the type of their events."
            ) from None
    return names


def tail_options(function: F) -> F:
    """Add the options that ``tail`` has with and without Flask."""
    options = [
        click.option("--channel", "channels", metavar="CHANNEL", multiple=True, help="A channel. Can be repeated."),
        click.option(
            "--type",
            "types",
            metavar="TYPE",
            multiple=True,
            callback=_types,
            help="Show only this type. Can be repeated.",
        ),
        click.option(
            "--since", "cursor", metavar="CURSOR", default="", callback=not_empty, help="Begin after this cursor."
        ),
        click.option("--full", is_flag=True, help="Do not shorten contents to the width of the terminal."),
        click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each event."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def request_options(function: F) -> F:
    """Add ``--header`` and ``--token``, which `request_of` takes, to a command."""
    header = click.option(
        "--header", "headers", metavar="'NAME: VALUE'", multiple=True, help="A header to send, such as a Cookie."
    )
    token = click.option(
        "--token",
        metavar="TOKEN",
        envvar=TOKEN_VARIABLE,
        show_envvar=True,
        callback=not_empty,
        help="A bearer token to send. Others on this machine can read arguments, but not the variable.",
    )
    return header(token(function))


def headers_of(lines: Iterable[str], own: Mapping[str, str] | None = None) -> list[tuple[str, str]]:
    """Return the headers of ``--header``.

    `own`: headers that the command sends itself, by their names in lower case, with what to do instead.

    Raises `click.UsageError` if a header is not valid or one of `own`, or if ``--token`` says another one.
    """
    try:
        given = [parse_header(line) for line in lines]
    except RemoteError as error:
        raise click.UsageError(str(error)) from None
    for name, _ in given:
        if name.lower() == "authorization" and is_argument("token"):
            raise click.UsageError(f"--token is the header {name}: leave one of them out")
        if own and name.lower() in own:
            raise click.UsageError(f"--header cannot be used for {name}: {own[name.lower()]}")
    return given


def request_of(
    url: str,
    headers: Iterable[str] = (),
    token: str | None = None,
    channels: Collection[str] = (),
    cursor: str | None = None,
) -> Request:
    """Make the request for these arguments. Raises `click.UsageError` if one of them is not valid.

    `cursor`: None if the command has none, so that ``--header`` may have one.
    """
    given = headers_of(headers, None if cursor is None else {"last-event-id": "use --since"})
    asks = any(name.lower() == "accept-encoding" for name, _ in given)
    for name in channels:
        if not is_utf8(name):
            raise click.UsageError(f"the channel {name!r} is not valid: it has a byte that is not UTF-8")
    try:
        address = with_channels(url, channels)
        return make_request(address, headers=given, token=token, cursor=cursor or "", takes_codings=asks)
    except RemoteError as error:
        raise click.UsageError(str(error)) from None


def is_argument(name: str) -> bool:
    """Return whether a parameter of the command that runs was given as an argument, not by the environment."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def user_of(text: str) -> User:
    """Return the user that an argument stands for: 7 is a number, '"7"' and alice are texts.

    A text that looks like a number needs the quotes of JSON. All texts may have them.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, str) or type(value) is int else text


def described_user(user: User) -> str:
    """Return a user for people, so that a number and a text of digits differ."""
    return f"{user} (a number)" if isinstance(user, int) else f"{json.dumps(user)} (a text)"
