"""What texts, users and polls cost with many clients: `python benchmarks/texts_users_polls.py`.

Uses the server and the load generator of `many.py`. Things that are compared take turns within each round, and each
ratio is the median of those of the rounds. PASS or FAIL is said of each limit; the other lines only report. Ends with
status 1 if a limit is not kept. Linux only; needs cc and gunicorn. About four minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import http.client
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from many_kinds import kinds
from many_load import Load, compile_load
from many_server import HOST, Kind, Server
from many_subject import BURST, PATIENCE, WINDOW, Subject, opened
from many_table import Limit

CLIENTS = 10_000
ROUNDS = 5
BURSTS = 10  # in a run of which the CPU is measured
LOOP_ROUNDS = 3  # of loops over users, and of polls
AWAY = 5  # one of so many users of a long loop has a stream
POLL_WAIT = 600  # seconds: opening so many takes longer than the default

PARTS = ("bursts", "users", "polls")

Line = Limit | str


class Sort(NamedTuple):
    """Bursts that are compared: to which clients, and what `many_app` calls them."""

    subject: Subject
    sort: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=CLIENTS, metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N")
    parser.add_argument(
        "--only", type=lambda names: names.split(","), default=PARTS, metavar="NAMES", help=",".join(PARTS)
    )
    arguments = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # inherited: a descriptor a client
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), {arguments.clients:,} clients\n")
    kept = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for line in measure(folder, compile_load(folder), arguments.clients, arguments.rounds, arguments.only):
            print(line if isinstance(line, Limit) else f"      {line}", flush=True)
            kept = kept and (isinstance(line, str) or line.kept)
    sys.exit(not kept)


def measure(folder: Path, program: Path, clients: int, rounds: int, parts: Collection[str]) -> Iterator[Line]:
    without, with_user = kinds()["detached"], kinds()["users"]
    with contextlib.ExitStack() as stack:
        if "bursts" in parts:
            plain = stack.enter_context(opened(without, clients, program, folder))
        if "bursts" in parts or "users" in parts:
            users = stack.enter_context(opened(with_user, clients, program, folder))
        if "bursts" in parts:
            yield from compare_bursts(plain, users, rounds)
            yield report("a user: memory a client more", (users.result.kb - plain.result.kb) * 1024, "bytes")
            for result in (plain.result, users.result):
                lost = result.missing + result.disordered
                yield Limit(f"{result.kind.title}: events missing or out of order", lost, 0, "")
        if "users" in parts:
            yield from loops_over_users(users)
    if "polls" in parts:
        yield from polls(without, clients, program, folder)


def report(what: str, value: float, unit: str) -> str:
    return f"{what:76}{value:>14,.2f}  {unit}"


# -- bursts ------------------------------------------------------------------------------------------------------------


def compare_bursts(plain: Subject, users: Subject, rounds: int) -> Iterator[Line]:
    """Bursts of JSON and of texts to the same clients; broadcasts to these, and to as many with a user each."""
    sorts = {
        "JSON": Sort(plain, ""),
        "texts": Sort(plain, "text"),
        "broadcast": Sort(plain, "broadcast"),
        "to users": Sort(users, "broadcast"),
    }
    lasts: dict[str, list[float]] = {name: [] for name in sorts}
    for _ in range(2 * rounds):
        for name, sort in sorts.items():
            time.sleep(WINDOW)
            lasts[name].append(last_ms(sort) - WINDOW * 1e3)
    every = 1.5 * max(statistics.median(took) for took in lasts.values()) / 1e3 + WINDOW + 0.02
    cpus: dict[str, list[float]] = {name: [] for name in sorts}
    for _ in range(rounds):
        for name, sort in sorts.items():
            cpus[name].append(cpu_us(sort, every))
    for what, name, base in (
        ("30 texts", "texts", "JSON"),
        ("a broadcast of 30 to clients with a user each", "to users", "broadcast"),
    ):
        against = "30 JSON events" if base == "JSON" else "the same without users"
        yield report(f"{base}, to the last, without the window", statistics.median(lasts[base]), "ms")
        yield report(f"{what}, to the last, without the window", statistics.median(lasts[name]), "ms")
        yield report(f"{base}, CPU a delivery", statistics.median(cpus[base]), "µs")
        yield Limit(f"{what}: time", ratio(lasts[name], lasts[base]), 1.1, f"x {against}")
        yield Limit(f"{what}: CPU", ratio(cpus[name], cpus[base]), 1.05, f"x {against}")


def ratio(of: list[float], to: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(of, to, strict=True))


def last_ms(sort: Sort) -> float:
    """Milliseconds until the last client has all of one burst."""
    publish = lambda first, count: sort.subject.server.publish(first, count, sort=sort.sort)  # noqa: E731
    return sort.subject.round(BURST, publish)[0].last_ms


def cpu_us(sort: Sort, every: float) -> float:
    """Microseconds of CPU for each delivery in a run of bursts, one in so many seconds."""
    server = sort.subject.server
    before = server.cpu()
    publish = lambda first, _: server.publish(first, BURST, bursts=BURSTS, every=every, sort=sort.sort)  # noqa: E731
    seen, _ = sort.subject.round(BURST * BURSTS, publish, BURSTS * every + PATIENCE)
    return (server.cpu() - before) / seen.events


# -- users -------------------------------------------------------------------------------------------------------------


class Loop(NamedTuple):
    """What a loop took that enqueues an event for each of many users."""

    enqueue_s: float
    last_ms: float
    """Until the last stream that got its event had it."""
    cpu_us: float
    missed: int
    """Streams that did not get it."""


def loops_over_users(users: Subject) -> Iterator[Line]:
    """Loops over the users that have a stream, and over five times as many, in turns."""
    clients = users.result.clients
    cursor = users.server.request("GET", "/cursor").decode()
    last_ms(Sort(users, ""))  # what a client that comes back with the cursor has missed
    before = gaps(users)
    short, long = [], []
    for _ in range(LOOP_ROUNDS):
        short.append(loop(users, clients, 1))
        long.append(loop(users, AWAY * clients, AWAY))
    each = statistics.median(took.cpu_us for took in short) / clients
    away = statistics.median(b.cpu_us - a.cpu_us for a, b in zip(short, long, strict=True)) / ((AWAY - 1) * clients)
    for name, loops, many in (
        ("all with a stream", short, clients),
        (f"{clients:,} with a stream", long, AWAY * clients),
    ):
        what = f"a loop over {many:,} users, {name}"
        yield report(f"{what}: the calls", statistics.median(took.enqueue_s for took in loops), "s")
        yield report(
            "    until each stream has its event", statistics.median(took.last_ms for took in loops) / 1e3, "s"
        )
        yield Limit("    streams that missed it, at most", max(took.missed for took in loops), 0, "")
    yield report("an event for one user with a stream, all in all", each, "µs of CPU")
    yield report("an event for one user without a stream", away, "µs of CPU")
    frames = LOOP_ROUNDS * (1 + AWAY) * clients
    yield Limit(f"gaps during {frames:,} events for users", gaps(users) - before, 0, "")
    yield Limit("events of a channel that were evicted by them", BURST - came_back(users, cursor), 0, "")


def loop(users: Subject, count: int, every: int) -> Loop:
    """Enqueue an event for each of so many users. Every so-many-th has a stream."""
    server, before = users.server, users.server.cpu()

    def publish(first: int, _: int) -> float:
        return float(server.post(f"/notes?first={first}&n={count}&every={every}")["seconds"])

    seen, took = users.round(1, publish, lossy=True)
    while stats(users)["pending_events"]:
        time.sleep(0.1)
    time.sleep(0.5)
    return Loop(took, seen.last_ms, server.cpu() - before, seen.clients - seen.complete)


def stats(subject: Subject) -> dict[str, int]:
    counters: dict[str, int] = json.loads(subject.server.request("GET", "/stats"))
    return counters


def gaps(subject: Subject) -> int:
    return stats(subject)["gaps"]


def came_back(subject: Subject, cursor: str) -> int:
    """How many events of a burst a client gets that comes back with this cursor. None after a gap."""
    connection = http.client.HTTPConnection(HOST, subject.server.port, timeout=5)
    connection.request("GET", f"/events?last_event_id={cursor}")
    response, came = connection.getresponse(), b""
    with contextlib.suppress(TimeoutError):
        while b"sse_gap" not in came and came.count(b'"n":') < BURST:
            came += response.read1()
    connection.close()
    return 0 if b"sse_gap" in came else came.count(b'"n":')


# -- polls -------------------------------------------------------------------------------------------------------------


def polls(kind: Kind, clients: int, program: Path, folder: Path) -> Iterator[Line]:
    """Open polls, which one event ends."""
    kind = dataclasses.replace(kind, environment={**kind.environment, "MANY_POLL_WAIT": str(POLL_WAIT)})
    lasts, ended, busiest, cpus, missed = [], [], [], [], 0
    with Server(kind, clients, folder) as server:
        for _ in range(LOOP_ROUNDS):
            cursor = server.request("GET", "/cursor").decode()
            with Load(program, server.port, f"/events?poll=1&last_event_id={cursor}") as load:
                load.connect(clients)
                time.sleep(0.5)
                first, before = server.numbers(1), server.cpu()
                publish = lambda first=first: server.publish(first, 1, sort="critical")  # noqa: E731
                seen = load.round(first, 1, publish, PATIENCE, ending=True)
                cpus.append((server.cpu() - before) / clients)
                lasts.append(seen.last_ms)
                ended.append(seen.ended_ms)
                retries = load.retries
                assert retries is not None
                busiest.append(retries.busiest)
                missed += clients - seen.complete + seen.open
    yield report(f"{clients:,} polls, one event: until all have it", statistics.median(lasts), "ms")
    yield report("    until all are ended", statistics.median(ended), "ms")
    yield report("    CPU a poll", statistics.median(cpus), "µs")
    least, middle, most, _ = retries
    yield f"    they come back after {least:,} to {most:,} ms, half of them within {middle:,} ms"
    yield Limit("    polls without the event, or not ended", missed, 0, "")
    yield Limit("    polls that come back within the busiest second", max(busiest), clients / 3, "")


if __name__ == "__main__":
    main()
