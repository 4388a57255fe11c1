"""What some tests need beside Python's packages: a browser, a proxy, Node. `.ci/run` installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest


def missing(what: str) -> NoReturn:
    """Skip this test, since `what` is not here; in CI, where everything has to be tested, fail it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what}, and in CI nothing is skipped", pytrace=False)
    pytest.skip(what)


def program(*names: str, package: str) -> str:
    """The path of the first of these programs that is installed. `package` says how to get it."""
    for name in names:
        path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        if path:
            return path
    missing(f"needs {' or '.join(names)} ({package})")


def pip_install(requirement: str, folder: Path) -> None:
    """Have pip put packages into a folder of their own, without what they need themselves. Options may come first."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps")
    done = subprocess.run(
        [*pip, f"--target={folder}", *requirement.split()], capture_output=True, text=True, check=False
    )
    if done.returncode:
        missing(f"pip cannot get {requirement}")


def npm_install(folder: Path) -> None:
    """Have npm install what the ``package.json`` of this folder names."""
    npm = program("npm", package="Debian: npm")
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
    try:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=40, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        missing(f"npm cannot install the packages: {error} {error.stderr}")


def moved_by(file: Path) -> dict[str, str]:
    """What makes a program take its time from this file, which says how far from ours it is: ``+1d``."""
    libraries = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    if not libraries:
        missing("needs libfaketime.so.1 (faketime)")
    # With jemalloc it does not start, so that the allocator of the C library has to come before that.
    return {
        "LD_PRELOAD": f"{libraries[0]} libc.so.6",
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def certificate(folder: Path, host: str) -> Path:
    """One for this host, signed by itself, with its key in the same file."""
    file = folder / "tls.pem"
    command = [program("openssl", package="openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
    command += ["-keyout", str(file), "-out", str(folder / "cert.pem"), "-subj", "/CN=test"]
    subprocess.run([*command, "-addext", f"subjectAltName=IP:{host}"], check=True, capture_output=True)
    file.write_text(file.read_text() + (folder / "cert.pem").read_text())
    return file
