"""Connections to Redis: from a URL or a ready client, with time-outs of ours.

The one module that imports redis-py, inside functions: it is an extra.
"""

from __future__ import annotations

import importlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ...errors import BackendError, ConfigurationError

if TYPE_CHECKING:
    import redis

_log = logging.getLogger("sse_batcher.backends.redis")

PREFIX = "sse_batcher"
TIMEOUT = 5.0
"""Seconds for each call of Redis."""
LONGEST_PAUSE = 2.0


def connector(backend: Any) -> tuple[Callable[[], Any], str]:
    """What makes a client for the place that a URL or a ready ``redis.Redis`` names, and the prefix of the keys.

    Connects to nothing. Raises `ConfigurationError`.
    """
    redis = _redis()
    if isinstance(backend, redis.Redis):
        return partial(_copy, backend), PREFIX
    if not isinstance(backend, str):
        raise ConfigurationError(f"backend must be a URL or a redis.Redis, not {backend!r}", option="backend")
    url, _, asked = backend.partition("?")
    query = dict(parse_qsl(asked))
    prefix = query.pop("prefix", PREFIX)
    try:
        if url.startswith("redis+sentinel:"):
            client = _sentinel(urlsplit(url), query)
        else:
            client = redis.Redis.from_url(f"{url}?{urlencode(query)}")
        _copy(client).connection_pool.make_connection()  # not connected; a misspelled option is found here
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the backend {_without_password(backend)} is not valid: {error}", option="backend"
        ) from error
    return partial(_copy, client), prefix


def _copy(client: redis.Redis) -> redis.Redis:
    """A client of its own pool of connections, to the same place, with our time-out on every call."""
    redis = _redis()
    pool: Any = client.connection_pool
    settings = {name: value for name, value in pool.connection_kwargs.items() if name != "connection_pool"}
    settings |= _settings()
    if hasattr(pool, "sentinel_manager"):
        return pool.sentinel_manager.master_for(pool.service_name, **settings)  # type: ignore[no-any-return]
    return redis.Redis(connection_pool=redis.ConnectionPool(pool.connection_class, **settings))  # type: ignore[no-any-return]


class Link:
    """One user of Redis: its client, made by the first call, and what is known of the answers to it.

    `task` says what it is for, in the log. Each is for one thread at a time, but for `disconnect` and the properties.
    What one user is refused says nothing about another: each has its own rights, its own commands and its own log line.
    """

    def __init__(self, connect: Callable[[], Any], task: str) -> None:
        self._connect = connect
        self._task = task
        self._client: Any = None
        self._asked_at: float | None = None
        self._answered_at: float | None = None
        self._failing = False

    @property
    def client(self) -> Any:
        if self._client is None:
            self._client = self._connect()
        return self._client

    def disconnect(self) -> None:
        """Close its connections: a call that is under way fails. Any thread."""
        client = self._client
        if client is not None:
            try:
                client.connection_pool.disconnect()
            except ValueError:
                # fakeredis: a connection that waits for an answer cannot be closed by another thread. The call ends by
                # itself soon.
                _log.debug("a connection is closed later: its call is still running", exc_info=True)

    def drop(self) -> None:
        """Give the client up: the next call makes another. Left to the garbage collector it would stay connected."""
        self.disconnect()
        self._client = None

    # -- its answers ---------------------------------------------------------------------------------------------------

    @property
    def silent_for(self) -> float:
        """Seconds for which Redis owes it an answer, or has answered with errors only."""
        since = self._asked_at
        return 0.0 if since is None else time.monotonic() - since

    @property
    def answered_ago(self) -> float:
        """Seconds since the last answer that was no error; if there was none, since the first question."""
        since = self._answered_at
        return self.silent_for if since is None else time.monotonic() - since

    def ask(self) -> None:
        """Call before each try."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def succeed(self) -> None:
        """Call after a try that succeeded."""
        self._answered_at = time.monotonic()
        self.rest()
        if self._failing:
            self._failing = False
            _log.info("%s Redis works again", self._task)

    def fail(self, error: Exception) -> None:
        """Call after a try that failed, and will be repeated. Drops the client."""
        self.drop()
        if not self._failing:
            self._failing = True
            text = str(error).rstrip(".")
            _log.error(
                "%s Redis fails: %s. It is tried again, and not logged until it works.%s",
                self._task,
                text,
                _advice(error),
            )

    def rest(self) -> None:
        """Call when nothing more is asked for now."""
        self._asked_at = None


def errors() -> tuple[type[Exception], ...]:
    """What redis-py raises, and `BackendError`, our own word for what is not as it should be."""
    return _redis().exceptions.RedisError, BackendError, OSError


def _advice(error: Exception) -> str:
    """What to do about an error that does not go away by itself; empty for all others."""
    exceptions = _redis().exceptions
    if isinstance(error, exceptions.NoPermissionError):
        return ' The README lists the rights that its user needs, under "Several processes, several hosts".'
    if isinstance(error, exceptions.MovedError) or "MOVED " in str(error):  # redis-py 5 has no class for it here
        return (
            " In a cluster, add ?prefix={sse} to the URL, so that both keys are in one slot, and use the address of "
            "the node that has this slot."
        )
    if isinstance(error, exceptions.ReadOnlyError):
        return " This is a replica: connect to the master, or through redis+sentinel://."
    return ""


@contextmanager
def understood() -> Iterator[None]:
    """Turn what redis-py raises for an answer of another kind into `BackendError`.

    A proxy that repeats or loses a part of an answer shifts all that follow: the connection has to be given up.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise BackendError(f"it gives an answer to something else: {error!r}") from error


def conflict() -> type[Exception]:
    """What redis-py raises if a key that was watched has changed."""
    return _redis().exceptions.WatchError  # type: ignore[no-any-return]


def is_exhausted(error: Exception) -> bool:
    """Whether Redis says that the stream has an entry with the largest possible id, so that none can be added."""
    return isinstance(error, _redis().exceptions.ResponseError) and "last possible ID" in str(error)


def pauses() -> Iterator[float]:
    """Seconds to wait before each further try: more and more, and not the same in each process."""
    pause = 0.05
    while True:
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, LONGEST_PAUSE)


def _redis() -> Any:
    try:
        import redis  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            "the backend redis:// needs the package redis: pip install 'sse_batcher[redis]'", option="backend"
        ) from error
    return redis


def _settings() -> dict[str, Any]:
    _redis()
    from redis.backoff import NoBackoff  # noqa: PLC0415
    from redis.retry import Retry  # noqa: PLC0415

    return {
        "socket_timeout": TIMEOUT,
        "socket_connect_timeout": TIMEOUT,
        "decode_responses": False,
        "retry": Retry(NoBackoff(), 0),  # we do that, and know what was read twice
    }


def _sentinel(parts: SplitResult, query: dict[str, str]) -> Any:
    sentinel: Any = importlib.import_module("redis.sentinel")
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("the path names the service, as in redis+sentinel://host:26379/mymaster/0")
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    places = [(host, int(port or 26379)) for host, _, port in (place.partition(":") for place in hosts.split(","))]
    options = _settings() | {"db": int(db or 0)} | query
    if login:
        options |= {"username": unquote(username) or None, "password": unquote(password) or None}
    return sentinel.Sentinel(places, socket_timeout=TIMEOUT).master_for(service, **options)


def _without_password(url: str) -> str:
    return re.sub(r"//[^@/]*@", "//...@", url)
