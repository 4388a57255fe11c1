"""The report: what batching saves and costs in each scenario, measured over real HTTP in this process.

The caller passes a server. The main thread enqueues; another thread reads the stream and notes when each piece arrives.
Each round has its own manager and connection, so that rounds do not affect each other.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import math
import os
import platform
import random
import socket
import statistics
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any, NamedTuple

from ..errors import SSEBatcherError
from ..event import DEFAULT_CHANNEL
from ..manager import SSEManager
from ..options import BatchOptions, ClientOptions
from ..wsgi import stream
from .scenarios import SCENARIOS, Happening, Scenario

MODES: Mapping[str, bool | BatchOptions] = {
    "unbatched": False,
    "batched": BatchOptions(dedup_key="server"),
    "mixed": BatchOptions(dedup_key="server", mixed=True),
    "leading": BatchOptions(dedup_key="server", leading=True),
    "compressed": BatchOptions(dedup_key="server"),
}
COMPRESSED = "compressed"
"""The mode in which the stream is compressed, too (`ClientOptions.compress`)."""
MEASURED = tuple(name for name in SCENARIOS if name != "error")

SEGMENT_HEADERS = 52
"""Bytes of IPv4 and TCP headers (the latter with timestamps) that each segment has beside its part of the stream."""
MSS = 1460
"""The maximum segment size of Ethernet; the loopback interface would carry 64 kB in one segment."""

ROUNDS_OF_A_BURST = 5
ROUNDS_OF_A_PERIOD = 3
PATIENCE = 20.0  # seconds to wait for something that has to come

WSGIApp = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]
Serve = Callable[[WSGIApp], contextlib.AbstractContextManager[tuple[str, int]]]
"""Serves an app with a thread for each request, for as long as the context lasts. Gives host and port."""


class MeasuringError(SSEBatcherError, RuntimeError):
    """A measurement is impossible or incomplete: an event was lost, or the machine is far too slow."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Of all events of a row, in milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario in one mode. Counts are medians over the rounds; latencies are over all events of all rounds.

    `segments` and `wire_bytes` are None if the system does not say (Linux does).
    """

    scenario: str
    mode: str
    rounds: int
    events: int
    frames: float
    segments: float | None
    body_bytes: float
    wire_bytes: float | None
    latency_ms: Latency
    """From the call of `enqueue` until the client has read the event."""
    added_ms: Latency
    """The same, less that of the unbatched stream."""
    replaced: float


@dataclass(frozen=True, slots=True)
class _Round:
    frames: int
    segments: int | None
    body_bytes: int
    wire_bytes: int | None
    latencies: list[float]  # seconds
    replaced: int


def measure(
    serve: Serve, names: Iterable[str] = MEASURED, progress: Callable[[str], None] = lambda line: None
) -> list[Row]:
    """Measure these scenarios in every mode. `progress` is called with what comes next.

    Takes about a minute for all. Raises `MeasuringError`.
    """
    site = _Site()
    scenarios = [SCENARIOS[name] for name in names]
    rows: list[Row] = []
    with serve(site.app) as address:
        for scenario in scenarios:
            base = None
            for mode in MODES:
                progress(f"{len(rows) + 1}/{len(scenarios) * len(MODES)} {scenario.title}, {mode}")
                row = _measure(site, address, scenario, mode, base)
                base = base or row.latency_ms
                rows.append(row)
    return rows


def machine() -> dict[str, str | int]:
    """Where this is measured, and when."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "date": date.today().isoformat(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "cores": cores,
    }


# -- one round ---------------------------------------------------------------------------------------------------------


def _measure(site: _Site, address: tuple[str, int], scenario: Scenario, mode: str, base: Latency | None) -> Row:
    events = scenario.happen(random.Random(0))
    count = ROUNDS_OF_A_BURST if events[-1].at == 0 else ROUNDS_OF_A_PERIOD
    rounds = [_round(site, address, events, mode) for _ in range(count)]

    def middle(name: str) -> Any:
        values = [getattr(one, name) for one in rounds]
        return None if None in values else statistics.median(values)

    seconds = sorted(latency for one in rounds for latency in one.latencies)
    latency = Latency(*(1000 * seconds[math.ceil(share * len(seconds)) - 1] for share in (0.5, 0.99)))
    base = base or latency
    return Row(
        scenario=scenario.title,
        mode=mode,
        rounds=count,
        events=len(events),
        frames=middle("frames"),
        segments=middle("segments"),
        body_bytes=middle("body_bytes"),
        wire_bytes=middle("wire_bytes"),
        latency_ms=latency,
        added_ms=Latency(latency.p50 - base.p50, latency.p99 - base.p99),
        replaced=middle("replaced"),
    )


def _round(site: _Site, address: tuple[str, int], events: list[Happening], mode: str) -> _Round:
    # Attached, so that each frame is one write: the loop would join frames that come together.
    clients = ClientOptions(transport="attached", compress=[DEFAULT_CHANNEL] if mode == COMPRESSED else ())
    with SSEManager(batching=MODES[mode], clients=clients) as site.manager, _Reader(address) as reader:
        manager = site.manager
        reader.wait_for(1)  # the first block: from here on the stream is live
        before, body_before = reader.traffic(), reader.body_bytes
        called = _enqueue(manager, events)
        deadline = time.monotonic() + PATIENCE
        while (stats := manager.get_stats()).pending_events:
            if time.monotonic() > deadline:
                raise MeasuringError(f"{stats.pending_events} events were not sent within {PATIENCE:.0f} s")
            time.sleep(0.005)
        reader.wait_for(1 + stats.batches)
        after, body_after = reader.traffic(), reader.body_bytes
    _, *frames = reader.blocks[: 1 + stats.batches]
    arrived = [(number, at) for at, block in frames for number in _numbers(block)]
    if len({number for number, _ in arrived}) != len(arrived) or len(arrived) + stats.replaced != len(events):
        raise MeasuringError(f"of {len(events)} events {len(arrived)} arrived, and {stats.replaced} were replaced")
    segments = wire_bytes = None
    if before is not None and after is not None:
        segments = after.segments - before.segments
        wire_bytes = after.bytes - before.bytes + segments * SEGMENT_HEADERS
    return _Round(
        frames=len(frames),
        segments=segments,
        body_bytes=body_after - body_before,
        wire_bytes=wire_bytes,
        latencies=[at - called[number] for number, at in arrived],
        replaced=stats.replaced,
    )


def _enqueue(manager: SSEManager, events: list[Happening]) -> list[float]:
    """Enqueue the events at their times. Returns when each call was made."""
    called = []
    began = time.monotonic()
    for number, (at, event_type, data) in enumerate(events):
        if at:
            time.sleep(max(0.0, began + at - time.monotonic()))
        called.append(time.perf_counter())
        manager.enqueue(event_type, data | {"n": number})
    return called


def _numbers(block: bytes) -> list[int]:
    """The numbers of the events in a block, plain or batch."""
    data = json.loads(block.partition(b"\ndata: ")[2].partition(b"\n")[0])
    events = data["events"] if "batchSize" in data else [data]
    return [event["data"]["n"] if "data" in event else event["n"] for event in events]


class _Site:
    """The app that is served: the stream of the current round's manager."""

    manager: SSEManager

    def app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        status, headers, body = stream(self.manager, environ)
        start_response(status, headers)
        return body


class _Traffic(NamedTuple):
    """What a connection has received."""

    segments: int
    bytes: int


class _Reader:
    """A client: reads a stream on a thread of its own, and notes when each block was complete."""

    def __init__(self, address: tuple[str, int]) -> None:
        self.blocks: list[tuple[float, bytes]] = []
        self.body_bytes = 0
        """The bytes of the body so far, without HTTP's framing. Written by the thread, before the blocks."""
        self._more = threading.Condition()  # guards `blocks` while the thread runs
        self._sock = _connect(address)
        self._connection = http.client.HTTPConnection(*address)
        self._connection.sock = self._sock
        self._thread = threading.Thread(target=self._read, name="sse_batcher report")

    def __enter__(self) -> _Reader:
        self._connection.request("GET", "/", headers={"Accept-Encoding": "gzip"})
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # the thread must not wait for more
        self._thread.join()
        self._connection.close()

    def wait_for(self, count: int) -> None:
        """Wait until this many blocks have come."""
        with self._more:
            if not self._more.wait_for(lambda: len(self.blocks) >= count, PATIENCE):
                raise MeasuringError(f"{len(self.blocks)} of {count} blocks came within {PATIENCE:.0f} s")

    def traffic(self) -> _Traffic | None:
        """What the kernel has counted so far, None if it does not say."""
        if not sys.platform.startswith("linux"):
            return None
        # struct tcp_info of linux/tcp.h: tcpi_bytes_received at 128, tcpi_data_segs_in at 152 (Linux 4.6 or later).
        info = self._sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        if len(info) < 156:
            return None
        return _Traffic(*struct.unpack_from("=I", info, 152), *struct.unpack_from("=Q", info, 128))

    def _read(self) -> None:
        rest = b""
        with contextlib.suppress(OSError, http.client.HTTPException):
            response = self._connection.getresponse()
            is_compressed = response.headers["Content-Encoding"] == "gzip"
            decompress = zlib.decompressobj(wbits=31).decompress if is_compressed else bytes
            while piece := response.read1():
                now = time.perf_counter()
                self.body_bytes += len(piece)
                *blocks, rest = (rest + decompress(piece)).split(b"\n\n")
                with self._more:
                    self.blocks += [(now, block + b"\n\n") for block in blocks]
                    self._more.notify_all()


def _connect(address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(socket.AF_INET)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, MSS)  # before it connects, which sends this to the server
    sock.settimeout(PATIENCE)
    sock.connect(address)
    return sock


# -- as text -----------------------------------------------------------------------------------------------------------

_HEAD = ("scenario", "mode", "frames", "segments", "bytes, body", "bytes, wire", "added, p50", "p99", "replaced")
_WORDS = 2  # so many columns are words, the others numbers


def as_json(rows: Iterable[Row]) -> str:
    """Everything that was measured, and where."""
    return json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows]}, indent=2)


def as_table(rows: Iterable[Row]) -> str:
    """A Markdown table, with percentages against the unbatched stream, and a line that says where it was measured."""
    lines: list[tuple[str, ...]] = [_HEAD]
    for title, group in itertools.groupby(rows, key=lambda row: row.scenario):
        unbatched, *others = group
        lines.append((title, *_cells(unbatched, unbatched)))
        lines += [("", *_cells(row, unbatched)) for row in others]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = [f"{'-' * (width + 1)}{'-' if n < _WORDS else ':'}" for n, width in enumerate(widths)]
    head, *body = [" | ".join(_aligned(line, widths)) for line in lines]
    table = [f"| {head} |", f"|{'|'.join(rule)}|", *(f"| {line} |" for line in body)]
    return "\n".join([*table, "", _where()])


def _where() -> str:
    of = machine()
    return (
        f"Measured on {of['date']}: {of['python']}, {of['system']}, {of['machine']}, {of['cores']} core(s), "
        f"one client on the loopback interface."
    )


def _cells(row: Row, unbatched: Row) -> tuple[str, ...]:
    def against(value: float | None, before: float | None) -> str:
        if value is None or before is None:
            return "?"
        return f"{value:,.0f}" + (f" ({value / before - 1:+.0%})" if value != before else "")

    return (
        row.mode,
        against(row.frames, unbatched.frames),
        against(row.segments, unbatched.segments),
        against(row.body_bytes, unbatched.body_bytes),
        against(row.wire_bytes, unbatched.wire_bytes),
        *("" if row is unbatched else f"{round(value)} ms" for value in (row.added_ms.p50, row.added_ms.p99)),
        f"{row.replaced:,.0f}",
    )


def _aligned(cells: Iterable[str], widths: Iterable[int]) -> Iterator[str]:
    for n, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        yield cell.ljust(width) if n < _WORDS else cell.rjust(width)
