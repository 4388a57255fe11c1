"""A small app whose tests use the testing kit."""

from __future__ import annotations

from typing import NamedTuple

from flask import Flask, Response, abort, request, session
from flask.testing import FlaskClient

from sse_batcher import SSE, Text


class Board(NamedTuple):
    """The app, its extension, and a client that is logged in as ada."""

    app: Flask
    sse: SSE
    client: FlaskClient


def make_board(**config: object) -> Board:
    """Teams have a channel each, users are in teams, and ``/orders`` sends an event."""
    app = Flask("board")
    app.config.update({"SECRET_KEY": "for a test", **config})
    sse = SSE(app)

    @sse.authorize
    def authorize(channels: list[str]) -> list[str]:
        return [channel for channel in channels if channel in ("default", f"team-{session.get('team')}")]

    @sse.identify
    def identify() -> str:
        if "user" not in session:
            abort(Response("log in first", 401))
        return str(session["user"])

    @sse.snapshot("team-7")
    def state() -> tuple[str, object]:
        return "state", {"orders": 3}

    @sse.user_snapshot
    def of_user(user: str) -> tuple[str, object]:
        return "greeting", Text(f"<b>{user}</b>")

    @app.post("/orders")
    def order() -> str:
        sse.enqueue("order", request.get_json(), channel="team-7")
        return "done"

    client = app.test_client()
    with client.session_transaction() as cookies:
        cookies.update(user="ada", team=7)
    return Board(app, sse, client)
