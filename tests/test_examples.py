"""The examples: each runs as its docstring says, and sends its events."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from .servers import Server, Stream, running

EXAMPLES = Path(__file__).parents[1] / "examples"
ALL = sorted(EXAMPLES.glob("*.py"))


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    with running((str(EXAMPLES / request.param),), tmp_path) as server:
        yield server


@pytest.mark.parametrize("server", ["hello.py"], indirect=True)
def test_hello_shows_further_visits(server: Server) -> None:
    with Stream(server) as stream:
        stream.until("sse_open")
        assert 'new EventSource("/events")' in server.request("GET", "/")
        assert stream.until("visit")[-1].data.keys() == {"browser"}


@pytest.mark.parametrize("server", ["worker_threads.py"], indirect=True)
def test_worker_threads_sends_lone_events_and_bursts_as_batches(server: Server) -> None:
    with Stream(server) as stream:
        assert stream.until("step")[-1].data["worker"] in {"Ann", "Bob"}
        assert [stream.until("file_batch")[-1].data["batchSize"] for _ in range(2)] == [50, 50]
        assert "step" in server.request("GET", "/")


@pytest.mark.parametrize("server", ["plain_wsgi.py"], indirect=True)
def test_plain_wsgi_ticks(server: Server) -> None:
    with Stream(server) as stream:
        first, second = stream.until("tick")[-1], stream.until("tick")[-1]
        assert second.data["seconds"] > first.data["seconds"]
        assert "tick" in server.request("GET", "/")


@pytest.mark.parametrize("server", [path.name for path in ALL], indirect=True)
def test_an_example_ends_without_a_complaint(server: Server) -> None:
    with Stream(server) as stream:
        stream.until("sse_open")
        assert server.stop(signal.SIGINT) == 0
        assert stream.to_end()[-1].event == "sse_bye"
    assert "Traceback" not in server.output()


def test_hello_fits_on_a_screen() -> None:
    assert len((EXAMPLES / "hello.py").read_text().splitlines()) < 30


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_page_shows_data_as_text_only(path: Path) -> None:
    page = path.read_text()
    assert ".textContent = " in page
    assert not any(word in page for word in (".innerHTML", "insertAdjacentHTML", "document.write", "eval("))
