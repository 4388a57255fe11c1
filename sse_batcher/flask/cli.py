"""The commands of ``flask sse``.

Run by the command's own process, which ends afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import click
from flask.cli import AppGroup, with_appcontext

from ..errors import InvalidEventError
from ..event import BROADCAST, DEFAULT_CHANNEL
from ..manager import SSEManager, process_of

PUBLISH_SECONDS = 10.0


def create_commands(manager: SSEManager, compare_config: Callable[[], None]) -> AppGroup:
    """Make ``flask sse publish TYPE JSON`` for one app. `compare_config` logs config keys that were set too late."""
    group = AppGroup("sse", help="Server-Sent Events.")

    @group.command("publish")
    @click.argument("event_type", metavar="TYPE")
    @click.argument("data", metavar="JSON")
    @click.option(
        "--channel",
        default=DEFAULT_CHANNEL,
        show_default=True,
        help="The channel whose clients get it; * for all clients.",
    )
    @with_appcontext
    def publish(event_type: str, data: str, channel: str) -> None:
        """Send an event to the clients of all processes."""
        compare_config()
        if not process_of(manager).reaches_others:
            raise click.ClickException(
                "the backend memory:// reaches only the clients of this process, which has none: set SSE_BACKEND to "
                '"redis://..."'
            )
        try:
            value = json.loads(data)
            if channel == BROADCAST:
                manager.broadcast(event_type, value)
            else:
                manager.enqueue(event_type, value, channel=channel)
        except json.JSONDecodeError as error:
            raise click.BadParameter(f"{error}. A string needs its quotes: '\"text\"'", param_hint="JSON") from error
        except InvalidEventError as error:
            raise click.ClickException(str(error)) from error
        if not manager.shutdown(PUBLISH_SECONDS):
            raise click.ClickException("the backend did not take the event in time")

    return group
