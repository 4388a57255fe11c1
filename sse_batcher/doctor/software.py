"""Software: which server or proxy has answered, and how each of its settings is called.

Pure. Goes by the headers that they add.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

Setting = Literal["buffering", "timeout", "compression", "http11", "headers"]


class Software(NamedTuple):
    """A proxy, or a server that runs the app."""

    name: str
    marks: tuple[str, ...]
    """What its name is in ``Server`` or ``Via``, in lower case."""
    settings: Mapping[Setting, str] = {}
    """For a proxy: what to change there."""

    @property
    def is_proxy(self) -> bool:
        """Whether it passes requests on to the server that runs the app."""
        return bool(self.settings)


_ANY: dict[Setting, str] = {
    "buffering": "switch its buffering of responses off for the path of the stream. In nginx that is "
    "`proxy_buffering off;` without `proxy_ignore_headers X-Accel-Buffering`; in Azure and Cloudflare, the response "
    "buffer",
    "timeout": "give it an idle time-out that is longer than the heartbeat: `proxy_read_timeout` in nginx, "
    "`ProxyTimeout` in Apache, `timeout server` and `timeout client` in HAProxy, the idle time-out of a load balancer",
    "compression": "leave `text/event-stream` out of what it compresses: `gzip off;` in the location of nginx, "
    "`SetEnvIf Request_URI ^/events no-gzip` in Apache",
    "http11": "let it answer with HTTP/1.1: in Apache, remove `force-response-1.0` and `downgrade-1.0` from SetEnvIf "
    "and BrowserMatch",
    "headers": "let it pass all headers of the stream on: look for `proxy_hide_header`, `more_clear_headers` and "
    "`proxy_ignore_headers` in nginx, `Header unset` in Apache, `header_down -` in Caddy, `http-response del-header` "
    "in HAProxy",
}
UNKNOWN = Software("a proxy", (), _ANY)

PROXIES = (
    Software(
        "nginx",
        ("nginx", "openresty"),
        {
            "buffering": "in the location of the stream, set `proxy_buffering off;` (`uwsgi_buffering off;` with "
            "uwsgi_pass), also in an nginx in front of another, since nginx does not pass `X-Accel-Buffering: no` on. "
            "Or let it see this header of each stream: remove `proxy_ignore_headers X-Accel-Buffering`",
            "timeout": "in the location of the stream, set `proxy_read_timeout` (`uwsgi_read_timeout`) to more than "
            "the heartbeat; the default is 60s",
            "compression": "in the location of the stream, set `gzip off;` (and `brotli off;`), or leave "
            "`text/event-stream` out of `gzip_types`, and remove `proxy_hide_header Content-Encoding`",
            "http11": "nothing, since nginx itself answers with HTTP/1.1: look what is in front of it",
            "headers": "in the location of the stream, remove the `proxy_hide_header`, `more_clear_headers` or "
            "`add_header` that names the header",
        },
    ),
    Software(
        "Apache",
        ("apache",),
        {
            **_ANY,
            "buffering": "remove what collects responses, such as `SetOutputFilter` with mod_deflate, mod_buffer or "
            "mod_security (`SecResponseBodyAccess Off`), and add `flushpackets=on` to the ProxyPass",
            "timeout": "set `ProxyTimeout`, or `timeout=` of the ProxyPass, to more than the heartbeat",
            "compression": "add `SetEnvIf Request_URI ^/events no-gzip` (with your path) to the virtual host, since "
            "mod_deflate ignores the header of the stream",
            "headers": "remove the `Header unset` or `Header set` that names the header",
        },
    ),
    Software(
        "Caddy",
        ("caddy",),
        {
            **_ANY,
            "buffering": "remove `response_buffers` (before version 2.7, `buffer_responses`) from the reverse_proxy",
            "timeout": "raise the `read_timeout` of the reverse_proxy's transport",
            "compression": "remove `header_down -Content-Encoding`, or leave the path of the stream out of `encode`",
            "headers": "remove the `header_down` or `header` that names the header",
        },
    ),
    Software(
        "Cloudflare",
        ("cloudflare",),
        {
            **_ANY,
            "buffering": "set Response Body Buffering to None for the path of the stream",
            "compression": "add a compression rule that switches compression off for the path of the stream",
        },
    ),
    Software("CloudFront", ("cloudfront", "amazons3"), {**_ANY, "timeout": "raise the response timeout of the origin"}),
    Software("the AWS load balancer", ("awselb",), {**_ANY, "timeout": "raise its connection idle timeout (60 s)"}),
    Software(
        "the Google load balancer",
        ("google", "gws"),
        {**_ANY, "timeout": "raise the timeout of the backend service (30 s), which limits the whole response"},
    ),
    Software("the router of Heroku", ("vegur", "heroku"), {**_ANY, "timeout": "have a heartbeat below 55 s"}),
    Software("HAProxy", ("haproxy",), {**_ANY, "timeout": "raise `timeout server` and `timeout client`"}),
    Software(
        "Envoy", ("envoy", "istio"), {**_ANY, "timeout": "raise `stream_idle_timeout`, and `timeout` of the route"}
    ),
    Software("Varnish", ("varnish",), {**_ANY, "buffering": "`return (pipe)` for the path of the stream"}),
    Software("IIS", ("microsoft-iis",), {**_ANY, "buffering": "set `responseBufferLimit` of ARR to 0"}),
    Software("Squid", ("squid",), _ANY),
)
SERVERS = tuple(
    Software(name, (mark,))
    for name, mark in [
        ("gunicorn", "gunicorn"),
        ("waitress", "waitress"),
        ("the development server of Flask", "werkzeug"),
        ("cheroot", "cheroot"),
        ("the server of wsgiref", "wsgiserver"),
        ("gevent", "gevent"),
    ]
)


def recognise(headers: Mapping[str, str]) -> Software | None:
    """Return the proxy that the response came through last, else the server that made it. None: it does not say.

    `headers`: by their names in lower case.
    """
    said = f"{headers.get('server', '')} {headers.get('via', '')}".lower()
    if "cf-ray" in headers:
        said += " cloudflare"
    return next((each for each in (*PROXIES, *SERVERS) if any(mark in said for mark in each.marks)), None)
