"""`doctor` against real servers and proxies: it finds the fault that each set-up has, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from .kit.doctor_setups import SETUPS, Workshop, events

pytestmark = [pytest.mark.external, pytest.mark.timeout(60)]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        workshop = Workshop(tmp_path_factory.mktemp("workshop"), stack)
        patch.setenv("SSL_CERT_FILE", str(workshop.trusted))
        yield workshop


@pytest.mark.parametrize("name", SETUPS)
def test_the_fault_of_a_set_up_is_there(workshop: Workshop, name: str) -> None:
    with SETUPS[name].start(workshop) as url:
        assert SETUPS[name].is_there(url)


def test_an_app_alone_has_none_of_the_faults(workshop: Workshop) -> None:
    url = events(workshop.app())
    with ThreadPoolExecutor(8) as pool:
        looks = {setup.is_there for setup in SETUPS.values()}
        assert not any(pool.map(lambda is_there: is_there(url), looks))
