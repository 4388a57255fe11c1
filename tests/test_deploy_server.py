"""The deployment guides, as they stand: gunicorn under supervisord, and each server of the table, with their commands.

A page in Chromium is on the site meanwhile, with the module for browsers and with a plain `EventSource`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Browser, Page

from sse_batcher import BatchOptions, SSEManager

from .kit.browser import browser_fixture
from .kit.deploy import COMMAND, DEPLOY, GUIDES, app_of, dockerfile, kubernetes, unit
from .kit.redisserver import RedisServer, redis_server
from .kit.repository import ROOT
from .kit.servers import HOST, Server, Stream, faults_in, running
from .kit.services import missing, program
from .kit.waiting import TIMEOUT, wait_until

pytestmark = pytest.mark.external

BIN = Path(sys.executable).parent
"""Where pip has put the programs of the packages."""

LONG_GRACE = "--graceful-timeout=60"
"""For gunicorn: what ends within `TIMEOUT` has not waited for its time-out, however slow the machine is."""


def make_site(folder: Path, page: str = "deployment.md", backend: str = "memory://") -> Path:
    """Write the app of this page into the folder, with the files beside the page and a virtual environment."""
    (folder / "app.py").write_text(app_of(GUIDES / page))
    shutil.copy(DEPLOY / "gunicorn.conf.py", folder)
    written = (DEPLOY / "supervisord.conf").read_text()
    # supervisord does not kill what ends late: a command that waits for that takes longer than `TIMEOUT`, and fails.
    for shown, here in [("redis://localhost:6379/0", backend), ("stopwaitsecs=20", "stopwaitsecs=60")]:
        assert shown in written
        written = written.replace(shown, here)
    (folder / "supervisord.conf").write_text(written)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "gunicorn").symlink_to(BIN / "gunicorn")
    return folder


class Supervised(NamedTuple):
    """A site under supervisord."""

    server: Server
    folder: Path

    def ctl(self, line: str) -> str:
        """Run this line of the page."""
        assert line in (GUIDES / "deployment.md").read_text()
        arguments = shlex.split(line)
        arguments[0] = str(BIN / arguments[0])
        done = subprocess.run(arguments, cwd=self.folder, capture_output=True, text=True, check=False, timeout=TIMEOUT)
        return done.stdout.strip()

    def status(self) -> str:
        return self.ctl("supervisorctl -c supervisord.conf status").split()[1]

    def master(self) -> int:
        """The process of gunicorn that supervisord has started. Waits until there is one."""
        wait_until(lambda: self.status() in {"RUNNING", "STARTING"}, "it runs")
        command = [str(BIN / "supervisorctl"), "-c", "supervisord.conf", "pid", "shop"]
        return int(subprocess.run(command, cwd=self.folder, capture_output=True, check=True).stdout)

    def worker(self) -> int:
        """The only worker. Waits until there is one alone."""
        wait_until(lambda: len(children(self.master())) == 1, "there is one worker")
        return children(self.master())[0]

    def log(self) -> str:
        return (self.folder / "shop.log").read_text()


def children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def is_gone(pid: int) -> bool:
    """Whether a process has ended. A zombie, which its parent has not waited for, counts as ended."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


@contextmanager
def supervised(folder: Path, backend: str = "memory://", **environment: str) -> Iterator[Supervised]:
    """Run supervisord with the files of the page; end it, and what it has started, in good order."""
    make_site(folder, backend=backend)
    environment["GUNICORN_CMD_ARGS"] = LONG_GRACE
    with running(("-m", "supervisor.supervisord", "-n", "-c", "supervisord.conf"), folder, **environment) as server:
        site = Supervised(server, folder)
        started: list[int] = []
        try:
            started = [site.master()]
            yield site
        finally:
            if server.process.poll() is None and site.status() == "RUNNING":
                started = [site.master()]
            server.process.terminate()  # not killed: gunicorn would outlive it
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(TIMEOUT)
            for pid in (*started, *(pid for one in started for pid in children(one))):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            sys.stdout.write(site.log())


@contextmanager
def streams(server: Server, number: int = 10) -> Iterator[list[Stream]]:
    with ExitStack() as stack:
        opened = [stack.enter_context(Stream(server)) for _ in range(number)]
        for stream in opened:
            stream.until("sse_open")
        yield opened


def each_ends_with_a_bye(opened: Sequence[Stream]) -> bool:
    ends = [stream.to_end()[-1:] for stream in opened]
    return all(end and (end[0].event, end[0].data) == ("sse_bye", {"reason": "shutdown"}) for end in ends)


# -- under supervisord -------------------------------------------------------------------------------------------------


def test_supervisord_stops_and_starts_gunicorn_and_each_stream_ends_with_a_bye(tmp_path: Path) -> None:
    with supervised(tmp_path) as site:
        limits = Path(f"/proc/{site.worker()}/limits").read_text()
        assert int(re.findall(r"^Max open files +(\d+)", limits, re.M)[0]) >= 20_000
        for line in ("supervisorctl -c supervisord.conf stop shop", ""):
            gunicorn = site.master(), site.worker()
            with streams(site.server) as opened:
                site.server.request("POST", "/orders/7")
                if line:
                    assert site.ctl(line) == "shop: stopped"
                else:
                    site.server.process.terminate()
                    assert site.server.process.wait(TIMEOUT) == 0
                assert all(is_gone(pid) for pid in gunicorn)
                assert [stream.until("order")[-1].data for stream in opened] == [{"id": 7}] * len(opened)
                assert each_ends_with_a_bye(opened)
            if line:
                assert site.status() == "STOPPED"
                restart = site.ctl("supervisorctl -c supervisord.conf restart shop")
                assert restart.endswith("shop: started")
        assert faults_in(site.log()) == []


class Visitor:
    """A page with the module and a plain `EventSource`, which notes what each of them gets."""

    def __init__(self, page: Page, server: Server) -> None:
        self._page = page
        page.goto(f"{server.url}/events/health/live")
        page.evaluate("""async () => {
            const { BatchedEventSource } = await import("/events/sse-batcher.js");
            window.clients = [new BatchedEventSource("/events"), new EventSource("/events?batch=0")];
            window.got = clients.map(() => []);
            window.opened = clients.map(() => 0);
            window.gaps = clients.map(() => 0);
            clients.forEach((client, n) => {
                client.addEventListener("n", (event) => got[n].push(JSON.parse(event.data)));
                client.addEventListener("sse_gap", () => gaps[n]++);
                client.addEventListener("open", () => opened[n]++);
            });
        }""")

    def wait(self, condition: str) -> None:
        """Wait until this holds for the number `n` of each of the two."""
        self._page.wait_for_function(f"clients.every((_, n) => {condition})", timeout=1000 * TIMEOUT)

    def value(self, expression: str) -> Any:
        return self._page.evaluate(expression)


class Publisher(threading.Thread):
    """A process of its own could do the same: sends the numbers from 0 on, each a hundredth of a second later."""

    def __init__(self, redis: RedisServer) -> None:
        super().__init__()
        self.sent = 0
        self._url = redis.url
        self._end = threading.Event()

    def run(self) -> None:
        with SSEManager(backend=self._url, batching=BatchOptions(batch_window=0.02)) as manager:
            while not self._end.wait(0.01):
                manager.enqueue("n", self.sent)
                self.sent += 1
            assert manager.flush_all(TIMEOUT)

    def stop(self) -> int:
        """Return how many it has sent. All of them are in Redis then."""
        self._end.set()
        self.join(TIMEOUT)
        assert not self.is_alive()
        return self.sent


browser = browser_fixture()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Supervised, RedisServer]]:
    with redis_server(tmp_path_factory.mktemp("redis")) as redis:
        with supervised(tmp_path_factory.mktemp("site"), redis.url, FLASK_SSE_RETRY_MS="1000") as site:
            yield site, redis


def reload(site: Supervised) -> None:
    assert site.ctl("supervisorctl -c supervisord.conf signal HUP shop") == "shop: signalled"


def restart(site: Supervised) -> None:
    assert site.ctl("supervisorctl -c supervisord.conf restart shop").endswith("shop: started")


def kill_worker(site: Supervised) -> None:
    os.kill(site.worker(), signal.SIGKILL)


def kill_gunicorn(site: Supervised) -> None:
    with streams(site.server) as opened:
        os.kill(site.master(), signal.SIGKILL)
        assert each_ends_with_a_bye(opened)


@pytest.mark.parametrize("act", [reload, restart, kill_worker, kill_gunicorn])
def test_with_redis_no_event_is_lost(site: tuple[Supervised, RedisServer], browser: Browser, act: Any) -> None:
    supervised, redis = site
    master, worker = supervised.master(), supervised.worker()
    publisher = Publisher(redis)
    with browser.new_context() as context:
        visitor = Visitor(context.new_page(), supervised.server)
        visitor.wait("opened[n] === 1")
        publisher.start()
        try:
            visitor.wait("got[n].length > 10")
            act(supervised)
            visitor.wait("opened[n] >= 2 && got[n].length > 50")
        finally:
            sent = publisher.stop()
        visitor.wait(f"got[n].at(-1) === {sent - 1}")
        assert visitor.value("got") == [list(range(sent))] * 2
        assert visitor.value("gaps") == [0, 0]
    assert supervised.worker() != worker
    assert (supervised.master() == master) == (act in {reload, kill_worker})


# -- systemd -----------------------------------------------------------------------------------------------------------


def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    analyze = program("systemd-analyze", package="Debian: systemd")
    make_site(tmp_path)
    text = (DEPLOY / "shop.service").read_text().replace("/srv/shop", str(tmp_path))
    for change, said in [(text, ""), (text.replace("KillMode", "KillMod"), "KillMod")]:
        (tmp_path / "shop.service").write_text(change)
        command = [analyze, "verify", "./shop.service"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert said in done.stderr
        assert bool(said) == bool(done.stderr)


def test_the_command_of_the_unit_tells_systemd_that_it_is_ready(tmp_path: Path) -> None:
    make_site(tmp_path)
    assert (unit("Type"), unit("NotifyAccess")) == (["notify"], ["main"])
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(TIMEOUT)
        with running(("-m", *COMMAND.split()), tmp_path, NOTIFY_SOCKET=str(tmp_path / "notify")):
            assert b"READY=1" in systemd.recv(4096).split()


def test_code_that_cannot_be_imported_is_found_before_a_reload_which_would_end_gunicorn(tmp_path: Path) -> None:
    check, kill = unit("ExecReload")
    assert kill == "/bin/kill -s HUP $MAINPID"
    arguments = check.replace("/srv/shop", str(make_site(tmp_path))).split()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def result() -> int:
        return subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode

    with running(("-m", *COMMAND.split()), tmp_path) as server:
        assert result() == 0
        with (tmp_path / "app.py").open("a") as file:
            file.write("import nothing_like_this")
        assert result() != 0
        server.request("GET", "/events/health/live")
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(TIMEOUT) != 0


# -- Docker and Kubernetes ---------------------------------------------------------------------------------------------


def test_the_command_of_the_image_serves_and_stops_with_its_signal(tmp_path: Path) -> None:
    site, image = tmp_path / "site", tmp_path / "image"
    site.mkdir(), image.mkdir()
    make_site(site)
    copied = [word for value in dockerfile("COPY") for word in value.split()[:-1]]
    for name in set(copied) - {"requirements.txt"}:
        shutil.copy(site / name, image)
    assert [name.partition("=")[0] for name in dockerfile("ENV")] == ["PORT"]  # as is in the environment of `running`
    (command,) = dockerfile("CMD")
    (stop_signal,) = dockerfile("STOPSIGNAL")
    environment = {"HOME": "/nonexistent", "GUNICORN_CMD_ARGS": LONG_GRACE}
    with running(("-m", *json.loads(command)), image, **environment) as server, streams(server) as opened:
        server.process.send_signal(signal.Signals[stop_signal])
        assert each_ends_with_a_bye(opened)
        assert server.process.wait(TIMEOUT) == 0
        assert server.faults() == []


def schemas(folder: Path) -> zipfile.ZipFile:
    """The schemas of Kubernetes: the package that has them is 110 MB on a disk, so it is only read."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*pip, f"--dest={folder}", "kubernetes-validate>=1.37"], check=False).returncode:
        missing("pip cannot get kubernetes-validate")
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


def test_kubernetes_takes_the_file(tmp_path: Path) -> None:
    import referencing
    from jsonschema.exceptions import ValidationError
    from jsonschema.validators import Draft202012Validator

    (version,) = set(re.findall(r"schema of Kubernetes ([\d.]+\d)", (GUIDES / "deployment.md").read_text()))
    with schemas(tmp_path) as archive:

        def schema(name: str) -> Any:
            path = f"kubernetes_validate/kubernetes-json-schema/v{version}.0-local-strict/{name}.json"
            return referencing.Resource.from_contents(json.loads(archive.read(path)))

        for kind, name in [("Deployment", "deployment-apps-v1"), ("Service", "service-v1")]:
            own = schema(name)
            registry = schema("_definitions") @ (own @ referencing.Registry())
            validator = Draft202012Validator(own.contents, registry=registry)
            validator.validate(kubernetes(kind))
            with pytest.raises(ValidationError):
                validator.validate(kubernetes(kind) | {"spek": {}})


# -- the table of servers ----------------------------------------------------------------------------------------------

ROWS = re.findall(r"^\| (.+?) \| `(.+?)` \| (\S+) \|", (GUIDES / "server.md").read_text(), re.M)
MODULES = {"waitress-serve": "waitress"}
BIND = {
    "gunicorn": f"--bind={HOST}:{{port}}",
    "waitress-serve": f"--listen={HOST}:{{port}}",
    "cheroot": f"--bind={HOST}:{{port}}",
    "flask": "--port={port}",
}


@pytest.mark.parametrize(("name", "line", "stop"), ROWS, ids=[row[0] for row in ROWS])
def test_the_command_serves_and_each_stream_ends_with_a_bye(name: str, line: str, stop: str, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(app_of(GUIDES / "server.md"))
    server_program, *options = line.split()
    if server_program == "uwsgi":
        options = [option.replace(":8000", f"{HOST}:{{port}}") for option in options]
        command = ("-c", "import pyuwsgi; pyuwsgi.run()", *options)
    else:
        at = len(options) if options[-1] == "run" else 0
        options.insert(at, BIND[server_program])
        command = ("-m", MODULES.get(server_program, server_program), *options)
    number = signal.SIGINT if stop == "Ctrl-C" else signal.Signals[stop]
    # A machine that stands still delays one of these, and a server that waits for a time-out is late each time.
    assert any(seconds_to_stop(command, number, tmp_path) < 3 for _ in range(3))


def seconds_to_stop(command: Sequence[str], number: signal.Signals, folder: Path) -> float:
    """How long a server with streams takes to end after this signal."""
    with running(command, folder) as server, server.watched():
        with streams(server, 3) as opened:
            server.request("POST", "/orders/7")
            for stream in opened:
                assert stream.until("order")[-1].data == {"id": 7}
            start = time.monotonic()
            server.process.send_signal(number)
            assert each_ends_with_a_bye(opened)
            server.process.wait(TIMEOUT)
            seconds = time.monotonic() - start
        assert server.faults() == []
    return seconds
