"""Nothing is lost silently in one process, without sockets: interleavings drawn at random, and each with one switch."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import Phase, settings

from .kit.checker import Violation
from .kit.interleavings import (
    MEANWHILE,
    WAITING,
    Interleavings,
    Seat,
)


@pytest.mark.parametrize(("poll", "for_user"), [(False, False), (False, True), (True, False), (True, True)])
def test_of_all_interleavings_with_one_switch_none_breaks_the_promise(poll: bool, for_user: bool) -> None:
    pairs = [] if poll or for_user else [*product(MEANWHILE, MEANWHILE)]
    for waiting, things, first, places in product(WAITING, [*product(MEANWHILE), *pairs], BOTH, range(12)):
        machine = Interleavings()
        try:
            machine.at_once(0, waiting, things, first, [places], for_user, poll)
        except Violation as violation:
            raise AssertionError(f"at_once(0, {waiting}, {things}, {first}, [{places}], ...)") from violation
        finally:
            machine.teardown()


BOTH = (True, False)


@pytest.mark.timeout(180)  # to find a small example, if there is one
class TestInterleavings(Interleavings.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(
        max_examples=500,
        stateful_step_count=12,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.reuse, Phase.generate, Phase.shrink],
    )


class CompressedInterleavings(Interleavings):
    """The same with compressed streams, beside one that is not."""

    VIEWERS = (Seat(("a",), None), Seat(("a", "b"), None), Seat(("b",), None, hub=1), Seat(("a",), 7))
    COMPRESS = ("a", "b")


@pytest.mark.timeout(180)
class TestCompressedInterleavings(CompressedInterleavings.TestCase):  # type: ignore[misc, valid-type]
    settings = settings(TestInterleavings.settings, max_examples=100)
