"""The moving picture of the README: the script that makes it works, and the picture is there."""

from __future__ import annotations

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
