"""The command ``flask sse client``: the module for browsers as files.

Run by the command's own process, which ends afterwards.
"""

from __future__ import annotations

from pathlib import Path

import click
from flask.cli import AppGroup

from ..browser import SCRIPT_NAME, SOURCE, TYPES, TYPES_NAME, VERSION
from ..commands.ending import command
from ..commands.terminal import Terminal

_MARK = "// sse_batcher for browsers, "
"""What the files begin with, so that the command can find those of an earlier run."""


def add_client(group: AppGroup) -> None:
    """Add the command to the group of an app."""

    @group.command("client")
    @click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
    @command
    def client(folder: Path) -> None:
        """Write sse-batcher.js and its types (.d.ts) into FOLDER, for bundlers such as Vite.

        Run it again after each upgrade of sse_batcher. It overwrites the files that it has written itself, and no
        others.
        """
        terminal = Terminal()
        for line in _write_client(folder):
            terminal.write(line)


def _write_client(folder: Path) -> list[str]:
    """Write the module for browsers and its types. If one of them cannot be replaced, write neither.

    Returns what was done, in lines.
    """
    note = f'{_MARK}version {VERSION}. Written by "flask sse client", which overwrites it: do not edit.\n'
    files = {folder / name: (note + text).encode() for name, text in [(SCRIPT_NAME, SOURCE), (TYPES_NAME, TYPES)]}
    said = []
    try:
        there = {path: path.read_bytes() for path in files if path.exists()}
        for path, content in there.items():
            if not content.startswith(_MARK.encode()):
                raise click.ClickException(f"{path} was not written by this command: remove it, or name another folder")
        for path, content in files.items():
            if there.get(path) != content:
                path.write_bytes(content)
            said.append(f"{path} is up to date" if there.get(path) == content else f"{path} was written")
    except OSError as error:
        raise click.ClickException(f"cannot write {error.filename}: {error.strerror}") from error
    return said
