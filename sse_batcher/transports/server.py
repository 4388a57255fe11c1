"""What is known of the server around us: the connection, how many requests it serves at once, whether it is stopping.

`inspect_server` runs in the server's thread that serves the request, `ServerInfo.is_stopping` in any thread. Nothing
here takes a lock, starts a thread, replaces a signal handler or imports a server. Most of what is read is no public API
of the server. If an object does not look as expected, the answer is "unknown".
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple


def _none() -> int:
    return 0


class ServerInfo(NamedTuple):
    """What is known about the server."""

    name: str
    """Such as ``gunicorn gthread``; ``""`` if it is unknown."""
    fd: int | None
    """The file descriptor of the request's connection. It is the server's, which may close it when the request ends."""
    threads: int | None
    """How many requests this process can serve at once. None if there is no limit, or it is unknown."""
    is_stopping: Callable[[], bool]
    """Returns whether the server is about to end this process, or itself. Cheap, never raises, and keeps neither the
    request nor its connection alive. The answer for one stream is true for all streams of the process."""
    lets_go: bool = False
    """Whether the connection can be taken over from the server: it serves a request in a thread, on a plain socket."""
    unsent: Callable[[], int] = _none
    """Returns how many bytes of its responses the server has still to write to this connection, in another thread than
    the one that iterates the response. Always 0 if it writes in that thread. Keeps the connection alive no more than
    `is_stopping` does."""
    obstacle: str = ""
    """Why the connection of this request cannot be taken over, though others of this server can; "" if it can."""
    max_requests: int | None = None
    """After how many requests the server ends this process. None if it does not, or it is unknown."""
    http2: bool = False
    """Whether the server itself speaks HTTP/2 with the client, and serves its requests one after the other."""

    @property
    def writes_later(self) -> bool:
        """Whether the server writes the response in another thread than the one that iterates it."""
        return self.unsent is not _none


def inspect_server(environ: Mapping[str, Any]) -> ServerInfo:
    """Find out what there is to know about the server of this request. Call this in the thread that serves it.

    Raises no exception of its own; a time limit that a signal handler raises passes through.
    """
    for find in (_gunicorn, _werkzeug, _waitress, _uwsgi, _mod_wsgi, _wsgiref, _cheroot):
        server = _ask(partial(find, environ))
        if isinstance(server, ServerInfo):
            obstacle = _obstacle(environ, server)
            return server._replace(obstacle=obstacle) if obstacle else server
    return ServerInfo("", None, None, _stopping())


_PLAIN_HTTP = re.compile(r"HTTP/1\.\d")
_ANY_HTTP = re.compile(r"HTTP/[1-9](\.\d)?")


def _obstacle(environ: Mapping[str, Any], server: ServerInfo) -> str:
    """Return why a take-over would fail, or harm other responses on the same connection; "" if there is no reason."""
    # uWSGI repeats the version that a proxy gives it. Behind nginx, that is the browser's, which may be HTTP/2.0. From
    # other servers, HTTP/2.0 can mean that many streams share one connection.
    known = _ANY_HTTP if server.name == "uwsgi" else _PLAIN_HTTP
    if not known.fullmatch(str(environ.get("SERVER_PROTOCOL"))):
        return "the request has a version of HTTP that does not allow it"
    if (environ.get("CONTENT_LENGTH") or "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ:
        return "the request has a body"  # a server may still wait for it: cheroot does so before it writes the head
    if server.unsent():
        return "an earlier response on the same connection is not sent yet"
    return ""


# -- the servers -------------------------------------------------------------------------------------------------------

_WORKER_SIGNALS = ("SIGTERM", "SIGQUIT", "SIGUSR1", "SIGABRT")


def _gunicorn(environ: Mapping[str, Any]) -> ServerInfo | None:
    connection = environ.get("gunicorn.socket") or environ.get("gunicorn.sock")  # sock: gevent_pywsgi
    if connection is None:
        return None
    known = _gunicorn_facts.of(_gunicorn_worker())
    # Not read from SERVER_PROTOCOL, which a client that speaks HTTP/1 can choose.
    http2 = bool([key for key in environ if key.startswith("gunicorn.http2.")])
    return ServerInfo(
        known.name,
        _fileno(connection),
        known.threads,
        known.is_stopping,
        known.kind in {"sync", "gthread"} and _is_plain(connection) and not http2,
        max_requests=known.max_requests,
        http2=http2,
    )


class _GunicornFacts(NamedTuple):
    """What is the same for all requests of a worker of gunicorn."""

    kind: str
    name: str
    threads: int | None
    max_requests: int | None
    is_stopping: Callable[[], bool]

    @classmethod
    def find(cls, worker: Any) -> _GunicornFacts:
        kind = _gunicorn_kind(worker)
        threads = {
            "sync": 1,
            "gthread": _get(worker, "cfg", "threads"),
            "gevent": _get(worker, "cfg", "worker_connections"),
            "eventlet": _get(worker, "cfg", "worker_connections"),
        }.get(kind)
        is_stopping = _stopping(
            lambda: worker is not None and worker.alive is False, lambda: _has_lost_its_arbiter(worker)
        )
        max_requests = _count(_get(worker, "cfg", "max_requests"))
        return cls(kind, f"gunicorn {kind}".strip(), _count(threads), max_requests, is_stopping)


class _KeptFacts:
    """Keeps the facts about the worker of the newest request, since a process has one. Any thread, without a lock."""

    def __init__(self) -> None:
        self._kept: tuple[Any, _GunicornFacts] | None = None

    def of(self, worker: Any) -> _GunicornFacts:
        """Return the facts about this worker; None: it is unknown."""
        kept = self._kept  # read once: another thread may replace it
        if kept is None or kept[0] is not worker or worker is None:
            kept = self._kept = worker, _GunicornFacts.find(worker)
        return kept[1]


_gunicorn_facts = _KeptFacts()


def _gunicorn_worker() -> Any:
    """Find the worker of this process through the signal handlers, which are its methods.

    Several signals are tried, because the app may have replaced the handler of one.
    """
    for name in _WORKER_SIGNALS:
        number = getattr(signal, name, None)
        worker = None if number is None else _get(signal.getsignal(number), "__self__")
        if isinstance(_get(worker, "alive"), bool) and _get(worker, "cfg") is not None:
            return worker
    return None


def _has_lost_its_arbiter(worker: Any) -> bool:
    """Return whether the process that started this worker is gone. Then the worker ends, but its `alive` stays True."""
    return isinstance(parent := _get(worker, "ppid"), int) and parent != os.getppid()


def _gunicorn_kind(worker: Any) -> str:
    """Return which of gunicorn's own kinds of worker this one is, or is derived from; "" if that is unknown."""
    for base in type(worker).__mro__:
        package, _, module = str(_get(base, "__module__")).rpartition(".")
        if package == "gunicorn.workers":
            return {"ggevent": "gevent", "geventlet": "eventlet"}.get(module, module)
    return ""


def _werkzeug(environ: Mapping[str, Any]) -> ServerInfo | None:
    connection = environ.get("werkzeug.socket")
    if connection is None:
        return None
    # Without threads, it serves one request after the other. With processes, it starts one for each request.
    one_by_one = environ.get("wsgi.multithread") is False and not environ.get("wsgi.multiprocess")
    server = _get(threading.current_thread(), "_target", "__self__")  # if it has started this thread
    # Private attributes of `socketserver.BaseServer`, so their names are mangled.
    shutdown_request = "_BaseServer__shutdown_request"
    is_stopping = _stopping(
        lambda: _get(server, shutdown_request) is True,
        lambda: _ask(_get(server, "_BaseServer__is_shut_down", "is_set")) is True,
    )
    # A process that serves one request ends with it.
    lets_go = not environ.get("wsgi.multiprocess") and _is_plain(connection)
    return ServerInfo("werkzeug", _fileno(connection), 1 if one_by_one else None, is_stopping, lets_go)


def _waitress(environ: Mapping[str, Any]) -> ServerInfo | None:
    channel = _get(environ.get("waitress.client_disconnected"), "__self__")
    if channel is None:
        return None
    dispatcher = _get(channel, "server", "task_dispatcher")
    # `stop_count` is how many of its threads have to end. Idle ones end at once, and are in neither number any more.
    is_stopping = _stopping(lambda: len(dispatcher.threads) <= dispatcher.stop_count)
    connection, threads = _get(channel, "socket"), _count(_get(channel, "adj", "threads"))
    unsent = "total_outbufs_len"
    lets_go = _is_plain(connection) and isinstance(_get(channel, unsent), int)
    reference = weakref.ref(channel)
    return ServerInfo(
        "waitress",
        _fileno(connection),
        threads,
        is_stopping,
        lets_go,
        unsent=lambda: _get(reference(), unsent) or 0,
    )


def _cheroot(_: Mapping[str, Any]) -> ServerInfo | None:
    thread = threading.current_thread()
    if not any(str(_get(base, "__module__")).startswith("cheroot.") for base in type(thread).__mro__):
        return None
    server = _get(thread, "server")
    is_stopping = _stopping(lambda: server.ready is False, lambda: isinstance(server.interrupt, BaseException))
    threads = _count(_get(server, "requests", "min"))  # it starts no further ones by itself
    connection = _get(thread, "conn", "socket")
    return ServerInfo("cheroot", _fileno(connection), threads, is_stopping, _is_plain(connection))


def _uwsgi(environ: Mapping[str, Any]) -> ServerInfo | None:
    if "uwsgi.version" not in environ:
        return None
    api = sys.modules.get("uwsgi")  # built into uWSGI: there is no file to import
    fd = _ask(_get(api, "connection_fd"))
    threads = _count(_get(api, "cores"))
    fd = fd if isinstance(fd, int) and fd >= 0 else None
    # In its other modes, a thread that waits in the middle of a request goes on with another one.
    options = _get(api, "opt") or {}
    lets_go = not any(name in options for name in ("async", "gevent", "asyncio", "tornado", "greenlet"))
    return ServerInfo("uwsgi", fd, threads, _uwsgi_stopping(), lets_go)


def _uwsgi_stopping() -> Callable[[], bool]:
    """Make the function that tells whether uWSGI is stopping.

    A worker that ends gracefully ends its idle threads at once. Nothing else can be seen of it. So the function returns
    False while all threads are busy, if there is only one thread, or if there is no /proc.
    """
    seen: frozenset[str] = frozenset()

    def is_stopping() -> bool:
        nonlocal seen
        # The first request may come before all threads exist, so new ones are added at each call.
        tasks = seen.union(filter(os.path.exists, _uwsgi_tasks()))
        seen = tasks
        return not all(map(os.path.exists, tasks))

    quiet = _quiet(is_stopping)
    quiet()
    return quiet


def _uwsgi_tasks() -> list[str]:
    """Return the paths under /proc of all threads of uWSGI except the first, which stays to the end."""
    # Not `threading.enumerate`, which takes a lock: uWSGI forks without Python's hooks, so a child may inherit the lock
    # held. For the same reason, the first thread has the `native_id` of its parent process.
    threads: list[Any] = list(_get(threading, "_active").values())
    return [
        f"/proc/self/task/{thread.native_id}"
        for thread in threads
        if re.fullmatch(r"uWSGIWorker\d+Core[1-9]\d*", thread.name)
    ]


def _mod_wsgi(environ: Mapping[str, Any]) -> ServerInfo | None:
    if "mod_wsgi.version" not in environ:
        return None
    # Here, Python's "main thread" is the one that first imported `threading`, so its end means nothing.
    return ServerInfo("mod_wsgi", None, None, _never)


def _wsgiref(environ: Mapping[str, Any]) -> ServerInfo | None:
    """Python's own, which Django's `runserver` is made of. Those that serve streams have a thread for each request."""
    if not str(environ.get("SERVER_SOFTWARE")).startswith("WSGIServer/"):
        return None
    return ServerInfo("wsgiref", None, None, _stopping())


# -- stopping ----------------------------------------------------------------------------------------------------------


def _never() -> bool:
    return False


def _stopping(*signs: Callable[[], bool]) -> Callable[[], bool]:
    """Make a function that returns whether any of these signs is there, or Python is about to end.

    Python ends when its main thread does, after it has waited for the other threads.
    """
    all_signs = [_quiet(sign) for sign in (*signs, _python_ends())]
    return lambda: any(sign() for sign in all_signs)


def _quiet(sign: Callable[[], bool]) -> Callable[[], bool]:
    """Make a function that returns False if this sign raises."""

    def is_stopping() -> bool:
        try:
            return bool(sign())
        except Exception:
            return False

    return is_stopping


def _python_ends() -> Callable[[], bool]:
    main = threading.main_thread()
    if _ends(main):
        return _never  # the server runs in another thread, and goes on without the main thread
    return lambda: _ends(main)


def _ends(main: threading.Thread) -> bool:
    """Return whether the main thread has ended or is about to. Does not block."""
    if _get(threading, "_SHUTTING_DOWN") is True:
        return (
            True  # the first sign: while Python waits for threads of executors, the main thread still counts as alive
        )
    # Not `is_alive`: up to Python 3.12, it takes the main thread's lock for a moment. If the main thread ends in this
    # moment, it fails, and does not wait for the other threads.
    stopped = _get(main, "_is_stopped")
    return stopped if isinstance(stopped, bool) else not main.is_alive()


# -- reading unknown objects -----------------------------------------------------------------------------------------

_ODD = (
    *(ArithmeticError, AttributeError, LookupError, OSError, ReferenceError),
    *(RuntimeError, SystemError, TypeError, ValueError),
)
"""What objects that are not as expected may raise. Other exceptions must pass: the app may have a time limit whose
signal handler raises at any moment, and if that were caught here, the server would be taken for an unknown one."""


def _get(value: Any, *names: str) -> Any:
    """Return an attribute of an attribute, and so on; None if one of them does not exist."""
    for name in names:
        try:
            value = getattr(value, name)
        except TimeoutError:  # it is an OSError, but time limits use it, too
            raise
        except _ODD:
            return None
    return value


def _ask(function: Any) -> Any:
    """Call a function without arguments. Returns None if it cannot be called, or fails."""
    try:
        return function()
    except TimeoutError:
        raise
    except _ODD:
        return None


def _fileno(connection: Any) -> int | None:
    fd = _ask(_get(connection, "fileno"))
    return fd if isinstance(fd, int) and fd >= 0 else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _is_plain(connection: Any) -> bool:
    """Return whether the client gets what is written to the file descriptor. With TLS, that is encrypted in between."""
    return isinstance(connection, socket.socket) and not hasattr(connection, "getpeercert")
