"""Which threads take the CPU of a burst to many clients, beside the bare loop: `python benchmarks/many_profile.py`.

Bursts as those of `many.py`, ten in a run, five a second. The two servers take turns. Each number is a median of the
runs, in microseconds for one burst of 30 events. `--cores 1` has all on one core. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

from many_kinds import kinds
from many_load import compile_load
from many_server import Server
from many_subject import BURST, Subject, opened

CLIENTS = (100, 1_000, 10_000)
RUNS = 5
BURSTS, EVERY = 10, 0.2  # in a run; seconds
NAMES = {"loop": "our loop", "batcher": "our batcher", "ThreadPoolExecutor": "the request that publishes"}
"""What the name of a thread has in it, and what the table calls it."""
OTHERS = "all other threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N")
    parser.add_argument("--cores", type=int, help="how many cores server and clients share; default: all")
    arguments = parser.parse_args()
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    columns = [profile(clients) for clients in arguments.clients]
    rows = ["the bare loop", *NAMES.values(), OTHERS]
    print("| CPU µs a burst |" + "".join(f" {clients:,} clients |" for clients in arguments.clients))
    print("|---|" + "--:|" * len(columns))
    for row in rows:
        print(f"| {row} |" + "".join(f" {column[row]:,.0f} |" for column in columns))


def profile(clients: int) -> dict[str, float]:
    """Return the microseconds of each row for this many clients."""
    took: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        program = compile_load(Path(name))
        bare, ours = (
            stack.enter_context(opened(kinds()[kind], clients, program, Path(name))) for kind in ("bare", "detached")
        )
        for _ in range(RUNS):
            took["the bare loop"].append(run(bare)["the process"])
            for row, microseconds in run(ours).items():
                took[row].append(microseconds)
    return {row: statistics.median(values) for row, values in took.items()}


def run(subject: Subject) -> dict[str, float]:
    """Microseconds of CPU a burst, by row of the table."""
    server = subject.server
    names = thread_names(server) if server.kind.ours else None
    before = cpu(server)
    publish = lambda first, _: server.publish(first, BURST, bursts=BURSTS, every=EVERY)  # noqa: E731
    subject.round(BURST * BURSTS, publish)
    rows: dict[str, float] = defaultdict(float)
    for thread, microseconds in cpu(server).items():
        name = "" if names is None else names.get(thread, "")
        row = next((row for part, row in NAMES.items() if part in name), OTHERS)
        rows["the process" if names is None else row] += (microseconds - before.get(thread, 0)) / BURSTS
    return rows


def thread_names(server: Server) -> dict[int, str]:
    """The names that Python's threads have, by the system's number."""
    return {int(number): str(name) for number, name in server.get("/threads").items()}


def cpu(server: Server) -> dict[int, float]:
    """Microseconds of CPU that each thread has taken."""
    found = {}
    for pid in server.pids():
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):  # it has ended
                found[int(thread)] = int(Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[0]) / 1e3
    return found


if __name__ == "__main__":
    main()
