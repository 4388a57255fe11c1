"""The configuration files of proxies that docs/guides/proxy.md shows, each run by its program before an app.

What has to be another thing in a test (ports, certificates, time-outs) is replaced in the text of the file, and each
replacement has to find something there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from .deploy import DEPLOY
from .servers import HOST, Server, running
from .services import certificate, program

IDLE = 60
"""Seconds after which a proxy ends a connection on which nothing comes, as in the files."""

_WRITE_AND_RUN = """
import os, sys
name, text, *command = sys.argv[1:]
with open(name, "w") as file:
    file.write(text)
os.execv(command[0], command)
"""


class Proxy(NamedTuple):
    """A proxy, its file in `DEPLOY`, and what is around the file in a test."""

    file: str
    command: tuple[str, ...]
    """The program and its arguments. It runs in a folder with ``whole.conf`` and ``tls.pem``."""
    package: str
    replaced: dict[str, str]
    """What has another value here. ``UPSTREAM`` is where the app listens, and ``IDLE`` the time-out in seconds."""
    around: str = "FILE"
    down: int = 502
    """The status while the app is down."""


APACHE_THREADS = 8
APACHE_MODULES = ("mpm_event", "authz_core", "deflate", "filter", "reqtimeout", "setenvif")  # Debian loads these itself
APACHE_MODULES += ("headers", "http2", "proxy", "proxy_http", "ssl")
NGINX_MAIN = """
daemon off; master_process off; pid nginx.pid; LIMITS
http {
    access_log off;
    client_body_temp_path temp; proxy_temp_path temp; uwsgi_temp_path temp; fastcgi_temp_path temp; scgi_temp_path temp;
    FILE
}
"""
# All is compressed that may be.
APACHE_MAIN = (
    "".join(f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n" for name in APACHE_MODULES)
    + """
User www-data
Group www-data
ServerLimit 1
ThreadsPerChild APACHE_THREADS
MaxRequestWorkers APACHE_THREADS
ServerName localhost
PidFile apache.pid
Mutex file:. default
ErrorLog /dev/stderr
Listen HOST:{port}
SetOutputFilter DEFLATE
FILE
""".replace("APACHE_THREADS", str(APACHE_THREADS))
)
PROXIES = {
    "nginx": Proxy(
        "nginx.conf",
        ("nginx", "-e", "stderr", "-p", ".", "-c", "whole.conf"),
        "nginx-light",
        {
            "443": "HOST:{port}",
            "/etc/ssl/app.pem": "tls.pem",
            "/etc/ssl/app.key": "tls.pem",
            "127.0.0.1:8000": "UPSTREAM",
            "60s": "IDLEs",
            "/var/www/app": str(DEPLOY),
        },
        NGINX_MAIN,
    ),
    "apache": Proxy(
        "apache.conf",
        ("apache2", "-D", "FOREGROUND", "-d", ".", "-f", "whole.conf"),
        "apache2",
        {
            "443": "{port}",
            "/etc/ssl/app.pem": "tls.pem",
            "/etc/ssl/app.key": "tls.pem",
            "127.0.0.1:8000": "UPSTREAM",
            "ProxyTimeout 60": "ProxyTimeout IDLE",
        },
        APACHE_MAIN,
        down=503,
    ),
    "caddy": Proxy(
        "Caddyfile",
        ("caddy", "run", "--adapter", "caddyfile", "--config", "whole.conf"),
        "caddy",
        {"app.example.com {": "https://HOST:{port} {\n\ttls tls.pem tls.pem", "127.0.0.1:8000": "UPSTREAM"},
        "{\n\tadmin off\n\tauto_https disable_redirects\n}\nFILE",
    ),
    "haproxy": Proxy(
        "haproxy.cfg",
        ("haproxy", "-db", "-f", "whole.conf"),
        "haproxy",
        {
            ":443": "HOST:{port}",
            "/etc/haproxy/app.pem": "tls.pem",
            "127.0.0.1:8000": "UPSTREAM",
            "60s": "IDLEs",
        },
        down=503,
    ),
}


def configuration(proxy: Proxy, upstream: str, text: str = "", *, idle: float = IDLE) -> str:
    """The whole configuration of a proxy, by its file or by `text`. The app listens on `upstream`."""
    text = text or (DEPLOY / proxy.file).read_text()
    for old, new in proxy.replaced.items():
        assert old in text, f"{proxy.file} has no {old}"
        text = text.replace(old, new.replace("IDLE", str(idle)))
    around = proxy.around.replace("LIMITS", (DEPLOY / "nginx-limits.conf").read_text())
    return around.replace("FILE", text).replace("UPSTREAM", upstream).replace("HOST", HOST)


@contextmanager
def running_proxy(proxy: Proxy, config: str, folder: Path) -> Iterator[Server]:
    """Run a proxy with this configuration, over TLS, with a certificate that is signed by itself: ``tls.pem``."""
    certificate(folder, HOST)
    name, *options = proxy.command
    path = program(name, package=f"Debian: {proxy.package}")
    home = str(folder)
    arguments = ("-c", _WRITE_AND_RUN, "whole.conf", config, path, *options)
    with running(arguments, folder, HOME=home, XDG_CONFIG_HOME=home, XDG_DATA_HOME=home) as server:
        server.tls = True
        server.url = f"https://{HOST}:{server.port}"
        yield server
