"""Rendering: findings as text for people, and as JSON.

Pure.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from ..commands.text import printable
from .facts import Facts
from .findings import Finding
from .software import recognise

MAX_WIDTH = 100


def as_text(subject: str, findings: Iterable[Finding], fine: Iterable[str], width: int = MAX_WIDTH) -> str:
    """Return a report: what was examined, a paragraph for each finding, and what is fine."""
    found = list(findings)
    paragraphs = [printable(subject)]
    paragraphs += [_paragraph(finding, width) for finding in found]
    good = list(fine)
    if good:
        paragraphs.append(_wrapped(f"Fine: {'; '.join(good)}.", width))
    if not found:
        paragraphs.append("Nothing is wrong.")
    return "\n\n".join(paragraphs)


def json_text(url: str | None, findings: Iterable[Finding], facts: Mapping[str, Any]) -> str:
    """Return the report as one JSON object."""
    found = list(findings)
    report = {
        "url": url,
        "ok": is_ok(found),
        "findings": [finding._asdict() for finding in found],
        "facts": dict(facts),
    }
    return json.dumps(report, indent=2)


def is_ok(findings: Iterable[Finding]) -> bool:
    """Return whether there is no fault. Warnings may be there."""
    return all(finding.level != "fault" for finding in findings)


def subject_of(facts: Facts) -> str:
    """Return a line that says what was examined."""
    said = [facts.url]
    software = recognise(facts.marks)
    if software is not None or facts.answer is not None:
        said.append(f"answered by {software.name}" if software else "answered by a server that does not name itself")
    if facts.answer is not None:
        said.append(facts.answer.version)
    return ", ".join(said)


def fine_of(facts: Facts, findings: Iterable[Finding]) -> list[str]:
    """Return what works, in a few words each. What a finding is about is left out."""
    codes = {finding.code for finding in findings}
    answer, first, listened, heartbeat = facts.plain or facts.answer, facts.first, facts.listened, facts.heartbeat
    if first is None or first.type == "sse_busy":
        return []
    fine = []
    if "buffered" not in codes and "read_whole" not in codes:
        after = first.after + (0.0 if answer is None else answer.after)
        fine.append(f"the first block comes {1000 * after:.0f} ms after the request")
    if listened is not None and listened.heartbeats and not codes & {"heartbeats_missing", "idle_timeout", "buffered"}:
        fine.append(f"heartbeats arrive, every {heartbeat:g} s" if heartbeat else "heartbeats arrive")
    elif listened is not None and heartbeat and listened.end is None and listened.silence < heartbeat:
        fine.append(f"the stream stayed open for {listened.seconds:.0f} s (too short, or too busy, for a heartbeat)")
    if facts.resumed is not None and facts.resumed.type == "sse_open" and "no_resume" not in codes:
        fine.append("a client that comes back goes on where it was")
    if facts.answers_beside and not codes & {"threads", "one_thread"}:
        fine.append(f"other requests are answered beside {facts.streams_beside} open streams")
    if facts.origin is not None and "cors" not in codes:
        fine.append(f"pages of {facts.origin} may read it")
    return fine


def _paragraph(finding: Finding, width: int) -> str:
    what = _wrapped(f"{finding.level.upper()} {finding.code}: {finding.what}", width)
    return f"{what}\n{textwrap.indent(_wrapped(f'What to do: {finding.do}', width - 2), '  ')}"


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(printable(text), width, break_long_words=False, break_on_hyphens=False)
