"""The pictures of the documentation: the scripts that make them work, and the pictures are there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from .kit.repository import README, ROOT
from .kit.services import program


def seconds(path: Path) -> float:
    """How long a moving picture takes."""
    total = 0.0
    with Image.open(path) as picture:
        for number in range(picture.n_frames):
            picture.seek(number)
            picture.load()
            total += picture.info["duration"] / 1000
    return total


def test_the_picture_of_the_readme_moves_and_is_small() -> None:
    assert "](docs/demo.webp)" in README
    picture = ROOT / "docs" / "demo.webp"
    assert picture.stat().st_size < 500_000
    assert 5 < seconds(picture) < 15


@pytest.mark.external
def test_the_script_makes_it(tmp_path: Path) -> None:
    program("chromium", "google-chrome", package="Debian: chromium")
    made = tmp_path / "made.webp"
    subprocess.run([sys.executable, ROOT / "docs" / "picture.py", made], cwd=ROOT, check=True)
    assert seconds(made) > 5


@pytest.mark.external
def test_the_script_makes_the_picture_of_the_monitor(tmp_path: Path) -> None:
    program("chromium", "google-chrome", package="Debian: chromium")
    made = tmp_path / "made.webp"
    script = ROOT / "docs" / "monitor_picture.py"
    subprocess.run(
        [sys.executable, script, made, "1"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True
    )
    kept = ROOT / "docs" / "guides" / "monitor.webp"
    assert kept.stat().st_size < 150_000
    with Image.open(made) as picture, Image.open(kept) as there:
        assert picture.size == there.size
