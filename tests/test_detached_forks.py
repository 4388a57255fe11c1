"""Forked children of a process with detached streams: they keep no connection of their parent open."""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import sys
import threading
from contextlib import closing
from typing import Any

import pytest

from sse_batcher import BatchOptions, SSEManager
from sse_batcher.runtime.process import PerProcess
from sse_batcher.transports.sockets import MIN_DUPLICATE_FD

from .kit import detached
from .kit.detached import OPTIONS, Server, detached_stream, wait_for_transports
from .kit.exchange import Exchange, descriptors
from .kit.process import AsProcess
from .kit.repository import ROOT
from .kit.sse_parser import EventStreamParser, ServerEvent
from .kit.waiting import wait_until

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="streams are detached where there is epoll")

# The fixtures of this module.
no_descriptor_is_left = detached.no_descriptor_is_left
nothing_was_logged_yet = detached.nothing_was_logged_yet
manager = detached.manager


def forking(*fds: int) -> None:
    """The program of the next test: a server with two open streams forks, and goes on, and so does its child.

    The third connection is the child's own.
    """
    manager = SSEManager(batching=BatchOptions(batch_window=0), clients=OPTIONS)
    inodes = [os.fstat(fd).st_ino for fd in fds]

    def detach(fd: int) -> None:
        thread = threading.Thread(target=Server().serve, args=(fd, detached_stream(manager, fd)))
        thread.start()
        thread.join()

    for fd in fds[:2]:
        detach(fd)
    wait_for_transports(manager, 0, 2)
    there = os.pipe()
    if os.fork():
        os.close(fds[2])
        os.read(there[0], 1)  # the child has had its say
        manager.enqueue("log", "parent")
        sys.stdin.readline()
        return
    detach(fds[2])
    wait_for_transports(manager, 0, 1)
    mine = " ".join(descriptors())
    manager.enqueue("log", "child")
    wait_until(lambda: manager.get_stats().frames == 1, "it is sent")
    say([f"socket:[{inode}]" in mine for inode in inodes])
    os.write(there[1], b"x")
    sys.stdin.readline()
    say("the child ends")
    os._exit(0)


def say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def test_a_forked_child_keeps_no_connection_of_its_parent_open_whose_streams_go_on() -> None:
    exchanges = [Exchange() for _ in range(3)]
    fds = [exchange.fd for exchange in exchanges]
    program = f"from tests.test_detached_forks import forking; forking(*{fds})"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=fds,
        cwd=ROOT,
    ) as parent:
        for fd in fds:
            os.close(fd)
        assert parent.stdout is not None
        assert parent.stdin is not None
        clients = [answered(exchange) for exchange in exchanges]
        assert json.loads(parent.stdout.readline()) == [False, False, True]
        assert [events(client, 2) for client in clients] == [
            ["sse_open", "parent"],
            ["sse_open", "parent"],
            ["sse_open", "child"],
        ]
        parent.kill()  # nothing is shut down: a client sees now that no process has its connection
        for client in clients[:2]:
            with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
                client.read()
        assert not select.select([exchanges[2].client], [], [], 0)[0]
        parent.stdin.close()
        assert json.loads(parent.stdout.readline()) == "the child ends"
    for exchange in exchanges:
        exchange.client.close()


def answered(exchange: Exchange) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(exchange.client)
    answer.begin()
    return answer


def events(answer: http.client.HTTPResponse, count: int) -> list[str]:
    parser = EventStreamParser(strict=True)
    found: list[ServerEvent] = []
    while len(found) < count:
        found += parser.feed(answer.read1(65_536))
    return [event.json if event.type == "log" else event.type for event in found]


def test_a_forked_child_keeps_no_connection_open_that_its_parent_is_about_to_take(manager: SSEManager) -> None:
    exchange = Exchange()
    with closing(detached_stream(manager, exchange.fd)) as body:
        next(body)
        child = os.fork()
        if not child:
            open_there = [
                os.stat(f"/proc/self/fd/{fd}").st_ino
                for fd in os.listdir("/proc/self/fd")
                if int(fd) >= MIN_DUPLICATE_FD
            ]
            os._exit(exchange.inode in open_there)
        assert os.waitpid(child, 0) == (child, 0)
        assert exchange.hears_nothing()
    assert exchange.is_restored()
    exchange.close()


def test_descriptors_that_a_child_has_closed_are_not_closed_by_its_own_child(as_process: AsProcess) -> None:
    loops = PerProcess(object)
    parents = loops.get()
    with as_process(-1):
        assert loops.left_behind() == [parents]
        childs = loops.get()
    with as_process(-2):
        assert loops.left_behind() == [childs]
        assert loops.left_behind() == []
