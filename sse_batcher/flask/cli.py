"""The group ``flask sse``.

Run by the command's own process, which ends afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import click
from flask.cli import AppGroup

from ..manager import SSEManager
from .signing import Tokens


class _Commands(AppGroup):
    """The group. It calls `add_more(group)` before the first command is looked for.

    The commands import a client of HTTP, which takes about as long as half of the library. The processes that serve the
    app do not need them.
    """

    def __init__(self, add_more: Callable[[AppGroup], None]) -> None:
        super().__init__("sse", help="Server-Sent Events.")
        self._add_more: Callable[[AppGroup], None] | None = add_more

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._complete()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        self._complete()
        return super().get_command(ctx, cmd_name)

    def _complete(self) -> None:
        add_more, self._add_more = self._add_more, None
        if add_more is not None:
            add_more(self)


def create_commands(manager: SSEManager, tokens: Tokens, compare_config: Callable[[], None]) -> AppGroup:
    """Make the commands for one app. `compare_config` logs config keys that were set too late."""

    def add_more(group: AppGroup) -> None:
        from .client_cli import add_client  # noqa: PLC0415  # see `_Commands`
        from .doctor_cli import add_doctor  # noqa: PLC0415
        from .operator_cli import add_operator_commands  # noqa: PLC0415

        add_client(group)
        add_operator_commands(group, manager, tokens, compare_config)
        add_doctor(group, manager, tokens, compare_config)

    return _Commands(add_more)
