"""The doctor inside of an app: its config, its Redis, and one request through all of it.

For a process that ends afterwards. The request has a thread of its own, because it may not come back.
"""

from __future__ import annotations

import argparse
import ast
import os
import shlex
import threading
import time
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from flask import Flask, got_request_exception
from werkzeug.test import EnvironBuilder

from ..backends.redis.connections import connector, errors, understood
from ..backends.redis.state import Keys
from ..doctor.client import ANY_CODING, Target, plain_object, printable_headers
from ..doctor.command import Report
from ..doctor.facts import Answer, FirstBlock
from ..doctor.inside import AppFacts, GunicornFacts, RedisFacts, RequestFacts, diagnose_app, fine_inside
from ..errors import SSEBatcherError, UsageError
from ..manager import SSEManager
from ..parser import Parser
from ..wire import begins_compressed
from .config import FlaskConfig, read_config

PATIENCE_SECONDS = 3.0
"""How long the first block may take to come out of the app."""


def examine_app(app: Flask, manager: SSEManager, target: Target) -> Report:
    """Examine an app from inside. `target` has the path, unless its URL is empty, and the headers and the token.

    Shuts the manager down. Raises `ConfigurationError` if the config is not valid any more.
    """
    config = read_config(app.config)
    facts = AppFacts(
        name=app.name,
        url_prefix=config.url_prefix,
        heartbeat=config.clients.heartbeat,
        transport=config.clients.transport,
        has_redis=config.backend != "memory://",
        middleware=_middleware(app),
        gunicorn=_gunicorn(),
    )
    if facts.has_redis:
        facts.redis = _ask_redis(config)
    path = urlsplit(target.url).path if config.url_prefix is None else config.url_prefix or "/"
    if path and (facts.redis is None or facts.redis.error is None):
        facts.request = _Request(app, target, path).run(manager)
    findings = diagnose_app(facts)
    where = "no route of its own" if config.url_prefix is None else f"streams at {config.url_prefix or '/'}"
    backend = "Redis" if facts.has_redis else "memory"
    subject = f"The app {app.name!r} in this process: {where}; transport {facts.transport!r}; backend: {backend}"
    return Report(subject, findings, fine_inside(facts, findings), {"app": facts.as_dict()})


# -- the request -------------------------------------------------------------------------------------------------------


class _Request:
    """A request for the stream, through all middleware and functions of the app, on a thread of its own."""

    def __init__(self, app: Flask, target: Target, path: str) -> None:
        self._app = app
        self._path = path
        self._has_token = target.has_token
        query = urlsplit(target.url).query
        bearer = [("Authorization", f"Bearer {target.token}")] if target.token else []
        given = [("Accept", "text/event-stream"), ANY_CODING, *target.headers, *bearer]
        base = f"http://{app.config.get('SERVER_NAME') or 'localhost'}/"
        self._environ = EnvironBuilder(path, base_url=base, query_string=query, headers=given).get_environ()
        self._environ["wsgi.multithread"] = True
        self._began = time.monotonic()
        self._answer: Answer | None = None
        self._first: FirstBlock | None = None
        self._coded_by_library = False
        self._error: BaseException | None = None
        self._done = threading.Event()

    def run(self, manager: SSEManager) -> RequestFacts:
        """Send it, and wait until its first block comes out. Shuts the manager down, which ends the stream."""

        def note(app: Flask, exception: BaseException, **_: Any) -> None:
            self._error = exception

        got_request_exception.connect(note, self._app)
        thread = threading.Thread(target=self._run, name="sse_batcher doctor", daemon=True)
        thread.start()
        self._done.wait(PATIENCE_SECONDS)
        answer, first, error = self._answer, self._first, self._error
        manager.shutdown(PATIENCE_SECONDS)  # what reads the whole response has its end now
        thread.join(PATIENCE_SECONDS)
        got_request_exception.disconnect(note, self._app)
        return RequestFacts(
            path=self._path,
            has_token=self._has_token,
            answer=answer,
            first=first,
            coded_by_library=self._coded_by_library,
            error=None if error is None else f"{type(error).__name__}: {error}",
            reads_whole=isinstance(error, UsageError) and "has no end" in str(error),
        )

    def _run(self) -> None:
        try:
            body = self._app(self._environ, self._start_response)
            try:
                self._read(body)
            finally:
                getattr(body, "close", lambda: None)()
        except Exception as error:
            self._error = self._error or error
        self._done.set()

    def _read(self, body: Iterable[bytes]) -> None:
        parser = Parser()
        for data in body:
            if begins_compressed(data):
                self._coded_by_library = True
                data = zlib.decompressobj(wbits=31).decompress(data)  # noqa: PLW2901  (the first block is whole)
            blocks = parser.blocks(data)
            if blocks:
                block = blocks[0]
                self._first = FirstBlock(type=block.type, data=plain_object(block.data), cursor=block.id)
            is_coded = self._answer is not None and self._answer.header("content-encoding") not in {"", "identity"}
            if blocks or (is_coded and len(data) > _CODED_BYTES) or (self._answer and not self._answer.is_stream):
                if is_coded and self._first is None:
                    self._first = FirstBlock(type="sse_open")  # that much is more than the head of the coding
                return

    def _start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        after = time.monotonic() - self._began
        self._answer = Answer(status=int(status[:3]), headers=printable_headers(headers), after=after)
        return lambda data: None


_CODED_BYTES = 30
"""The head of a compressed body has fewer bytes than this, and a compressed first block has more."""


# -- what surrounds the app --------------------------------------------------------------------------------------------


def _middleware(app: Flask) -> list[str]:
    """Return the classes of the middleware around the app, from outside in, as far as each names the next one."""
    found: list[str] = []
    layer: Any = app.wsgi_app
    while getattr(layer, "__self__", None) is not app and len(found) < 20:
        if not getattr(layer, "__module__", "").startswith("sse_batcher."):
            found.append(getattr(layer, "__name__", type(layer).__name__))
        layer = next(
            (inner for name in ("app", "wsgi_app", "application") if (inner := getattr(layer, name, None))), app
        )
        if layer is app:
            break
    if "COMPRESS_MIMETYPES" in app.config:
        found.append("Flask-Compress")
    return found


def _gunicorn() -> GunicornFacts | None:
    """Return what the environment and the file ``gunicorn.conf.py`` of this folder say; None if there is nothing.

    As for gunicorn, the arguments win over the file, and ``WEB_CONCURRENCY`` is only the default of ``workers``.
    """
    arguments = _argument_values(os.environ.get("GUNICORN_CMD_ARGS", ""))
    file = arguments.pop("config", _DEFAULT_CONF).removeprefix("file:")
    said: dict[str, tuple[str, Any]] = {}  # by setting: the place that decides it, and the value
    for place, values in [
        ("`WEB_CONCURRENCY`", {"workers": os.environ.get("WEB_CONCURRENCY")}),
        (f"`{file}`", _conf_values(Path(file))),
        ("`GUNICORN_CMD_ARGS`", arguments),
    ]:
        said |= {name: (place, value) for name, value in values.items() if value is not None}
    known = {name: value for name, (_, value) in said.items() if value is not _UNKNOWN}
    if not known:
        return None
    worker_class = known.get("worker_class")
    return GunicornFacts(
        where=" with ".join(dict.fromkeys(said[name][0] for name in known)),
        workers=_number(known.get("workers")),
        threads=_number(known.get("threads")),
        worker_class=worker_class if isinstance(worker_class, str) else None,
        max_requests=_number(known.get("max_requests")),
    )


_DEFAULT_CONF = "gunicorn.conf.py"
_UNKNOWN = object()
"""The value of a setting that the file computes."""
_GUNICORN = {
    "workers": ("-w", "--workers"),
    "threads": ("--threads",),
    "worker_class": ("-k", "--worker-class"),
    "max_requests": ("--max-requests",),
}


def _conf_values(file: Path) -> dict[str, Any]:
    """Return the settings in the file, which is not run. Only constants are known."""
    try:
        statements = ast.parse(file.read_text()).body
    except (OSError, SyntaxError, ValueError):
        return {}
    found: dict[str, Any] = {}
    for statement in statements:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or statement.value is None:
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        for name in {target.id for target in targets if isinstance(target, ast.Name)} & _GUNICORN.keys():
            found.pop(name, None)
            if isinstance(statement.value, ast.Constant) and not isinstance(statement, ast.AugAssign):
                found[name] = statement.value.value
            elif "WEB_CONCURRENCY" not in ast.unparse(statement.value):  # else it is that variable's
                found[name] = _UNKNOWN
    return found


class _ArgumentError(ValueError):
    """Gunicorn would refuse the arguments."""


class _Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _ArgumentError(message)


def _argument_values(text: str) -> dict[str, str]:
    """Return the settings in arguments of gunicorn, and ``config``, the file that it reads."""
    parser = _Arguments(add_help=False, argument_default=argparse.SUPPRESS)
    for name, options in {**_GUNICORN, "config": ("-c", "--config")}.items():
        parser.add_argument(*options, dest=name)
    try:
        known, _ = parser.parse_known_args(shlex.split(text))
    except ValueError:
        return {}
    return vars(known)


def _number(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None


# -- Redis -------------------------------------------------------------------------------------------------------------


def _ask_redis(config: FlaskConfig) -> RedisFacts:
    """Ask Redis for what the library needs. Reads only."""
    try:
        connect, prefix = connector(config.backend)
        keys = Keys(prefix)
        client = connect()
        failures = errors()
    except SSEBatcherError as error:
        return RedisFacts(error=str(error))
    try:
        with understood():
            before = time.time()
            seconds, microseconds = client.time()
            offset = seconds + microseconds / 1_000_000 - (before + time.time()) / 2
            client.xrange(keys.stream, count=1)
            client.get(keys.epoch)
    except failures as error:
        return RedisFacts(error=str(error))
    memory, replication = _info(client, "memory", failures), _info(client, "replication", failures)
    client.close()
    return RedisFacts(
        clock_offset=offset,
        is_replica=replication.get("role") == "slave",
        policy=memory.get("maxmemory_policy") if memory.get("maxmemory") else None,
    )


def _info(client: Any, section: str, failures: tuple[type[Exception], ...]) -> Mapping[str, Any]:
    """Return a section of INFO, nothing if the user of Redis has no right to see it."""
    try:
        answer: Mapping[str, Any] = client.info(section)
    except failures:
        return {}
    return answer
