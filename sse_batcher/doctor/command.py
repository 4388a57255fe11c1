"""The command: examines a URL and prints the report. For `python -m sse_batcher doctor` and `flask sse doctor URL`.

The main thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import click

from ..remote.message import RemoteError, make_request, parse_header
from .client import Target
from .diagnoses import diagnose
from .findings import Finding
from .probes import examine
from .rendering import as_json, as_text, fine_of, is_ok, subject_of

F = TypeVar("F", bound=Callable[..., Any])


class Report(NamedTuple):
    """What was found about one subject, from outside or inside."""

    subject: str
    """What was examined, as a line."""
    findings: list[Finding]
    fine: list[str]
    """What works, in a few words each."""
    facts: Mapping[str, Any]


def options(function: F) -> F:
    """Add the options of the command. `target_of` takes all of them except ``--json``."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
        click.option("--insecure", is_flag=True, help="Accept any certificate."),
        click.option(
            "--origin", metavar="ORIGIN", help="The origin of a page that has to read it: https://example.com."
        ),
        click.option("--token", metavar="TOKEN", help="A bearer token to send, such as one of sse.sign()."),
        click.option("--header", "headers", metavar="'NAME: VALUE'", multiple=True, help="A header to send."),
        click.option(
            "--seconds",
            type=click.FloatRange(0.1, 3600),
            help="How long to listen. By default, one and a half times the heartbeat of the stream.",
        ),
    ):
        function = option(function)
    return function


def target_of(
    url: str, seconds: float | None, headers: Iterable[str], token: str | None, origin: str | None, insecure: bool
) -> Target:
    """Make the target for these arguments. Raises `click.UsageError` if one of them is not valid."""
    try:
        given = tuple(parse_header(line) for line in headers)
        origins = [("Origin", origin)] if origin else []
        make_request(url, headers=[*given, *origins], token=token)
    except RemoteError as error:
        raise click.UsageError(str(error)) from None
    return Target(url, given, token, origin, seconds, insecure)


def examine_url(target: Target) -> Report:
    """Examine a stream from outside, and show the progress."""
    show, done = _progress()
    try:
        facts = examine(target, show)
    finally:
        done()
    findings = diagnose(facts)
    return Report(subject_of(facts), findings, fine_of(facts, findings), facts.as_dict())


def print_reports(reports: Iterable[Report], url: str | None, *, as_json_text: bool) -> int:
    """Print reports as one. Returns the exit status: 1 if there is a fault."""
    made = list(reports)
    findings = [finding for report in made for finding in report.findings]
    if as_json_text:
        click.echo(as_json(url, findings, {name: value for report in made for name, value in report.facts.items()}))
    else:
        click.echo("\n\n".join(as_text(report.subject, report.findings, report.fine) for report in made))
    return 0 if is_ok(findings) else 1


@click.command("doctor")
@click.argument("url")
@options
def doctor(url: str, as_json: bool, **arguments: Any) -> None:
    """Find out what is wrong between a server and its browsers, and say what to change.

    URL is that of the stream, such as http://localhost:8000/events. It is examined from outside, by a few streams and
    short requests that change nothing. The exit status is 1 if there is a fault.
    """
    target = target_of(url, **arguments)
    report = examine_url(target)
    sys.exit(print_reports([report], report.facts["url"], as_json_text=as_json))


def _progress() -> tuple[Callable[[str], None], Callable[[], None]]:
    """Return a function that shows a line on stderr, if that is a terminal, and one that removes it."""
    if not sys.stderr.isatty():
        return (lambda line: None), (lambda: None)

    def show(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    return show, lambda: show("")
