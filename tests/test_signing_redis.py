"""Signed URLs with Redis: a kick refuses tokens in all processes, and for as long as they could live."""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from flask import Flask

from sse_batcher import SSE, BackendError
from sse_batcher.backends.kicks import MAX_TOKEN_SECONDS
from sse_batcher.backends.redis import state
from sse_batcher.backends.redis.state import State
from sse_batcher.manager_state import process_of

from .kit.documents import text_of
from .kit.flask_sites import making
from .kit.redisserver import RedisServer, be_patient, redis_fixture, redis_server
from .kit.servers import HOST, Server, gunicorn, running
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

redis = redis_fixture()
RIGHTS = ("app", "on", ">password", "~sse_batcher:*", "+@all")
KICKED = "sse_batcher:kicked"
APP = """
import os

from flask import Flask, request

from sse_batcher import SSE

app = Flask("site")
app.config.update(SECRET_KEY="the key", SSE_BACKEND=os.environ["BACKEND"])
sse = SSE(app)


@app.post("/sign")
def sign():
    return sse.sign(**request.get_json())


@app.post("/kick")
def kick():
    return str(sse.kick(user=request.get_json()))
"""


class Site:
    """An app as one more process would have it, but in this one."""

    def __init__(self, **config: Any) -> None:
        self.app = Flask("site", static_folder=None)
        self.app.config.update({"SECRET_KEY": "the key", **config})
        self.sse = SSE(self.app)
        self.manager = self.sse.manager
        self.backend = process_of(self.manager).backend

    def answer(self, token: str) -> tuple[int, bytes]:
        """The status, and the first block of a stream."""
        with self.app.test_client().get("/events", query_string={"token": token}) as response:
            return response.status_code, next(iter(response.response), b"")  # type: ignore[call-overload, no-any-return]

    def status(self, token: str) -> int:
        return self.answer(token)[0]


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    be_patient(monkeypatch)


@pytest.fixture
def make_site(redis: RedisServer) -> Iterator[Callable[..., Site]]:
    with making(Site) as make:
        yield lambda **config: make(**{"SSE_BACKEND": redis.url, **config})


def processes(stack: ExitStack, folder: Path, backend: str) -> list[Server]:
    """Two servers with one process each."""
    (folder / "app.py").write_text(APP)
    arguments = gunicorn("-k", "gthread", "--threads", "8", "app:app")
    return [stack.enter_context(running(arguments, folder, BACKEND=backend)) for _ in range(2)]


def status(server: Server, token: str) -> int:
    connection = http.client.HTTPConnection(HOST, server.port, timeout=TIMEOUT)
    connection.request("GET", f"/events?token={token}")
    with connection.getresponse() as response:
        found = response.status
    connection.close()
    return found


def test_a_kick_refuses_tokens_in_all_processes_also_after_a_restart(redis: RedisServer, tmp_path: Path) -> None:
    with ExitStack() as stack:
        one, other = processes(stack, tmp_path, redis.url)
        old = [server.request("POST", "/sign", {"user": 7}) for server in (one, other)]
        bystanders = [one.request("POST", "/sign", {"user": user}) for user in (8, "7")]
        free = one.request("POST", "/sign", {})
        assert {status(server, token) for server in (one, other) for token in (*old, *bystanders, free)} == {200}
        one.request("POST", "/kick", 7)
        new = one.request("POST", "/sign", {"user": 7})  # in the same second
        for server in (one, other):
            assert [status(server, token) for token in (*old, new, *bystanders, free)] == [401, 401, 200, 200, 200, 200]
    with ExitStack() as stack:
        for server in processes(stack, tmp_path, redis.url):
            assert [status(server, token) for token in (*old, new, *bystanders, free)] == [401, 401, 200, 200, 200, 200]
            assert "sse1." not in re.sub(r'"GET /events\?token=\S+ HTTP/1.1"', "", server.output())


def test_with_the_memory_backend_a_restart_refuses_all_tokens_of_users(tmp_path: Path) -> None:
    with ExitStack() as stack:
        one, _ = processes(stack, tmp_path, "memory://")
        kicked, other, free = (one.request("POST", "/sign", what) for what in ({"user": 7}, {"user": 8}, {}))
        one.request("POST", "/kick", 7)
        assert [status(one, token) for token in (kicked, other, free)] == [401, 200, 200]
    with ExitStack() as stack:
        one, _ = processes(stack, tmp_path, "memory://")
        assert [status(one, token) for token in (kicked, other, free)] == [401, 401, 200]


def test_kicks_outlive_the_entries_of_the_stream(redis: RedisServer, make_site: Callable[..., Site]) -> None:
    before = make_site()
    token = before.sse.sign(user="ada")
    assert before.status(token) == 200
    before.sse.kick(user="ada")
    redis.client.xtrim("sse_batcher:stream", maxlen=1, approximate=False)
    assert make_site().status(token) == 401


def test_after_redis_has_lost_its_data_tokens_of_users_are_refused(tmp_path: Path) -> None:
    with redis_server(tmp_path, saves=False) as server, making(Site) as make:
        site = make(SSE_BACKEND=server.url)
        kicked, other, free = site.sse.sign(user=7), site.sse.sign(user=8), site.sse.sign()
        site.sse.kick(user=7)
        server.kill()
        server.start()

        def answers() -> list[int] | None:
            found = [site.answer(token) for token in (kicked, other, free)]
            return None if any(b"sse_busy" in block for _, block in found) else [code for code, _ in found]

        wait_until(lambda: answers() is not None, "Redis answers")
        assert answers() == [401, 401, 200]
        assert site.status(site.sse.sign(user=8)) == 200


def test_while_redis_is_away_no_stream_of_a_user_opens(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server, making(Site) as make:
        site = make(SSE_BACKEND=server.url)
        kicked, free = site.sse.sign(user=7), site.sse.sign()
        assert site.status(kicked) == 200
        site.sse.kick(user=7)
        server.kill()
        assert site.answer(kicked)[0] == 200
        assert b'"reason":"backend"' in site.answer(kicked)[1]
        assert b"sse_busy" not in site.answer(free)[1]
        with pytest.raises(BackendError):
            site.sse.kick(user=8)
        server.start()
        wait_until(lambda: site.status(kicked) == 401, "Redis answers")


def test_the_clock_is_that_of_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path, clock="+1d") as server, making(Site) as make:
        one, other = make(SSE_BACKEND=server.url), make(SSE_BACKEND=server.url)
        old = one.sse.sign(user=7, ttl=60)
        assert [site.status(old) for site in (one, other)] == [200, 200]
        other.sse.kick(user=7)
        new = other.sse.sign(user=7, ttl=60)
        assert [site.status(old) for site in (one, other)] == [401, 401]
        assert [site.status(new) for site in (one, other)] == [200, 200]


def test_an_entry_far_ahead_does_not_move_the_clock_of_tokens(
    redis: RedisServer, make_site: Callable[..., Site]
) -> None:
    """Any program that may write to Redis can add one. The clock of the history follows it."""
    one = make_site()
    tokens = [one.sse.sign(user=7), one.sse.sign(user=8), one.sse.sign()]
    assert [one.status(token) for token in tokens] == [200, 200, 200]
    day = 86_400_000
    redis.client.xadd("sse_batcher:stream", {"x": "y"}, id=f"{redis.client.time()[0] * 1_000 + day}-0")
    wait_until(lambda: one.backend.now() > time.time() * 1_000 + day / 2, "the entry was read")
    tokens.append(one.sse.sign(user=8))
    later = make_site()
    assert [site.status(token) for site in (one, later) for token in tokens] == [200] * 8
    later.sse.kick(user=7)
    assert [site.status(token) for site in (one, later) for token in tokens] == [401, 200, 200, 200] * 2
    assert [site.status(one.sse.sign(user=7)) for site in (one, later)] == [200, 200]


def test_tokens_follow_the_clock_of_redis_if_it_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "CLOCK_SECONDS", 0.0)
    with redis_server(tmp_path, clock="+0") as server, making(Site) as make:
        site = make(SSE_BACKEND=server.url)
        assert site.status(site.sse.sign()) == 200
        server.set_clock("+1h")
        # A process that starts now knows the new time at once, the older one a moment later.
        token = make(SSE_BACKEND=server.url).sse.sign(ttl=60)
        wait_until(lambda: site.status(token) == 200, "the clock was read")


def test_what_redis_remembers_is_bounded(redis: RedisServer, make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.sse.kick(user=7)
    since = redis.client.zscore(KICKED, "since")
    for _ in range(3):
        site.sse.kick(user=7)
    assert redis.client.zscore(KICKED, "since") == since
    now = int(redis.client.zscore(KICKED, "7"))
    week = MAX_TOKEN_SECONDS * 1_000_000
    redis.client.zadd(KICKED, {"since": now - 2 * week, "8": now - 2 * week, "9": now - week + 60_000_000})
    site.sse.kick(user="ä")
    assert {json.loads(each) if each != b"since" else each for each in redis.client.zrange(KICKED, 0, -1)} == {
        *(b"since", 7, 9, "ä"),
    }
    assert now - week <= redis.client.zscore(KICKED, "since") <= now - week + 60_000_000
    assert redis.client.ttl(KICKED) == -1  # evicted by no policy that begins with "volatile"


def test_a_kick_never_becomes_older(redis: RedisServer, make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.sse.kick(user=7)
    later = int(redis.client.zscore(KICKED, "7")) + 10**9
    redis.client.zadd(KICKED, {"7": later})
    site.sse.kick(user=7)
    assert redis.client.zscore(KICKED, "7") == later
    assert site.backend.kicked_until(7) == later


def test_the_first_token_is_valid_although_the_time_of_redis_is_known_late(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    signing, serving = make_site(), make_site()
    redis_time = State.redis_time
    with monkeypatch.context() as patch:
        patch.setattr(State, "redis_time", lambda state: redis_time(state) - 1_000)
        token = signing.sse.sign(user=7)
    assert serving.status(token) == 200


def test_a_time_far_ahead_in_redis_refuses_no_token_without_a_user(
    redis: RedisServer, make_site: Callable[..., Site]
) -> None:
    redis.client.zadd(KICKED, {"since": (redis.client.time()[0] + 86_400) * 1_000_000})
    site = make_site()
    without_user = site.sse.sign(ttl=3_600)
    assert site.status(site.sse.sign(user=7)) == 401
    assert site.status(without_user) == 200


def test_a_time_that_is_no_number_is_no_error_of_the_app(redis: RedisServer, make_site: Callable[..., Site]) -> None:
    site = make_site()
    token = site.sse.sign(user=7)
    redis.client.zadd(KICKED, {"since": float("inf")})
    status, block = site.answer(token)
    assert (status, b'"reason":"backend"' in block) == (200, True)


def test_the_rights_of_the_guide_are_enough(redis: RedisServer, make_site: Callable[..., Site]) -> None:
    [rights] = re.findall(r"^ACL SETUSER (.*)$", text_of("guides/redis"), flags=re.MULTILINE)
    redis.client.execute_command("ACL", "SETUSER", *rights.split())
    site = make_site(SSE_BACKEND=redis.url.replace("//", "//app:password@"))
    token = site.sse.sign(user=7)
    assert site.status(token) == 200
    site.sse.kick(user=7)
    assert site.status(token) == 401
    # redis-py tells Redis its name and version, and goes on if it may not.
    assert [entry["object"] for entry in redis.client.acl_log() if not entry["object"].startswith("client")] == []


@pytest.mark.parametrize("right", ["zscore", "zadd"])
def test_without_the_rights_no_stream_of_a_user_opens(
    redis: RedisServer, make_site: Callable[..., Site], caplog: pytest.LogCaptureFixture, right: str
) -> None:
    redis.client.execute_command("ACL", "SETUSER", *RIGHTS, f"-{right}")
    site = make_site(SSE_BACKEND=redis.url.replace("//", "//app:password@"))
    assert b"sse_busy" in site.answer(site.sse.sign(user=7))[1]
    assert "Reading kicks from Redis fails" in caplog.text


@pytest.mark.parametrize("right", ["zadd", "zremrangebyscore"])
def test_without_the_rights_no_user_is_kicked_silently(
    redis: RedisServer, make_site: Callable[..., Site], right: str
) -> None:
    redis.client.execute_command("ACL", "SETUSER", *RIGHTS, f"-{right}")
    site = make_site(SSE_BACKEND=redis.url.replace("//", "//app:password@"))
    with pytest.raises(BackendError, match="Redis did not take the kick"):
        site.sse.kick(user=7)
