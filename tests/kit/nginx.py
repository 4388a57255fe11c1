"""nginx before a server: an unprivileged process of one piece, with all its files in the folder it runs in.

Pure: arguments in, arguments out.
"""

from __future__ import annotations

PASS = "proxy_pass http://app;"
KEEPING = PASS + ' proxy_http_version 1.1; proxy_set_header Connection "";'
"""With HTTP/1.1, over connections that it uses again."""
HOLDING = (
    PASS + " proxy_http_version 1.0; proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;"
    " proxy_buffer_size 1m; proxy_buffers 8 1m; proxy_busy_buffers_size 2m;"
)
"""Holds each response back until its end, as proxies in some companies do."""
UWSGI_PASS = """uwsgi_pass app;
    uwsgi_param QUERY_STRING $query_string; uwsgi_param REQUEST_METHOD $request_method;
    uwsgi_param CONTENT_TYPE $content_type; uwsgi_param CONTENT_LENGTH $content_length;
    uwsgi_param REQUEST_URI $request_uri; uwsgi_param PATH_INFO $document_uri;
    uwsgi_param SERVER_PROTOCOL $server_protocol;
    uwsgi_param SERVER_NAME $server_name; uwsgi_param SERVER_PORT $server_port;"""
"""What Debian has in ``uwsgi_params``, as far as it is needed."""

_CONFIG = """
daemon off;
master_process off;
pid nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path temp; proxy_temp_path temp; uwsgi_temp_path temp; fastcgi_temp_path temp; scgi_temp_path temp;
    upstream app {{ server {upstream}; keepalive 8; }}
    server {{
        listen {host}:{{port}};
        location / {{ {location} }}
    }}
}}
"""

_WRITE_AND_RUN = """
import os, sys
_, nginx, config = sys.argv
with open("nginx.conf", "w") as file:
    file.write(config)
os.execv(nginx, [nginx, "-e", "stderr", "-p", ".", "-c", "nginx.conf"])
"""


def arguments_of(program: str, location: str, *, host: str, upstream: str) -> tuple[str, ...]:
    """The arguments for Python by which nginx listens on ``{port}``.

    `location` has the directives of its one location; `upstream` is where the server behind it, ``app``, listens.
    """
    config = _CONFIG.format(host=host, location=location, upstream=upstream)
    return ("-c", _WRITE_AND_RUN, program, config)
