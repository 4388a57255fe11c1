"""`doctor` against real servers and proxies: it finds the fault that each set-up has, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from sse_batcher.doctor.client import Target
from sse_batcher.doctor.command import examine_url
from sse_batcher.doctor.findings import Finding

from .kit.doctor_setups import HEALTHY, SETUPS, Workshop, events
from .kit.servers import SERVERS, serving

pytestmark = [pytest.mark.external, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        workshop = Workshop(tmp_path_factory.mktemp("workshop"), stack)
        patch.setenv("SSL_CERT_FILE", str(workshop.trusted))
        yield workshop


def findings(url: str) -> list[Finding]:
    return examine_url(Target(url)).findings


@pytest.mark.parametrize("name", SETUPS)
def test_the_fault_that_is_there_is_found_and_no_other(workshop: Workshop, name: str) -> None:
    setup = SETUPS[name]
    with setup.start(workshop) as url, ThreadPoolExecutor(1) as pool:
        is_there = pool.submit(setup.is_there, url)
        found = findings(url)
        assert is_there.result()
    print(name, *found, sep="\n")
    assert [(finding.code, finding.level) for finding in found] == [(setup.code, setup.level)]
    said = f"{found[0].what} {found[0].do}"
    assert [word for word in setup.names if word not in said] == [], said


def test_an_app_alone_has_none_of_the_faults(workshop: Workshop) -> None:
    url = events(workshop.app())
    with ThreadPoolExecutor(8) as pool:
        looks = {setup.is_there for setup in SETUPS.values()}
        assert not any(pool.map(lambda is_there: is_there(url), looks))


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_set_up_gets_a_clean_bill(workshop: Workshop, name: str) -> None:
    with HEALTHY[name](workshop) as url:
        assert findings(url) == []


@pytest.mark.parametrize("name", SERVERS)
def test_a_healthy_server_gets_a_clean_bill(tmp_path: Path, name: str) -> None:
    with serving(SERVERS[name], tmp_path) as server:
        assert findings(events(server)) == []
