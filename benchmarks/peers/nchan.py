"""nchan, a module of nginx, with one worker. `python -m peers.nchan PORT FOLDER MODULE` becomes nginx.

What it is told to publish comes by HTTP, 50 requests in one write, from the process that measures.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
from pathlib import Path

from peers.event import event

PIPELINED = 50
CONFIGURATION = """
load_module {module};
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {folder}/nginx.pid;
error_log stderr;
events {{ worker_connections {connections}; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  nchan_shared_memory_size 256M;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location = /ping {{ return 200 "pong"; }}
    location = /publish {{ nchan_publisher; nchan_channel_id all; nchan_message_buffer_length 10000; }}
    location = /events {{ nchan_subscriber eventsource; nchan_channel_id all; nchan_subscriber_first_message newest; }}
  }}
}}
"""


def main() -> None:
    port, folder, module = sys.argv[1:]
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    path = Path(folder) / "nginx.conf"
    words = {"module": module, "folder": folder, "port": port, "files": files, "connections": files - 100}
    path.write_text(CONFIGURATION.format(**words))
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    os.execv(nginx, [nginx, "-p", folder, "-e", "stderr", "-c", str(path)])


def publish(port: int, numbers: range) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start in range(0, len(numbers), PIPELINED):
            part = numbers[start : start + PIPELINED]
            connection.sendall(b"".join(map(_request, part)))
            answers = b""
            while answers.count(b"HTTP/1.1 20") < len(part):
                more = connection.recv(65_536)
                if not more or b"HTTP/1.1 4" in more or b"HTTP/1.1 5" in more:
                    raise ConnectionError(f"nchan refuses to publish: {more!r}")
                answers += more


def _request(number: int) -> bytes:
    body = json.dumps(event(number), separators=(",", ":")).encode()
    return b"POST /publish HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


if __name__ == "__main__":
    main()
