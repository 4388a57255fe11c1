"""The commands of ``flask sse``.

Run by the command's own process, which ends afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
from flask.cli import AppGroup

from ..browser import SCRIPT_NAME, SOURCE, TYPES, TYPES_NAME, VERSION
from ..manager import SSEManager
from .signing import Tokens

_MARK = "// sse_batcher for browsers, "
"""What the files that ``flask sse client`` writes begin with, so that it can find the files of an earlier run."""


class _Commands(AppGroup):
    """The group. It calls `add_more(group)` before the first command is looked for.

    The commands for operators import a client of HTTP, which takes about as long as half of the library. The processes
    that serve the app do not need them.
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
        from .doctor_cli import add_doctor  # noqa: PLC0415  # see `_Commands`
        from .operator_cli import add_operator_commands  # noqa: PLC0415

        add_operator_commands(group, manager, tokens, compare_config)
        add_doctor(group, manager, tokens, compare_config)

    group = _Commands(add_more)

    @group.command("client")
    @click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
    def client(folder: Path) -> None:
        """Write sse-batcher.js and its types (.d.ts) into FOLDER, for bundlers such as Vite.

        Run it again after each upgrade of sse_batcher. It overwrites the files that it has written itself, and no
        others.
        """
        write_client(folder)

    return group


def write_client(folder: Path) -> None:
    """Write the module for browsers and its types, and say so. If one of them cannot be replaced, write neither."""
    note = f'{_MARK}version {VERSION}. Written by "flask sse client", which overwrites it: do not edit.\n'
    files = {folder / name: (note + text).encode() for name, text in [(SCRIPT_NAME, SOURCE), (TYPES_NAME, TYPES)]}
    try:
        there = {path: path.read_bytes() for path in files if path.exists()}
        for path, content in there.items():
            if not content.startswith(_MARK.encode()):
                raise click.ClickException(f"{path} was not written by this command: remove it, or name another folder")
        for path, content in files.items():
            if there.get(path) == content:
                click.echo(f"{path} is up to date")
            else:
                path.write_bytes(content)
                click.echo(f"{path} was written")
    except OSError as error:
        raise click.ClickException(f"cannot write {error.filename}: {error.strerror}") from error
