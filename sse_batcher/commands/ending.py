"""How commands end: without a traceback, and with the usual exit status.

The command's own thread.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import click

from ..errors import BackendError
from ..remote.message import RemoteError
from .terminal import OutputError, output
from .text import printable

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 128 + signal.SIGINT
"""The exit status after Ctrl-C."""
PIPE_CLOSED = 141
"""The exit status if the reader of our output has left: 128 and the number of SIGPIPE, which Windows does not have."""


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what a command runs, so that it ends as people expect, without a traceback.

    After Ctrl-C, and if the reader of its output has left, with the usual exit status. If a site or Redis does not
    answer, with a line on stderr and exit status 1.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        # Click would write its errors to stdout if there is no stderr.
        sys.stdout, sys.stderr = output(sys.stdout), output(sys.stderr)
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            _drop_output()
            sys.exit(PIPE_CLOSED)
        except OutputError as error:
            _drop_output()
            raise click.ClickException(printable(str(error))) from None
        except (RemoteError, BackendError) as error:
            raise click.ClickException(printable(str(error))) from None

    return run


def _drop_output() -> None:
    """Write to stdout no more. Python flushes it at its end, and would report the error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
