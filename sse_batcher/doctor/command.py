"""The command: examines a URL, and prints the report. `python -m sse_batcher doctor`, and a part of `flask sse doctor`.

The main thread.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .client import Target
from .diagnoses import diagnose
from .findings import Finding
from .probes import examine
from .rendering import as_json, as_text, fine_of, is_ok, subject_of


class Report(NamedTuple):
    """What was found about one subject, from outside or inside."""

    subject: str
    findings: list[Finding]
    fine: list[str]
    facts: Mapping[str, Any]


def examine_url(target: Target) -> Report:
    """Examine a stream from outside, and show the progress. Raises `RemoteError` for invalid arguments."""
    show, done = progress()
    try:
        facts = examine(target, show)
    finally:
        done()
    findings = diagnose(facts)
    return Report(subject_of(facts), findings, fine_of(facts, findings), facts.as_dict())


def print_report(report: Report, url: str | None, *, json: bool) -> int:
    """Print the report. Returns the exit status: 1 if there is a fault."""
    if json:
        print(as_json(url, report.findings, report.facts))
    else:
        print(as_text(report.subject, report.findings, report.fine))
    return 0 if is_ok(report.findings) else 1


def progress() -> tuple[Callable[[str], None], Callable[[], None]]:
    """Return a function that shows a line on stderr, if that is a terminal, and one that removes it."""
    if not sys.stderr.isatty():
        return (lambda line: None), (lambda: None)

    def show(line: str) -> None:
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    return show, lambda: show("")
