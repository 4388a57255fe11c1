"""What the server that we run in tells us: the connection, how many requests it serves at once, whether it is stopping.

`inspect_server` runs in the server's thread that serves the request; `ServerInfo.is_stopping` in any thread.
Nothing here takes a lock, starts a thread, replaces a signal handler or imports a server. Most of what is looked at is
no public API: where it has another shape than we know, the answer is that we do not know.
"""

from __future__ import annotations

import importlib
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
    """What is known of the server."""

    name: str
    """Such as ``gunicorn gthread``; ``""`` if we do not know it."""
    fd: int | None
    """The descriptor of the request's connection. It is the server's, which may close it when the request ends."""
    threads: int | None
    """How many requests this process can serve at once. None if there is no limit, or we do not know it."""
    is_stopping: Callable[[], bool]
    """Whether the server has been told to end this process, or itself. Cheap, never raises, and keeps neither the
    request nor its connection alive. One stream's answer holds for all of the process."""
    lets_go: bool = False
    """Whether the connection may be taken over from it: it serves a request in a thread, and the socket is plain."""
    unsent: Callable[[], int] = _none
    """How many bytes of its answers it has still to write to this connection, in another thread than the one that asks
    the app for them. Always 0 if it writes in that thread. Keeps the connection no more alive than `is_stopping`."""
    obstacle: str = ""
    """Why this request's connection cannot be taken over, though its server lets go of others; "" if it can."""
    max_requests: int | None = None
    """After how many requests it ends this process. None: it does not, or we do not know."""
    http2: bool = False
    """Whether the request came over HTTP/2 that the server itself speaks, and serves one request after the other."""

    @property
    def writes_later(self) -> bool:
        """Whether it writes the response in another thread than the one that asks the app for it."""
        return self.unsent is not _none


_fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None

HIGH = 1024
"""From here on are the numbers of duplicates. Lower ones are left to servers that `select`, which knows no higher."""


def duplicate(fd: int) -> int:
    """The same connection under a number of its own. Raises `OSError` where there is none left."""
    if _fcntl is None:
        raise OSError("not on this system")
    try:
        return int(_fcntl.fcntl(fd, _fcntl.F_DUPFD_CLOEXEC, HIGH))
    except OSError:  # more than this process may have
        return os.dup(fd)


def inspect_server(environ: Mapping[str, Any]) -> ServerInfo:
    """Look at the request's `environ`, in the thread that serves it. Raises nothing of its own."""
    for find in (_gunicorn, _werkzeug, _waitress, _uwsgi, _mod_wsgi, _cheroot):
        server = _ask(partial(find, environ))
        if isinstance(server, ServerInfo):
            return server._replace(obstacle=_obstacle(environ, server))
    return ServerInfo("", None, None, _stopping())


_PLAIN_HTTP = re.compile(r"HTTP/1\.\d")
_ANY_HTTP = re.compile(r"HTTP/[1-9](\.\d)?")


def _obstacle(environ: Mapping[str, Any], server: ServerInfo) -> str:
    """What the request itself has that makes a take-over fail, or harms the answers to others on its connection."""
    # uWSGI repeats the version that it is given. Behind nginx, that is the browser's: it may be HTTP/2.0. From other
    # servers that can mean many streams on one connection.
    known = _ANY_HTTP if server.name == "uwsgi" else _PLAIN_HTTP
    if not known.fullmatch(str(environ.get("SERVER_PROTOCOL"))):
        return "the request has a version of HTTP that does not allow it"
    if (environ.get("CONTENT_LENGTH") or "0") != "0" or "HTTP_TRANSFER_ENCODING" in environ:
        return "the request has a body"  # for which a server may still wait: cheroot does, before it writes its head
    if server.unsent():
        return "an earlier answer on the same connection is not sent yet"
    return ""


# -- the servers -------------------------------------------------------------------------------------------------------

_WORKER_SIGNALS = ("SIGTERM", "SIGQUIT", "SIGUSR1", "SIGABRT")


def _gunicorn(environ: Mapping[str, Any]) -> ServerInfo | None:
    connection = environ.get("gunicorn.socket") or environ.get("gunicorn.sock")  # the latter: its gevent_pywsgi
    if connection is None:
        return None
    worker = _gunicorn_worker()
    kind = _gunicorn_kind(worker)
    threads = {
        "sync": 1,
        "gthread": _get(worker, "cfg", "threads"),
        "gevent": _get(worker, "cfg", "worker_connections"),
        "eventlet": _get(worker, "cfg", "worker_connections"),
    }.get(kind)
    is_stopping = _stopping(lambda: worker is not None and worker.alive is False)
    # Not by SERVER_PROTOCOL, which a client of HTTP/1 may choose.
    http2 = any(key.startswith("gunicorn.http2.") for key in environ)
    lets_go = kind in {"sync", "gthread"} and _is_plain(connection) and not http2
    return ServerInfo(
        f"gunicorn {kind}".strip(),
        _fileno(connection),
        _count(threads),
        is_stopping,
        lets_go,
        max_requests=_count(_get(worker, "cfg", "max_requests")),
        http2=http2,
    )


def _gunicorn_worker() -> Any:
    """The worker of this process, whose methods handle its signals. An app may have taken one of them for itself."""
    for name in _WORKER_SIGNALS:
        number = getattr(signal, name, None)
        worker = None if number is None else _get(signal.getsignal(number), "__self__")
        if isinstance(_get(worker, "alive"), bool) and _get(worker, "cfg") is not None:
            return worker
    return None


def _gunicorn_kind(worker: Any) -> str:
    """Which of gunicorn's own workers it is, or is derived from."""
    for base in type(worker).__mro__:
        package, _, module = str(_get(base, "__module__")).rpartition(".")
        if package == "gunicorn.workers":
            return {"ggevent": "gevent", "geventlet": "eventlet"}.get(module, module)
    return ""


def _werkzeug(environ: Mapping[str, Any]) -> ServerInfo | None:
    connection = environ.get("werkzeug.socket")
    if connection is None:
        return None
    # Without threads, it serves one request after the other. With processes, it makes one for each request.
    one_by_one = environ.get("wsgi.multithread") is False and not environ.get("wsgi.multiprocess")
    server = _get(threading.current_thread(), "_target", "__self__")  # which has started this thread, if it has
    # These are `socketserver.BaseServer`'s own, so their names are mangled.
    asked = "_BaseServer__shutdown_request"
    is_stopping = _stopping(
        lambda: _get(server, asked) is True, lambda: _ask(_get(server, "_BaseServer__is_shut_down", "is_set")) is True
    )
    # A process for each request ends with it.
    lets_go = not environ.get("wsgi.multiprocess") and _is_plain(connection)
    return ServerInfo("werkzeug", _fileno(connection), 1 if one_by_one else None, is_stopping, lets_go)


def _waitress(environ: Mapping[str, Any]) -> ServerInfo | None:
    channel = _get(environ.get("waitress.client_disconnected"), "__self__")
    if channel is None:
        return None
    dispatcher = _get(channel, "server", "task_dispatcher")
    # `stop_count` of its threads have to end. Those that are idle do so at once, and are in neither number any more.
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
    threads = _count(_get(server, "requests", "min"))  # it never starts more by itself
    connection = _get(thread, "conn", "socket")
    return ServerInfo("cheroot", _fileno(connection), threads, is_stopping, _is_plain(connection))


def _uwsgi(environ: Mapping[str, Any]) -> ServerInfo | None:
    if "uwsgi.version" not in environ:
        return None
    api = sys.modules.get("uwsgi")  # there, but not on disk
    fd = _ask(_get(api, "connection_fd"))
    threads = _count(_get(api, "cores"))
    fd = fd if isinstance(fd, int) and fd >= 0 else None
    # Its other ways to run leave a request waiting in the middle and go on with another one in the same thread.
    options = _get(api, "opt") or {}
    lets_go = not any(name in options for name in ("async", "gevent", "asyncio", "tornado", "greenlet"))
    return ServerInfo("uwsgi", fd, threads, _uwsgi_stopping(), lets_go)


def _uwsgi_stopping() -> Callable[[], bool]:
    """A worker that is to end gracefully ends its idle threads at once, which is all that can be seen of it.

    Nothing is seen while all of them are busy, with one thread, or without /proc.
    """
    seen: frozenset[str] = frozenset()

    def is_stopping() -> bool:
        nonlocal seen
        # The first request may come before all threads are there, so this looks for them again and again.
        tasks = seen.union(filter(os.path.exists, _uwsgi_tasks()))
        seen = tasks
        return not all(map(os.path.exists, tasks))

    quiet = _quiet(is_stopping)
    quiet()
    return quiet


def _uwsgi_tasks() -> list[str]:
    """Where the system shows the threads of uWSGI, but for the first, which stays to the end."""
    # Not `threading.enumerate`, which takes a lock: uWSGI forks without Python's hooks, so it may be held for ever.
    # For the same reason the first thread has its parent's `native_id`.
    threads: list[Any] = list(_get(threading, "_active").values())
    return [
        f"/proc/self/task/{thread.native_id}"
        for thread in threads
        if re.fullmatch(r"uWSGIWorker\d+Core[1-9]\d*", thread.name)
    ]


def _mod_wsgi(environ: Mapping[str, Any]) -> ServerInfo | None:
    if "mod_wsgi.version" not in environ:
        return None
    # Python's main thread is here the one that was first to import `threading`, and its end means nothing.
    return ServerInfo("mod_wsgi", None, None, _never)


# -- stopping ----------------------------------------------------------------------------------------------------------


def _never() -> bool:
    return False


def _stopping(*signs: Callable[[], bool]) -> Callable[[], bool]:
    """Any of these, or the end of the main thread: Python then waits for the threads that are left."""
    every = [_quiet(sign) for sign in (*signs, _python_ends())]
    return lambda: any(sign() for sign in every)


def _quiet(sign: Callable[[], bool]) -> Callable[[], bool]:
    def is_stopping() -> bool:
        try:
            return bool(sign())
        except Exception:
            return False

    return is_stopping


def _python_ends() -> Callable[[], bool]:
    main = threading.main_thread()
    if _ends(main):
        return _never  # it has left its server to another thread, for which its end meant nothing
    return lambda: _ends(main)


def _ends(main: threading.Thread) -> bool:
    if _get(threading, "_SHUTTING_DOWN") is True:
        return True  # told first: Python waits for the threads of executors while the main thread still counts as alive
    # Up to Python 3.12, `is_alive` takes the main thread's lock for a moment. If that is the moment in which the main
    # thread ends, that one fails, and does not wait for the other threads.
    stopped = _get(main, "_is_stopped")
    return stopped if isinstance(stopped, bool) else not main.is_alive()


# -- looking -----------------------------------------------------------------------------------------------------------

_ODD = (
    *(ArithmeticError, AttributeError, LookupError, OSError, ReferenceError),
    *(RuntimeError, SystemError, TypeError, ValueError),
)
"""What objects of another shape than we know may raise. Nothing more: a time limit of the app, which a signal handler
raises at any moment, must pass. To us, the server would look like one that we do not know."""


def _get(value: Any, *names: str) -> Any:
    """An attribute of an attribute and so on; None where there is no such thing."""
    for name in names:
        try:
            value = getattr(value, name)
        except TimeoutError:  # an OSError, but also what time limits are made of
            raise
        except _ODD:
            return None
    return value


def _ask(function: Any) -> Any:
    """What it returns, or None."""
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
    """Whether what is written to its descriptor is what the client reads: TLS has it encrypted in between."""
    return isinstance(connection, socket.socket) and not hasattr(connection, "getpeercert")
