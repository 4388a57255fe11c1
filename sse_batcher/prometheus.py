"""`SSECollector`: the manager's counters for Prometheus. Needs the extra: ``pip install 'sse_batcher[prometheus]'``.

Runs in the thread that answers the scrape. Nothing is counted here: each scrape reads `SSEManager.get_stats` once.
Names follow https://prometheus.io/docs/practices/naming/, and the class is what prometheus_client calls a custom
collector: https://prometheus.github.io/client_python/collector/custom/
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import fields
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple, get_args

from .errors import MissingPackageError
from .event import check_channels
from .manager import SSEManager
from .reasons import BatchReason, EndReason, RefusalReason
from .stats import Histogram, ManagerStats

if TYPE_CHECKING:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

PREFIX = "sse_batcher_"


class _Row(NamedTuple):
    """One metric. It is a counter if its name says so by ``_total``, a histogram if the field is one, else a gauge."""

    field: str
    """Of `ManagerStats`."""
    name: str
    help: str
    label: str = ""
    """The name of the label, if the field is a mapping."""
    always: tuple[str, ...] = ()
    """Keys that are exported from the start, with 0: an alert needs a series that exists."""


_REASONS: tuple[str, ...] = get_args(BatchReason)
_ENDS: tuple[str, ...] = get_args(EndReason)
_REFUSALS: tuple[str, ...] = get_args(RefusalReason)

# `batches` and `clients` are sums over a label. If they were series of their own, a sum would count everything twice.
ROWS = (
    _Row("enqueued", "events_enqueued_total", "Events accepted."),
    _Row("replaced", "events_replaced_total", "Events that a newer one of the same key replaced."),
    _Row("failed", "events_failed_total", "Events in batches that the backend did not take."),
    _Row("refused", "calls_refused_total", "Calls that raised; their events were not accepted."),
    _Row("by_reason", "batches_total", "Batches taken by the backend, by why they were closed.", "reason", _REASONS),
    _Row("pending_events", "pending_events", "Events accepted and not yet taken by the backend."),
    _Row("pending_bytes", "pending_bytes", "The data of pending events, plus 200 bytes each and 100 a user."),
    _Row("pending_age", "pending_age_seconds", "How long the oldest pending event has waited, its window included."),
    _Row("publishing_for", "publishing_seconds", "How long the backend has been taking a batch; 0: there is none."),
    _Row("thread_restarts", "thread_restarts_total", "How often a dead thread was started again."),
    _Row("frames", "sent_frames_total", "Frames handed to streams, summed over all clients."),
    _Row("bytes", "sent_bytes_total", "Bytes handed to streams, control blocks and heartbeats included."),
    _Row("saved_frames", "saved_frames_total", "How many frames more it would be, had each event come alone."),
    # No counter: a batch whose own JSON outweighs what it saves makes it less.
    _Row("saved_bytes", "saved_bytes", "How many bytes more it would be. May be negative, and may fall."),
    _Row("clients_by_state", "clients", "Streams that are open now, by whether they keep up.", "state"),
    _Row(
        "clients_by_transport", "transport_clients", "Streams that are open now, by what writes to them.", "transport"
    ),
    _Row("streams_opened", "streams_opened_total", "Streams that were opened, polls included."),
    _Row("streams_closed", "streams_closed_total", "Streams that have ended, by why.", "reason", _ENDS),
    _Row("streams_refused", "streams_refused_total", "Requests that got no stream, by why.", "reason", _REFUSALS),
    _Row("lifetimes", "stream_lifetime_seconds", "For how long streams were open that have ended, without polls."),
    _Row("oldest_stream", "oldest_stream_seconds", "For how long the oldest open stream has been open."),
    _Row("client_lag", "client_lag_seconds", "Age of the oldest frame that an open stream was not handed yet."),
    _Row("overflows", "client_overflows_total", "How often a client fell so far behind that it reads the history."),
    _Row("replays", "client_replays_total", "Streams that continued where the client had stopped."),
    _Row("gaps", "client_gaps_total", "How often a client got sse_gap: it may have missed something."),
    _Row(
        "undone", "takeovers_undone_total", "Streams that had to stay attached although they were about to be detached."
    ),
    _Row("loop_delay", "loop_delay_seconds", "By how much the loop of the detached streams is late, 5 times a second."),
    _Row("gil_yields", "gil_yields_total", "How often the loop has paused to give other threads the GIL."),
    _Row("gil_yielded", "gil_yielded_seconds_total", "How long these pauses took."),
    _Row("history_frames", "history_frames", "Frames kept for clients that return or are behind."),
    _Row("history_bytes", "history_bytes", "Memory that the frames kept take, about."),
    _Row("history_age", "history_age_seconds", "Age of the oldest frame kept."),
    _Row("backend_silent", "backend_silent_seconds", "For how long an answer of the backend has been due."),
    _Row("backend_answered", "backend_answered_seconds", "How long ago the backend has answered."),
    _Row(
        "ignored",
        "backend_ignored_total",
        "Entries in the Redis stream that were ignored: other programs wrote them, or they could not be read.",
    ),
    _Row("signals_dropped", "signals_dropped_total", "Signals not sent and log lines not written: too many at once."),
)
_CHANNELS = _Row("clients_by_channel", "channels", "Channels that have a client now.")
_CHANNEL_CLIENTS = _Row("clients_by_channel", "channel_clients", "Streams of a channel that are open now.", "channel")


_HISTOGRAMS = frozenset(item.name for item in fields(ManagerStats) if item.default_factory is Histogram)


class SSECollector:
    """Exports what `SSEManager.get_stats` counts to Prometheus: register it with a registry of prometheus_client.

    `manager`
        the manager to export, with Flask ``sse.manager``. It is held weakly: the collector keeps no manager alive that
        the app has dropped, and then exports nothing.
    `channels`
        1 to 100 names of channels whose numbers of clients are exported, as ``sse_batcher_channel_clients``, also if
        they are 0. By default none: each value of a label is a series forever, and there are often as many channels as
        users. How many channels have a client is always exported, as ``sse_batcher_channels``. A stream of several
        channels is counted in each, so these do not add up to ``sse_batcher_clients``.

    Every other field is exported with its unit, counters as ``_total``, batches and streams that were closed or refused
    by ``reason``, clients by ``state`` (``live``, ``behind``), and what is a `Histogram` as one. Raises
    `MissingPackageError` if prometheus_client is not installed, and `InvalidEventError` for invalid channels.
    Thread-safe, and starts no thread.

    A registry takes one such collector, and raises ``ValueError`` for a second: use one registry for each app.

    The counters are those of the process that answers. So Prometheus needs a target for each process, as with
    ``gunicorn --workers 1``. If several workers share a port, each scrape meets another one, and the counters jump:
    give each worker a port of its own, by ``prometheus_client.start_http_server`` after the fork. The multiprocess mode
    of prometheus_client does not help, because it leaves out custom collectors.

    >>> REGISTRY.register(SSECollector(sse.manager))
    """

    def __init__(self, manager: SSEManager, *, channels: Iterable[str] = ()) -> None:
        _families()  # a missing package is an error now, not at the first scrape
        self._manager = weakref.ref(manager)
        names = channels if isinstance(channels, str) else tuple(channels)
        self._channels = check_channels(names) if names != () else ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._manager() or 'a manager that is gone'}>"

    def describe(self) -> list[Metric]:
        """Return the names, types and help texts of what `collect` returns, without values. Ignores the manager."""
        rows = (*ROWS, _CHANNELS, _CHANNEL_CLIENTS) if self._channels else (*ROWS, _CHANNELS)
        return [_histogram(row, None) if row.field in _HISTOGRAMS else _metric(row, {}) for row in rows]

    def collect(self) -> list[Metric]:
        """Return all metrics, with their values at one moment, in seconds and bytes; none once the manager is gone."""
        manager = self._manager()
        if manager is None:
            return []
        stats = manager.get_stats()
        metrics = []
        for row in ROWS:
            value = getattr(stats, row.field)
            if isinstance(value, Histogram):
                metrics.append(_histogram(row, value))
            else:
                metrics.append(_metric(row, {**dict.fromkeys(row.always, 0), **value} if row.label else {"": value}))
        clients = stats.clients_by_channel
        metrics.append(_metric(_CHANNELS, {"": len(clients)}))
        if self._channels:
            metrics.append(_metric(_CHANNEL_CLIENTS, {name: clients.get(name, 0) for name in self._channels}))
        return metrics


def _metric(row: _Row, values: Mapping[str, float]) -> Metric:
    """A metric with these values by label; ``""`` is that of a metric without one."""
    counter, gauge, _ = _families()
    family = counter if row.name.endswith("_total") else gauge
    metric = family(PREFIX + row.name, row.help, labels=[row.label] if row.label else [])
    for label, value in values.items():
        metric.add_metric([label] if row.label else [], value)
    return metric


def _histogram(row: _Row, value: Histogram | None) -> Metric:
    """A histogram, without samples for None. Prometheus counts each value in all buckets whose limit it is within."""
    _, _, family = _families()
    metric = family(PREFIX + row.name, row.help)
    if value is not None and value.buckets:
        limits = [_limit(text) for text in value.buckets]
        metric.add_metric([], list(zip(limits, accumulate(value.buckets.values()), strict=True)), value.sum)
    return metric


def _limit(text: str) -> str:
    """Return a limit as prometheus_client writes that of its own histograms: ``1.0``, not ``1``."""
    return text if text == "+Inf" else repr(float(text))


def _families() -> tuple[type[CounterMetricFamily], type[GaugeMetricFamily], type[HistogramMetricFamily]]:
    try:
        from prometheus_client.core import (  # noqa: PLC0415
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )
    except ImportError as error:
        raise MissingPackageError(
            "sse_batcher.prometheus needs prometheus_client: pip install 'sse_batcher[prometheus]'",
            name="prometheus_client",
        ) from error
    return CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
