"""A CDN for tests: the real files that pages load, from packages of npm and PyPI, at the paths that jsDelivr has.

A thread for each request; it reads files and nothing else.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from .servers import HOST
from .services import npm_install, pip_install

_PACKAGES = Path(__file__).parent / "pages" / "package.json"

# npm has no Datastar of version 1, only older ones that do not know `datastar-patch-elements`. This package has it, and
# changes nothing in it that touches streams. It is for Python 3.12 and later, but only one of its files is used.
_DATASTAR = "--ignore-requires-python starhtml==0.7.0"
_DATASTAR_FILE = "starhtml/static/js/datastar-core.js"


@contextmanager
def cdn(folder: Path) -> Iterator[str]:
    """Install the packages in this folder, and serve them while the context is open. Yields the URL."""
    (folder / "npm").mkdir()
    shutil.copy(_PACKAGES, folder / "npm")
    npm_install(folder / "npm")
    pip_install(_DATASTAR, folder / "pypi")
    files = {**_npm(folder / "npm"), **_datastar(folder / "pypi" / _DATASTAR_FILE)}

    class Handler(SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            """The file at this path; one that is not there, if no package has the path."""
            prefix = next((prefix for prefix in files if path.startswith(prefix)), None)
            return str(folder / "nothing" if prefix is None else files[prefix] / path.removeprefix(prefix))

        def end_headers(self) -> None:
            self.send_header("Access-Control-Allow-Origin", "*")  # as a CDN does: modules need it
            super().end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="cdn")
        thread.start()
        try:
            yield f"http://{HOST}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def _npm(folder: Path) -> dict[str, Path]:
    """The folder of each package, by its path: ``/npm/NAME@MAJOR/``."""
    folders = {}
    for name in json.loads(_PACKAGES.read_text())["dependencies"]:
        package = folder / "node_modules" / name
        facts = json.loads((package / "package.json").read_text())
        folders[f"/npm/{facts['name']}@{facts['version'].split('.')[0]}/"] = package
    return folders


def _datastar(file: Path) -> dict[str, Path]:
    """The file, by its path with the version that its first line names."""
    found = re.match(r"// Datastar v(\S+)", file.read_text())
    assert found, "the file begins in another way"
    return {f"/gh/starfederation/datastar@{found[1]}/bundles/datastar.js": file}
