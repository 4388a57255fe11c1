"""What `doctor` says of proxies is what the guide about proxies says."""

from __future__ import annotations

import pytest

from sse_batcher.doctor.software import PROXIES, Setting

from .kit.deploy import GUIDES

PAGE = (GUIDES / "proxy.md").read_text() + "".join(
    (GUIDES / "deploy" / name).read_text() for name in ("nginx.conf", "apache.conf", "haproxy.cfg", "Caddyfile")
)
SETTINGS: dict[tuple[str, Setting], tuple[str, ...]] = {
    ("nginx", "buffering"): ("proxy_buffering off;", "proxy_ignore_headers X-Accel-Buffering"),
    ("nginx", "timeout"): ("proxy_read_timeout", "60s"),
    ("nginx", "compression"): ("gzip_types", "proxy_hide_header Content-Encoding"),
    ("Apache", "timeout"): ("ProxyTimeout",),
    ("Apache", "compression"): ("SetEnvIf Request_URI ^/events no-gzip",),
    ("Apache", "http11"): ("force-response-1.0", "downgrade-1.0"),
    ("Caddy", "buffering"): ("response_buffers", "buffer_responses", "2.7"),
    ("Caddy", "timeout"): ("read_timeout", "transport"),
    ("Caddy", "compression"): ("encode", "header_down", "Content-Encoding"),
    ("HAProxy", "timeout"): ("timeout server", "timeout client"),
    ("Cloudflare", "buffering"): ("Response Body Buffering to None",),
    ("the AWS load balancer", "timeout"): ("connection idle timeout", "60 s"),
    ("the Google load balancer", "timeout"): ("30 s", "whole response"),
    ("the router of Heroku", "timeout"): ("55 s",),
}


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_the_words_and_the_guide_name_the_same_settings(name: str, setting: Setting) -> None:
    (software,) = [software for software in PROXIES if software.name == name]
    for word in SETTINGS[name, setting]:
        assert word in software.settings[setting]
        assert word in PAGE
