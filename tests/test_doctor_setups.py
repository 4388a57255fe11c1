"""`doctor` against real servers and proxies: it finds the fault that each set-up has, and none in healthy ones.

It mostly waits, for heartbeats. So a few set-ups run side by side, and each test waits for its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import pytest

from sse_batcher.doctor.client import Target
from sse_batcher.doctor.command import examine_url
from sse_batcher.doctor.findings import Finding

from .kit.commands import environment
from .kit.doctor_setups import HEALTHY, SETUPS, Setup, Start, Workshop, events
from .kit.http_proxy import Meddling, meddling_proxy
from .kit.repository import ROOT
from .kit.servers import APPS
from .kit.waiting import TRIES, tried

pytestmark = [pytest.mark.external, pytest.mark.timeout(90)]

SIDE_BY_SIDE = 6


class Visit(NamedTuple):
    """What the doctor said of a set-up, and whether the fault was there."""

    findings: list[Finding]
    facts: Mapping[str, Any]
    has_fault: bool


def visit_faulty(workshop: Workshop, setup: Setup) -> Visit:
    """Run a set-up with a fault, the doctor, and at the same time what looks for the fault."""
    with setup.start(workshop) as url, ThreadPoolExecutor(1) as pool:

        def visit() -> Visit:
            looks = pool.submit(setup.is_there, url)
            report = examine_url(Target(url, is_insecure=True))
            has_fault = looks.result() or setup.is_there(url)  # on a busy machine, the first look may be too short
            return Visit(report.findings, report.facts, has_fault)

        expected = [(setup.code, setup.level)]
        return tried(visit, lambda visit: visit.has_fault and codes(visit.findings) == expected)


def visit_healthy(workshop: Workshop, start: Start) -> Visit:
    """Run a set-up without a fault, and the doctor."""
    with start(workshop) as url:
        report = tried(
            lambda: examine_url(Target(url, is_insecure=True)),
            lambda report: not report.findings and seen(report.facts) == ALL_SEEN,
        )
        return Visit(report.findings, report.facts, False)


def codes(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    return [(finding.code, finding.level) for finding in findings]


ALL_SEEN = (True, 3, True, "sse_gap", "sse_gap", "sse_open")


def seen(facts: Mapping[str, Any]) -> tuple[Any, ...]:
    """What shows whether something was left out."""
    listened, resumed = facts["listened"] or {}, facts["resumed"] or {}
    return (
        listened.get("heartbeats", 0) + listened.get("events", 0) >= 4,
        facts["streams_beside"],
        facts["answers_beside"],
        facts["by_header"],
        facts["by_query"],
        resumed.get("type"),
    )


Visits = Callable[[str], Visit]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with ExitStack() as stack:
        yield Workshop(tmp_path_factory.mktemp("workshop"), stack)


@pytest.fixture(scope="module")
def visits(workshop: Workshop, request: pytest.FixtureRequest) -> Iterator[Visits]:
    """Return the visit to the set-up with this name. All that this run of pytest needs begin now."""
    jobs: dict[str, Callable[[Workshop], Visit]] = {
        **{name: partial(visit_healthy, start=start) for name, start in HEALTHY.items()},
        **{name: partial(visit_faulty, setup=setup) for name, setup in SETUPS.items()},
    }
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    tests = [item for item in items if item.module is request.module]
    names = [str(test.callspec.params["name"]) for test in tests if "visits" in test.fixturenames]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        begun = {name: pool.submit(jobs[name], workshop) for name in names}
        yield lambda name: begun[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", SETUPS)
def test_the_fault_that_is_there_is_found_and_no_other(visits: Visits, name: str) -> None:
    setup, (findings, _, has_fault) = SETUPS[name], visits(name)
    assert has_fault, findings
    assert codes(findings) == [(setup.code, setup.level)], findings
    said = f"{findings[0].what} {findings[0].do}"
    assert [word for word in setup.names if word not in said] == [], said


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_set_up_gets_a_clean_bill(visits: Visits, name: str) -> None:
    findings, facts, _ = visits(name)
    assert findings == []
    assert seen(facts) == ALL_SEEN


def test_an_app_alone_has_none_of_the_faults(workshop: Workshop) -> None:
    url = events(workshop.app())
    with ThreadPoolExecutor(8) as pool:
        looks = {setup.is_there for setup in SETUPS.values()}
        assert not any(pool.map(lambda is_there: all(is_there(url) for _ in range(TRIES)), looks))


def test_a_server_that_is_slow_to_start_is_not_taken_for_a_proxy_that_buffers(workshop: Workshop) -> None:

    def findings() -> list[Finding]:
        with meddling_proxy(workshop.app().port, Meddling(delays_first=3)) as url:
            return examine_url(Target(f"{url}/events", seconds=2)).findings

    assert any(findings() == [] for _ in range(TRIES))


def flask_sse_doctor(workshop: Workshop, name: str) -> tuple[str, int, Any]:
    """Run the command in a process of its own until it finds the fault alone. The URL, exit status and report."""
    command = [sys.executable, "-m", "flask", "--app", "serverapp", "sse", "doctor", "--insecure", "--json"]
    of_app = environment(PYTHONPATH=os.pathsep.join([str(ROOT), str(APPS)]))
    with SETUPS[name].start(workshop) as url:

        def examined() -> tuple[str, int, Any]:
            done = subprocess.run([*command, url], env=of_app, capture_output=True, timeout=60, check=False)
            return url, done.returncode, json.loads(done.stdout)

        def is_right(found: tuple[str, int, Any]) -> bool:
            _, status, report = found
            from_outside = any(finding["code"] == SETUPS[name].code for finding in report["findings"])
            return from_outside and status == (SETUPS[name].level == "fault")

        return tried(examined, is_right)


def test_flask_sse_doctor_finds_it_and_its_exit_status_counts_faults(workshop: Workshop) -> None:
    statuses = {"Caddy that buffers": 1, "nginx with gzip": 0}
    with ThreadPoolExecutor() as pool:
        for name, (url, status, report) in zip(
            statuses, pool.map(lambda name: flask_sse_doctor(workshop, name), statuses), strict=True
        ):
            assert (report["url"], report["ok"], status) == (url, statuses[name] == 0, statuses[name])
            found = [(finding["code"], finding["level"]) for finding in report["findings"]]
            assert (SETUPS[name].code, SETUPS[name].level) in found
