"""The collector for Prometheus: with the real prometheus_client, what a scrape reads is what the manager counts."""

from __future__ import annotations

import gc
import importlib.util
import re
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args

import pytest
from flask import Flask
from flask.typing import ResponseReturnValue

from sse_batcher import SSE, BatchOptions, InvalidEventError, MissingPackageError, SSEManager
from sse_batcher.prometheus import PREFIX, ROWS, SSECollector
from sse_batcher.reasons import BatchReason, EndReason, RefusalReason
from sse_batcher.stats import Histogram, ManagerStats

from .kit.services import missing
from .kit.sse_parser import take_events
from .kit.waiting import TIMEOUT, wait_until

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

SUMS = {"batches": "by_reason", "clients": "clients_by_state"}
"""Fields whose value is the sum over the labels of another field."""
APART = {"clients_by_channel"}
"""The field of which the number of channels is given, and the values of chosen channels."""


@pytest.fixture
def registry() -> CollectorRegistry:
    if importlib.util.find_spec("prometheus_client") is None:
        missing("needs prometheus_client (pip: prometheus-client)")
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


@pytest.fixture
def manager() -> Iterator[SSEManager]:
    with SSEManager(batching=BatchOptions(batch_window=10, max_batch_size=3)) as manager:
        yield manager


def scrape(registry: CollectorRegistry) -> dict[str, Metric]:
    """What Prometheus reads, by name. Counters have the name without ``_total``, their samples with it."""
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    return {metric.name: metric for metric in text_string_to_metric_families(generate_latest(registry).decode())}


def samples(registry: CollectorRegistry) -> dict[str, dict[str, float]]:
    """The values by full name, and by the value of the label, which is ``""`` if there is none.

    Without histograms.
    """
    found: dict[str, dict[str, float]] = {}
    for metric in scrape(registry).values():
        for sample in metric.samples if metric.type != "histogram" else ():
            assert len(sample.labels) <= 1
            found.setdefault(sample.name, {})["".join(sample.labels.values())] = sample.value
    return found


def use(manager: SSEManager) -> None:
    """Have as many counters as possible be something else than 0."""
    cursor = manager.cursor()
    with closing(manager.subscribe(["a", "b"])) as returning:
        take_events(returning, 1)
    for number in range(4):
        manager.enqueue("log", {"number": number, "server": number % 2}, channel="a")
    manager.enqueue("error", "critical", channel="a")
    manager.enqueue("log", "waits", channel="a")
    with pytest.raises(InvalidEventError):
        manager.enqueue("", 1)
    take_events(manager.subscribe(["a", "b"], cursor), 2)
    take_events(manager.subscribe(["a"], "unknown-1"), 1)
    # A batch counts when the sink has returned, and a client may have it before that.
    wait_until(lambda: manager.get_stats().batches == 2, "both batches are counted")


# -- values ------------------------------------------------------------------------------------------------------------


def test_every_field_of_the_stats_is_collected_once() -> None:
    told = [row.field for row in ROWS] + [*SUMS] + [*APART]
    assert sorted(told) == sorted(field.name for field in fields(ManagerStats))
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_what_is_scraped_is_what_the_manager_counts(
    manager: SSEManager, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(manager)
    registry.register(SSECollector(manager, channels=["b", "nobody"]))
    stats = manager.get_stats()
    monkeypatch.setattr(manager, "get_stats", lambda: stats)  # the same moment
    values = samples(registry)
    for row in ROWS:
        expected: Any = getattr(stats, row.field)
        if isinstance(expected, Histogram):
            continue
        told = values.pop(PREFIX + row.name)
        assert told == ({**dict.fromkeys(row.always, 0), **expected} if row.label else {"": expected}), row.field
    assert values == {"sse_batcher_channels": {"": 2}, "sse_batcher_channel_clients": {"b": 1, "nobody": 0}}
    zero = {name for name, value in stats.as_dict().items() if not value}
    never = {"failed", "publishing_for", "thread_restarts", "overflows", "undone", "signals_dropped", "ignored"}
    never |= {"backend_silent", "backend_answered", "client_lag", "gil_yields", "gil_yielded"}
    assert zero <= never


PROMISED = {
    "events_enqueued_total": "enqueued",
    "events_replaced_total": "replaced",
    "events_failed_total": "failed",
    "calls_refused_total": "refused",
    "pending_events": "pending_events",
    "pending_bytes": "pending_bytes",
    "pending_age_seconds": "pending_age",
    "publishing_seconds": "publishing_for",
    "thread_restarts_total": "thread_restarts",
    "sent_frames_total": "frames",
    "sent_bytes_total": "bytes",
    "saved_frames_total": "saved_frames",
    "saved_bytes": "saved_bytes",
    "streams_opened_total": "streams_opened",
    "oldest_stream_seconds": "oldest_stream",
    "client_lag_seconds": "client_lag",
    "client_overflows_total": "overflows",
    "client_replays_total": "replays",
    "client_gaps_total": "gaps",
    "takeovers_undone_total": "undone",
    "gil_yields_total": "gil_yields",
    "gil_yielded_seconds_total": "gil_yielded",
    "history_frames": "history_frames",
    "history_bytes": "history_bytes",
    "history_age_seconds": "history_age",
    "backend_silent_seconds": "backend_silent",
    "backend_answered_seconds": "backend_answered",
    "backend_ignored_total": "ignored",
    "signals_dropped_total": "signals_dropped",
}
"""Dashboards and alerts go by these names: they stay."""


def test_each_field_has_the_name_that_was_promised(
    manager: SSEManager, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbered: dict[str, Any] = {field: number for number, field in enumerate(PROMISED.values(), 1000)}
    labelled: dict[str, Any] = {
        "by_reason": {"manual": 1, "new": 2},
        "clients_by_state": {"live": 3, "behind": 4},
        "clients_by_transport": {"attached": 7, "detached": 0},
        "clients_by_channel": {"a": 5, "b": 6},
        "streams_closed": {"left": 8, "lease": 9},
        "streams_refused": {"limit": 10, "forbidden": 11},
    }
    monkeypatch.setattr(manager, "get_stats", lambda: ManagerStats(**numbered, **labelled))
    registry.register(SSECollector(manager, channels=["b"]))
    values = samples(registry)
    batches = values.pop("sse_batcher_batches_total")
    assert {reason: count for reason, count in batches.items() if count} == {"manual": 1, "new": 2}
    for name in ("streams_closed", "streams_refused"):
        counts = values.pop(f"sse_batcher_{name}_total")
        assert {reason: count for reason, count in counts.items() if count} == labelled[name]
    assert values.pop("sse_batcher_clients") == {"live": 3, "behind": 4}
    assert values.pop("sse_batcher_transport_clients") == {"attached": 7, "detached": 0}
    assert values.pop("sse_batcher_channels") == {"": 2}
    assert values.pop("sse_batcher_channel_clients") == {"b": 6}
    assert values == {PREFIX + name: {"": numbered[field]} for name, field in PROMISED.items()}


def test_the_values_of_all_labels_add_up_to_the_field_of_the_stats(manager: SSEManager) -> None:
    use(manager)
    stats = manager.get_stats()
    for total, parts in SUMS.items():
        assert getattr(stats, total) == sum(getattr(stats, parts).values()) > 0, total


@pytest.mark.parametrize(
    ("name", "reasons"),
    [("batches", BatchReason), ("streams_closed", EndReason), ("streams_refused", RefusalReason)],
)
def test_all_reasons_are_there_from_the_start(
    manager: SSEManager, registry: CollectorRegistry, name: str, reasons: Any
) -> None:
    registry.register(SSECollector(manager))
    assert samples(registry)[f"sse_batcher_{name}_total"] == dict.fromkeys(get_args(reasons), 0)


def test_a_histogram_counts_each_value_in_all_buckets_that_it_is_within(
    manager: SSEManager, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    lifetimes = Histogram(buckets={"0.5": 2, "60": 3, "+Inf": 1}, sum=200.5)
    monkeypatch.setattr(manager, "get_stats", lambda: ManagerStats(lifetimes=lifetimes))
    registry.register(SSECollector(manager))
    metric = scrape(registry)["sse_batcher_stream_lifetime_seconds"]
    assert metric.type == "histogram"
    found = [(sample.name.rpartition("_")[2], *sample.labels.values(), sample.value) for sample in metric.samples]
    assert sorted(found) == [
        ("bucket", "+Inf", 6),
        ("bucket", "0.5", 2),
        ("bucket", "60.0", 5),
        ("count", 6),
        ("sum", 200.5),
    ]


@pytest.mark.parametrize("field", [row for row in ROWS if row.field in ("lifetimes", "loop_delay")])
def test_histograms_are_there_from_the_start(manager: SSEManager, registry: CollectorRegistry, field: Any) -> None:
    registry.register(SSECollector(manager))
    limits = getattr(manager.get_stats(), field.field).buckets
    (metric,) = (metric for metric in scrape(registry).values() if metric.name == PREFIX + field.name)
    values = {sample.labels.get("le"): sample.value for sample in metric.samples if sample.name.endswith("_bucket")}
    assert [float(limit) for limit in limits] == [float(str(limit)) for limit in values]
    assert len(limits) > 10
    assert set(values.values()) == {0}


def test_bytes_that_are_saved_may_be_less_than_nothing(
    manager: SSEManager, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manager, "get_stats", lambda: ManagerStats(saved_bytes=-5))
    registry.register(SSECollector(manager))
    metric = scrape(registry)["sse_batcher_saved_bytes"]
    assert (metric.type, metric.samples[0].value) == ("gauge", -5)


def test_a_scrape_after_the_shutdown_still_tells_the_counts(manager: SSEManager, registry: CollectorRegistry) -> None:
    registry.register(SSECollector(manager))
    use(manager)
    assert manager.shutdown(TIMEOUT)
    values = samples(registry)
    assert values["sse_batcher_events_enqueued_total"] == {"": 6}
    assert values["sse_batcher_batches_total"]["shutdown"] == 1


# -- names -------------------------------------------------------------------------------------------------------------

UNITS = ("bytes", "seconds")
OTHER_UNITS = r"_(ms|s|sec|milliseconds|minutes|hours|days|kb|mb|kilobytes|megabytes|bits|percent)(_|$)"


def test_names_and_help_texts_are_as_promtool_wants_them(manager: SSEManager, registry: CollectorRegistry) -> None:
    registry.register(SSECollector(manager, channels=["a"]))
    for name, metric in scrape(registry).items():
        full_names = {sample.name for sample in metric.samples}
        endings = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}[metric.type]
        assert full_names == {name + ending for ending in endings}, name
        assert re.fullmatch(r"sse_batcher(_[a-z]+)+", name)
        assert not name.endswith(("_total", "_count", "_sum", "_bucket", "_info", "_created"))
        assert not re.search(r"_(counter|gauge|metric|histogram|summary)(_|$)", name)
        assert not re.search(OTHER_UNITS, name)
        assert re.fullmatch(r"[A-Z].{10,}\.", metric.documentation), name
        labels = {label for sample in metric.samples for label in sample.labels}
        assert labels <= {"reason", "state", "transport", "channel", "le"}
        assert not any(label in name.split("_") for label in labels - {"channel", "transport"}), name


def test_what_has_a_unit_says_it_in_its_name() -> None:
    for row in ROWS:
        unit = {"float": "seconds", "Histogram": "seconds"}.get(str(ManagerStats.__dataclass_fields__[row.field].type))
        unit = "bytes" if row.field.endswith("bytes") else unit
        last = row.name.removesuffix("_total").rpartition("_")[2]
        assert last == unit if unit else last not in UNITS, row.field


def test_the_openmetrics_format_parses_too(manager: SSEManager, registry: CollectorRegistry) -> None:
    from prometheus_client.openmetrics.exposition import generate_latest
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    registry.register(SSECollector(manager, channels=['odd "\\ name']))
    use(manager)
    text = generate_latest(registry).decode()  # type: ignore[no-untyped-call]
    parsed = list(text_string_to_metric_families(text))  # type: ignore[no-untyped-call]
    assert len(parsed) == len(ROWS) + 2
    (metric,) = (metric for metric in parsed if metric.name == "sse_batcher_channel_clients")
    assert metric.samples[0].labels == {"channel": 'odd "\\ name'}


@pytest.mark.parametrize("channels", [(), ("a", "b")])
def test_what_is_described_is_what_is_collected(
    manager: SSEManager, registry: CollectorRegistry, channels: tuple[str, ...]
) -> None:
    collector = SSECollector(manager, channels=channels)
    registry.register(collector)
    described = [(metric.name, metric.type, metric.documentation) for metric in collector.describe()]
    assert described == [(metric.name, metric.type, metric.documentation) for metric in collector.collect()]
    assert not any(metric.samples for metric in collector.describe())


def test_registering_does_not_collect(
    manager: SSEManager, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prometheus_client import CollectorRegistry

    monkeypatch.setattr(manager, "get_stats", lambda: pytest.fail("collected"))
    CollectorRegistry(auto_describe=True).register(SSECollector(manager))


def test_a_second_collector_in_a_registry_is_refused(manager: SSEManager, registry: CollectorRegistry) -> None:
    first = SSECollector(manager)
    registry.register(first)
    with pytest.raises(ValueError, match="sse_batcher_events_enqueued"):
        registry.register(SSECollector(SSEManager()))
    registry.unregister(first)
    registry.register(SSECollector(manager))


# -- channels ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("channels", ["default", "", ["*"], [""], [1], [str(number) for number in range(101)]])
def test_channels_that_cannot_be_are_refused_when_the_collector_is_made(manager: SSEManager, channels: Any) -> None:
    with pytest.raises(InvalidEventError):
        SSECollector(manager, channels=channels)


def test_channels_come_from_any_iterable_each_once(manager: SSEManager, registry: CollectorRegistry) -> None:
    registry.register(SSECollector(manager, channels=iter(["b", "a", "b"])))
    assert samples(registry)["sse_batcher_channel_clients"] == {"b": 0, "a": 0}


def test_a_thousand_channels_make_no_further_series(manager: SSEManager, registry: CollectorRegistry) -> None:
    registry.register(SSECollector(manager))
    before = {name: set(values) for name, values in samples(registry).items()}
    clients = [manager.subscribe([f"user-{number}"]) for number in range(1000)]
    after = samples(registry)
    assert {name: set(values) for name, values in after.items()} == before
    assert after["sse_batcher_channels"] == {"": 1000}
    assert after["sse_batcher_clients"] == {"live": len(clients), "behind": 0}


# -- lifetime and threads ----------------------------------------------------------------------------------------------


def test_the_collector_does_not_keep_a_dropped_manager_alive(registry: CollectorRegistry) -> None:
    manager = SSEManager()
    registry.register(SSECollector(manager, channels=["a"]))
    assert samples(registry)["sse_batcher_events_enqueued_total"] == {"": 0}
    dropped = weakref.ref(manager)
    del manager
    gc.collect()
    assert dropped() is None
    assert scrape(registry) == {}


def test_neither_registering_nor_scraping_starts_a_thread(registry: CollectorRegistry) -> None:
    before = threading.active_count()
    manager = SSEManager()
    registry.register(SSECollector(manager))
    scrape(registry)
    assert threading.active_count() == before


def test_scrapes_at_once_while_events_and_clients_come_read_what_fits_together(
    manager: SSEManager, registry: CollectorRegistry
) -> None:
    registry.register(SSECollector(manager, channels=["a"]))
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with closing(manager.subscribe(["a"])) as client:
                manager.enqueue("log", 1, channel="a")
                take_events(client, 1)

    failures: list[BaseException] = []

    def read() -> None:
        try:
            last: dict[str, dict[str, float]] = {}
            for _ in range(30):
                values = samples(registry)
                accepted = values["sse_batcher_events_enqueued_total"][""]
                assert accepted >= values["sse_batcher_pending_events"][""]
                for name, by_label in last.items():
                    if name.endswith("_total"):
                        assert all(values[name][label] >= value for label, value in by_label.items()), name
                last = values
        except BaseException as error:
            failures.append(error)

    working = [threading.Thread(target=work) for _ in range(2)]
    reading = [threading.Thread(target=read) for _ in range(3)]
    for thread in working + reading:
        thread.start()
    for thread in reading:
        thread.join(30)
    stopped.set()
    for thread in working:
        thread.join(30)
    assert failures == []
    assert not any(thread.is_alive() for thread in working + reading)


# -- as people use it --------------------------------------------------------------------------------------------------


def test_a_flask_view_serves_the_metrics_of_its_app(registry: CollectorRegistry) -> None:
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    app = Flask(__name__)
    sse = SSE(app)
    registry.register(SSECollector(sse.manager))

    @app.get("/metrics")
    def metrics() -> ResponseReturnValue:
        return generate_latest(registry), {"Content-Type": CONTENT_TYPE_LATEST}

    sse.enqueue("log", 1)
    answer = app.test_client().get("/metrics")
    assert answer.content_type == CONTENT_TYPE_LATEST
    assert "sse_batcher_events_enqueued_total 1.0" in answer.text.splitlines()
    assert sse.manager.shutdown(TIMEOUT)


def test_a_missing_package_is_an_error_when_the_collector_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = [name for name in sys.modules if name.partition(".")[0] == "prometheus_client"]
    for name in {"prometheus_client", *loaded}:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingPackageError, match=re.escape("pip install 'sse_batcher[prometheus]'")) as caught:
        SSECollector(SSEManager())
    assert isinstance(caught.value, ImportError)
    assert caught.value.name == "prometheus_client"
