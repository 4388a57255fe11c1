"""The kinds of server that are measured, and how each is started."""

from __future__ import annotations

from dataclasses import replace

from many_server import Kind
from peers import install, nchan

GUNICORN = (
    "{python} -m gunicorn --workers=1 --bind=127.0.0.1:{port} --backlog=4096 --timeout=0 --worker-connections=30000"
)
OURS = GUNICORN + " -k gthread --threads={threads} many_app:create_app()"
FOLK = " peers.folk:create_app()"
UVICORN = "{python} -m uvicorn --host=127.0.0.1 --port={port} --backlog=4096 --no-access-log --log-level=warning"
SLOW_FLOOD = 5_000  # events, of those that would need a minute for 50,000


def python(*modules: str) -> dict[str, str | None]:
    return {"python": install.python_with(*modules)}


def kinds() -> dict[str, Kind]:
    flask = python("flask", "gunicorn")
    found = {
        "bare": Kind("bare joined loop, no window", "{python} -m peers.bare {port}", python()),
        "detached": Kind(
            "sse_batcher, gthread, detached",
            OURS,
            flask,
            environment={"MANY_TRANSPORT": "auto"},
            window=100,
            ours=True,
        ),
        "channels": Kind(
            "sse_batcher, detached, a channel each",
            OURS,
            flask,
            environment={"MANY_TRANSPORT": "auto"},
            path="/events?channel=default&channel=",
            window=100,
            ours=True,
        ),
        "users": Kind(
            "sse_batcher, detached, a user each",
            OURS,
            flask,
            environment={"MANY_TRANSPORT": "auto"},
            path="/events?user=",
            window=100,
            ours=True,
        ),
        "attached": Kind(
            "sse_batcher, gthread, attached", OURS, flask, threads=None, window=100, most=1_000, ours=True
        ),
        "folk": Kind(
            "a queue a client, gthread",
            GUNICORN + " -k gthread --threads={threads}" + FOLK,
            flask,
            threads=None,
            most=1_000,
            flood=SLOW_FLOOD,
        ),
        "folk-gevent": Kind(
            "a queue a client, gevent",
            GUNICORN + " -k gevent" + FOLK,
            python("flask", "gunicorn", "gevent"),
            flood=SLOW_FLOOD,
        ),
        "sse-starlette": Kind(
            "sse-starlette, uvicorn",
            UVICORN + " peers.starlette_app:app",
            python("uvicorn", "sse_starlette"),
            flood=SLOW_FLOOD,
        ),
        "better-sse": Kind(
            "better-sse batch(), Node",
            "node {here}/peers/better_sse.cjs {port}",
            {"node_modules": _text(install.better_sse())},
            environment={"NODE_PATH": "{node_modules}"},
        ),
        "nchan": Kind(
            "nchan, nginx, one worker",
            "{python} -m peers.nchan {port} {folder} {module}",
            {**python(), "module": _text(install.nchan())},
            flood=SLOW_FLOOD,
            burst=nchan.publish,
        ),
    }
    return {name: replace(kind, name=name) for name, kind in found.items()}


def _text(path: object) -> str | None:
    return None if path is None else str(path)
