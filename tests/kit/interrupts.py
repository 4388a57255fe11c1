"""Raises an exception in the middle of a call, at each place at which CPython runs signal handlers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import sse_batcher

ROOT = str(Path(sse_batcher.__file__).parent)


class Interrupt(Exception):
    """What the handler raises."""


def interrupt(call: Callable[[], Any], place: int) -> bool:
    """Make a call, and raise at this place of our code, counted from 0. False if the call ends before it is reached.

    A place is where a function of ours begins, and where a function written in C has returned to it: there CPython runs
    signal handlers, and what they raise is raised by the call, as here.
    """
    seen = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal seen
        if event in {"call", "c_return"} and frame.f_code.co_filename.startswith(ROOT):
            if seen == place:
                sys.setprofile(None)
                raise Interrupt
            seen += 1

    sys.setprofile(profile)
    try:
        call()
    except Interrupt:
        return True
    finally:
        sys.setprofile(None)
    return False


def sweep(attempt: Callable[[int], bool], at_least: int = 3) -> None:
    """Call ``attempt(place)`` for each place, until it returns False: the call has ended before this place.

    There must be more than `at_least` places, or too little was interrupted.
    """
    for place in count():
        if not attempt(place):
            break
    assert place > at_least
