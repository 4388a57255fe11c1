"""The commands of ``flask sse``.

Run by the command's own process, which ends afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import click
from flask.cli import AppGroup, with_appcontext

from ..errors import InvalidEventError
from ..event import BROADCAST, DEFAULT_CHANNEL, Text
from ..manager import SSEManager, process_of

PUBLISH_SECONDS = 10.0


def create_commands(manager: SSEManager, compare_config: Callable[[], None]) -> AppGroup:
    """Make ``flask sse publish TYPE DATA`` for one app. `compare_config` logs config keys that were set too late."""
    group = AppGroup("sse", help="Server-Sent Events.")

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
    @with_appcontext
    def publish(event_type: str, data: str, channel: str, text: bool) -> None:
        """Send an event to the clients of all processes. DATA is JSON, or any text with --text."""
        compare_config()
        if not process_of(manager).reaches_others:
            raise click.ClickException(
                "the backend memory:// reaches only the clients of this process, which has none: set SSE_BACKEND to "
                '"redis://..."'
            )
        try:
            value = Text(data) if text else json.loads(data)
            if channel == BROADCAST:
                manager.broadcast(event_type, value)
            else:
                manager.enqueue(event_type, value, channel=channel)
        except json.JSONDecodeError as error:
            raise click.BadParameter(
                f"{error}. A string needs its quotes: '\"text\"'; or add --text", param_hint="DATA"
            ) from error
        except InvalidEventError as error:
            raise click.ClickException(str(error)) from error
        if not manager.shutdown(PUBLISH_SECONDS):
            raise click.ClickException("the backend did not take the event in time")

    return group
