"""Flask-SQLAlchemy: an open stream holds no database connection."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path

import pytest
from flask import Flask, Response, appcontext_popped, appcontext_pushed, stream_with_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.pool import QueuePool
from werkzeug.serving import make_server

from sse_batcher import SSE

from .kit.waiting import TIMEOUT

STREAMS = 50
POOL_SIZE = 3

Open = Callable[[str], None]


class Site:
    """An app whose visitors are looked up in a database of few connections."""

    def __init__(self, database: Path) -> None:
        self.app = Flask(__name__)
        self.app.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{database}"
        self.app.config["SQLALCHEMY_ENGINE_OPTIONS"] = {
            "poolclass": QueuePool,
            "pool_size": POOL_SIZE,
            "max_overflow": 0,
            "pool_timeout": 1,
        }
        self.db = SQLAlchemy(self.app)
        self.sse = SSE(self.app)
        self.asked = self.contexts = 0
        appcontext_pushed.connect(self.count_context, self.app)
        appcontext_popped.connect(self.uncount_context, self.app)
        with self.app.app_context():
            self.manager = self.sse.manager
            self.engine = self.db.engine

        @self.sse.authorize
        def may_read(channels: tuple[str, ...]) -> tuple[str, ...]:
            self.asked += 1
            return channels if self.ask_database() else ()

        @self.app.get("/visit")
        def visit() -> str:
            return str(self.ask_database())

        @self.app.get("/holding")
        def holding() -> Response:
            def blocks() -> Iterator[bytes]:
                self.ask_database()
                yield from self.manager.subscribe()

            return Response(stream_with_context(blocks()))

    def ask_database(self) -> bool:
        return bool(self.db.session.execute(self.db.text("SELECT 1")).scalar())

    def count_context(self, sender: Flask) -> None:
        self.contexts += 1

    def uncount_context(self, sender: Flask) -> None:
        self.contexts -= 1

    def checked_out(self) -> int:
        pool = self.engine.pool
        assert isinstance(pool, QueuePool)
        return pool.checkedout()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path / "visitors.db")
    yield site
    site.engine.dispose()


@pytest.fixture
def open_stream(site: Site) -> Iterator[Open]:
    """Open a stream at a real server, and keep it open until the end of the test."""
    server = make_server("127.0.0.1", 0, site.app, threaded=True)
    server.daemon_threads = False  # so that the end of the server waits for them
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    with ExitStack() as stack:

        def open_stream(path: str) -> None:
            connection = HTTPConnection("127.0.0.1", server.port, timeout=TIMEOUT)
            stack.callback(connection.close)
            connection.request("GET", path)
            response = stack.enter_context(connection.getresponse())
            assert response.status == 200
            # The first block is sent after the request's context has ended.
            assert response.readline() == b"event: sse_open\n"

        yield open_stream
        site.manager.shutdown()
        server.shutdown()
        thread.join()


def test_fifty_open_streams_leave_no_connection_checked_out(site: Site, open_stream: Open) -> None:
    for _ in range(STREAMS):
        open_stream("/events")
    assert (site.asked, site.manager.get_stats().clients) == (STREAMS, STREAMS)
    assert site.checked_out() == 0
    assert site.app.test_client().get("/visit").text == "True"


def test_an_open_stream_holds_no_app_context(site: Site, open_stream: Open) -> None:
    # From Flask 3.1.2 on, stream_with_context() makes a context of its own. The pool would not show it; this test does.
    open_stream("/events")
    assert site.contexts == 0


def test_these_tests_notice_a_stream_that_holds_a_connection(site: Site, open_stream: Open) -> None:
    """What the tests above would see, if ours were such a stream."""
    open_stream("/holding")
    assert (site.checked_out(), site.contexts) == (1, 1)
