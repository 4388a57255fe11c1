"""The `SSE_` keys of a Flask config: read and checked once, in `SSE.init_app`.

Any thread. Nothing reads these keys later, except for the one comparison at the first request.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from ..options import (
    BATCH_OPTION_NAMES,
    CLIENT_OPTION_NAMES,
    HISTORY_OPTION_NAMES,
    BatchOptions,
    ClientOptions,
    HistoryOptions,
    batch_options,
)
from ..runtime.log_fields import log_fields
from .cors import Cors

if TYPE_CHECKING:
    import redis

_log = logging.getLogger("sse_batcher.extension")

PREFIX = "SSE_"
OWN_DEFAULTS: dict[str, Any] = {
    "batching": True,
    "backend": "memory://",
    "url_prefix": "/events",
    "cors_origins": (),
    "token_salt": None,
    "monitor_content": False,
    "monitor_addresses": True,
}
"""What has a key, but is no keyword of an options object."""
KEYS = tuple(
    PREFIX + name.upper() for name in (*BATCH_OPTION_NAMES, *CLIENT_OPTION_NAMES, *HISTORY_OPTION_NAMES, *OWN_DEFAULTS)
)
"""The keys of all options, and of `OWN_DEFAULTS`."""
_UNKNOWN_KEY = "sse_batcher does not know the config key %s and ignores it"


@dataclass(frozen=True, slots=True)
class FlaskConfig:
    """What the `SSE_` keys of one app say.

    `batching`, `clients`, `history`, `backend`
        Arguments of `SSEManager`. The manager checks the backend.
    `url_prefix`
        The path of the stream, and the beginning of those of the other routes, without a slash at its end. ``None``:
        the app gets no routes, and a view of its own returns `SSE.response`. If a route of the app has the same path,
        only one of the two answers, and a warning is logged.
    `cors_origins`
        Which other origins may read the stream: a list such as ``["https://example.com"]``, also with cookies; or
        ``"*"`` for all of them, without cookies.
    `token_salt`
        Only apps with the same salt and the same `SECRET_KEY` accept the tokens of each other. ``None``: the name of
        the app.
    `monitor_content`
        Whether the monitor shows what the newest events contain. ``False``: only their types, channels and sizes.
    `monitor_addresses`
        Whether the monitor shows the addresses of clients. ``False``: they are not sent to its page, and not searched.
    `names_backend`
        Whether there was a key `SSE_BACKEND`.
    """

    batching: BatchOptions
    clients: ClientOptions
    history: HistoryOptions
    backend: str | redis.Redis = field(repr=False)  # a URL may have a password
    url_prefix: str | None
    cors_origins: Cors
    token_salt: str | None
    monitor_content: bool
    monitor_addresses: bool
    names_backend: bool


def read_config(config: Mapping[str, Any]) -> FlaskConfig:
    """Read the `SSE_` keys, and log those that are unknown.

    Raises `ConfigurationError`, which names the key, for an invalid value and for a key that looks misspelled.
    """
    for key in config:
        if key.startswith(PREFIX) and key not in KEYS:
            meant = _known_key(key)
            if meant is not None:
                raise ConfigurationError(f"there is no config key {key}: did you mean {meant}?")
            _log.warning(_UNKNOWN_KEY, key, extra=log_fields("unknown_key", key=key))
    url_prefix = _url_prefix(config)
    token_salt = _token_salt(config)
    content, addresses = _flag(config, "monitor_content"), _flag(config, "monitor_addresses")
    with naming_keys():
        cors = Cors(_own(config, "cors_origins"))
        return FlaskConfig(
            batching=_batching(config),
            clients=ClientOptions(**_options(CLIENT_OPTION_NAMES, config)),
            history=HistoryOptions(**_options(HISTORY_OPTION_NAMES, config)),
            backend=_own(config, "backend"),
            url_prefix=url_prefix,
            cors_origins=cors,
            token_salt=token_salt,
            monitor_content=content,
            monitor_addresses=addresses,
            names_backend="SSE_BACKEND" in config,
        )


@contextmanager
def naming_keys() -> Iterator[None]:
    """Have each `ConfigurationError` of this block begin with the config key of its option."""
    try:
        yield
    except ConfigurationError as error:
        if error.option is None:
            raise
        raise ConfigurationError(f"{_key(error.option)}: {error}", option=error.option) from error


class KeysAtStart:
    """The `SSE_` keys as they were when they were read, to find those that change too late."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._keys = _own_keys(config)
        self._compared = False

    def compare_once(self, config: Mapping[str, Any]) -> None:
        """Log what has changed since then. Only the first call does anything."""
        if self._compared:
            return
        self._compared = True  # a harmless race: two threads that come at the same time may both log
        before, now = self._keys, _own_keys(config)
        for key in sorted(before.keys() | now.keys()):
            if key in before and key in now and (key not in KEYS or _is_same(before[key], now[key])):
                continue
            meant = key if key in KEYS else _known_key(key)
            if meant is not None:
                _log.error(
                    "the config key %s was %s after SSE(app) or init_app(app) had read the config, and that has no "
                    "effect: set %s before",
                    key,
                    "removed" if key not in now else "changed" if key in before else "set",
                    "it" if meant == key else meant,
                    extra=log_fields("key_too_late", key=key),
                )
            elif key in now:
                _log.warning(_UNKNOWN_KEY, key, extra=log_fields("unknown_key", key=key))


def _batching(config: Mapping[str, Any]) -> BatchOptions:
    given = _options(BATCH_OPTION_NAMES, config)
    batching = _own(config, "batching")
    if isinstance(batching, BatchOptions):
        twice = given
    elif isinstance(batching, Mapping):
        twice = {name: value for name, value in given.items() if name in {"batch_window", "max_batch_size"}}
    else:
        twice = {}
    for name in twice:
        raise ConfigurationError(f"SSE_BATCHING and {_key(name)} both say how to batch: keep one of them")
    return batch_options(batching, BatchOptions(**given))


def _url_prefix(config: Mapping[str, Any]) -> str | None:
    prefix = _own(config, "url_prefix")
    if prefix is None:
        return None
    if not isinstance(prefix, str) or not prefix.startswith("/"):
        raise ConfigurationError(
            f"SSE_URL_PREFIX must be a path that begins with /, or None for no routes, not {prefix!r}",
            option="url_prefix",
        )
    return prefix.rstrip("/")


def _token_salt(config: Mapping[str, Any]) -> str | None:
    salt = _own(config, "token_salt")
    if salt is None or (isinstance(salt, str) and salt):
        return salt
    raise ConfigurationError(
        f"SSE_TOKEN_SALT must be a text, or None for the name of the app, not {salt!r}", option="token_salt"
    )


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = _own(config, name)
    if isinstance(value, bool):
        return value
    raise ConfigurationError(f"{_key(name)} must be True or False, not {value!r}", option=name)


def _own(config: Mapping[str, Any], name: str) -> Any:
    return config.get(_key(name), OWN_DEFAULTS[name])


def _key(option: str) -> str:
    return PREFIX + option.upper()


def _options(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of these options that the config sets."""
    return {name: config[_key(name)] for name in names if _key(name) in config}


def _known_key(key: str) -> str | None:
    """The key that a misspelled one probably stands for, None if there is none."""
    return next(iter(difflib.get_close_matches(key, KEYS, n=1, cutoff=0.8)), None)


def _own_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys with our prefix. Containers are copied, so that a change inside one is found."""
    return {key: _copy(value) for key, value in list(config.items()) if key.startswith(PREFIX)}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return type(value)(value) if type(value) in (list, set) else value


def _is_same(one: Any, other: Any) -> bool:
    return one is other or (type(one) is type(other) and bool(one == other))
