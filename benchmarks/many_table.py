"""What was measured, as tables, and the limits that the detached streams have to keep."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

from many_subject import BURST, FLOODED, Result


class Column(NamedTuple):
    title: str
    value: Callable[[Result], float | None]
    decimals: int = 0


def without_window(result: Result) -> float | None:
    """Milliseconds to the last client of a burst, without those it was held back on purpose."""
    last = result.median("burst_last")
    return None if last is None else last - result.kind.window


COLUMNS = (
    Column("KB a client", lambda result: result.kb if result.threads else None, 2),
    Column("threads", lambda result: result.threads or None),
    Column("connects/s", lambda result: result.connects or None),
    Column("CPU µs a delivery", lambda result: result.median("cpu_us"), 2),
    Column("burst: p50 ms", lambda result: result.median("burst_p50"), 1),
    Column("p99", lambda result: result.median("burst_p99"), 1),
    Column("last", lambda result: result.median("burst_last"), 1),
    Column("one event: last ms", lambda result: result.median("single_last"), 1),
    Column(f"publish {BURST}, µs", lambda result: result.median("publish_us")),
    Column("deliveries/s", lambda result: result.median("flood")),
    Column("enqueue, µs", lambda result: result.median("enqueue_us"), 2),
    Column("busy: last ms", lambda result: result.median("busy_last")),
    Column("page: p99 ms", lambda result: result.ping and result.ping.p99_ms, 1),
)
RATIOS = (
    Column("CPU / bare", lambda result: result.median("cpu_us"), 2),
    Column("last / bare", without_window, 2),
    Column("one / bare", lambda result: result.median("single_last"), 2),
    Column("deliveries / bare", lambda result: result.median("flood"), 2),
)


def rows(results: list[Result]) -> Iterator[tuple[str, ...]]:
    """A heading, and a row for each; the last columns are ratios to the bare loop with as many clients."""
    yield ("", *(column.title for column in COLUMNS + RATIOS))
    for clients in dict.fromkeys(result.clients for result in results):
        same = [result for result in results if result.clients == clients]
        bare = next((result for result in same if result.kind.name == "bare"), None)
        yield (f"{clients:,} clients", *[""] * len(COLUMNS + RATIOS))
        for result in same:
            values = [_number(column.value(result), column.decimals) for column in COLUMNS]
            values += [_ratio(column, result, bare) for column in RATIOS]
            yield (result.kind.title, *values)


def text(results: list[Result]) -> str:
    """For a terminal."""
    table = list(rows(results))
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
    return "\n".join([*lines, *remarks(results)])


def markdown(results: list[Result]) -> str:
    """For a page of the documentation."""
    heading, *others = [f"| {' | '.join(row)} |" for row in rows(results)]
    return "\n".join([heading, "|---" + "|--:" * len(COLUMNS + RATIOS) + "|", *others, "", *remarks(results)])


def remarks(results: list[Result]) -> Iterator[str]:
    """What went wrong, if anything did."""
    for result in results:
        name = f"{result.kind.title}, {result.clients:,} clients"
        if result.fault:
            yield f"{name}: {result.fault}"
        if result.missing or result.disordered:
            yield f"{name}: {result.missing:,} events missing, {result.disordered:,} out of order"


def _number(value: float | None, decimals: int) -> str:
    return "" if value is None else f"{value:,.{decimals}f}"


def _ratio(column: Column, result: Result, bare: Result | None) -> str:
    ours, limit = column.value(result), bare and column.value(bare)
    return f"{ours / limit:.2f}" if ours is not None and limit else ""


class Limit(NamedTuple):
    """What must be. `value` is None where it was not measured."""

    what: str
    value: float | None
    most: float
    unit: str
    least: bool = False
    """Whether the limit is the least that is good."""

    @property
    def kept(self) -> bool:
        return self.value is not None and (self.value >= self.most if self.least else self.value <= self.most)

    def __str__(self) -> str:
        value = "not measured" if self.value is None else f"{self.value:,.2f}"
        word = "at least" if self.least else "at most"
        return f"{'PASS' if self.kept else 'FAIL'}  {self.what:76}{value:>14}  {word} {self.most:,.2f} {self.unit}"


def limits(results: list[Result], channels: list[Result], few: Result) -> list[Limit]:
    """For the detached streams, from runs in which they took turns with the bare loop.

    `channels`: the same for clients with a channel each. `few` has 50 streams and 4 threads.
    """

    def of(clients: int, value: Callable[[Result], float | None], name: str = "detached") -> float | None:
        """The median of the runs."""
        values = [value(result) for result in measured(clients, name) if result.kind.ours]
        return _median([each for each in values if each is not None])

    def measured(clients: int, name: str) -> list[Result]:
        those = channels if name == "channels" else results
        return [result for result in those if result.clients == clients]

    def rounds(measured: list[Result], field: str, *, ours: bool) -> list[float]:
        """The values of all rounds, without the window."""
        return [
            value - (result.kind.window if field == "burst_last" else 0)
            for result in measured
            if result.kind.ours == ours
            for value in getattr(result, field)
        ]

    def ratio(clients: int, field: str, name: str = "detached") -> float | None:
        """To the bare loop: the median of the ratios of all rounds, since the two take turns."""
        those = measured(clients, name)
        pairs = zip(rounds(those, field, ours=True), rounds(those, field, ours=False), strict=False)
        return _median([ours / bare for ours, bare in pairs])

    def busy(result: Result) -> float | None:
        window, pairs = result.kind.window, zip(result.busy_last, result.busy_bare, strict=False)
        return _median([(ours - window) / bare for ours, bare in pairs])

    def page(result: Result) -> float | None:
        ours, bare = result.ping, result.ping_bare
        return None if ours is None or bare is None else ours.p99_ms / bare.p99_ms

    def enqueue(result: Result) -> float | None:
        return _median([ours / dumps for ours, dumps in zip(result.enqueue_us, result.dumps_us, strict=False)])

    p99: Callable[[Result], float | None] = lambda result: result.ping and result.ping.p99_ms  # noqa: E731
    kb: Callable[[Result], float | None] = lambda result: result.kb if result.threads else None  # noqa: E731
    flood = f"deliveries a second of 50,000 events to {FLOODED} clients"
    return [
        Limit("memory a client, 10,000 clients", of(10_000, kb), 1, "KB"),
        Limit("burst to the last of 1,000 clients, without the window", ratio(1_000, "burst_last"), 1.5, "x bare"),
        Limit("burst to the last of 10,000 clients, without the window", ratio(10_000, "burst_last"), 1.3, "x bare"),
        Limit("CPU a delivery of a burst to 1,000 clients", ratio(1_000, "cpu_us"), 1.25, "x bare"),
        Limit("CPU a delivery of a burst to 10,000 clients", ratio(10_000, "cpu_us"), 1.25, "x bare"),
        Limit("a channel each: memory a client, 10,000 clients", of(10_000, kb, "channels"), 1.3, "KB"),
        Limit("a channel each: CPU a delivery to 1,000 clients", ratio(1_000, "cpu_us", "channels"), 1.25, "x bare"),
        Limit("a channel each: CPU a delivery to 10,000 clients", ratio(10_000, "cpu_us", "channels"), 1.15, "x bare"),
        Limit(flood, ratio(FLOODED, "flood"), 1, "x bare", True),
        Limit("one event to the last of 10,000 clients", ratio(10_000, "single_last"), 1.25, "x bare"),
        Limit("enqueue back to back, 100 clients", of(100, enqueue), 2, "x json.dumps"),
        Limit("enqueue back to back, 10,000 clients", of(10_000, enqueue), 2, "x json.dumps"),
        Limit("a request computes: burst to 1,000, without the window", of(1_000, busy), 6, "x bare"),
        Limit("a request computes: burst to 10,000, without the window", of(10_000, busy), 4, "x bare"),
        Limit("constant bursts to 10,000: p99 of another page", of(10_000, page), 3, "x bare"),
        Limit("constant bursts to 50, 4 threads: p99 of another page", p99(few), 100, "ms"),
    ]


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None
