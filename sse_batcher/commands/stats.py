"""The counters of a process, and what Redis knows of all processes, as tables for people.

The command's own thread. Numbers and names come from outside, so all of them are escaped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

from ..backends.redis.inspection import RedisFacts
from ..remote.message import RemoteError, Request
from ..remote.stream import CONNECT_SECONDS, connect
from ..remote.url import without_token
from ..stats import ManagerStats
from .terminal import Terminal
from .text import duration, printable, shortened, size

MOST_SHOWN = 10
"""How many names of one counter are shown; the others are counted."""
MAX_DIGITS = 20
"""No whole number of a counter is longer."""
MOST_CHARACTERS = 200
"""How much is shown of a name, or of a value that is no number."""
_ORDER = {field.name: place for place, field in enumerate(fields(ManagerStats))}


def fetch_stats(request: Request) -> dict[str, Any]:
    """Return the counters of the process that answers. Raises `RemoteError`."""
    with connect(request) as answer:
        status = answer.head.status
        body = answer.read_rest(CONNECT_SECONDS, limit=10_000_000) if status == 200 else b""
    if status != 200:
        why = {
            401: ": give the --token or --header that the app asks for",
            403: ": the app's @sse.allow_stats does not let this request see them",
            404: ": the app has no @sse.allow_stats, or this is not the URL of its stream",
        }.get(status)
        raise RemoteError(f"{without_token(request.url)} is answered with {status}{why}", "answer")
    try:
        stats = json.loads(body, parse_constant=str, parse_float=_float, parse_int=_int)
    except (ValueError, RecursionError):
        stats = None
    if not isinstance(stats, dict):
        raise RemoteError(f"{without_token(request.url)} does not answer with the counters of sse_batcher", "answer")
    return stats


def _int(text: str) -> int | str:
    """Return a number, or its text if no counter can be so large."""
    return int(text) if len(text) <= MAX_DIGITS else text


def _float(text: str) -> float | str:
    """Return a number, or its text if it is none for JSON."""
    number = float(text)
    return number if math.isfinite(number) else text


def show_stats(ask: Callable[[], dict[str, Any]], url: str, terminal: Terminal, as_json: bool, watch: float) -> None:
    """Print the counters; with `watch`, again after so many seconds, with the changes, until Ctrl-C."""
    before: dict[str, Any] = {}
    while True:
        stats = ask()
        if as_json:
            terminal.write(_as_json(stats, url))
        else:
            if watch:
                terminal.clear_screen()
            place, moment = printable(without_token(url)), time.strftime("%H:%M:%S")
            terminal.write(f"One process of {place}: the one that has answered. {moment}")
            for line in table(stats, before):
                terminal.write(line)
        if not watch:
            return
        before = stats
        time.sleep(watch)


def _as_json(stats: dict[str, Any], url: str) -> str:
    try:
        return json.dumps(stats, allow_nan=False)
    except RecursionError:
        raise RemoteError(f"{without_token(url)} does not answer with the counters of sse_batcher", "answer") from None


def table(stats: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines: a counter each, with its names below it, and with the change since `before`."""
    for name in sorted(stats, key=lambda name: (_ORDER.get(name, len(_ORDER)), name)):
        value, label = stats[name], _label(name)
        if isinstance(value, dict):
            earlier = before.get(name)
            yield from _histogram(label, value) or _names(label, value, earlier if isinstance(earlier, dict) else None)
        elif isinstance(value, float):  # seconds
            yield _row(label, duration(value))
        elif isinstance(value, int) and not isinstance(value, bool):
            text = f"{'-' * (value < 0)}{size(abs(value))}" if name.endswith("bytes") else f"{value:,}"
            yield _row(label, text, _change(value, before.get(name, 0) if before else None))
        else:
            yield _row(label, _text(value))


def _histogram(label: str, value: Mapping[str, Any]) -> list[str]:
    """Return the line of times that are counted in buckets. Nothing, if this is not such a counter."""
    buckets, total = value.get("buckets"), value.get("sum")
    if not isinstance(buckets, dict) or not isinstance(total, (int, float)):
        return []
    count = sum(_numbers(buckets).values())
    return [_row(label, f"{count:,}", f"mean {duration(total / count)}" if count else "")]


def _names(label: str, value: Mapping[str, Any], before: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines of a counter with names, the largest first. Names with 0 are left out."""
    numbers = {key: count for key, count in _numbers(value).items() if count or (before or {}).get(key)}
    yield f"  {label}" if numbers else _row(label, "0")
    shown = sorted(numbers, key=lambda key: (-numbers[key], key))
    for key in shown[:MOST_SHOWN]:
        change = _change(numbers[key], None if before is None else before.get(key, 0))
        yield _row(f"  {_text(key)}", f"{numbers[key]:,}", change)
    rest = shown[MOST_SHOWN:]
    if rest:
        yield _row(f"  {len(rest)} more", f"{sum(numbers[key] for key in rest):,}")


def _numbers(value: Mapping[str, Any]) -> dict[str, float]:
    return {key: count for key, count in value.items() if isinstance(count, (int, float))}


def redis_lines(facts: RedisFacts) -> Iterator[str]:
    """Yield the lines about Redis."""
    unknown = "not known"
    yield "Redis, for all processes (of one process: flask sse stats --url URL)"
    yield _row("stream", printable(facts.stream))
    yield _row("epoch", printable(facts.epoch or "none"))
    yield _row("entries", f"{facts.entries:,}")
    yield _row("memory", unknown if facts.memory_bytes is None else size(facts.memory_bytes))
    yield _row("oldest entry", _ago(facts.oldest_age))
    yield _row("newest entry", _ago(facts.newest_age))
    yield _row("reading processes", unknown if facts.processes is None else f"{facts.processes:,}")
    yield _row("kicked users", unknown if facts.kicked_users is None else f"{facts.kicked_users:,}")


def redis_json(facts: RedisFacts) -> str:
    """Return the same for programs."""
    return json.dumps(asdict(facts))


def _label(name: str) -> str:
    return _text(name.replace("_", " "))


def _text(value: object) -> str:
    try:
        return shortened(printable(str(value)), MOST_CHARACTERS)
    except RecursionError:  # a list in a list in a list...
        return "..."


def _row(label: str, value: str, change: str = "") -> str:
    return f"  {label:<24}{value:>14}{f'  {change}' if change else ''}"


def _change(value: float, earlier: object) -> str:
    """Return by how much it has changed; nothing, if it has not, or if it is not known."""
    return f"{value - earlier:+,.6g}" if isinstance(earlier, (int, float)) and value != earlier else ""


def _ago(age: float | None) -> str:
    return "none" if age is None else f"{duration(age)} ago"
