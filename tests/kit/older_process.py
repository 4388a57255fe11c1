"""A program of an older version of sse_batcher, which is in the current folder. Run by `tests.kit.older`.

``python -m tests.kit.older_process URL OPTIONS``. Reads a call ``[command, arguments, keywords]`` from each line of its
input, and writes ``[name of a stream, event]``, or ``[null, answer]``. Uses only what that version has.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

import sse_batcher
from sse_batcher import BatchOptions, ClientOptions, SSEManager

from .sse_parser import parse

options = json.loads(sys.argv[2])
manager = SSEManager(
    batching=BatchOptions(**{"batch_window": 0.01, **options}),
    clients=ClientOptions(heartbeat=0.2),
    backend=sys.argv[1],
)
writing = threading.Lock()


def say(name: str | None, value: Any) -> None:
    with writing:
        sys.stdout.write(json.dumps([name, value]) + "\n")
        sys.stdout.flush()


def read(name: str, client: sse_batcher.Client) -> None:
    for data in client:
        for event in [] if data == b":\n" else parse(data):
            say(name, event)


def open_stream(name: str, channels: list[str], cursor: str | None, user: Any) -> None:
    client = manager.subscribe(channels, cursor, user=user)
    threading.Thread(target=read, args=(name, client), daemon=True).start()


for line in sys.stdin:
    command, arguments, more = json.loads(line)
    if command == "open":
        open_stream(*arguments)
        answer = None
    elif command == "package":
        answer = sse_batcher.__file__
    elif command == "ignored":
        answer = manager.get_stats().ignored
    else:
        answer = getattr(manager, command)(*arguments, **more)
    say(None, answer)
manager.shutdown(1.0)
