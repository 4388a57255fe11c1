"""Connections to Redis, made from a URL or a ready client, with a time limit for each call.

The only module that imports redis-py. It does so inside functions, since redis-py is an extra.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit

from ...errors import BackendError, ConfigurationError
from ...functions import described
from ...runtime.locks import new_lock, run_if_free
from ...runtime.log_fields import log_fields

if TYPE_CHECKING:
    import redis

_log = logging.getLogger("sse_batcher.backends.redis")

T = TypeVar("T")

DEFAULT_KEY_PREFIX = "sse_batcher"
CALL_TIMEOUT_SECONDS = 5.0
"""The time limit of each call of Redis, and of connecting."""
LONGEST_RETRY_PAUSE_SECONDS = 2.0
TURN_WAIT_SECONDS = 1.0
"""How long a stream waits until a link that it shares has asked for other streams."""
SILENT_SECONDS = 2.0
"""If Redis has not answered the reader for longer than this, streams do not ask: each call would hold a thread."""

_HARMLESS_REASONS = ("Redis URL must", "Invalid value for", "Invalid IPv6", "the path must", '"max_connections" must')
"""How errors begin that do not quote a part of the URL, which may be a part of the password."""
_OF_SENTINEL = ("ssl", "check_connection")
"""Options, true or false, that redis-py has for the clients of a Sentinel, and not for its own URLs."""
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/+")


def connector(backend: Any) -> tuple[Callable[[], Any], str]:
    """Return a function that makes clients for a URL or like a ready ``redis.Redis``, and the prefix of the keys.

    Connects to nothing. Raises `ConfigurationError`.
    """
    redis = _redis()
    if isinstance(backend, redis.Redis):
        return partial(_copy, backend), DEFAULT_KEY_PREFIX
    if not isinstance(backend, str):
        raise not_a_backend(backend)
    url, _, asked = backend.partition("?")
    query = dict(parse_qsl(asked))
    prefix = query.pop("prefix", DEFAULT_KEY_PREFIX)
    try:
        if url.startswith("redis+sentinel:"):
            client = _sentinel(urlsplit(url), query)
        else:
            client = redis.Redis.from_url(f"{url}?{urlencode(query)}")
        _copy(client).connection_pool.make_connection()  # does not connect, but finds a misspelled option
    except (ValueError, TypeError) as error:
        reason = str(error)
        if isinstance(error, ValueError) and not reason.startswith(_HARMLESS_REASONS):
            reason = (
                "its host, port or database cannot be read. In a user or a password, write special characters such as "
                "/ ? # @ [ ] percent-encoded"
            )
        text = f"the backend {without_secrets(backend)} is not valid: {reason}"
        # Without the cause: a traceback would print its text, too.
        raise ConfigurationError(text, option="backend") from None
    return partial(_copy, client), prefix


def without_secrets(url: str) -> str:
    """Return a URL for an error message, without user, password and the values of its query. It may be invalid."""
    found = _SCHEME.match(url)
    scheme = found[0] if found else ""
    address, mark, query = url[len(scheme) :].partition("?")
    if "@" in query:  # or the `?` is a character of the password
        return f"{scheme}..."
    _, at, place = address.rpartition("@")
    return f"{scheme}{'...@' if at else ''}{place}{mark}{re.sub('=[^&]*', '=...', query)}"


def not_a_backend(backend: object) -> ConfigurationError:
    """Return the error for a backend that is no URL and no client. It does not quote it: that may hold a password."""
    return ConfigurationError(f"backend must be a URL or a redis.Redis, not {described(backend)}", option="backend")


def _copy(client: redis.Redis) -> redis.Redis:
    """Return a client for the same server, with its own connections and our time limit for each call."""
    redis = _redis()
    pool: Any = client.connection_pool
    settings = {name: value for name, value in pool.connection_kwargs.items() if name != "connection_pool"}
    settings |= _settings()
    if hasattr(pool, "sentinel_manager"):
        # The pool itself keeps these two. Without the class, the connections would have no TLS.
        settings |= {"connection_class": pool.connection_class, "check_connection": pool.check_connection}
        return pool.sentinel_manager.master_for(pool.service_name, **settings)  # type: ignore[no-any-return]
    return redis.Redis(connection_pool=redis.ConnectionPool(pool.connection_class, **settings))  # type: ignore[no-any-return]


class Link:
    """The client for one task, such as reading the stream, and when Redis has answered it.

    `connect` makes the client, at the first call. `task` begins the log messages. Each task has a link, because Redis
    may refuse the commands of one task and accept those of another.

    Used by one thread at a time. `disconnect` and the properties are thread-safe: they read single references.
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
        """The client; made at the first use, and after `drop`."""
        if self._client is None:
            self._client = self._connect()
        return self._client

    def disconnect(self) -> None:
        """Close the connections, so that a running call fails. Thread-safe."""
        client = self._client
        if client is not None:
            try:
                client.connection_pool.disconnect()
            except ValueError:
                # fakeredis: another thread cannot close a connection that waits for an answer. The call ends soon.
                _log.debug(
                    "a connection will be closed later: its call is still running",
                    exc_info=True,
                    extra=log_fields("connection_closed_later"),
                )

    def drop(self) -> None:
        """Close the client, and let the next call make another. Without closing, it would stay connected until it is
        garbage-collected."""
        self.disconnect()
        self._client = None

    # -- answers -------------------------------------------------------------------------------------------------------

    @property
    def silent_for(self) -> float:
        """For how many seconds Redis has not answered, or only with errors; 0 if no answer is due."""
        since = self._asked_at
        return 0.0 if since is None else time.monotonic() - since

    @property
    def answered_ago(self) -> float:
        """Seconds since the last answer without an error; if there was none, since the first call."""
        since = self._answered_at
        return self.silent_for if since is None else time.monotonic() - since

    def expect_answer(self) -> None:
        """Call before each attempt: `silent_for` counts from the first one that gets no answer."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def note_answer(self) -> None:
        """Call after an attempt that succeeded."""
        self._answered_at = time.monotonic()
        self.expect_no_answer()
        if self._failing:
            self._failing = False
            _log.info("%s Redis works again", self._task, extra=log_fields("redis_works", task=self._task))

    def note_failure(self, error: Exception) -> None:
        """Call after an attempt that failed and will be repeated. Drops the client."""
        self.drop()
        if not self._failing:
            self._failing = True
            text = str(error).rstrip(".")
            _log.error(
                "%s Redis fails: %s. It is tried again, and not logged until it works.%s",
                self._task,
                text,
                _advice(error),
                extra=log_fields("redis_fails", task=self._task, error=text),
            )

    def expect_no_answer(self) -> None:
        """Call when no answer is due any more."""
        self._asked_at = None


class SharedLink:
    """A link that the threads of streams share. It asks for one thread at a time. Thread-safe.

    So there is one connection, and the answers for one thread are in memory. `what` names in errors what is read.
    `reader` is the link of the thread that reads the stream.
    """

    def __init__(self, connect: Callable[[], Any], task: str, what: str, reader: Link) -> None:
        self._what = what
        self._reader = reader
        # `_asking` guards `_link`. `close` disconnects the link without it, which may be done in any thread.
        self._asking = new_lock()
        self._link = Link(connect, task)
        self._closed = False

    def ask(self, call: Callable[[Any], T]) -> T:
        """Return what the call returns for the client. Raises `BackendError` if Redis does not answer."""
        answers: list[T] = []

        def ask_locked() -> None:
            try:
                with understood():
                    answers.append(call(self._link.client))
                self._link.note_answer()
            except errors() as error:
                if self._closed:
                    self._link.drop()
                else:
                    self._link.note_failure(error)
                raise BackendError(f"reading {self._what} from Redis failed: {error}") from error

        redis_answers = self._reader.silent_for <= SILENT_SECONDS
        if not (redis_answers and run_if_free(self._asking, ask_locked, timeout=TURN_WAIT_SECONDS)):
            raise BackendError(f"Redis does not answer, or other streams read {self._what}: try again")
        return answers[0]

    def close(self) -> None:
        """Disconnect. A call that waits for an answer raises."""
        self._closed = True
        self._link.disconnect()


def errors() -> tuple[type[Exception], ...]:
    """Return the errors that a call of Redis may raise: those of redis-py, `OSError` and our `BackendError`."""
    return _redis().exceptions.RedisError, BackendError, OSError


def refusals() -> type[Exception]:
    """Return the error of a call that Redis has answered with an error. The connection can be used further."""
    return _redis().exceptions.ResponseError  # type: ignore[no-any-return]


def _advice(error: Exception) -> str:
    """Return what to do about an error that does not go away by itself; empty for all others."""
    exceptions = _redis().exceptions
    if isinstance(error, exceptions.NoPermissionError):
        return ' The documentation lists the rights that its user needs, under "Give its user few rights".'
    if isinstance(error, exceptions.MovedError) or "MOVED " in str(error):  # redis-py 5 has no class for it here
        return (
            " In a cluster, add ?prefix={sse} to the URL, so that all keys are in one slot, and use the address of "
            "the node that has this slot."
        )
    if isinstance(error, exceptions.ReadOnlyError):
        return " This is a replica: connect to the master, or through redis+sentinel://."
    return ""


@contextmanager
def understood() -> Iterator[None]:
    """Turn what redis-py raises for an unexpected kind of answer into `BackendError`.

    After a proxy has repeated or lost a part of an answer, each answer belongs to another call. The connection cannot
    be used any more.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise BackendError(f"the answer belongs to another call: {error!r}") from error


def conflict() -> type[Exception]:
    """Return the error that redis-py raises if a watched key has changed."""
    return _redis().exceptions.WatchError  # type: ignore[no-any-return]


def is_exhausted(error: Exception) -> bool:
    """Return whether no entry can be added because the stream has one with the largest possible id."""
    return isinstance(error, _redis().exceptions.ResponseError) and "last possible ID" in str(error)


def pauses() -> Iterator[float]:
    """Yield the seconds to wait before each further attempt: longer and longer, and random to spread processes."""
    pause = 0.05
    while True:
        yield pause * random.uniform(0.5, 1)
        pause = min(2 * pause, LONGEST_RETRY_PAUSE_SECONDS)


def _redis() -> Any:
    """Import and return the module ``redis``. `Any`, since not all of redis-py has types."""
    try:
        import redis  # noqa: PLC0415
    except ImportError as error:
        raise ConfigurationError(
            "the backend needs the package redis: pip install 'sse_batcher[redis]'", option="backend"
        ) from error
    return redis


def _settings() -> dict[str, Any]:
    redis = _redis()
    return {
        "socket_timeout": CALL_TIMEOUT_SECONDS,
        "socket_connect_timeout": CALL_TIMEOUT_SECONDS,
        "decode_responses": False,
        # No retries by redis-py. The callers of `pauses` try again, and recognise an entry that was added twice.
        "retry": redis.retry.Retry(redis.backoff.NoBackoff(), 0),
    }


def _sentinel(parts: SplitResult, query: dict[str, str]) -> Any:
    redis = _redis()
    service, _, db = parts.path.strip("/").partition("/")
    if not service:
        raise ValueError("the path must name the service, as in redis+sentinel://host:26379/mymaster/0")
    login, _, hosts = parts.netloc.rpartition("@")
    username, _, password = login.partition(":")
    places = [(host, int(port or 26379)) for host, _, port in (place.partition(":") for place in hosts.split(","))]
    # redis-py gives the options their types, as in its own URLs, except those that only the clients of a Sentinel have.
    options = _settings() | {"db": int(db or 0)} | redis.connection.parse_url(f"redis:///?{urlencode(query)}")
    options |= {name: redis.connection.to_bool(query[name]) for name in _OF_SENTINEL if name in query}
    if login:
        options |= {"username": unquote(username) or None, "password": unquote(password) or None}
    return redis.Sentinel(places, socket_timeout=CALL_TIMEOUT_SECONDS).master_for(service, **options)
