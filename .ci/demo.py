"""Runs a command that starts the demo, as a newcomer would, opens its page, and stops it with Ctrl-C.

python3 .ci/demo.py FOLDER COMMAND
"""

import os
import re
import signal
import subprocess
import sys
import urllib.request

folder, command = sys.argv[1:]
process = subprocess.Popen(
    ["bash", "-c", command], cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True
)
try:
    for line in process.stdout:
        print(line, end="", flush=True)
        url = re.search(r"http://\S+", line)
        if url:
            break
    else:
        sys.exit("the command ended without printing a URL")
    with urllib.request.urlopen(url[0], timeout=10) as page:
        assert page.status == 200, page.status
        assert b"<title>" in page.read()
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=2)
    print("the page was served, and Ctrl-C ended it")
finally:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
