"""The dashboard for Grafana and the alerts for Prometheus: they ask for what is exported, and miss nothing of it."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest

from sse_batcher import SSEManager
from sse_batcher.prometheus import SSECollector
from sse_batcher.reasons import BatchReason, EndReason, RefusalReason

from .kit.repository import DOCS
from .kit.services import missing, program

FOLDER = DOCS / "guides" / "deploy"
DASHBOARD = json.loads((FOLDER / "grafana-dashboard.json").read_text())
LEFT_OUT = {"sse_batcher_oldest_stream_seconds"}  # of a healthy process, it is the lease, and says nothing more
"""Metrics that the dashboard does not show."""

FROM_PROMETHEUS = {"job", "instance"}
"""Labels that Prometheus adds to all metrics of a target."""
VALUES = {
    "batches_total": get_args(BatchReason),
    "streams_closed_total": get_args(EndReason),
    "streams_refused_total": get_args(RefusalReason),
    "clients": ("live", "behind"),
    "transport_clients": ("attached", "detached"),
}
"""The values of the labels that are none of a user's own."""


class Query(NamedTuple):
    """An expression, and where it stands."""

    place: str
    text: str

    @property
    def metrics(self) -> dict[str, set[str]]:
        """The names in it, each with the labels that it is asked for."""
        text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', self.text)
        found: dict[str, set[str]] = {}
        for name, labels in re.findall(r"\b(sse_batcher_\w+)(?:\{([^}]*)\})?", text):
            found.setdefault(name, set()).update(re.findall(r"(\w+)\s*[=!]", labels))
        return found

    @property
    def grouped_by(self) -> set[str]:
        """The labels that a sum keeps, and that Grafana writes into the legend."""
        kept = re.findall(r"\bby\s*\(([^)]*)\)", self.text)
        return {label.strip() for labels in kept for label in labels.split(",")}


def panels() -> Iterator[dict[str, Any]]:
    for panel in DASHBOARD["panels"]:
        if panel["type"] != "row":
            yield panel


def alerts() -> list[dict[str, Any]]:
    yaml: Any = importlib.import_module("yaml")  # has no types
    [group] = yaml.safe_load((FOLDER / "prometheus-alerts.yml").read_text())["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


SHOWN = [Query(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
WATCHED = [Query(rule["alert"], rule["expr"]) for rule in alerts()]
every_query = pytest.mark.parametrize("query", [*SHOWN, *WATCHED], ids=lambda query: query.text[:60])


@pytest.fixture(scope="module")
def exported() -> dict[str, set[str]]:
    """The name of each series that the collector exports, with its labels."""
    if importlib.util.find_spec("prometheus_client") is None:
        missing("needs prometheus_client (pip: prometheus-client)")
    found: dict[str, set[str]] = {}
    with SSEManager() as manager:
        for metric in SSECollector(manager, channels=["default"]).collect():
            for sample in metric.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


# -- names and labels --------------------------------------------------------------------------------------------------


@every_query
def test_a_query_names_only_what_is_exported(query: Query, exported: dict[str, set[str]]) -> None:
    assert query.metrics
    for name, labels in query.metrics.items():
        assert name in exported, "no such series: a histogram has _bucket, _sum and _count, a counter _total"
        assert labels <= exported[name] | FROM_PROMETHEUS
        assert query.grouped_by <= exported[name] | FROM_PROMETHEUS


@every_query
def test_a_label_is_compared_with_a_value_that_it_can_have(query: Query) -> None:
    for name, label, value in re.findall(
        r'\b(sse_batcher_\w+)\{[^}]*?\b(reason|state|transport)=~?"([^"]*)"', query.text
    ):
        assert set(value.split("|")) <= set(VALUES[name.removeprefix("sse_batcher_")]), label


@every_query
def test_counters_are_asked_for_their_increase_and_gauges_are_not(query: Query) -> None:
    for name in query.metrics:
        is_counter = name.endswith(("_total", "_bucket", "_sum", "_count"))
        for before in re.findall(rf"(\w*)\(?\s*{name}\b", query.text):
            assert (before in {"rate", "increase"}) == is_counter, name


def test_every_metric_is_on_the_dashboard_or_left_out_on_purpose(exported: dict[str, set[str]]) -> None:
    used = {family_of(name) for query in SHOWN for name in query.metrics}
    families = {family_of(name) for name in exported}
    assert used | LEFT_OUT == families
    assert not used & LEFT_OUT


def family_of(name: str) -> str:
    return re.sub(r"_(bucket|sum|count)$", "", name)


# -- the form of the dashboard -----------------------------------------------------------------------------------------


def test_it_asks_for_a_data_source_when_it_is_imported() -> None:
    [source] = DASHBOARD["__inputs"]
    assert (source["name"], source["type"], source["pluginId"]) == ("DS_PROMETHEUS", "datasource", "prometheus")
    wanted = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    for panel in panels():
        assert panel["datasource"] == wanted, panel["title"]
        assert all(target["datasource"] == wanted for target in panel["targets"]), panel["title"]
    assert all(each["datasource"] == wanted for each in DASHBOARD["templating"]["list"])
    assert DASHBOARD["id"] is None
    assert DASHBOARD["schemaVersion"] >= 36
    needed = {each["id"] for each in DASHBOARD["__requires"] if each["type"] == "panel"}
    assert needed == {panel["type"] for panel in panels()}


def test_its_rows_go_from_the_whole_to_the_parts() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == [
        *("Is it well?", "Traffic", "Clients", "Why streams end", "Refused", "Delays", "Redis", "Memory"),
    ]


def test_no_panel_covers_another() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_all_panels_go_by_the_chosen_job_and_process() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["job", "instance"]
    for query in SHOWN:
        series = re.findall(r"sse_batcher_\w+(?:\{[^}]*\})?", query.text)
        assert all('{job=~"$job", instance=~"$instance"' in each for each in series), query.place


def test_the_legend_names_only_labels_that_the_query_keeps() -> None:
    for panel in panels():
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= Query(panel["title"], target["expr"]).grouped_by, panel["title"]


# -- with the real parser ----------------------------------------------------------------------------------------------


@pytest.mark.external
def test_prometheus_parses_every_query_and_the_metrics(tmp_path: Path, exported: dict[str, set[str]]) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    promtool = program("promtool", package="Debian: prometheus")
    texts = [query.text.replace("$__rate_interval", "5m") for query in SHOWN]
    rules = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(texts)]
    queries = tmp_path / "queries.yml"
    queries.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    for file in (queries, FOLDER / "prometheus-alerts.yml"):
        done = subprocess.run([promtool, "check", "rules", file], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    registry = CollectorRegistry()
    with SSEManager() as manager:
        registry.register(SSECollector(manager, channels=["default"]))
        text = generate_latest(registry)
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, b"")
