"""What many clients cost, and how long they wait, beside others and a bare loop. `python benchmarks/many.py`.

`README.md` in this folder says what is measured. `--clients 100 1000` and `--only detached,bare` run a part, `--cores
1` has server and clients on one core, `--install` gets the others that are missing, `--markdown` prints a table for the
README, `--must` says whether the detached streams keep their limits, and ends with status 1 if not. Linux only; needs
cc and gunicorn.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import many_table
from many_kinds import kinds
from many_load import LoadError, compile_load
from many_server import Kind, ServerError
from many_subject import FLOODED, Result, Subject, opened
from peers import install

CLIENTS = (100, 1_000, 5_000, 10_000)
MUST_CLIENTS = (100, 1_000, 10_000)
MUST_TIMES = 3  # each time with new processes: the same program is up to 3 % slower or faster in another process
TOGETHER = ("bare", "detached", "channels")  # those that are asked for take turns in each round; others run alone
FEW = (50, 4)  # clients and threads
ROUNDS = 5
SECONDS = 8.0  # for the rounds of one measurement: at least one, whatever it takes
MOST_CALLS = 20_000_000  # deliveries that `enqueue` back to back may make


def main() -> None:
    arguments = parse()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # inherited: a descriptor a client
    if arguments.install:
        install.install()
    if arguments.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    cores = len(os.sched_getaffinity(0))
    print(f"Python {platform.python_version()}, {platform.machine()}, {cores} core(s), medians of up to {ROUNDS}\n")
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), kinds())
        if arguments.must:
            sys.exit(must(bench))
        results = bench.run(arguments.clients, arguments.only or list(bench.kinds))
    print(many_table.markdown(results) if arguments.markdown else many_table.text(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=CLIENTS, metavar="N")
    parser.add_argument("--only", type=lambda names: names.split(","), metavar="NAMES", help=", ".join(kinds()))
    parser.add_argument("--cores", type=int, help="how many cores server and clients share; default: all")
    parser.add_argument("--install", action="store_true", help=f"get what is missing, into {install.CACHE}")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--must", action="store_true")
    return parser.parse_args()


class Bench:
    """The load generator, and the kinds of server that are measured with it."""

    def __init__(self, folder: Path, kinds: dict[str, Kind]) -> None:
        self.kinds = kinds
        self._folder = folder
        self._program = compile_load(folder)
        self._given_up: set[str] = set()

    def run(self, clients: Iterable[int], names: Iterable[str]) -> list[Result]:
        """Measure each of these kinds with each of these numbers of clients. One that fails is not tried with more."""
        results: list[Result] = []
        for many in sorted(clients):
            for group in groups(names):
                kinds = [self.kinds[name] for name in group if name not in self._given_up]
                measured = self._together([kind for kind in kinds if many <= kind.most], many)
                self._given_up |= {name for name in group for result in measured if _failed(result, self.kinds[name])}
                results += measured
        return results

    def few(self) -> Result:
        """Another page beside few detached streams, with few threads."""
        clients, threads = FEW
        kind = dataclasses.replace(self.kinds["detached"], threads=threads)
        with contextlib.ExitStack() as stack:
            subject, result = self._open(stack, kind, clients)
            if subject is not None:
                take_turns([subject], Subject.other_page, rounds=1)
        return result

    def _together(self, kinds: list[Kind], clients: int) -> list[Result]:
        """Measure these kinds, which run beside each other and take turns, so that what disturbs one disturbs all."""
        with contextlib.ExitStack() as stack:
            opened_all = [self._open(stack, kind, clients) for kind in kinds]
            measure([subject for subject, _ in opened_all if subject is not None], clients)
        return [result for _, result in opened_all]

    def _open(self, stack: contextlib.ExitStack, kind: Kind, clients: int) -> tuple[Subject | None, Result]:
        result = Result(kind, clients)
        try:
            if not kind.installed:
                raise ServerError("not installed")
            subject = stack.enter_context(opened(kind, clients, self._program, self._folder))
        except (ServerError, LoadError, OSError) as error:
            result.fault = str(error)
            return None, result
        print(f"{time.strftime('%T')} {kind.title}: {clients:,} clients", file=sys.stderr)
        return subject, subject.result


def groups(names: Iterable[str]) -> list[list[str]]:
    """Return which kinds run at the same time."""
    names = list(names)
    together = [name for name in TOGETHER if name in names]
    return [together] * bool(together) + [[name] for name in names if name not in TOGETHER]


def measure(subjects: list[Subject], clients: int) -> None:
    take_turns(subjects, Subject.burst)
    take_turns(subjects, Subject.single)
    # The same pauses for all: what a burst costs depends on how long the machine has done something else.
    every = max((subject.interval or 0 for subject in subjects), default=0)
    # Many short runs: what disturbs one of them for a moment must not move the median.
    take_turns(subjects, lambda subject: subject.run(SECONDS / 8, every), rounds=2 * ROUNDS)
    if clients == FLOODED:
        take_turns(subjects, Subject.flood, rounds=3)
    ours = [subject for subject in subjects if subject.result.kind.ours]
    take_turns(ours, lambda subject: subject.enqueue(min(10_000, MOST_CALLS // clients)), rounds=3)
    bare = next((subject for subject in subjects if subject not in ours and not subject.result.fault), None)
    take_turns(ours, lambda subject: subject.busy(ROUNDS, bare), rounds=1)
    take_turns(ours, lambda subject: subject.other_page(bare), rounds=1)


def take_turns(subjects: list[Subject], step: Callable[[Subject], object], rounds: int = ROUNDS) -> None:
    """Let each subject take this step, again and again. One that fails takes no more."""
    began = time.monotonic()
    for _ in range(rounds):
        for subject in subjects:
            if subject.result.fault:
                continue
            try:
                step(subject)
            except (ServerError, LoadError, OSError) as error:
                subject.result.fault = str(error)
        if time.monotonic() - began > SECONDS * len(subjects):
            return


def must(bench: Bench) -> int:
    """Print each limit of the detached streams. Returns 1 if one is not kept."""
    # Two by two: a third server between them would leave the caches cold for both.
    results: list[Result] = []
    channels: list[Result] = []
    for _ in range(MUST_TIMES):
        results += bench.run(MUST_CLIENTS, ("bare", "detached"))
        channels += bench.run(MUST_CLIENTS[1:], ("bare", "channels"))
    few = bench.few()
    limits = many_table.limits(results, channels, few)
    remarks = list(many_table.remarks([*results, *channels, few]))
    print("\n".join([*map(str, limits), *remarks]))
    return int(not all(limit.kept for limit in limits) or bool(remarks))


def _failed(result: Result, kind: Kind) -> bool:
    return bool(result.fault) and result.kind is kind


if __name__ == "__main__":
    main()
