"""Runs examples/hello.py with an installed sse_batcher, and waits for an event of its stream.

python3 .ci/hello.py FOLDER PYTHON
"""

import os
import re
import subprocess
import sys
import urllib.request

folder, python = sys.argv[1:]
process = subprocess.Popen(
    [python, "hello.py"],
    cwd=folder,
    env=os.environ | {"PORT": "0"},  # any that is free
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
)
try:
    for line in process.stdout:
        print(line, end="", flush=True)
        url = re.search(r"http://\S+", line)
        if url:
            break
    else:
        sys.exit("the example ended without printing a URL")
    with urllib.request.urlopen(f"{url[0]}/events", timeout=10) as stream:
        with urllib.request.urlopen(url[0], timeout=10) as page:
            assert page.status == 200, page.status
        for line in stream:
            if line.startswith(b"event: ") and not line.startswith(b"event: sse_"):
                print("the stream has an event:", line.decode().strip())
                break
        else:
            sys.exit("the stream ended without an event")
finally:
    process.terminate()
    process.wait(10)
