"""The guide to the tools for the command line: its samples have the form of what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sse_batcher import SSEManager
from sse_batcher.backends.redis.inspection import RedisFacts
from sse_batcher.cli import main
from sse_batcher.commands.load import OPENING_AT_ONCE
from sse_batcher.commands.load_tally import Tally, as_table, losses, report
from sse_batcher.commands.stats import redis_lines
from sse_batcher.manager_state import process_of

from .kit.documents import text_of
from .kit.redisserver import RedisServer, redis_fixture

PAGE = text_of("guides/command-line-tools")
server = redis_fixture()


def labels(lines: list[str]) -> list[str]:
    return [found[1] for line in lines if (found := re.match(r"( {2,4}\S+(?: \S+)*)(?: {2,}|$)", line))]


def sample(begin: str) -> list[str]:
    """The lines of the sample that begins with this command."""
    [text] = re.findall(rf"^```text\n\$ {re.escape(begin)}[^\n]*\n(.*?)^```", PAGE, flags=re.M | re.S)
    return str(text).splitlines()


def test_the_sample_of_load_has_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    tally = Tally(1)
    said = report(tally, url="http://x", seconds=1.0, busy=0.1, lost=losses(tally.frames, []))
    assert labels(sample("python -m sse_batcher load")) == labels(as_table(said))
    assert f"At most {OPENING_AT_ONCE} connections" in PAGE
    assert main(["load", "--help"]) == 0
    assert "1<=x<=10000" in capsys.readouterr().out


def test_the_sample_of_redis_has_its_rows() -> None:
    facts = RedisFacts(
        stream="s", entries=1, memory_bytes=1, epoch="e", oldest_age=1, newest_age=1, processes=1, kicked_users=1
    )
    [text] = re.findall(r"^(Redis, for all processes.*?)^```", PAGE, flags=re.M | re.S)
    assert labels(text.splitlines()) == labels(list(redis_lines(facts)))


@pytest.mark.external
def test_the_rights_are_enough(server: RedisServer, tmp_path: Path) -> None:
    [app] = re.findall(r"^ACL SETUSER (.*)$", text_of("guides/redis"), flags=re.M)
    first, second = re.findall(r"^ACL SETUSER (.*)$", PAGE, flags=re.M)
    server.client.execute_command("ACL", "SETUSER", *app.split())
    server.client.execute_command("ACL", "SETUSER", *first.split())
    with SSEManager(backend=server.url.replace("//", "//app:password@")) as manager:
        manager.enqueue("order", 1)
        manager.flush_all()
        backend = process_of(manager).backend
        with backend.inspect() as inspection:  # type: ignore[attr-defined]
            next(inspection.follow(1, ""))
            facts = inspection.facts()
            assert (facts.entries, facts.memory_bytes, facts.processes) == (1, None, None)
            server.client.execute_command("ACL", "SETUSER", *second.split())
            facts = inspection.facts()
            assert facts.memory_bytes
            assert facts.processes == 0  # it only publishes
