"""The pages on troubles, on WSGI, on migrating and on why: what they quote is in the code, and their programs work."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

from sse_batcher.testing import open_stream

from .kit.documents import blocks, check_scripts, files, text_of
from .kit.redisserver import redis_server
from .kit.repository import ROOT
from .kit.servers import GTHREAD, Server, Stream, running
from .kit.services import pip_install
from .kit.waiting import wait_until

TROUBLES = text_of("troubleshooting")


def _words(text: str) -> str:
    """A text as it can be compared: what differs from case to case is ``...``."""
    return re.sub(r"\s+", " ", re.sub(r"%[sdrg]|%\.\w+|\.\.\.", "\0", text))


def _texts() -> list[str]:
    """Every string of the package, with the parts that are filled in later as ``...``."""
    texts = []
    for path in sorted((ROOT / "sse_batcher").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                texts.append(_words("".join(map(str, parts))))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(_words(node.value))
    texts += [_words(line) for line in (ROOT / "sse_batcher/browser/sse-batcher.js").read_text().splitlines()]
    return texts


TEXTS = _texts()
NOT_OURS = {
    'EventSource\'s response has a MIME type ("text/html") that is not "text/event-stream"',
    "blocked by CORS policy",
}
"""What browsers say."""


def quoted() -> list[str]:
    """What the page quotes of the log and of errors: everything with several words."""
    page = re.sub(r"^```.*?^```$", "", TROUBLES, flags=re.M | re.S)
    found = [text for text in re.findall(r"`([^`\n]+)`", page) if re.search(r"[a-z:)]\S* \S+ ", text)]
    return [text for text in found if not text.startswith(("SSE_", "pip ")) and text not in NOT_OURS]


def _is_said(quote: str, text: str) -> bool:
    """Whether the parts of the quote are in the text, in this order."""
    place = 0
    for part in re.split("\0", _words(quote)):
        place = text.find(part.strip(), place)
        if place < 0:
            return False
    return True


def test_each_line_that_is_quoted_is_in_the_source() -> None:
    assert len(quoted()) > 50
    assert [quote for quote in quoted() if not any(_is_said(quote, text) for text in TEXTS)] == []


def _logged() -> list[str]:
    """The text of each warning and error that the package logs with a constant text."""
    texts = []
    for path in sorted((ROOT / "sse_batcher").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            call = ast.unparse(node)
            by_level = node.func.attr in {"log", "log_once"} and "INFO" not in call
            if node.func.attr in {"warning", "error", "exception"} or by_level:
                for argument in node.args[:2]:
                    if isinstance(argument, ast.JoinedStr):
                        parts = [part.value if isinstance(part, ast.Constant) else "..." for part in argument.values]
                        texts.append(_words("".join(map(str, parts))))
                    elif isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        texts.append(_words(argument.value))
    return [text for text in texts if " " in text and "--json" not in text]


def test_each_warning_and_error_of_the_log_has_an_entry() -> None:
    logged = _logged()
    assert len(logged) > 25
    assert [text for text in logged if not any(_is_said(quote, text) for quote in quoted())] == []


@pytest.mark.external
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of these packages
def test_the_programs_for_pyramid_and_falcon_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = "pyramid falcon webob zope.interface zope.deprecation translationstring venusian plaster"
    pip_install(f"{needed} plaster-pastedeploy PasteDeploy hupper setuptools<81", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    programs = files(text_of("guides/wsgi"))
    for name in ("pyramid_live", "falcon_live"):
        (tmp_path / f"{name}.py").write_text(programs[f"{name}.py"])
        live: Any = importlib.import_module(name)
        with open_stream(live.app) as stream:
            live.manager.enqueue("order", {"id": 7})
            stream.clock.advance(0.1)
            assert stream.events() == [("order", {"id": 7})]
        live.manager.shutdown()


SETTINGS = """
SECRET_KEY = "x" * 50
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "site_urls"
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django.contrib.sessions"]
MIDDLEWARE = [
    "django.middleware.gzip.GZipMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": "db.sqlite3", "ATOMIC_REQUESTS": True}}
"""
SITE = """
import os
import urls
from django.contrib.auth import login
from django.contrib.auth.models import User
from django.db import transaction
from django.http import HttpResponse
from django.urls import path
from live import manager

def enter(request):
    login(request, User.objects.get_or_create(username="ada")[0])
    return HttpResponse()

def leave(request):
    User.objects.update(is_active=False)
    return HttpResponse(manager.revalidate(User.objects.get().pk))

@transaction.non_atomic_requests
def databases(request):
    files = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if os.path.exists(entry.path)]
    return HttpResponse(sum("sqlite3" in name for name in files))

urlpatterns = [*urls.urlpatterns, path("enter", enter), path("leave", leave), path("databases", databases)]
"""
WSGI = """
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
from django.core.management import call_command
from django.core.wsgi import get_wsgi_application
from django.db import connections
application = get_wsgi_application()
call_command("migrate", verbosity=0)
connections.close_all()
"""


class _Cookies(Stream):
    def __init__(self, server: Server, cookie: str) -> None:
        super().__init__(server, {"Cookie": cookie, "Accept-Encoding": "gzip"})


@pytest.mark.parametrize("transport", ["auto", "attached"])
def test_the_program_for_django_streams_and_holds_no_connection_to_the_database(tmp_path: Path, transport: str) -> None:
    shown = files(text_of("guides/wsgi"))
    programs = {name: shown[name] for name in ("live.py", "views.py", "urls.py")}
    assert "transport" not in programs["live.py"]
    programs["live.py"] = f"from sse_batcher import ClientOptions\n{programs['live.py']}".replace(
        "SSEManager(\n", f"SSEManager(\n    clients=ClientOptions(transport='{transport}'),\n"
    )
    programs |= {"settings.py": SETTINGS, "site_urls.py": SITE, "site_wsgi.py": WSGI}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
    with running((*GTHREAD[:-1], "site_wsgi:application"), tmp_path) as server, server.watched():
        assert "BatchedEventSource" in server.request("GET", "/events/sse-batcher.js")
        with Stream(server) as refused:
            assert refused.response.status == 403
        connection = server.connect()
        connection.request("GET", "/enter")
        with connection.getresponse() as response:
            cookie = (response.headers["Set-Cookie"] or "").partition(";")[0]
        connection.close()
        with _Cookies(server, cookie) as stream:
            stream.until("sse_open")
            wait_until(lambda: server.request("GET", "/databases") == "0", "no open database")
            connection = server.connect()
            connection.request("POST", "/orders", headers={"Cookie": cookie})
            with connection.getresponse() as response:
                assert response.status == 204
            connection.close()
            assert stream.until("order")[-1].data == {"id": 7}
        assert server.request("GET", "/leave") == "False"


def test_the_after_and_the_before_are_python() -> None:
    names = [f"{when}_{what}.py" for when in ("before", "after") for what in ("flask_sse", "socketio")]
    programs = files(text_of("guides/migrating"))
    assert sorted(programs) == sorted(names)
    for text in programs.values():
        ast.parse(text)


@pytest.mark.external
def test_the_program_before_is_one_of_flask_sse(tmp_path: Path) -> None:
    pip_install("flask-sse six", tmp_path / "packages")
    text = files(text_of("guides/migrating"))["before_flask_sse.py"]
    with redis_server(tmp_path) as redis:
        (tmp_path / "app.py").write_text(text.replace("redis://localhost:6379/0", redis.url))
        packages = {"PYTHONPATH": str(tmp_path / "packages")}
        with running((*GTHREAD[:-1], "app:app"), tmp_path, **packages) as server, server.watched():
            connection = server.connect()
            connection.putrequest("GET", "/stream?channel=team-7")
            connection.endheaders()
            # Its head comes with its first event.
            wait_until(lambda: redis.client.pubsub_numsub("team-7")[0][1] == 1, "a subscriber")
            server.request("POST", "/orders", {"id": 7})
            with connection.getresponse() as response:
                assert [response.readline() for _ in range(2)] == [b"event:order\n", b'data:{"id": 7}\n']
            connection.close()


@pytest.mark.external
@pytest.mark.parametrize("page", ["guides/migrating", "guides/wsgi"])
def test_the_scripts_are_javascript(page: str, tmp_path: Path) -> None:
    text = text_of(page)
    scripts = blocks(text, "js") + re.findall(r"<script[^>]*>(.*?)</script>", text, flags=re.S)
    assert scripts
    check_scripts(scripts, tmp_path)
