"""The command: examines a URL and prints the report. For `python -m sse_batcher doctor` and `flask sse doctor URL`.

The main thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import click

from ..commands.arguments import FiniteRange, headers_of, not_empty, request_options
from ..commands.ending import command
from ..commands.terminal import Terminal
from ..remote.message import RemoteError, make_request
from .client import Target
from .diagnoses import diagnose
from .findings import Finding
from .probes import examine
from .rendering import MAX_WIDTH, as_text, fine_of, is_ok, json_text, subject_of

F = TypeVar("F", bound=Callable[..., Any])


class Report(NamedTuple):
    """What was found about one subject, from outside or inside."""

    subject: str
    """What was examined, as a line."""
    findings: list[Finding]
    fine: list[str]
    """What works, in a few words each."""
    facts: Mapping[str, Any]


def doctor_options(function: F) -> F:
    """Add the options of the command. `target_of` takes all of them except ``--json``."""
    options = [
        click.option(
            "--seconds",
            type=FiniteRange(0.1, 3600),
            help="How long to listen. By default, one and a half times the heartbeat of the stream.",
        ),
        click.option(
            "--origin",
            metavar="ORIGIN",
            callback=not_empty,
            help="The origin of a page that reads it: https://example.com.",
        ),
        request_options,
        click.option("--insecure", is_flag=True, help="Accept any certificate."),
        click.option("--json", "as_json", is_flag=True, help="Print JSON."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


def target_of(
    url: str, seconds: float | None, headers: Iterable[str], token: str | None, origin: str | None, insecure: bool
) -> Target:
    """Make the target for these arguments. Raises `click.UsageError` if one of them is not valid."""
    own = {"last-event-id": "the doctor sends cursors of its own"}
    if origin is not None:
        own["origin"] = "--origin says it"
    given = tuple(headers_of(headers, own))
    origins = [] if origin is None else [("Origin", origin)]
    try:
        make_request(url, headers=[*given, *origins], token=token)
    except RemoteError as error:
        raise click.UsageError(str(error)) from None
    return Target(url, given, token, origin, seconds, insecure)


def examine_url(target: Target, terminal: Terminal | None = None) -> Report:
    """Examine a stream from outside, and show the progress, if there is a terminal."""
    facts = examine(target) if terminal is None else examine(target, terminal.progress, terminal.progress_seconds)
    findings = diagnose(facts)
    return Report(subject_of(facts), findings, fine_of(facts, findings), facts.as_dict())


def print_reports(reports: Iterable[Report], url: str | None, terminal: Terminal, *, as_json: bool) -> int:
    """Print reports as one. Returns the exit status: 1 if there is a fault."""
    made = list(reports)
    findings = [finding for report in made for finding in report.findings]
    terminal.end()
    if as_json:
        terminal.write(
            json_text(url, findings, {name: value for report in made for name, value in report.facts.items()})
        )
    else:
        width = min(MAX_WIDTH, terminal.width) if terminal.is_terminal else MAX_WIDTH
        terminal.write("\n\n".join(as_text(report.subject, report.findings, report.fine, width) for report in made))
    return 0 if is_ok(findings) else 1


@click.command("doctor")
@click.argument("url")
@doctor_options
@command
def doctor(url: str, as_json: bool, **arguments: Any) -> None:
    """Find out what is wrong between a server and its browsers, and say what to change.

    URL is that of the stream, such as http://localhost:8000/events. It is examined from outside, by a few streams and
    short requests that change nothing. The exit status is 1 if there is a fault.
    """
    terminal = Terminal()
    report = examine_url(target_of(url, **arguments), terminal)
    status = print_reports([report], report.facts["url"], terminal, as_json=as_json)
    click.get_current_context().exit(status)
