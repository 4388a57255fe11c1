"""What some tests need beside Python's packages: a browser, a proxy, Node. `.ci/run` installs it."""

from __future__ import annotations

import os
import shutil
import subprocess
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
