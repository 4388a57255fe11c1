"""Diagnoses: from the facts that were seen from outside to findings.

Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .answers import clock_off, compressed, cors_missing, headers_missing, http_1_0
from .facts import Facts
from .findings import Finding
from .flow import blocks_late, ends_early, heartbeats_missing, idle_timeout, long_heartbeat, nothing_came, read_whole
from .refusals import diagnose_refusal
from .serving import (
    backend_silent,
    cursor_removed,
    history_too_short,
    http2_blocks,
    limit_reached,
    separate_processes,
    threads_taken,
    unhealthy,
)

Diagnose = Callable[[Facts], Finding | None]

_ALONE: tuple[Diagnose, ...] = (
    compressed,
    http_1_0,
    headers_missing,
    clock_off,
    cors_missing,
    http2_blocks,
    unhealthy,
    limit_reached,
)
_GROUPS: tuple[tuple[Diagnose, ...], ...] = (
    (read_whole, idle_timeout, ends_early, blocks_late, heartbeats_missing, long_heartbeat),
    (backend_silent, threads_taken),
    (separate_processes, cursor_removed, history_too_short),
)


def diagnose(facts: Facts) -> list[Finding]:
    """Return what is wrong, faults first. A fault that explains others stands for them."""
    refusal = diagnose_refusal(facts) or _one_of(facts, [nothing_came])
    found = [*refusal, *_each(facts, [clock_off])] if refusal else [*_each(facts, _ALONE), *_first_of(facts)]
    return sorted(found, key=lambda finding: finding.level != "fault")


def _one_of(facts: Facts, functions: Iterable[Diagnose]) -> list[Finding]:
    """Return the first finding of these functions."""
    return [finding for finding in (function(facts) for function in functions) if finding is not None][:1]


def _each(facts: Facts, functions: Iterable[Diagnose]) -> Iterator[Finding]:
    for function in functions:
        finding = function(facts)
        if finding is not None:
            yield finding


def _first_of(facts: Facts) -> Iterator[Finding]:
    """For each group of faults that follow from each other, yield the first one that is found."""
    for group in _GROUPS:
        yield from _one_of(facts, group)
