"""Runs a command that starts a site, as a newcomer would, opens its page, and stops it with Ctrl-C.

python3 .ci/visit.py FOLDER COMMAND [--event]

With --event, it opens the stream /events first, and waits for an event of it.
"""

import os
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import ExitStack

folder, command, *options = sys.argv[1:]
process = subprocess.Popen(
    ["bash", "-c", command],
    cwd=folder,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
)
try:
    for line in process.stdout:
        print(line, end="", flush=True)
        url = re.search(r"http://(127\.0\.0\.1|localhost):\d+", line)
        if url:
            break
    else:
        sys.exit("the command ended without printing a URL")
    with ExitStack() as stack:
        if "--event" in options:
            stream = stack.enter_context(urllib.request.urlopen(f"{url[0]}/events", timeout=10))
        with urllib.request.urlopen(url[0], timeout=10) as page:
            assert page.status == 200, page.status
            assert b"<title>" in page.read()
        if "--event" in options:
            for line in stream:
                if line.startswith(b"event: ") and not line.startswith(b"event: sse_"):
                    print("the stream has an event:", line.decode().strip())
                    break
            else:
                sys.exit("the stream ended without an event")
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=2)
    print("the page was served, and Ctrl-C ended the site")
finally:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
