"""Connections to Redis: from a URL or a ready client, with time-outs of ours.

The one module that imports redis-py, inside functions: it is an extra.
"""

from __future__ import annotations

import importlib
import random
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ..errors import BackendError, ConfigurationError

if TYPE_CHECKING:
    import redis

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
    except (ValueError, TypeError) as error:
        raise ConfigurationError(
            f"the backend {_without_password(backend)} cannot be meant: {error}", option="backend"
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
    """One client of Redis, made by the first call. Each is for one thread at a time, but for `disconnect`."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._client: Any = None

    @property
    def client(self) -> Any:
        if self._client is None:
            self._client = self._connect()
        return self._client

    def disconnect(self) -> None:
        """Close its connections: a call that is under way fails. Any thread."""
        client = self._client
        if client is not None:
            client.connection_pool.disconnect()

    def drop(self) -> None:
        """Give the client up: the next call makes another. Left to the garbage collector it would stay connected."""
        self.disconnect()
        self._client = None


def errors() -> tuple[type[Exception], ...]:
    """What redis-py raises, and `BackendError`, our own word for what is not as it should be."""
    return _redis().exceptions.RedisError, BackendError, OSError


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
