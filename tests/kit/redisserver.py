"""A real redis-server for tests: on a free port, in a folder of its own, with the faults that it may have."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from sse_batcher import SSEManager
from sse_batcher.manager_state import process_of

from .ports import HOST, free_port
from .services import certificate, moved_by, program
from .waiting import TIMEOUT, wait_until


class RedisServer:
    """One that can be killed, paused and started again. `saves`: whether it has its data when it is started again.

    `clock`: how far its clock is from ours at first, as in ``"+1d"``; `set_clock` moves it. None: it cannot be moved.
    `options` are more of ``redis.conf``.
    """

    def __init__(
        self,
        folder: Path,
        *,
        saves: bool = True,
        tls: bool = False,
        clock: str | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        import redis

        another = os.environ.get("SSE_TEST_REDIS_SERVER")  # of another version
        self.program = another or program("redis-server", package="redis-server")
        self._folder = folder
        self._saves = saves
        self._options = options or {}
        self._clock = folder / "clock"
        self._environment = dict(os.environ)
        if clock is not None:
            if another:
                pytest.skip("a clock is set for the redis-server of this system, whose allocator can be replaced")
            self.set_clock(clock)
            self._environment |= moved_by(self._clock)
        self.port = free_port()
        self.certificate = certificate(folder, HOST) if tls else None
        self.url = (
            f"rediss://{HOST}:{self.port}/0?ssl_ca_certs={self.certificate}" if tls else f"redis://{HOST}:{self.port}/0"
        )
        self.client = redis.Redis.from_url(self.url, socket_timeout=TIMEOUT)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        options = {
            "--port": str(self.port),
            "--bind": HOST,
            "--dir": str(self._folder),
            "--save": "",
            "--appendonly": "yes" if self._saves else "no",
            "--appendfsync": "always",
            "--repl-diskless-sync-delay": "0",
        }
        if self.certificate:
            options |= {"--port": "0", "--tls-port": str(self.port), "--tls-auth-clients": "no"}
            options |= {"--tls-cert-file": str(self.certificate), "--tls-key-file": str(self.certificate)}
        options |= self._options
        command = [self.program, *(part for option in options.items() for part in option)]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment)
        wait_until(self._answers, "redis-server answers")

    def _answers(self) -> bool:
        import redis

        try:
            return bool(self.client.ping())
        except redis.RedisError:
            return False

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait(TIMEOUT)

    def follow(self, master: RedisServer) -> None:
        """Become a replica, up to where the master is."""
        self.client.replicaof(HOST, master.port)

        def has_all() -> bool:
            # WAIT is about what its own connection has written.
            written = master.client.pipeline(transaction=False).set("followed", self.port)
            return bool(written.wait(1, 100).execute()[1] == 1 and self.client.get("followed"))

        wait_until(has_all, "the replica has what the master has")

    def set_clock(self, offset: str) -> None:
        self._clock.write_text(offset)

    def config(self, name: str, value: Any) -> None:
        self.client.config_set(name, value)


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process wait for Redis as long as a test may wait: a machine that stands still is no fault of Redis."""
    for name in ("CALL_TIMEOUT_SECONDS", "TURN_WAIT_SECONDS", "SILENT_SECONDS"):
        monkeypatch.setattr(f"sse_batcher.backends.redis.connections.{name}", TIMEOUT)
    for name in ("OPEN_SECONDS", "SHORT_SECONDS", "CATCH_UP_SECONDS"):
        monkeypatch.setattr(f"sse_batcher.backends.redis.backend.{name}", TIMEOUT)


def cursor_of(manager: SSEManager) -> str:
    """Where the history stands, as soon as this manager knows it."""
    wait_until(process_of(manager).backend.find_position, "the stream was read")
    return manager.cursor()


@contextmanager
def redis_server(folder: Path, **options: Any) -> Iterator[RedisServer]:
    """A `RedisServer` with these options, which has been started. Makes the folder."""
    folder.mkdir(exist_ok=True)
    server = RedisServer(folder, **options)
    server.start()
    try:
        yield server
    finally:
        server.kill()
        server.client.close()


def redis_fixture(**options: Any) -> Any:
    """A fixture for a test module: a `redis_server` with these options in the test's folder."""

    @pytest.fixture
    def server(tmp_path: Path) -> Iterator[RedisServer]:
        with redis_server(tmp_path, **options) as server:
            yield server

    return server


@contextmanager
def sentinel_of(server: RedisServer, folder: Path) -> Iterator[int]:
    """A sentinel that knows this server and its replicas as ``shop``. Its port.

    It makes no other one the master before `fail_over`, even if all of them stand still for a while.
    """
    import redis

    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(
        f"port {port}\nbind {HOST}\ndir {folder}\nsentinel monitor shop {HOST} {server.port} 1\n"
        "sentinel down-after-milliseconds shop 60000\n"
    )
    if server.certificate:  # the sentinel's own port is without TLS
        files = [f"tls-{name} {server.certificate}\n" for name in ("ca-cert-file", "cert-file", "key-file")]
        config.write_text(config.read_text() + "tls-replication yes\n" + "".join(files))
    with (folder / "sentinel.log").open("ab") as log:
        process = subprocess.Popen([server.program, str(config), "--sentinel"], stdout=log, stderr=log)
    try:
        client = redis.Redis(host=HOST, port=port, socket_timeout=TIMEOUT)

        def knows() -> bool:
            try:
                return bool(client.sentinel_get_master_addr_by_name("shop"))
            except redis.RedisError:
                return False

        wait_until(knows, "the sentinel knows the server")
        with suppress(redis.ResponseError):  # Redis before version 7 has no such command
            # After a pause of more than 2 seconds it would do nothing for 30 seconds.
            client.execute_command("SENTINEL", "DEBUG", "TILT-TRIGGER", "600000")
        client.close()
        yield port
    finally:
        process.kill()
        process.wait(TIMEOUT)


def fail_over(url: str) -> None:
    """Have the sentinel of this URL make the replica the master."""
    import redis

    with redis.Redis(host=HOST, port=urlsplit(url).port or 0, socket_timeout=TIMEOUT) as client:

        def begins() -> bool:
            try:
                return bool(client.sentinel_failover("shop"))
            except redis.ResponseError:
                return False  # it has just not heard of the replica

        wait_until(begins, "the sentinel begins a failover")
