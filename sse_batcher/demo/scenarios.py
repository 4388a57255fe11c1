"""What happens in a simulated hub of ten servers: the scenarios that the demo plays and the report measures.

Pure: the caller brings the source of randomness, and keeps the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

SERVERS = tuple(f"server-{number:02}" for number in range(1, 11))
LISTS = ("tool_list_changed", "resource_list_changed", "prompt_list_changed")
CONFIG = "config_changed"
LOG = "log"
ERROR = "error"
TYPES = (*LISTS, CONFIG, LOG, ERROR)


class Happening(NamedTuple):
    """One event of a scenario, `at` seconds from its start."""

    at: float
    type: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something that happens in the hub. `happen(random)` makes its events, in the order of their times."""

    title: str
    happen: Callable[[Random], list[Happening]]


def _list_changed(random: Random, at: float, server: str, event_type: str) -> Happening:
    kind = event_type.removesuffix("_list_changed")
    names = [f"{kind}_{number}" for number in random.sample(range(100, 1000), 3)]
    data = {"server": server, "count": random.randint(10, 99), "added": names[:2], "removed": names[2:]}
    return Happening(at, event_type, data | {"took_ms": random.randint(10, 99), "version": _hex(random)})


def _config_changed(random: Random, at: float, server: str) -> Happening:
    return Happening(at, CONFIG, {"server": server, "timeout_s": random.randint(10, 99), "version": _hex(random)})


def _log(random: Random, at: float, number: int) -> Happening:
    # No "server" in it, so that none replaces another.
    text = f"{random.choice(SERVERS)} answered request {number:03} in {random.randint(10, 99)} ms"
    return Happening(at, LOG, {"level": "info", "message": text})


def _error(random: Random) -> Happening:
    data = {"server": random.choice(SERVERS), "code": -32000, "message": "the connection was lost"}
    return Happening(0.0, ERROR, data)


def _hex(random: Random) -> str:
    return f"{random.getrandbits(64):016x}"


def _restart(random: Random) -> list[Happening]:
    return [_list_changed(random, 0.0, server, kind) for server in SERVERS for kind in LISTS]


def _five(random: Random) -> list[Happening]:
    return [_list_changed(random, 0.0, server, LISTS[0]) for server in sorted(random.sample(SERVERS, 5))]


def _config(random: Random) -> list[Happening]:
    servers = sorted(random.sample(SERVERS, 3))
    # 22 ms, so that no change falls on the end of a window of 100 ms, where chance would say which one it joins.
    return [_config_changed(random, number * 0.022, servers[number % 3]) for number in range(30)]


def _one(random: Random) -> list[Happening]:
    return [_list_changed(random, 0.0, random.choice(SERVERS), random.choice(LISTS))]


def _steady(random: Random) -> list[Happening]:
    return [_log(random, number * 0.005, number) for number in range(400)]


def _sparse(random: Random) -> list[Happening]:
    return [_list_changed(random, number * 0.3, random.choice(SERVERS), LISTS[0]) for number in range(6)]


SCENARIOS = {
    "restart": Scenario("Hub restart", _restart),  # ten servers report three lists each, at once
    "five": Scenario("Five servers", _five),  # five servers report one list each, at once
    "config": Scenario("Rapid config changes", _config),  # three servers change ten times each, one change every 22 ms
    "one": Scenario("One server", _one),  # one server reports one list
    "steady": Scenario("Steady 200/s", _steady),  # 400 log lines in two seconds
    "sparse": Scenario("Sparse events", _sparse),  # six lone changes, 300 ms apart
    "error": Scenario("Error", lambda random: [_error(random)]),  # an error, which never waits
}
"""By name, in the order in which they are shown."""
