"""Detached streams under each version of the servers that is known to let go of a connection.

What they are taken from is no public API of theirs. CI has the oldest and what is installed, which is the newest;
``--all-versions`` brings those between, too.
"""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from .kit.servers import GTHREAD, SERVERS, Kind, Stream, detached, gunicorn, serving
from .kit.waiting import wait_until

pytestmark = pytest.mark.external


class Family(NamedTuple):
    """A server and its versions."""

    kind: Kind
    ends_by: signal.Signals
    """On which it ends in good order."""
    others: tuple[str, ...]
    """What pip has to get for those that are not installed, the oldest first."""


def as_old_ones_start(command: tuple[str, ...]) -> tuple[str, ...]:
    """The oldest gunicorn cannot be run by its name."""
    return tuple("gunicorn.app.wsgiapp" if argument == "gunicorn" else argument for argument in command)


GUNICORNS = (
    "gunicorn==20.0.4 setuptools<81",
    *("gunicorn==20.1.* setuptools<81", "gunicorn==21.2.*", "gunicorn==22.*", "gunicorn==23.*", "gunicorn==24.1.*"),
    *("gunicorn==25.3.*", "gunicorn==26.2.*"),
)

FAMILIES = {
    "gunicorn-gthread": Family(Kind(as_old_ones_start(GTHREAD)), signal.SIGTERM, GUNICORNS),
    "gunicorn-sync": Family(Kind(as_old_ones_start(gunicorn())), signal.SIGTERM, GUNICORNS),
    "werkzeug": Family(SERVERS["werkzeug"], signal.SIGINT, ("werkzeug==3.0.0 flask==3.0.0", "werkzeug==3.0.*")),
    "waitress": Family(SERVERS["waitress"], signal.SIGINT, ("waitress==2.1.*", "waitress==3.0.0")),
    "cheroot": Family(SERVERS["cheroot"], signal.SIGINT, ("cheroot==8.6.* six", "cheroot==9.*", "cheroot==10.*")),
    "uwsgi": Family(SERVERS["uwsgi"], signal.SIGINT, ("pyuwsgi==2.0.28.post1",)),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" not in metafunc.fixturenames:
        return
    every = metafunc.config.getoption("--all-versions")
    metafunc.parametrize(
        ("family", "requirement"),
        [
            pytest.param(family, requirement, id=f"{name}-{requirement or 'installed'}")
            for name, family in FAMILIES.items()
            for requirement in ("", *(family.others if every else family.others[:1]))
        ],
    )


def test_this_version_lets_go_of_its_streams_and_ends_them_in_good_order(
    family: Family, requirement: str, tmp_path: Path
) -> None:
    kind = detached(family.kind)._replace(requirement=requirement, streams=20)
    with serving(kind, tmp_path) as server, server.watched(), ExitStack() as stack:
        streams = [stack.enter_context(Stream(server)) for _ in range(kind.streams)]
        for stream in streams:
            stream.until("sse_open")
        stats = server.stats()
        assert stats["clients_by_transport"] == {"attached": 0, "detached": kind.streams}
        server.enqueue(("hub_state", 1))
        for stream in streams:
            assert stream.until("hub_state")[-1].data == 1
        for _ in range(kind.streams - 3):
            streams.pop().__exit__()
        wait_until(lambda: server.stats()["clients"] == 3, "those that have left are forgotten")
        server.enqueue(("item", 2))
        server.stop(family.ends_by)
        for stream in streams:
            assert [block.event for block in stream.to_end()] == ["item", "sse_bye"]
        assert stats["undone"] == 0
        assert server.faults() == []


@pytest.mark.parametrize("requirement", ["waitress==1.4.*"])
def test_this_version_shows_no_connection_and_keeps_its_streams(requirement: str, tmp_path: Path) -> None:
    kind = SERVERS["waitress"]._replace(requirement=requirement, transport="auto")
    with serving(kind, tmp_path) as server, server.watched(), Stream(server) as stream:
        stream.until("sse_open")
        assert server.stats()["clients_by_transport"] == {"attached": 1, "detached": 0}
        assert "[WARNING] sse_batcher.transports: streams stay attached" in server.output()
        server.enqueue(("item", 1))
        stream.until("item")
        assert server.faults() == []
