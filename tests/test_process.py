"""One of a thing for each process."""

from __future__ import annotations

import os
import sys

import pytest

from sse_batcher.process import PerProcess

from .conftest import AsProcess


def count_asking(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    asked: list[None] = []
    getpid = os.getpid
    monkeypatch.setattr(os, "getpid", lambda: asked.append(None) or getpid())
    return asked


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux wipes a page in a forked child")
def test_the_system_is_asked_for_the_process_id_once(monkeypatch: pytest.MonkeyPatch) -> None:
    things = PerProcess(object)
    mine = things.get()
    asked = count_asking(monkeypatch)
    assert all(things.get() is mine for _ in range(10))
    assert asked == []


def test_where_the_kernel_does_not_tell_of_a_fork_the_system_is_asked_each_time(
    monkeypatch: pytest.MonkeyPatch, as_process: AsProcess
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    things = PerProcess(object)
    with as_process(-1), monkeypatch.context() as patch:
        asked = count_asking(patch)
        mine = things.get()
        assert all(things.get() is mine for _ in range(10))
        assert len(asked) == 11
        patch.setattr(os, "getpid", lambda: -2)
        assert things.get() is not mine


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_and_its_child_have_things_of_their_own() -> None:
    things = PerProcess(os.getpid)
    assert things.get() == os.getpid()
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return
    ok = things.get() == os.getpid()
    grandchild = os.fork()
    if not grandchild:
        os._exit(things.get() != os.getpid())
    os._exit(not ok or os.waitpid(grandchild, 0)[1] != 0)
