"""An HTTP server that answers as a page has asked for: exact bytes, statuses, cuts and silence.

A thread for each connection, and one that accepts. `_Streams` has the state that they share, behind its lock.

It listens on several ports, each an origin of its own, since a browser has at most six connections to one. Paths:

- ``/NAME``: a file of the folder.
- ``PUT /script/NAME``: a JSON object with two lists of answers, ``stream`` and ``poll``, which is for requests that
  have ``poll=1``. Request k of its kind to ``/stream/NAME`` gets answer k, or the last one.
- ``POST /say/NAME``: the body is sent on the stream that is held open, or on the next one that is.
- ``GET /requests/NAME``: the requests so far, as JSON; see `Request`.

An answer is an object, and all of its fields may be missing:

- ``status`` (200), ``headers``: of the head. With status 0, the connection ends without any answer.
- ``after``: ms before the head. null: never.
- ``polls``: before that, it waits for so many requests with ``poll=1``.
- ``body``: a list of texts, which are sent each by itself, and numbers, which are pauses in ms.
- ``history``: a list of [id, text]. The texts behind the id that the client has come with follow the ``body``,
  and those of the list ``last`` follow them.
- ``cut``: after so many bytes of the body, the connection ends.
- ``slice``: the most bytes that are sent at once.
- ``end``: ``close`` (the default), ``reset``, or ``hold``: it stays open until the client leaves.
- ``beat``: ms between the heartbeats of a stream that is held.
- ``chunked``: as in HTTP/1.1. Then the client can see whether the body is complete.
"""

from __future__ import annotations

import json
import select
import selectors
import socket
import struct
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

HOST = "127.0.0.1"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}
_TICK = 0.01
"""Seconds between two looks at whether a client has left, or has something to get."""


@dataclass
class Request:
    """A request for a stream. Times are in ms since the server began."""

    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    at: float
    left: float | None = None
    """When the client hung up. None if it has not, or if the server ended the response."""


class ScriptedServer:
    """Listens as long as it is a context. `folder` has the files, and `headers` those of certain files."""

    def __init__(self, *folders: Path, ports: int = 1, headers: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self._folders = folders
        self._headers = headers or {}
        self._listeners = [socket.create_server((HOST, 0), backlog=64) for _ in range(ports)]
        self.ports = [listener.getsockname()[1] for listener in self._listeners]
        self.url = f"http://{HOST}:{self.ports[0]}"
        self._began = time.monotonic()
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []  # of the thread that accepts
        self._acceptor = threading.Thread(target=self._accept, name="scripted server")
        self._lock = threading.Lock()  # guards the three below
        self._answers: dict[str, dict[str, list[dict[str, Any]]]] = {}
        self._requests: dict[str, list[Request]] = defaultdict(list)
        self._said: dict[str, deque[bytes]] = defaultdict(deque)

    def __enter__(self) -> ScriptedServer:
        self._acceptor.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._acceptor.join()
        for listener in self._listeners:
            listener.close()

    def script(self, name: str, answers: list[dict[str, Any]]) -> str:
        """Say how requests to a stream are answered. Returns its path."""
        with self._lock:
            self._answers[name] = {"stream": answers}
        return f"/stream/{name}"

    def say(self, name: str, text: str) -> None:
        with self._lock:
            self._said[name].append(text.encode())

    def requests(self, name: str) -> list[Request]:
        with self._lock:
            return list(self._requests[name])

    def _accept(self) -> None:
        with selectors.DefaultSelector() as selector:
            for listener in self._listeners:
                selector.register(listener, selectors.EVENT_READ)
            while not self._ended.is_set():
                for key, _ in selector.select(0.1):
                    connection, _ = key.fileobj.accept()  # type: ignore[union-attr]
                    self._threads = [thread for thread in self._threads if thread.is_alive()]
                    self._threads.append(threading.Thread(target=self._serve, args=(connection,), name="scripted"))
                    self._threads[-1].start()
        for thread in self._threads:
            thread.join()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            head, _, body = self._receive(connection, b"", b"\r\n\r\n").partition(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").split("\r\n")
            if not first:
                return
            method, target, _ = first.split(" ")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            while len(body) < int(headers.get("content-length", "0")) and (piece := connection.recv(65536)):
                body += piece
            url = urlsplit(target)
            kind, _, name = url.path[1:].partition("/")
            if kind == "stream" and method == "GET":
                self._stream(connection, name, Request(url.path, parse_qs(url.query), headers, self._now()))
            else:
                self._respond(connection, method, url.path, body)

    def _receive(self, connection: socket.socket, data: bytes, end: bytes) -> bytes:
        """What comes up to `end`, or at all. A browser opens connections that it does not use, too."""
        while end not in data and not self._ended.is_set():
            if select.select([connection], [], [], 0.1)[0]:
                piece = connection.recv(65536)
                if not piece:
                    break
                data += piece
        return data

    def _now(self) -> float:
        return 1000 * (time.monotonic() - self._began)

    # -- what is no stream ---------------------------------------------------------------------------------------------

    def _respond(self, connection: socket.socket, method: str, path: str, body: bytes) -> None:
        headers = {"Cache-Control": "no-cache", "Access-Control-Allow-Origin": "*"}
        kind, _, name = path[1:].partition("/")
        status, content, content_type = 200, b"", "application/json"
        with self._lock:
            if method == "OPTIONS":
                headers |= {"Access-Control-Allow-Headers": "*", "Access-Control-Allow-Methods": "*"}
            elif kind == "script":
                self._answers[name] = json.loads(body)
            elif kind == "say":
                self._said[name].append(body)
            elif kind == "requests":
                content = json.dumps([asdict(request) for request in self._requests[name]]).encode()
            else:
                files = [file for folder in self._folders if (file := folder / path[1:]).is_file()]
                if files:
                    content, content_type = files[0].read_bytes(), _TYPES[files[0].suffix]
                    headers |= self._headers.get(path[1:], {})
                else:
                    status = 404
        headers |= {"Content-Type": content_type, "Content-Length": str(len(content))}
        connection.sendall(_head(status, headers) + content)

    # -- streams -------------------------------------------------------------------------------------------------------

    def _stream(self, connection: socket.socket, name: str, request: Request) -> None:
        with self._lock:
            kind = "poll" if "poll" in request.query else "stream"
            self._requests[name].append(request)
            number = sum(("poll" in each.query) == (kind == "poll") for each in self._requests[name])
            answers = self._answers.get(name, {}).get(kind) or [{"status": 404}]
            answer = answers[min(number, len(answers)) - 1]
        stream = _Stream(connection, answer, self._ended)
        try:
            while self._polls(name) < answer.get("polls", 0):
                stream.pause(1000 * _TICK)
            if stream.pause(answer.get("after", 0)):
                self._answer(stream, name, answer, request)
        except (_LeftError, OSError):
            request.left = self._now()

    def _polls(self, name: str) -> float:
        return inf if self._ended.is_set() else sum("poll" in each.query for each in self.requests(name))

    def _answer(self, stream: _Stream, name: str, answer: dict[str, Any], request: Request) -> None:
        headers = {
            "Content-Type": "text/event-stream; charset=utf-8",
            "Cache-Control": "no-cache, no-transform",
            "Access-Control-Allow-Origin": request.headers.get("origin", "*"),
            "Access-Control-Allow-Credentials": "true",
            "Access-Control-Expose-Headers": "Retry-After",
        }
        if answer.get("status") == 0:
            stream.end()
            return
        stream.head(answer.get("status", 200), headers | answer.get("headers", {}))
        behind = _after(request.query, answer.get("history", ()))
        for step in [*answer.get("body", ()), *behind, *answer.get("last", ())]:
            if not (stream.send(step.encode()) if isinstance(step, str) else stream.pause(step)):
                return
        if answer.get("end") == "hold":
            beat = answer.get("beat", 1e9)
            next_beat = self._now() + beat
            while stream.pause(1000 * _TICK):
                with self._lock:
                    said = self._said[name].popleft() if self._said[name] else b""
                if self._now() >= next_beat:
                    said += b":\n"
                    next_beat = self._now() + beat
                if said and not stream.send(said):
                    return
        else:
            stream.finish()


class _LeftError(Exception):
    """The client has hung up."""


class _Stream:
    """The response to a request for a stream. Its methods return False if it has ended."""

    def __init__(self, connection: socket.socket, answer: Mapping[str, Any], ended: threading.Event) -> None:
        self._connection = connection
        self._ended = ended
        self._chunked = answer.get("chunked", False)
        self._slice = answer.get("slice") or 1_000_000
        self._left = answer.get("cut")
        self._reset = answer.get("end") == "reset"

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        more = {"Transfer-Encoding": "chunked"} if self._chunked else {}
        self._connection.sendall(_head(status, {**headers, **more}))

    def send(self, data: bytes) -> bool:
        is_last = self._left is not None and len(data) >= self._left
        if self._left is not None:
            data = data[: self._left]
            self._left -= len(data)
        for start in range(0, len(data), self._slice):
            piece = data[start : start + self._slice]
            self._connection.sendall(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)
            if self._slice < 100:
                self.pause(1)  # so that the browser most likely reads it by itself
        if is_last:
            self.end()
        return not is_last

    def pause(self, milliseconds: float | None) -> bool:
        """Wait, None: without end. Raises `_LeftError` as soon as the client leaves."""
        deadline = inf if milliseconds is None else time.monotonic() + milliseconds / 1000
        while not self._ended.is_set():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return True
            if select.select([self._connection], [], [], min(0.1, remaining))[0] and not self._connection.recv(1000):
                raise _LeftError
        return False

    def finish(self) -> None:
        if self._chunked and not self._reset:
            self._connection.sendall(b"0\r\n\r\n")
        self.end()

    def end(self) -> None:
        if self._reset:
            self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self._connection.shutdown(socket.SHUT_WR)


def _after(query: Mapping[str, list[str]], history: Sequence[tuple[str, str]]) -> list[str]:
    """The texts behind the cursor; all of them if it is not in this history."""
    (cursor,) = query.get("last_event_id", [""])
    ids = [id for id, _ in history]
    return [text for _, text in history[ids.index(cursor) + 1 if cursor in ids else 0 :]]


def _head(status: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Scripted", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "Connection: close", "\r\n"]).encode()
