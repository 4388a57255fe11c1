"""The bare joined loop: what a thread of Python needs to write the same bytes to all sockets, and nothing else.

`python -m peers.bare PORT`. Answers the same head by hand, keeps the descriptors in a list, and at a burst calls libc's
`send` for each of them, with the events joined as one batch in one HTTP chunk, at most 50 in each. `ctypes.PyDLL` keeps
the interpreter's lock, as nothing else runs here. What a client's socket does not take is sent on in the next turn,
batch by batch; once all batches are made, turns go on until all have everything. No window, no history, no heartbeats.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import selectors
import socket
import sys
from urllib.parse import parse_qsl, urlsplit

from peers.event import event, publish

BATCH = 50
HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: bare\r\nContent-Type: text/event-stream; charset=utf-8\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)

send = ctypes.PyDLL(None).send
send.restype = ctypes.c_ssize_t
sized = (
    ctypes.c_size_t.from_param
)  # once for all sends of the same bytes; `argtypes` would cost half a microsecond each
FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class Clients:
    """The descriptors of open streams, and what they have still to get."""

    def __init__(self) -> None:
        self.descriptors: list[int] = []
        self._behind: dict[int, list[bytes]] = {}

    def write(self, data: bytes) -> None:
        """Send this to all clients, once. What a client does not take is kept for it."""
        size, behind = len(data), self._behind
        ready = sized(size)
        for fd in self.descriptors:
            if fd in behind:
                behind[fd].append(data)
            elif (sent := send(fd, data, ready, FLAGS)) != size:
                behind[fd] = [data[max(sent, 0) :]]
        if behind:
            self._catch_up()

    def finish(self) -> None:
        """Send until all clients have everything. Clients that have left are forgotten."""
        while self._behind:
            poll = select.poll()
            for fd in self._behind:
                poll.register(fd, select.POLLOUT)
            for fd, flags in poll.poll():
                if flags & (select.POLLERR | select.POLLHUP):
                    del self._behind[fd]
                    self.descriptors.remove(fd)
                    os.close(fd)
            self._catch_up()

    def _catch_up(self) -> None:
        for fd, waiting in list(self._behind.items()):
            for number, data in enumerate(waiting):
                sent = send(fd, data, sized(len(data)), FLAGS)
                if sent != len(data):
                    self._behind[fd] = [data[max(sent, 0) :], *waiting[number + 1 :]]
                    break
            else:
                del self._behind[fd]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def burst(clients: Clients, numbers: range) -> None:
    for start in range(0, len(numbers), BATCH):
        part = numbers[start : start + BATCH]
        events = [json.dumps(event(number), separators=(",", ":")) for number in part]
        kind, data = "tick", events[0]
        if len(numbers) > 1:
            kind = "tick_batch"
            data = f'{{"type":"tick_batch","batchSize":{len(part)},"events":[{",".join(events)}]}}'
        clients.write(chunk(f"event: {kind}\ndata: {data}\nid: {part[-1]}\n\n".encode()))
    clients.finish()


def answer(clients: Clients, connection: socket.socket) -> None:
    """Answer one request, which comes in one piece from the program that measures."""
    method, target, _ = connection.recv(65_536).decode().split(" ", 2)
    url = urlsplit(target)
    if (method, url.path) == ("GET", "/events"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.send(HEAD + chunk(b"event: sse_open\ndata: {}\n\n"))
        clients.descriptors.append(connection.detach())
        return
    body = b"pong"
    if method == "POST":
        body = json.dumps(publish(dict(parse_qsl(url.query)), lambda numbers: burst(clients, numbers))).encode()
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (len(body), body))
    connection.close()


def main() -> None:
    clients = Clients()
    with socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=4096) as listener:
        selector = selectors.DefaultSelector()
        selector.register(listener, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    selector.register(listener.accept()[0], selectors.EVENT_READ)
                    continue
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                selector.unregister(connection)
                answer(clients, connection)


if __name__ == "__main__":
    main()
